"""What models write behind prompts: greedy, alike in any batch, cut where the context ends, and scored by ROUGE."""

import json
import math
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_recipe import built_chain
from transformers import AutoTokenizer, PreTrainedModel

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.metrics import rouge
from cbd_hub.evaluation.summaries import Item, evaluate_summaries, read_summaries

needs_rouge = pytest.mark.skipif(
    find_spec("rouge_score") is None,
    reason="needs rouge-score: pip install 'cbd_hub[eval]'",
)
PROMPTS = ["The Congress of the", "Fellow citizens, peace with all men", "Laws", "The people of the United States and"]
CONTEXT = 64


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(built_chain())


@cache
def model() -> PreTrainedModel:
    """A random model that reads what the tiny chain's tokenizer writes. Its texts are nonsense, each its own."""
    return tiny_model(tiny_config("llama", vocab_size=300, max_position_embeddings=CONTEXT), seed=3)


def written(prompt: str, tokens: int, keep: int = CONTEXT) -> str:
    """What plain transformers writes behind the last tokens of one prompt, step by step, until it ends the text."""
    ids = tokenizer()(prompt)["input_ids"][-keep:]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + tokens:
            ids.append(int(model()(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer().eos_token_id:
                break
    return tokenizer().decode(ids[start:], skip_special_tokens=True)


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def items(folder: Path, tokens: int = 12) -> Path:
    """Prompts whose references hold what the model writes, and a little more for every other one."""
    rows = [
        {"prompt": p, "reference": f"x {written(p, tokens)}" + " the nation" * (i % 2)} for i, p in enumerate(PROMPTS)
    ]
    return write(folder / "items.jsonl", rows)


@needs_rouge
def test_rouge_is_of_what_plain_greedy_decoding_writes(tmp_path: Path) -> None:
    file = items(tmp_path)
    rows = evaluate_summaries(model(), tokenizer(), file, max_new_tokens=12, progress=False)
    expected = rouge([written(p, 12) for p in PROMPTS], [item.reference for item in read_summaries(file)])
    assert [row["metric"] for row in rows] == ["rouge1", "rouge2", "rougeL"]
    for row in rows:
        values = expected.values[row["metric"]]
        mean = sum(values) / 4
        assert row["value"] == pytest.approx(mean) and 0 < mean < 1
        assert row["stderr"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 3 / 4))
        assert (row["items"], row["truncated"], row["task"]) == (4, 0, "items.jsonl")
        assert row["implementation"] == expected.implementation


@needs_rouge
@pytest.mark.parametrize("training", [True, False])
def test_batches_and_repeats_change_nothing(training: bool, tmp_path: Path) -> None:
    file = items(tmp_path)
    model().train(training)
    state = torch.get_rng_state()
    made = [
        evaluate_summaries(model(), tokenizer(), file, max_new_tokens=12, batch_size=n, progress=False)
        for n in (1, 3, 3, 8)
    ]
    assert made[0] == made[1] == made[2] == made[3]
    assert model().training is training
    assert torch.equal(state, torch.get_rng_state())


@needs_rouge
def test_the_text_ends_where_the_model_ends_it(tmp_path: Path) -> None:
    """With one of the tokens that it writes as its end of text, only those before it are judged."""
    prompt = tokenizer()(PROMPTS[0], return_tensors="pt")
    ids = model().generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    place = next(i for i in range(2, 12) if ids[i] not in ids[:i] and re.search("[a-z]", tokenizer().decode(ids[:i])))
    before = tokenizer().decode(ids[:place])
    file = write(tmp_path / "a.jsonl", [{"prompt": PROMPTS[0], "reference": before}] * 2)
    config = model().generation_config
    own, config.eos_token_id = config.eos_token_id, ids[place]
    try:
        short = evaluate_summaries(model(), tokenizer(), file, max_new_tokens=12, progress=False)
    finally:
        config.eos_token_id = own
    long = evaluate_summaries(model(), tokenizer(), file, max_new_tokens=12, progress=False)
    assert short[0]["value"] == 1.0 and short[0]["stderr"] == 0.0
    assert long[0]["value"] < 1.0


@needs_rouge
def test_limit_takes_the_first_items(tmp_path: Path) -> None:
    file = items(tmp_path)
    lines = file.read_text(encoding="utf-8").splitlines()
    (tmp_path / "first").mkdir()
    first = tmp_path / "first" / "items.jsonl"
    first.write_text("\n".join(lines[:2]), encoding="utf-8")
    limited = evaluate_summaries(model(), tokenizer(), file, 2, max_new_tokens=12, progress=False)
    assert limited == evaluate_summaries(model(), tokenizer(), first, max_new_tokens=12, progress=False)
    assert limited[0]["items"] == 2
    (row, *_) = evaluate_summaries(model(), tokenizer(), file, 1, max_new_tokens=12, progress=False)
    assert (row["items"], row["stderr"]) == (1, None)


@needs_rouge
def test_a_prompt_that_is_too_long_loses_its_beginning(tmp_path: Path) -> None:
    long = "Fellow citizens of the Senate and of the House of Representatives. " * 12
    reference = written(long, 12, CONTEXT - 12) + " and the nation"
    file = write(tmp_path / "a.jsonl", [{"prompt": p, "reference": reference} for p in (long, PROMPTS[0], long)])
    rows = evaluate_summaries(model(), tokenizer(), file, max_new_tokens=12, progress=False)
    expected = rouge(
        [written(long, 12, CONTEXT - 12), written(PROMPTS[0], 12), written(long, 12, CONTEXT - 12)], [reference] * 3
    )
    assert {row["metric"]: row["value"] for row in rows} == pytest.approx(expected.means)
    assert rows[0]["truncated"] == 2


@needs_rouge
def test_a_begin_of_text_token_is_kept(tmp_path: Path) -> None:
    from cbd_hub.evaluation.summaries import _Writer

    begins = AutoTokenizer.from_pretrained(built_chain())
    begins.bos_token = begins.convert_ids_to_tokens(7)
    writer = _Writer(model(), begins, 2, CONTEXT - 4)
    prompt = begins.convert_ids_to_tokens(7) + "of the House of Representatives and all"
    assert begins(prompt)["input_ids"][0] == 7
    ids = writer._prompt_ids(prompt)
    assert len(ids) == 4 and ids[0] == 7 and ids[1:] == begins(prompt)["input_ids"][-3:]
    assert writer.truncated == 1


def test_numbers_out_of_range_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"prompt": "a", "reference": "b"}])
    for options in ({"limit": 0}, {"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(RecipeError, match=f"{next(iter(options))} must be 1 or more, not 0"):
            evaluate_summaries(model(), tokenizer(), file, progress=False, **options)
    with pytest.raises(RecipeError, match=f"max_new_tokens is {CONTEXT} and the model's context {CONTEXT}"):
        evaluate_summaries(model(), tokenizer(), file, max_new_tokens=CONTEXT, progress=False)


# -- reading


def test_lines_are_read_with_all_that_is_in_them(tmp_path: Path) -> None:
    rows = [{"prompt": "a\u2028b\x85c", "reference": "ä", "id": 3}, {"reference": "y", "prompt": " x\n"}]
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n", encoding="utf-8")
    assert read_summaries(file) == [Item("a\u2028b\x85c", "ä"), Item(" x\n", "y")]


GOOD = '{"prompt": "a", "reference": "b"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[1]", "is no JSON object"),
        ('{"prompt": "a"}', "field 'reference' must be text, not None"),
        ('{"prompt": 3, "reference": "b"}', "field 'prompt' must be text, not 3"),
        ('{"prompt": "a", "reference": " \\n"}', "field 'reference' must be text"),
    ],
)
def test_a_line_that_is_no_item_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(f"{GOOD}\n\n{line}\n{GOOD}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="line 3") as error:
        read_summaries(file)
    assert message in str(error.value)


def test_files_without_items_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        read_summaries(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(RecipeError, match="holds no item"):
        read_summaries(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe4"}')
    with pytest.raises(RecipeError, match="UTF-8"):
        read_summaries(tmp_path / "latin.jsonl")
