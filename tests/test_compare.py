"""Perplexity on a user's own text: of chains, of plain models, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_recipe import TEXT, built_chain
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub.assemble import Chain
from cbd_hub.compare import evaluate_on_text
from cbd_hub.errors import ChainNotFoundError, IntegrityError, RecipeError

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
