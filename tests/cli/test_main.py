"""The command line as a shell meets it: exit codes, what goes to which stream, and what is left on disk.

Most commands run in this process, with the streams caught at their file descriptors; what depends on a process of its
own (the installed entry point, tracebacks, progress bars, a stranger who loads the result) gets one.
"""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import terminal
import yaml
from huggingface_hub import ModelCard
from tiny_models import tiny_config, tiny_model
from tiny_recipe import TEXT, built_chain, digests, tiny_recipe

from cbd_hub.chain.chain import Chain
from cbd_hub.cli.main import app, main
from cbd_hub.text.packing import train_tokenizer

COMMAND = Path(sys.executable).with_name("cbd-hub")
HELD_OUT = str(TEXT / "1800_john_adams_f.txt")
NAMES = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


class Result(NamedTuple):
    code: Any
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON document and nothing else."""
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def run_here(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(a) for a in arguments])
        return Result(exit_.value.code, *capfd.readouterr())

    return run_here


def shell(*arguments: object, **environment: str) -> Result:
    done = subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    return Result(done.returncode, done.stdout, done.stderr)


def on_a_terminal(*arguments: object, **environment: str) -> str:
    """What a command shows on a terminal of 80 columns; it must succeed."""
    ours = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    env = {**ours, "HF_HUB_DISABLE_PROGRESS_BARS": "0", **environment}
    return terminal.on_a_terminal([str(COMMAND), *map(str, arguments)], env).replace("\r\n", "\n")


def failed(result: Result) -> str:
    """The message of a command that failed as it should: exit 1, one line on standard error, nothing else."""
    assert (result.code, result.out) == (1, ""), result
    assert result.err.endswith("\n") and result.err.count("\n") == 1, result.err
    assert result.err.startswith("cbd-hub: ")
    return result.err


# -- build


def test_build_from_the_shell(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(anchors=[0.7]), sort_keys=False))
    built = shell(COMMAND, "build", recipe, "--output", tmp_path / "chain", "--json")
    assert built.code == 0, built.err
    assert built.json["name"] == "tiny"
    assert [a["name"] for a in built.json["anchors"]] == [
        a.name for a in Chain.from_pretrained(tmp_path / "chain").anchors
    ]
    assert built.err == ""


def test_build_goes_on_and_shows_a_table(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(anchors=[{"fraction": 0.75, "tokens": 0}]), sort_keys=False))
    first = run("build", recipe, "--output", tmp_path / "chain")
    assert first.code == 0, first.err
    before = digests(tmp_path / "chain")
    for name in (a.name for a in Chain.from_pretrained(tmp_path / "chain").anchors):
        assert name in first.out
    assert run("build", recipe, "--output", tmp_path / "chain").out == first.out
    assert digests(tmp_path / "chain") == before
    recipe.write_text(yaml.safe_dump(tiny_recipe(anchors=[{"fraction": 0.6, "tokens": 0}]), sort_keys=False))
    assert "--no-resume" in failed(run("build", recipe, "--output", tmp_path / "chain"))
    assert digests(tmp_path / "chain") == before
    assert run("build", recipe, "--output", tmp_path / "chain", "--no-resume").code == 0
    assert digests(tmp_path / "chain") != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("name: [", "no valid YAML"),
        ("name: x\nsuorce: {model: a}\nanchors: [0.5]\n", "Did you mean 'source'?"),
    ],
)
def test_a_bad_recipe_fails_in_one_line(text: str | None, message: str, run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_text(text)
    assert message in failed(run("build", recipe, "--output", tmp_path / "chain"))
    assert not (tmp_path / "chain").exists()


# -- inspect, plan, env


def test_inspect(run: Run) -> None:
    chain = Chain.from_pretrained(built_chain())
    told = run("inspect", built_chain(), "--json")
    assert told.code == 0
    assert told.json["architecture"] == "llama"
    assert [a["num_parameters"] for a in told.json["anchors"]] == [a.num_parameters for a in chain.anchors]
    table = run("inspect", built_chain())
    assert table.code == 0
    assert "apache-2.0" in table.out and "native" in table.out
    for anchor in chain.manifest.anchors:
        assert anchor.name in table.out
        assert anchor.evaluation is not None and f"{anchor.evaluation.loss:.4f}" in table.out
    assert max(map(len, table.out.splitlines())) <= 80


def test_plan(run: Run) -> None:
    chain = Chain.from_pretrained(built_chain())
    size = chain.manifest.curve[0].num_parameters
    told = run("plan", built_chain(), "--num-parameters", size, "--json")
    assert told.code == 0
    assert told.json == json.loads(json.dumps(chain.plan(size).as_dict()))
    assert run("plan", built_chain(), "--num-parameters", f"{size / 1000}K").out.rstrip("\n") == str(chain.plan(size))
    shape = dict(chain.plan(size).shape)
    by_shape = run(
        "plan", built_chain(), "--shape", json.dumps(shape), "--alpha", "0.25", "--method", "paper", "--json"
    )
    assert by_shape.code == 0, by_shape.err
    assert by_shape.json["shape"] == shape
    assert by_shape.json == json.loads(json.dumps(chain.plan(shape=shape, alpha=0.25, method="paper").as_dict()))


def test_env(run: Run) -> None:
    told = run("env", "--json")
    assert told.code == 0
    assert {"python", "cbd_hub", "torch", "transformers", "accelerator"} <= told.json.keys()
    lines = run("env").out.splitlines()
    assert f"- torch: {told.json['torch']}" in lines


# -- from-chain


def test_from_chain_writes_a_folder_that_a_stranger_can_load(run: Run, tmp_path: Path) -> None:
    chain = Chain.from_pretrained(built_chain())
    size = chain.manifest.curve[0].num_parameters
    made = run("from-chain", built_chain(), "--num-parameters", size, "--output", tmp_path / "model", "--json")
    assert made.code == 0, made.err
    assert made.json["output"] == str(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    stranger = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The Congress of the United States", return_tensors="pt")
text = tokenizer.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0])
assert not any(info.values()), info
assert not any(name.startswith("cbd_hub") for name in sys.modules)
loss = model(**ids, labels=ids["input_ids"]).loss.item()
print(json.dumps([model.num_parameters(), loss, text, model.config.cbd_hub]))
"""
    loaded = shell(sys.executable, "-c", stranger, tmp_path / "model")
    assert loaded.code == 0, loaded.err
    count, loss, text, origin = loaded.json
    assert count == made.json["num_parameters"]
    assert text.startswith("The Congress of the United States")
    assert origin["chain"] == "tiny" and origin["method"] == made.json["method"]
    model = chain.initialize(chain.plan(size))
    ids = chain.tokenizer("The Congress of the United States", return_tensors="pt")
    assert model(**ids, labels=ids["input_ids"]).loss.item() == pytest.approx(loss, rel=1e-5)


def test_from_chain_into_a_folder_that_holds_something_changes_nothing(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    size = Chain.from_pretrained(built_chain()).manifest.curve[0].num_parameters
    for place in (tmp_path, tmp_path / "notes.txt"):
        message = failed(run("from-chain", built_chain(), "--num-parameters", size, "--output", place))
        assert "not empty" in message
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.parent.glob("*.partial"))


def test_from_chain_options(run: Run, tmp_path: Path) -> None:
    large, small = built_chain() / "anchors", tmp_path / "small"
    chain = Chain.from_pretrained(built_chain())
    name, shape = chain.anchors[-1].name, json.dumps(chain.anchors[-1].shape)
    (tmp_path / "half").mkdir()  # empty is as good as new
    made = run("from-chain", built_chain(), "--shape", shape, "--output", small)
    assert made.code == 0, made.err
    assert "written to" in made.out
    assert (small / "model.safetensors").read_bytes() == (large / name / "model.safetensors").read_bytes()
    size = chain.manifest.curve[0].num_parameters
    half = ("--dtype", "bfloat16", "--alpha", 0.5, "--method", "interpolate")
    done = run("from-chain", built_chain(), "--num-parameters", size, "--output", tmp_path / "half", *half)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    assert (config["dtype"], config["cbd_hub"]["alpha"]) == ("bfloat16", 0.5)


def test_a_build_in_a_pipe_says_each_stage_in_a_line_and_shows_no_bar(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(), sort_keys=False))
    built = shell(COMMAND, "build", recipe, "--output", tmp_path / "chain", HF_HUB_DISABLE_PROGRESS_BARS="0")
    assert built.code == 0, built.err
    for stage in ("trained on", "evaluating:", "barrier above", "size-loss curve:"):
        assert re.search(rf"^{stage} .*\d s$", built.err, re.MULTILINE), (stage, built.err)
    assert "\r" not in built.err and "%|" not in built.err
    assert built.err.count("\n") <= 60


@pytest.mark.parametrize(
    ("environment", "allowed"),
    [({"TERM": "dumb"}, set()), ({"TERM": "xterm-256color", "NO_COLOR": "1"}, {"\x1b[1m", "\x1b[0m"})],  # bold heads
    ids=["dumb", "no color"],
)
def test_a_terminal_gets_no_color_no_long_line_and_times(
    tmp_path: Path, environment: dict[str, str], allowed: set[str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(), sort_keys=False))
    told = {
        "inspect": on_a_terminal("inspect", "quickstart", **environment),
        "plan": on_a_terminal("plan", "quickstart", "--num-parameters", "600k", **environment),
        "build": on_a_terminal("build", tmp_path / "recipe.yaml", "--output", tmp_path / "chain", **environment),
    }
    for name, text in told.items():
        assert set(re.findall(r"\x1b.[\d;?]*[A-Za-z]?", text)) <= allowed, name
        lines = re.split(r"[\r\n]", re.sub(r"\x1b\[[\d;]*m", "", text))
        assert max(map(len, lines)) <= 80, (name, max(lines, key=len))
    assert "340.3k 3.493" in told["inspect"] and "on disk" in told["plan"]
    assert re.search(r"^warning: the anchor of .* keeps", told["build"], re.MULTILINE)
    assert ".py:" not in told["build"]
    for stage in ("evaluating", "refit", "barrier above tiny-24.51k", "size-loss curve"):
        assert re.search(rf"{stage}: .*\[\d\d:\d\d[<,]", told["build"]), stage


def test_progress_bars_follow_the_hubs_variable(tmp_path: Path) -> None:
    size = Chain.from_pretrained(built_chain()).manifest.curve[0].num_parameters
    command = (COMMAND, "from-chain", built_chain(), "--num-parameters", size, "--output")
    quiet = shell(*command, tmp_path / "quiet", HF_HUB_DISABLE_PROGRESS_BARS="1")
    shown = shell(*command, tmp_path / "shown", HF_HUB_DISABLE_PROGRESS_BARS="0")
    assert (quiet.code, quiet.err) == (0, "")
    assert shown.code == 0 and re.fullmatch(r"bezier tiny: \d+ tensors, \d+\.\d s\n", shown.err)
    assert shown.out.replace("shown", "quiet") == quiet.out


# -- eval


def test_eval_of_a_chain(run: Run) -> None:
    chain = Chain.from_pretrained(built_chain())
    told = run("eval", built_chain(), "--text", HELD_OUT, "--sequence-length", 32, "--json")
    assert told.code == 0, told.err
    assert [row["name"] for row in told.json] == [a.name for a in chain.anchors]
    assert all(3 < row["loss"] < 5.7 and row["num_tokens"] > 1000 for row in told.json)
    assert all(2 < row["bits_per_byte"] < row["loss"] / math.log(2) for row in told.json)  # tokens of over a byte
    table = run("eval", built_chain(), "--text", HELD_OUT, "--sequence-length", 32)
    assert all(f"{row['loss']:.4f}" in table.out for row in told.json)


def test_version_and_first_steps(run: Run) -> None:
    assert run("--version").out == f"cbd-hub {version('cbd_hub')}\n"
    told = " ".join(run("--help").out.split())
    assert "First steps: cbd-hub plan CHAIN" in told and "recover" in told


def test_vocabulary_compares_two_tokenizers(run: Run, tmp_path: Path) -> None:
    other = train_tokenizer([{"text": Path(HELD_OUT).read_text(encoding="utf-8")}], 500)
    other.save_pretrained(tmp_path / "other")
    told = run("vocabulary", tmp_path / "other", built_chain(), "--text", HELD_OUT, "--json")
    assert told.code == 0, told.err
    assert told.json["student_size"] == 500 and 0.2 < told.json["student_frequency"] < 1 > told.json["token_ratio"]
    table = run("vocabulary", tmp_path / "other", built_chain(), "--text", HELD_OUT)
    assert f"{told.json['student_frequency']:.1%}" in table.out
    assert "cannot be loaded" in failed(run("vocabulary", tmp_path / "none", built_chain(), "--text", HELD_OUT))


def test_eval_of_an_anchor_folder(run: Run) -> None:
    entry = Chain.from_pretrained(built_chain()).manifest.anchors[0]
    folder = built_chain() / entry.subfolder
    options = ("--text", HELD_OUT, "--sequence-length", 32, "--max-tokens", 500, "--json")
    told = run("eval", folder, *options)
    assert told.code == 0, told.err
    (row,) = told.json
    assert (row["num_parameters"], row["num_tokens"] <= 500) == (entry.num_parameters, True)
    assert row["loss"] == run("eval", built_chain(), *options).json[0]["loss"]


def test_eval_prints_a_path_with_brackets_as_it_is(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # no fold in the middle of it, however long the path is
    entry = Chain.from_pretrained(built_chain()).manifest.anchors[-1]
    (tmp_path / "[v1]").symlink_to(built_chain() / entry.subfolder)
    told = run("eval", tmp_path / "[v1]", "--text", HELD_OUT, "--sequence-length", 32, "--max-tokens", 100)
    assert told.code == 0, told.err
    assert "[v1]" in told.out.replace("\n", "")


def test_eval_without_text_says_what_to_give(run: Run) -> None:
    assert "--text FILE" in failed(run("eval", built_chain()))


def test_eval_of_several_with_plot_and_cards(run: Run, tmp_path: Path) -> None:
    """A chain, an anchor and a model of another tokenizer: one table, one plot, a card each."""
    chain = tmp_path / "chain"
    shutil.copytree(built_chain(), chain, ignore=shutil.ignore_patterns(".build"))
    before = ModelCard.load(chain / "README.md")
    other = tmp_path / "other"
    train_tokenizer([{"text": Path(HELD_OUT).read_text(encoding="utf-8")}], 400).save_pretrained(other)
    tiny_model(tiny_config("llama", vocab_size=400)).save_pretrained(other)
    anchors = [a.name for a in Chain.from_pretrained(chain).anchors]
    options = ("--text", HELD_OUT, "--sequence-length", 32, "--max-tokens", 300)
    told = run("eval", chain, other, *options, "--json", "--plot", tmp_path / "a.png", "--update-card")
    assert told.code == 0, told.err
    assert [(row["of"], row["name"]) for row in told.json] == [
        *((str(chain), name) for name in anchors),
        (str(other), str(other)),
    ]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    after = ModelCard.load(chain / "README.md")
    assert after.text == before.text
    values = {result.metric_name: result.metric_value for result in after.data.eval_results}
    assert all(values[f"loss of {row['name']}"] == row["loss"] for row in told.json[:3])
    assert {r.metric_name for r in before.data.eval_results} < set(values)
    (loss,) = [r for r in ModelCard.load(other / "README.md").data.eval_results if r.metric_type == "loss"]
    assert (loss.metric_value, loss.dataset_name) == (told.json[3]["loss"], Path(HELD_OUT).name)
    assert len(Chain.from_pretrained(chain).anchors) == 3  # a chain it still is

    table = run("eval", chain, other, *options, "--update-card")
    assert table.code == 0, table.err
    assert "the tokenizers differ, so only bits a byte compare" in table.out
    assert all(f"{row['bits_per_byte']:.4f}" in table.out for row in told.json)
    assert f"results written into {other / 'README.md'}" in table.out
    assert str(ModelCard.load(chain / "README.md")) == str(after)
    alike = run("eval", chain, chain / "anchors" / anchors[0], *options)
    assert alike.code == 0 and "tokenizers differ" not in alike.out


def test_eval_of_summaries(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'cbd_hub[eval]'")
    long = "Fellow citizens of the Senate and the House. " * 10
    rows = [{"prompt": prompt, "reference": "a nation of laws"} for prompt in (long, "The people", long)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--summaries", tmp_path / "s.jsonl", "--max-new-tokens", 16)
    told = run("eval", built_chain(), *options, "--json", "--plot", tmp_path / "a.png")
    assert told.code == 0, told.err
    assert [row["metric"] for row in told.json] == ["rouge1", "rouge2", "rougeL"] * 3
    assert {(row["items"], row["truncated"]) for row in told.json} == {(3, 2)}
    assert (tmp_path / "a.png").is_file()
    table = run("eval", built_chain(), *options)
    assert table.code == 0, table.err
    assert "greedy; ROUGE F1 by rouge-score" in table.out
    assert "2 items of s.jsonl were longer than the context and lost their beginning" in table.out
    limited = run("eval", built_chain(), *options, "--limit", 2, "--json")
    assert {(row["items"], row["truncated"]) for row in limited.json} == {(2, 1)}
    assert run("eval", built_chain(), *options, "--text", HELD_OUT).code == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--text", "missing.txt", "--update-card"], "org/name is no local folder"),
        (["--text", "missing.txt", "--plot", "a.pdf"], "FILE.png"),
        (["--text", "missing.txt", "--plot", "no/a.png"], "no folder for the plot"),
        (["--summaries", "missing.jsonl"], "missing.jsonl cannot be read"),
    ],
)
def test_eval_refuses_before_it_measures(options: list[str], message: str, run: Run, tmp_path: Path) -> None:
    """Nothing is looked for on the Hub, and not even the text is read."""
    assert message in failed(run("eval", built_chain(), "org/name", *options))
    assert not list(tmp_path.iterdir())


# -- wrong usage and failure


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["inspect"],
        ["plan", "x", "--nonsense"],
        ["from-chain", "x", "--num-parameters", "1M"],
        ["build", "recipe.yaml"],
        ["plan", "CHAIN", "--shape", "{"],
        ["plan", "CHAIN", "--shape", "[1]"],
        ["eval", "CHAIN", "--text", HELD_OUT, "--sequence-length", "1"],
        ["plan", "CHAIN", "--num-parameters", "1M", "--alpha", "much"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], run: Run) -> None:
    result = run(*[str(built_chain()) if a == "CHAIN" else a for a in arguments])
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Usage: ") and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "missing/"], "missing"),
        (["plan", "CHAIN", "--num-parameters", "9B"], "outside this chain"),
        (["plan", "CHAIN", "--num-parameters", "many"], "many"),
        (["plan", "CHAIN"], "exactly one of num_parameters, shape and memory"),
        (["plan", "CHAIN", "--num-parameters", "39k", "--method", "papre"], "Did you mean 'paper'?"),
        (["plan", "CHAIN", "--num-parameters", "39k", "--alpha", "2"], "alpha is 2"),
        (["plan", "CHAIN", "--shape", '{"hidden_sice": 3}'], "Did you mean 'hidden_size'?"),
        (["from-chain", "CHAIN", "--num-parameters", "39k", "--output", "OUT", "--dtype", "int8"], "dtype is 'int8'"),
        (["eval", "CHAIN", "--text", "missing.txt"], "missing.txt"),
        (["eval", "TEXT", "--text", HELD_OUT], "chain.json"),
    ],
)
def test_failure_is_one_line(arguments: list[str], message: str, run: Run, tmp_path: Path) -> None:
    places = {"CHAIN": built_chain(), "OUT": tmp_path / "out", "TEXT": TEXT, "missing/": tmp_path / "missing"}
    assert message in failed(run(*[places.get(a, a) for a in arguments]))
    assert not list(tmp_path.iterdir())


def test_a_traceback_only_with_debug(tmp_path: Path) -> None:
    plain = shell(COMMAND, "inspect", tmp_path / "missing")
    assert "Traceback" not in failed(plain)
    debug = shell(COMMAND, "--debug", "inspect", tmp_path / "missing")
    assert (debug.code, debug.out) == (1, "")
    assert "Traceback" in debug.err and "ChainNotFoundError" in debug.err


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_an_example(name: str, run: Run) -> None:
    told = run(name, "--help")
    assert told.code == 0
    assert f"Example: cbd-hub {name}" in told.out
    assert name in run("--help").out


def test_every_promised_command_is_there() -> None:
    assert {"build", "inspect", "plan", "from-chain", "eval", "env"} <= set(NAMES)


# -- building without a recipe ------------------------------------------------------------------------------------


def test_a_chain_is_built_of_a_model_and_text_alone(run: Run, tmp_path: Path) -> None:
    """The recipe is written beside the chain, and building from it goes on with the same chain."""
    source = built_chain() / "anchors" / Chain.from_pretrained(built_chain()).anchors[0].name
    files = sorted(TEXT.glob("179*.txt"))
    of = ["--source", source, "--anchors", "0.8", "0.6", "--text", *files, "--tokens", "2k", "-o", tmp_path / "mine"]
    planned = run("build", *of, "--dry-run")
    assert planned.code == 0 and "the build can start" in planned.out
    assert not list(tmp_path.iterdir())  # a dry run writes nothing
    recipe = yaml.safe_load(planned.err)
    same = ["--anchors=0.8", "0.6", *of[:2], *of[5:]]
    assert yaml.safe_load(run("build", *same, "--dry-run").err) == recipe
    assert recipe["anchors"] == [{"fraction": 0.8}, {"fraction": 0.75}]
    assert recipe["data"]["text_files"] == [str(path) for path in files]
    recipe["data"]["sequence_length"] = 32  # the tiny model's context
    recipe["evaluation"] = {"tokens": 500, "curve_points": 1}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    refused = run("build", *of)
    assert refused.code == 1 and "holds another recipe" in refused.err.splitlines()[-1]
    done = run("build", tmp_path / "mine.yaml", "-o", tmp_path / "mine", "--json")
    assert done.code == 0 and len(json.loads(done.out)["anchors"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--anchors", "0.5"], "give a recipe, or --source"),
        (["r.yaml", "--source", "m"], "give a recipe, or --source"),
        (["--source", "m", "--anchors", "0.5"], "exactly one of --text and --dataset"),
        (["--source", "m", "--text", "a", "b", "--dataset", "c"], "exactly one of --text and --dataset"),
    ],
)
def test_half_a_command_is_wrong_usage(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("build", *arguments, "-o", tmp_path / "x")
    assert result.code == 2 and message in " ".join(result.err.split())


@pytest.mark.parametrize("sizes", [["0.5", "0.75"], ["0.5", "0.5"]])
def test_sizes_that_do_not_fall(run: Run, tmp_path: Path, sizes: list[str]) -> None:
    result = run("build", "--source", "m", "--anchors", *sizes, "--text", "t", "-o", tmp_path / "x")
    assert "must be smaller than the one before it" in failed(result)


def test_a_build_that_is_interrupted_says_that_it_goes_on(tmp_path: Path) -> None:
    source = tiny_recipe()["source"]
    source["train"]["training"]["tokens"] = 30_000_000  # not done before the interrupt, on any machine
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_recipe(source=source)))
    command = [str(COMMAND), "build", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "chain")]
    # Where these tests run in the background, their children would ignore Ctrl-C.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        deadline = time.monotonic() + 100
        while not (tmp_path / "chain" / ".build" / "begun.json").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=100)
        finally:
            process.kill()  # a build that goes on would never end
    assert process.returncode == 130
    assert err.splitlines()[-1] == "cbd-hub: stopped; the same command goes on from here"


IN_A_DESTRUCTOR = """
import signal, time
from cbd_hub.cli.main import interrupts_kept
signal.signal(signal.SIGINT, signal.default_int_handler)
class Pressed:
    def __del__(self): signal.raise_signal(signal.SIGINT)
class Broken:
    def __del__(self): 1 / 0
try:
    with interrupts_kept():
        Broken()
        Pressed()
        print("went on", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interrupt_in_a_destructor_is_not_lost() -> None:
    done = shell(sys.executable, "-c", IN_A_DESTRUCTOR)
    assert done.out.splitlines() == ["went on", "interrupted"]
    assert "ZeroDivisionError" in done.err and "KeyboardInterrupt" not in done.err


def test_the_demo_makes_a_model_and_writes(run: Run) -> None:
    done = run("demo", "--num-parameters", "500k", "--max-new-tokens", "8", "--json")
    assert done.code == 0 and abs(done.json["num_parameters"] - 500_000) < 5000
    assert done.json["text"].startswith("The Congress of the United States") and len(done.json["text"]) > 36
    shown = run("demo", "--num-parameters", "500k", "--max-new-tokens", "8")
    assert done.json["text"] in shown.out and 'from_chain("quickstart", "500k")' in shown.out
