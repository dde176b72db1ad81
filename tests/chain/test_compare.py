"""Perplexity on a user's own text and ROUGE of what is written: of chains, of plain models, and what is refused."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from tiny_models import tiny_config, tiny_model
from tiny_recipe import TEXT, built_chain
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub.chain.chain import Chain
from cbd_hub.chain.compare import evaluate_on_summaries, evaluate_on_tasks, evaluate_on_text
from cbd_hub.errors import ChainNotFoundError, IntegrityError, RecipeError
from cbd_hub.evaluation.plots import plot_scores
from cbd_hub.hub.card_results import update_card
from cbd_hub.text.packing import train_tokenizer

HELD_OUT = TEXT / "1800_john_adams_f.txt"


def test_the_loss_is_that_of_plain_transformers() -> None:
    chain = Chain.from_pretrained(built_chain())
    rows = evaluate_on_text(str(built_chain()), [HELD_OUT], sequence_length=32, progress=False)
    assert [r["name"] for r in rows] == [a.name for a in chain.anchors]
    ids = AutoTokenizer.from_pretrained(built_chain())(HELD_OUT.read_text(encoding="utf-8"))["input_ids"]
    blocks = torch.tensor([*ids, 0][: (len(ids) + 1) // 32 * 32]).view(-1, 32)
    for row, anchor in zip(rows, chain.manifest.anchors, strict=True):
        model = AutoModelForCausalLM.from_pretrained(built_chain() / anchor.subfolder).eval()
        with torch.no_grad():
            expected = model(blocks, labels=blocks).loss.item()
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert row["num_tokens"] == blocks.numel() - len(blocks)
        assert row["num_parameters"] == anchor.num_parameters == model.num_parameters()


def test_a_plain_model_and_several_files() -> None:
    folder = str(built_chain() / Chain.from_pretrained(built_chain()).manifest.anchors[0].subfolder)
    (one,) = evaluate_on_text(folder, [HELD_OUT], sequence_length=32, progress=False)
    (two,) = evaluate_on_text(folder, [HELD_OUT, TEXT / "1932_herbert_hoover_r.txt"], sequence_length=32)
    (few,) = evaluate_on_text(folder, [HELD_OUT], sequence_length=32, max_tokens=400)
    assert one["name"] == folder
    assert few["num_tokens"] <= 400 < one["num_tokens"] < two["num_tokens"]


def test_a_relative_path_is_found_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("Fellow citizens of the Senate. " * 30)
    (tmp_path / "chain").symlink_to(built_chain())
    monkeypatch.chdir(tmp_path)
    assert len(evaluate_on_text("chain", ["mine.txt"], sequence_length=16, progress=False)) == 3


def test_no_text_and_too_little_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--text FILE"):
        evaluate_on_text(str(built_chain()), [])
    (tmp_path / "short.txt").write_text("No.")
    with pytest.raises(RecipeError, match="block"):
        evaluate_on_text(str(built_chain()), [tmp_path / "short.txt"], progress=False)


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChainNotFoundError, match=r"chain\.json"):
        evaluate_on_text(str(tmp_path), [HELD_OUT])
    with pytest.raises(ChainNotFoundError, match="missing"):
        evaluate_on_text(str(tmp_path / "missing"), [HELD_OUT])
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "bare")
    with pytest.raises(ChainNotFoundError, match="bare"):  # a model without a tokenizer
        evaluate_on_text(str(tmp_path / "bare"), [HELD_OUT])


def test_a_model_whose_tokenizer_is_made_up_is_refused(tmp_path: Path) -> None:
    tiny_model(tiny_config("gpt2")).save_pretrained(tmp_path / "bare")
    with pytest.raises((ChainNotFoundError, IntegrityError, RecipeError)):
        evaluate_on_text(str(tmp_path / "bare"), [HELD_OUT], sequence_length=16, progress=False)


def anchor_folder() -> str:
    return str(built_chain() / Chain.from_pretrained(built_chain()).manifest.anchors[0].subfolder)


def make_other(folder: Path) -> str:
    """A model with a tokenizer of its own."""
    train_tokenizer([{"text": HELD_OUT.read_text(encoding="utf-8")}], 400).save_pretrained(folder)
    tiny_model(tiny_config("llama", vocab_size=400)).save_pretrained(folder)
    return str(folder)


def test_several_are_measured_as_each_alone(tmp_path: Path) -> None:
    several = [str(built_chain()), anchor_folder(), make_other(tmp_path / "other")]
    options = {"sequence_length": 32, "max_tokens": 600, "progress": False}
    rows = evaluate_on_text([*several, several[1]], [HELD_OUT], **options)  # what is named twice is measured once
    assert rows == [row for one in several for row in evaluate_on_text(one, [HELD_OUT], **options)]
    assert [row["of"] for row in rows] == [several[0]] * 3 + several[1:]
    assert [row["name"] for row in rows[3:]] == several[1:]
    assert list(rows[0]) == [
        "name",
        "num_parameters",
        "loss",
        "perplexity",
        "num_tokens",
        "bits_per_byte",
        "tokenizer",
        "of",
    ]


def test_rows_tell_whose_text_was_cut_alike(tmp_path: Path) -> None:
    places = [str(built_chain()), anchor_folder(), make_other(tmp_path / "other")]
    rows = evaluate_on_text(places, [HELD_OUT], sequence_length=32, max_tokens=100, progress=False)
    assert len({row["tokenizer"] for row in rows[:4]}) == 1
    assert rows[4]["tokenizer"] != rows[0]["tokenizer"]


def test_what_is_missing_is_found_before_anything_is_measured(tmp_path: Path) -> None:
    """The first argument has a tokenizer and no weights: it would fail first if it were loaded."""
    AutoTokenizer.from_pretrained(built_chain()).save_pretrained(tmp_path / "words")
    tiny_config("llama", vocab_size=300).save_pretrained(tmp_path / "words")
    places = [str(tmp_path / "words"), str(tmp_path / "missing")]
    with pytest.raises(ChainNotFoundError, match="missing"):
        evaluate_on_text(places, [HELD_OUT], sequence_length=32)
    with pytest.raises(ChainNotFoundError, match="words"):
        evaluate_on_text(places[:1], [HELD_OUT], sequence_length=32)
    with pytest.raises(RecipeError, match="name a model or chain"):
        evaluate_on_text([], [HELD_OUT])


def test_tasks_of_several_in_one_plot_and_their_cards(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'cbd_hub[eval]'")
    lines = [json.dumps({"goal": "to sit", "sol1": f"take chair {i}", "sol2": "a pen", "label": 0}) for i in range(4)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(lines))
    model = tmp_path / "model"
    shutil.copytree(anchor_folder(), model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(built_chain() / name, model)
    several = [str(built_chain()), str(model)]
    rows = evaluate_on_tasks(several, ["piqa"], tmp_path, progress=False)
    assert rows[:6] == evaluate_on_tasks(several[0], ["piqa"], tmp_path, progress=False)
    assert [(row["of"], row["metric"]) for row in rows[6:]] == [(str(model), "acc"), (str(model), "acc_norm")]
    assert rows[6]["value"] == rows[0]["value"]  # the model is the first anchor
    plot_scores(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    update_card(model, rows[6:])
    results = ModelCard.load(model / "README.md").data.eval_results[-2:]
    assert [(r.dataset_name, r.metric_name, r.metric_value) for r in results] == [
        ("piqa", row["metric"], row["value"]) for row in rows[6:]
    ]


def test_summaries_of_several(tmp_path: Path) -> None:
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'cbd_hub[eval]'")
    lines = [json.dumps({"prompt": f"The people of {name}", "reference": "a the i"}) for name in ("Rome", "Athens")]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    several = [str(built_chain()), anchor_folder()]
    options = {"max_new_tokens": 20, "progress": False}
    rows = evaluate_on_summaries(several, tmp_path / "s.jsonl", **options)
    assert rows == [row for one in several for row in evaluate_on_summaries(one, tmp_path / "s.jsonl", **options)]
    assert [row["of"] for row in rows] == [several[0]] * 9 + [several[1]] * 3
    assert [row["name"] for row in rows[::3]] == [
        *(a.name for a in Chain.from_pretrained(built_chain()).anchors),
        several[1],
    ]
    drop = {"name", "of"}
    assert [{k: row[k] for k in row.keys() - drop} for row in rows[:3]] == [
        {k: row[k] for k in row.keys() - drop} for row in rows[9:]
    ]
    assert {row["items"] for row in evaluate_on_summaries(several, tmp_path / "s.jsonl", limit=1, **options)} == {1}


def test_a_slip_in_summaries_is_found_before_a_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text('{"prompt": "a", "reference": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(RecipeError, match="line 2"):
        evaluate_on_summaries("no-such-chain", tmp_path / "s.jsonl")
    (tmp_path / "s.jsonl").write_text('{"prompt": "a", "reference": "b"}\n')
    with pytest.raises(RecipeError, match="no metric script"):
        evaluate_on_summaries("no-such-chain", tmp_path / "s.jsonl", metric_scripts=tmp_path)
