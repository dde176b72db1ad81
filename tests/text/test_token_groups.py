"""Groups of real tokenizers' tokens spell the same bytes."""

import json
import pickle

import pytest
import torch
from test_vocabulary import byte_level, sentence_piece
from tiny_text import make_text
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.token_groups import TokenAligner

WILD = "In 1945, 漢字 and 😀😀 at a café; " * 3


def small() -> PreTrainedTokenizerFast:
    return train_tokenizer([{"text": "sat on mat " * 9}], 270)


def blocks(
    tokenizer: PreTrainedTokenizerFast, length: int, texts: tuple[str, ...] = (WILD, make_text(1, 2))
) -> Tensor:
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ids = [i for document in encoded for i in [*document, tokenizer.eos_token_id]]
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def spelled(aligner: TokenAligner, ids: Tensor, batch: dict[str, Tensor]) -> list[tuple[bytes | None, bytes | None]]:
    """The bytes of each group on both sides; None for the token that ends a text."""
    sides = (ids, aligner.student, 1), (batch["teacher_input_ids"], aligner.teacher, 3)
    out = []
    for group in batch["groups"].tolist():
        texts = []
        for tokens, vocabulary, at in sides:
            found = tokens[group[0], group[at] + 1 : group[at] + 1 + group[at + 1]].tolist()
            texts.append(None if found == [vocabulary.eos] else b"".join(vocabulary.tokens[i] for i in found))
        out.append(tuple(texts))
    return out


@pytest.mark.parametrize("length", [5, 7, 33])
@pytest.mark.parametrize("teacher", [byte_level, small, sentence_piece])
@pytest.mark.parametrize("student", [byte_level, small, sentence_piece])
def test_groups_spell_the_same(student, teacher, length: int) -> None:
    aligner = TokenAligner(student(), teacher())
    ids = blocks(student(), length)
    batch = aligner.align(ids)
    pairs = spelled(aligner, ids, batch)
    assert pairs and all(ours == theirs for ours, theirs in pairs)
    assert pairs.count((None, None)) == (ids[:, 1:] == aligner.student.eos).sum()
    assert (batch["groups"][:, [1, 3]] >= 0).all()
    assert aligner.counts["skipped_segments"] == 0 and aligner.counts["groups"] == len(pairs)
    assert (aligner.front is not None) == (batch["teacher_input_ids"][0, 0].item() == aligner.front)
    # Most of the text is in groups: what is not lies at the borders of the blocks.
    assert sum(len(ours or b"") for ours, _ in pairs) > 0.5 * sum(
        len(aligner.student.tokens[i] or b"") for i in ids.flatten().tolist()
    )


def test_same_tokenizer_gives_one_to_one_groups() -> None:
    ids = blocks(byte_level(), 40, (make_text(1, 4),))
    aligner = TokenAligner(byte_level(), byte_level())
    batch = aligner.align(ids)
    assert (batch["groups"][:, [2, 4]] == 1).all() and aligner.counts["groups"] == ids.numel() - len(ids)
    assert torch.equal(batch["teacher_input_ids"], ids) and batch["teacher_attention_mask"].all()


def test_split_characters_are_trimmed() -> None:
    ids = torch.tensor([byte_level()("😀 and 😀")["input_ids"][1:-1]])
    aligner = TokenAligner(byte_level(), byte_level())
    batch = aligner.align(ids)
    assert aligner.counts["trimmed_bytes"] == 6 and aligner.counts["skipped_segments"] == 0
    assert byte_level().decode(batch["teacher_input_ids"][0]) == " and "


def test_unpredicted_tokens_are_in_no_group() -> None:
    ids = blocks(small(), 33)
    labels = ids.clone()
    labels[:, 10:20] = -100
    groups = TokenAligner(small(), byte_level()).align(ids, labels)["groups"]
    assert all(
        end <= 10 or begin >= 20 for begin, end in zip(groups[:, 1] + 1, groups[:, 1] + 1 + groups[:, 2], strict=True)
    )


def test_long_groups_are_left_out_and_counted() -> None:
    ids = blocks(small(), 33)
    every, short = TokenAligner(small(), byte_level()), TokenAligner(small(), byte_level(), longest=2)
    groups = every.align(ids)["groups"]
    kept = groups[(groups[:, [2, 4]] <= 2).all(1)]
    assert torch.equal(short.align(ids)["groups"], kept)
    assert short.counts["long_groups"] == len(groups) - len(kept) > 0


def test_text_that_spells_a_special_token_is_skipped() -> None:
    ids = torch.tensor([byte_level()("a <s> b")["input_ids"]])
    aligner = TokenAligner(byte_level(), sentence_piece())
    assert len(aligner.align(ids)["groups"]) == 0 and aligner.counts["skipped_segments"] == 1


def composing() -> PreTrainedTokenizerFast:
    """Qwen's kind: a normalizer composes characters before anything else."""
    tokenizer = byte_level()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"}
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=tokenizer.eos_token)


@pytest.mark.parametrize("length", [7, 48])
def test_text_that_a_normalizer_composes_yields_no_group_and_the_other_all(length: int) -> None:
    """Decomposed characters: their segment is counted as skipped, and is read all the same; others are as ever."""
    whole, altered = "At a café in 1945, 漢字. ", "At a cafe\u0301 in Vie\u0302\u0323t Nam. "
    ids = blocks(small(), length, (whole * 4, altered * 4, whole * 4))
    aligner, plain = TokenAligner(small(), composing()), TokenAligner(small(), byte_level())
    batch, expected = aligner.align(ids), plain.align(ids)
    pairs = spelled(aligner, ids, batch)
    assert pairs and all(ours == theirs for ours, theirs in pairs)
    assert aligner.counts["skipped_segments"] > plain.counts["skipped_segments"] == 0
    assert 0 < len(batch["groups"]) < len(expected["groups"])
    marks = torch.tensor([i for i, token in enumerate(aligner.student.tokens) if token and b"\xcc" in token])
    same = (~torch.isin(ids, marks)).all(1)  # rows without a combining mark
    assert same.any() and not same.all()
    for row in same.nonzero()[:, 0].tolist():
        assert torch.equal(*(x["groups"][x["groups"][:, 0] == row] for x in (batch, expected)))


def test_a_student_that_composes_has_read_what_it_spells() -> None:
    """Its ids are of the composed text, so that both sides agree on the bytes."""
    ids = blocks(composing(), 33, ("At a cafe\u0301 in Vie\u0302\u0323t Nam. " * 6,))
    aligner = TokenAligner(composing(), small())
    pairs = spelled(aligner, ids, aligner.align(ids))
    assert pairs and all(ours == theirs for ours, theirs in pairs) and aligner.counts["skipped_segments"] == 0


def test_it_can_be_pickled() -> None:
    aligner, ids = TokenAligner(small(), sentence_piece()), blocks(small(), 33)
    copy = pickle.loads(pickle.dumps(aligner))
    for name, expected in aligner.align(ids).items():
        assert torch.equal(copy.align(ids)[name], expected) and expected.dtype == torch.int64
