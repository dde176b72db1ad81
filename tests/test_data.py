"""Tokenising, packing and mixing real text."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_text import make_documents, make_files, make_text, texts
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cbd_hub.data import pack, token_batches, train_tokenizer
from cbd_hub.documents import DataConfig, load_documents
from cbd_hub.errors import RecipeError
from cbd_hub.splits import split_documents


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(make_documents(), 320)


# -- tokenizer ----------------------------------------------------------------------------------------------------------


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
        "import sys; from cbd_hub.data import *; from cbd_hub.documents import *\n"
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


# -- packing ----------------------------------------------------------------------------------------------------------


def test_loading_writes_nothing_beside_the_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_files(tmp_path, a=make_text(1, 50))
    pack(load_documents(DataConfig(text_files="a.txt"), tmp_path), tokenizer, 16)
    assert [path.name for path in tmp_path.rglob("*")] == ["a.txt"]


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
