"""Reading, splitting, tokenising and packing real files."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, IterableDataset
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cbd_hub.data import (
    DataConfig,
    DatasetSource,
    Splits,
    load_documents,
    pack,
    split_documents,
    token_batches,
    train_tokenizer,
)
from cbd_hub.errors import RecipeError

PARAGRAPH = "The {0} sat on the mat, and the {0} saw {1} birds over the river.\n\n"


def make_text(number: int, paragraphs: int = 6) -> str:
    return "".join(PARAGRAPH.format(f"cat{number}", index) for index in range(paragraphs))


def make_documents(count: int = 40, paragraphs: int = 6) -> Dataset:
    return Dataset.from_dict({"text": [make_text(number, paragraphs) for number in range(count)]})


def texts(documents: Dataset | IterableDataset) -> list[str]:
    return [row["text"] for row in documents]


def make_files(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (folder / f"{name}.txt").write_text(content, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(make_documents(), 320)


# -- config ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of text_files and dataset, got neither"),
        ({"text_files": []}, "got neither"),
        ({"text_files": "a.txt", "dataset": {"name": "x"}}, "got both"),
        ({"text_files": "a.txt", "held_out_fraction": 0.6}, "held_out_fraction"),
        ({"text_files": "a.txt", "held_out_fraction": 0}, "held_out_fraction"),
        ({"text_files": "a.txt", "sequence_length": 1}, "sequence_length"),
        ({"text_files": "a.txt", "sequence_lenght": 5}, "sequence_lenght"),
        ({"dataset": {"name": "x", "spilt": "train"}}, "spilt"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(fields)


@pytest.mark.parametrize("model", [DataConfig, DatasetSource])
def test_every_field_is_documented(model: type) -> None:
    assert all(field.description for field in model.model_fields.values())


# -- loading ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_files_are_documents_in_the_order_of_their_paths(tmp_path: Path, streaming: bool) -> None:
    make_files(tmp_path, b="second", a="first\r\nline", c="third")
    (tmp_path / "deep").mkdir()
    make_files(tmp_path / "deep", a="deep\ffed")
    config = DataConfig(text_files=["c.txt", "*.txt", "./b.txt", "deep/**/*.txt"], streaming=streaming)
    documents = load_documents(config, tmp_path)
    assert isinstance(documents, IterableDataset if streaming else Dataset)
    assert texts(documents) == ["first\nline", "second", "third", "deep\ffed"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_single_file_is_cut_at_form_feeds(tmp_path: Path, streaming: bool) -> None:
    make_files(tmp_path, a="\ufeffone\f\n \ftwo\n\fthree")
    documents = load_documents(DataConfig(text_files="a.txt", streaming=streaming), tmp_path)
    assert texts(documents) == ["one", "two\n", "three"]


def test_an_absolute_path_needs_no_base_folder(tmp_path: Path) -> None:
    make_files(tmp_path, a="one")
    assert texts(load_documents(DataConfig(text_files=str(tmp_path / "*.txt")), "/")) == ["one"]


def test_loading_writes_nothing_beside_the_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_files(tmp_path, a=make_text(1, 50))
    pack(load_documents(DataConfig(text_files="a.txt"), tmp_path), tokenizer, 16)
    assert [path.name for path in tmp_path.rglob("*")] == ["a.txt"]


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_files(tmp_path, empty=" \n", good="text")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    for pattern, message in {
        "missing*.txt": r"No text file matches 'missing\*.txt' in .*check the path",
        "folder": "'folder' in .*it is a folder",
        "empty.txt": "empty.txt is empty",
        "latin.txt": r"latin.txt is not UTF-8 \(byte 2\)",
        "dangling.txt": "dangling.txt cannot be read: No such file",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_documents(DataConfig(text_files=["good.txt", pattern]), tmp_path)


def make_dataset_folder(folder: Path) -> Path:
    (folder / "rows").mkdir()
    lines = [
        '{"body": "first", "id": 1}',
        '{"body": " ", "id": 2}',
        '{"body": null, "id": 3}',
        '{"body": "last", "id": 4}',
    ]
    (folder / "rows" / "data.jsonl").write_text("\n".join(lines))
    return folder


def test_a_dataset_is_streamed(tmp_path: Path) -> None:
    source = DatasetSource(name="rows", column="body")
    documents = load_documents(DataConfig(dataset=source, streaming=True), make_dataset_folder(tmp_path))
    assert texts(documents) == ["first", "last"]
    assert list(next(iter(documents))) == ["text"]


def test_a_dataset_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    make_dataset_folder(tmp_path)
    code = (
        "import sys; from cbd_hub.data import *\n"
        "config = DataConfig(dataset=DatasetSource(name='rows', column='body'))\n"
        "print(load_documents(config, sys.argv[1])['text'][:])"
    )
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "['first', 'last']", done.stderr
    assert "examples/s" not in done.stderr  # datasets would show bars of its own


def test_a_dataset_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_dataset_folder(tmp_path)
    (tmp_path / "nothing").mkdir()
    for source, message in {
        DatasetSource(name="rows", column="bodi"): "no column 'bodi', only body, id. Did you mean 'body'",
        DatasetSource(name="rows", split="tset", column="body"): "'rows' cannot be loaded: .*tset",
        DatasetSource(name="nothing"): "'nothing' cannot be loaded",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_documents(DataConfig(dataset=source, streaming=True), tmp_path)


# -- splitting -------------------------------------------------------------------------------------------------


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


# -- tokenizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", " ", "cat sat", " two  spaces ", "tab\tnew\nline\r\n", "naïve 日本語 🙂 \x00\x7f", "it 's . a n't ,"]
)
def test_any_text_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_end_of_text_begins_ends_and_pads(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == 320
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == 0
    assert tokenizer("cat")["input_ids"].count(0) == 0


def test_it_reloads_with_plain_transformers(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = make_text(3) + " naïve 🙂"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == text
    assert again.eos_token_id == again.pad_token_id == 0


def test_training_is_deterministic_across_processes(tmp_path: Path) -> None:
    documents = make_documents(20)
    train_tokenizer(documents, 400).save_pretrained(tmp_path / "here")
    make_files(tmp_path, a="\f".join(texts(documents)))
    code = (
        "import sys; from cbd_hub.data import *\n"
        "documents = load_documents(DataConfig(text_files='a.txt'), sys.argv[1])\n"
        "train_tokenizer(documents, 400).save_pretrained(sys.argv[1] + '/there')"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        env={"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3", "PATH": "", "PYTHONPATH": ":".join(sys.path)},
    )
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert "tokenizer.json" in names
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_little_text_fills_less_than_the_vocabulary() -> None:
    assert 257 < len(train_tokenizer(Dataset.from_dict({"text": ["abab abab"]}), 5000)) < 300


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"257 or more .* got 256"):
        train_tokenizer(make_documents(1), 256)


# -- packing ---------------------------------------------------------------------------------------------------


def expected_blocks(documents: Dataset, tokenizer: PreTrainedTokenizerFast, length: int) -> list[list[int]]:
    tokens = [id for text in texts(documents) for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


@pytest.mark.parametrize("length", [2, 33, 128])
def test_blocks_are_the_documents_joined_by_end_of_text(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    documents = make_documents(70)  # more than are tokenised at once, so blocks cross batches
    blocks = pack(documents, tokenizer, length)
    assert blocks.column_names == ["input_ids"]
    assert blocks.features["input_ids"].feature.dtype == "int32"
    assert blocks["input_ids"][:] == expected_blocks(documents, tokenizer, length)
    assert not blocks.cache_files  # documents in memory leave no file behind


def test_a_stream_packs_alike_and_twice(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = make_documents(70)
    stream = pack(documents.to_iterable_dataset(), tokenizer, 50)
    for _ in range(2):
        assert [row["input_ids"] for row in stream] == expected_blocks(documents, tokenizer, 50)


def test_streamed_files_go_all_the_way(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_files(tmp_path, **{f"f{number:02}": make_text(number) for number in range(30)})
    streamed, loaded = (
        split_documents(load_documents(DataConfig(text_files="*.txt", streaming=streaming), tmp_path), 0.3, 0)
        for streaming in (True, False)
    )
    blocks = pack(streamed.train, tokenizer, 64)
    first = next(iter(token_batches(blocks, 4)))
    assert first.shape == (4, 64) and first.dtype == torch.int64
    assert len(texts(loaded.train)) == pytest.approx(len(texts(streamed.train)), abs=8)


def test_too_few_tokens_for_a_block_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = make_documents(2, paragraphs=1)
    had = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts(documents))
    assert len(pack(documents, tokenizer, had)) == 1
    with pytest.raises(RecipeError, match=f"has {had} tokens and one block needs {had + 1}"):
        pack(documents, tokenizer, had + 1)
    with pytest.raises(RecipeError, match=f"has {had} tokens and one block needs {had + 1}"):
        list(pack(documents.to_iterable_dataset(), tokenizer, had + 1))


def test_a_tokenizer_without_end_of_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(RecipeError, match="no eos_token"):
        pack(make_documents(1), bare, 8)


def test_token_batches_keep_the_order(tokenizer: PreTrainedTokenizerFast) -> None:
    blocks = pack(make_documents(20), tokenizer, 16)
    expected = torch.tensor(blocks["input_ids"][:])
    for source in (blocks, blocks.to_iterable_dataset(), expected, expected.to(torch.int32)):
        batches = list(token_batches(source, 5))
        assert all(batch.dtype == torch.int64 for batch in batches)
        assert [len(batch) for batch in batches[:-1]] == [5] * (len(batches) - 1)
        assert torch.equal(torch.cat(batches), expected)
