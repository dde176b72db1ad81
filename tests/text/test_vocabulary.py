"""The bytes of real tokenizers' tokens, and vocabularies against one another."""

import json
from functools import cache

import pytest
import torch
from tiny_text import make_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.vocabulary import Pairs, Vocabulary, compare_vocabularies

TEXT = make_text(3) + "In 1945, 漢字 and 😀 at a café.\tEnd\r\n"


@cache
def byte_level(size: int = 400) -> PreTrainedTokenizerFast:
    return train_tokenizer([{"text": make_text(1, 40) + "1945 " * 9}], size)


@cache
def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama 2's kind, with the space in front and a token that begins each text."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<s>", "</s>", *fallback], show_progress=False)
    tokenizer.train_from_iterator([make_text(2, 30)], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = state["added_tokens"][:2]  # <0xNN> are ordinary entries
    tokenizer = Tokenizer.from_str(json.dumps(state))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("make", "front"), [(byte_level, ""), (sentence_piece, " ")])
def test_tokens_spell_the_text(make, front: str) -> None:
    vocabulary = Vocabulary.of(make())
    ids = make()(TEXT, add_special_tokens=False)["input_ids"]
    assert b"".join(vocabulary.tokens[index] for index in ids) == (front + TEXT).encode()
    assert vocabulary.tokens[vocabulary.eos] is None and len(vocabulary) == len(make())


def test_a_token_is_preferred_to_its_fallback() -> None:
    vocabulary = Vocabulary.of(sentence_piece())
    plain, spelled = sentence_piece().convert_tokens_to_ids(["t", "<0x74>"])
    assert vocabulary.tokens[plain] == vocabulary.tokens[spelled] == b"t" and spelled < plain
    assert vocabulary.ids[b"t"] == plain
    assert vocabulary.ids[b"\xf0"] == sentence_piece().convert_tokens_to_ids("<0xF0>")


def test_an_added_token_that_is_not_special_stands_for_its_text() -> None:
    tokenizer = train_tokenizer([{"text": "a b"}], 300)
    tokenizer.add_tokens(["   "])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<call>"]})
    assert Vocabulary.of(tokenizer).tokens[-2:] == (b"   ", None)


def test_what_cannot_spell_every_text_is_refused() -> None:
    bert = BertTokenizer(vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"])})
    with pytest.raises(RecipeError, match="WordPiece"):
        Vocabulary.of(bert)
    plain = Tokenizer(models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"))
    with pytest.raises(RecipeError, match="BPE tokenizer that cannot spell"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=plain))
    broken = Tokenizer(models.BPE({"a": 0}, []))
    broken.pre_tokenizer = pre_tokenizers.ByteLevel()
    with pytest.raises(RecipeError, match="no token for"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=broken))


def test_pairs_have_the_same_bytes_and_roles() -> None:
    ours, theirs = Vocabulary.of(byte_level()), Vocabulary.of(sentence_piece())
    pairs = Pairs.between(ours, theirs)
    found = list(zip(pairs.student_ids.tolist(), pairs.teacher_ids.tolist(), strict=True))
    assert (ours.eos, theirs.eos) in found and theirs.bos not in pairs.teacher_ids.tolist()
    assert all(ours.tokens[a] == theirs.tokens[b] for a, b in found)
    assert {ours.tokens[a] for a, _ in found} - {None} == set(ours.tokens) & set(theirs.tokens) - {None}
    assert len(set(pairs.student_ids.tolist())) == len(set(pairs.teacher_ids.tolist())) == len(found)
    assert not pairs.identical


def test_duplicates_are_paired_once_and_both_roles_meet() -> None:
    ours = Vocabulary((b"a", b"b", b"a", None, None), bos=3, eos=4)
    theirs = Vocabulary((None, b"a", None, b"c"), bos=0, eos=2)
    pairs = Pairs.between(ours, theirs)
    assert pairs.student_ids.tolist() == [0, 3, 4] and pairs.teacher_ids.tolist() == [1, 0, 2]


def test_one_vocabulary_is_identical() -> None:
    vocabulary = Vocabulary.of(byte_level())
    pairs = Pairs.between(vocabulary, Vocabulary.of(byte_level()))
    assert pairs.identical and torch.equal(pairs.student_ids, torch.arange(len(vocabulary)))
    assert not Pairs.between(vocabulary, Vocabulary.of(byte_level(280))).identical


def test_the_report_counts_digits_and_specials() -> None:
    ours, theirs = sentence_piece(), byte_level()
    report = compare_vocabularies(ours, theirs, [TEXT, "1945 1945 1945"])
    ids = {name: t([TEXT, "1945 1945 1945"], add_special_tokens=False)["input_ids"] for name, t in
           (("ours", ours), ("theirs", theirs))}  # fmt: skip
    ours_count, theirs_count = (sum(map(len, ids[name])) for name in ("ours", "theirs"))
    assert report.token_ratio == pytest.approx(ours_count / theirs_count)
    assert report.teacher_bytes_per_token == pytest.approx(len((TEXT + "1945 1945 1945").encode()) / theirs_count)
    whole = theirs.convert_tokens_to_ids("Ġ1945")
    assert report.teacher_digits >= 2 and report.teacher_digits_frequency * theirs_count >= ids["theirs"][1].count(
        whole
    )
    assert report.student_specials == ("<s>",) and report.teacher_specials == ()
    assert report.to_dict()["matched"] == report.matched and "digits without" in str(report)
    same = compare_vocabularies(theirs, theirs, [TEXT])
    assert same.student_share == same.teacher_frequency == same.token_ratio == 1 and same.student_digits == 0


def test_no_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="no text"):
        compare_vocabularies(byte_level(), byte_level(), [""])
