"""Holding out whole documents, of one source and of several."""

import json
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_text import make_documents, make_files, make_text, texts

from cbd_hub.errors import RecipeError
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.splits import Splits, load_splits, split_documents

NAMES = ("train", "validation", "test")


def parts(splits: Splits) -> list[list[str]]:
    return [texts(splits.train), texts(splits.validation), texts(splits.test)]


def share(part: list[str], documents: Dataset) -> float:
    return sum(map(len, part)) / sum(map(len, texts(documents)))


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_whole_documents_are_held_out(fraction: float) -> None:
    documents = make_documents(100)
    train, validation, test = parts(split_documents(documents, fraction, seed=0))
    assert sorted(train + validation + test) == sorted(texts(documents))
    assert not set(train) & set(validation) and not set(train) & set(test) and not set(validation) & set(test)
    for part in (validation, test):
        assert share(part, documents) == pytest.approx(fraction / 2, abs=0.02)


def test_the_seed_alone_decides_what_is_held_out() -> None:
    documents = make_documents(60)
    first, again, other = (parts(split_documents(documents, 0.2, seed)) for seed in (0, 0, 1))
    assert first == again
    assert first[1] != other[1]
    backwards = parts(split_documents(Dataset.from_dict({"text": texts(documents)[::-1]}), 0.2, 0))
    assert [sorted(part) for part in backwards] == [sorted(part) for part in first]


@pytest.mark.parametrize("streaming", [False, True])
def test_copies_of_a_document_share_a_split(streaming: bool) -> None:
    documents = Dataset.from_dict({"text": texts(make_documents(60)) * 3})
    splits = split_documents(documents.to_iterable_dataset() if streaming else documents, 0.2, seed=0)
    held = [set(part) for part in parts(splits)]
    assert all(held)
    assert sum(map(len, held)) == 60
    assert sum(len(part) for part in parts(splits)) == 180


def test_one_document_is_cut_at_paragraphs() -> None:
    text = make_text(7, paragraphs=200)
    (train,), (validation,), (test,) = parts(split_documents(Dataset.from_dict({"text": [text]}), 0.1, seed=3))
    assert train + validation + test == text
    assert train.endswith("\n\n") and validation.endswith("\n\n")
    for part in (validation, test):
        assert len(part) / len(text) == pytest.approx(0.05, abs=0.02)


def test_one_document_without_paragraphs_is_cut_at_spaces() -> None:
    text = "word " * 400
    (train,), (validation,), (test,) = parts(split_documents(Dataset.from_dict({"text": [text]}), 0.2, seed=0))
    assert train + validation + test == text
    assert train.endswith("word ") and validation.endswith("word ")


def test_very_few_documents_are_cut_by_position() -> None:
    documents = Dataset.from_dict({"text": [make_text(1, 400), make_text(2, 40)]})
    train, validation, test = parts(split_documents(documents, 0.1, seed=0))
    assert [a + b + c for a, b, c in zip(train, validation, test, strict=True)] == texts(documents)
    assert share(train, documents) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("documents", [[], ["a"], ["ab"]])
def test_too_little_text_is_refused(documents: list[str]) -> None:
    with pytest.raises(
        RecipeError, match=rf"Too little text: {len(''.join(documents))} characters in {len(documents)}"
    ):
        split_documents(Dataset.from_dict({"text": documents}), 0.1, seed=0)


def test_a_wrong_fraction_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"at most 0\.5, got 0\.7"):
        split_documents(make_documents(), 0.7, seed=0)


def test_a_stream_is_split_document_by_document() -> None:
    documents = make_documents(400, paragraphs=1)
    splits = split_documents(documents.to_iterable_dataset(), 0.2, seed=0)
    assert sorted(text for part in parts(splits) for text in part) == sorted(texts(documents))
    assert len(texts(splits.validation)) == pytest.approx(40, abs=15)
    assert len(texts(splits.test)) == pytest.approx(40, abs=15)
    assert texts(splits.train) == texts(splits.train)  # a second pass gives the same


# -- several sources -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_nothing_that_one_source_holds_out_is_in_another(tmp_path: Path, streaming: bool) -> None:
    documents = texts(make_documents(200, 1))
    make_files(tmp_path, a="\f".join(documents[:140]))
    (tmp_path / "rows").mkdir()
    lines = [json.dumps({"text": text}) for text in documents[60:]]  # 80 are in both
    (tmp_path / "rows" / "data.jsonl").write_text("\n".join(lines))
    sources = [{"text_files": "a.txt", "weight": 2}, {"dataset": {"name": "rows"}}]
    config = DataConfig.model_validate({"sources": sources, "held_out_fraction": 0.3, "streaming": streaming})
    splits = load_splits(config, tmp_path)
    assert len(splits) == 2
    train, validation, test = (set(texts(getattr(splits[0], n)) + texts(getattr(splits[1], n))) for n in NAMES)
    assert not train & (validation | test) and not validation & test
    assert train | validation | test == set(documents)
    for split in splits:
        assert all(parts(split))


def test_copies_across_sources_would_leak_if_they_were_split_alone(tmp_path: Path) -> None:
    """What load_splits guards against happens: the same text lies in different splits of two sources."""
    documents = texts(make_documents(200, 1))
    alone = [split_documents(Dataset.from_dict({"text": part}), 0.3, 0) for part in (documents[:140], documents[60:])]
    held = [set(texts(split.validation) + texts(split.test)) for split in alone]
    assert set(texts(alone[0].train)) & held[1] or set(texts(alone[1].train)) & held[0]


def test_a_single_source_is_split_as_ever(tmp_path: Path) -> None:
    make_files(tmp_path, **{f"f{number:02}": make_text(number) for number in range(30)})
    config = DataConfig(text_files="*.txt", held_out_fraction=0.2)
    (splits,) = load_splits(config, tmp_path)
    expected = split_documents(Dataset.from_dict({"text": [make_text(number) for number in range(30)]}), 0.2, 0)
    assert parts(splits) == parts(expected)
