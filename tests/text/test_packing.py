"""Tokenizing, packing and mixing real text."""

import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from tiny_models import FAMILIES, tiny_config, tiny_model
from tiny_text import make_documents, make_files, make_text, texts, tokenizer_with_beginning
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import block_batches, mix, pack, pack_as, token_batches, train_tokenizer
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.splits import load_splits, split_documents


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(make_documents(), 320)


# -- tokenizer ---------------------------------------------------------------------------------------------------


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
        "import sys; from cbd_hub.text.packing import *; from cbd_hub.text.documents import *\n"
        "from cbd_hub.text.settings import DataConfig\n"
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


# -- packing -----------------------------------------------------------------------------------------------------


def test_loading_writes_nothing_beside_the_text(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_files(tmp_path, a=make_text(1, 50))
    pack(load_documents(DataConfig(text_files="a.txt"), tmp_path), tokenizer, 16)
    assert [path.name for path in tmp_path.rglob("*")] == ["a.txt"]


def expected_blocks(documents: Dataset, tokenizer: PreTrainedTokenizerFast, length: int) -> list[list[int]]:
    tokens = [id for text in texts(documents) for id in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


@pytest.mark.parametrize("length", [2, 33, 128])
def test_blocks_are_the_documents_joined_by_end_of_text(tokenizer: PreTrainedTokenizerFast, length: int) -> None:
    documents = make_documents(70)  # more than are tokenized at once, so blocks cross batches
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


# -- document boundaries ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", [7, 64, 500])
def test_boundaries_add_positions_and_labels(tokenizer: PreTrainedTokenizerFast, length: int, streaming: bool) -> None:
    documents = Dataset.from_dict({"text": ["<|endoftext|> inside", *texts(make_documents(40, 3)), ".", "the"]})
    source = documents.to_iterable_dataset() if streaming else documents
    rows = list(pack(source, tokenizer, length, boundaries=True))
    starts = [place == 0 for text in texts(documents) for place in range(len(tokenizer(text)["input_ids"]) + 1)]
    assert [row["input_ids"] for row in rows] == expected_blocks(documents, tokenizer, length)
    for number, row in enumerate(rows):
        place = -1
        for ids, position, label, first in zip(
            row["input_ids"], row["position_ids"], row["labels"], starts[number * length :], strict=False
        ):
            place = 0 if first or place < 0 else place + 1
            assert (position, label) == (place, ids if place else -100)


def packed_pieces(batch: dict[str, torch.Tensor], row: int) -> list[torch.Tensor]:
    """The token ids (1, s) of the documents in a block."""
    starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    return [batch["input_ids"][row : row + 1, a:b] for a, b in pairwise(starts)]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opt"}))
def test_a_packed_document_reads_as_if_alone(tokenizer: PreTrainedTokenizerFast, family: str, attention: str) -> None:
    blocks = pack(make_documents(30, 1), tokenizer, 60, boundaries=True)
    (batch,) = block_batches(blocks.select(range(3)), 8)
    model = tiny_model(tiny_config(family, vocab_size=len(tokenizer)))
    model.set_attn_implementation(attention)
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        packed = model(**inputs, use_cache=False).logits
        joined = model(batch["input_ids"], use_cache=False).logits
        for row in range(3):
            pieces = packed_pieces(batch, row)
            assert len(pieces) > 2
            alone = torch.cat([model(piece, use_cache=False).logits for piece in pieces], 1)[0]
            torch.testing.assert_close(packed[row], alone, rtol=1e-5, atol=1e-5)
            assert (joined[row] - alone).abs().max() > 0.01


# -- begin of text ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun() -> PreTrainedTokenizerFast:
    return tokenizer_with_beginning(make_documents())


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", [2, 7, 64])
def test_every_block_begins_as_a_text_does(begun: PreTrainedTokenizerFast, length: int, streaming: bool) -> None:
    documents = make_documents(70)
    rows = list(pack(documents.to_iterable_dataset() if streaming else documents, begun, length))
    plain = [t for text in texts(documents) for t in [*begun(text)["input_ids"][1:], begun.eos_token_id]]
    step = length - 1
    assert [row["input_ids"] for row in rows] == [
        [begun.bos_token_id, *plain[start : start + step]] for start in range(0, len(plain) - step + 1, step)
    ]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("length", [2, 7, 64, 500])
def test_with_boundaries_every_document_begins_too(
    begun: PreTrainedTokenizerFast, length: int, streaming: bool
) -> None:
    documents = Dataset.from_dict({"text": [*texts(make_documents(40, 3)), ".", "the"]})
    rows = list(pack(documents.to_iterable_dataset() if streaming else documents, begun, length, boundaries=True))
    written = []
    for row in rows:
        assert row["input_ids"][0] == begun.bos_token_id
        for place, (token, position, label) in enumerate(
            zip(row["input_ids"], row["position_ids"], row["labels"], strict=True)
        ):
            begins = token == begun.bos_token_id
            assert position == (0 if begins else row["position_ids"][place - 1] + 1)
            assert label == (-100 if begins else token)
        written += [token for token in row["input_ids"] if token != begun.bos_token_id]
    plain = [t for text in texts(documents) for t in [*begun(text)["input_ids"][1:], begun.eos_token_id]]
    assert written == plain[: len(written)]
    assert len(plain) - len(written) < length


def test_a_beginning_that_a_document_spells_is_not_written_twice(begun: PreTrainedTokenizerFast) -> None:
    documents = Dataset.from_dict({"text": ["<s>the cat", "the cat"]})
    (row,) = pack(documents, begun, 1 + 2 * (len(begun("the cat")["input_ids"])))
    half = [*begun("the cat")["input_ids"][1:], begun.eos_token_id]
    assert row["input_ids"] == [begun.bos_token_id, *half, *half]


def test_a_recipe_without_beginning_packs_as_before(begun: PreTrainedTokenizerFast) -> None:
    documents = make_documents(20)
    config = DataConfig(text_files="unused", sequence_length=33, begin_of_text="none")
    plain = [t for text in texts(documents) for t in [*begun(text)["input_ids"][1:], begun.eos_token_id]]
    assert pack_as(config, documents, begun)["input_ids"][0] == plain[:33]


# -- several sources -------------------------------------------------------------------------------------------


def make_sources(folder: Path, small: int = 60, large: int = 400) -> dict[str, Any]:
    """Files of cats with three quarters of the weight, and fewer rows of long texts about dogs."""
    make_files(folder, **{f"c{number:03}": make_text(number, 2) for number in range(large)})
    (folder / "dogs").mkdir()
    for part in range(2):
        rows = [json.dumps({"text": make_text(n, 9).replace("cat", "dog")}) for n in range(part, small, 2)]
        (folder / "dogs" / f"{part}.jsonl").write_text("\n".join(rows))
    return {"sources": [{"text_files": "c*.txt", "weight": 3}, {"dataset": {"name": "dogs"}, "weight": 1}]}


def mixed(folder: Path, tokenizer: PreTrainedTokenizerFast, split: str = "train", **fields: Any) -> Any:
    config = DataConfig.model_validate({"held_out_fraction": 0.3, **fields})
    packed = [pack(getattr(splits, split), tokenizer, 24) for splits in load_splits(config, folder)]
    return mix(packed, config.shares, config.seed, repeat=split == "train"), packed


def rows_of(blocks: Any) -> list[list[int]]:
    return [row["input_ids"] for row in blocks]


@pytest.mark.parametrize("streaming", [False, True])
def test_weights_are_shares_of_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, streaming: bool) -> None:
    fields = {**make_sources(tmp_path), "streaming": streaming}
    blocks, packed = mixed(tmp_path, tokenizer, **fields)
    assert isinstance(blocks, IterableDataset if streaming else Dataset)
    got, cats, dogs = rows_of(blocks), rows_of(packed[0]), rows_of(packed[1])
    cat_blocks = {tuple(row) for row in cats}
    of_cats = [row for row in got if tuple(row) in cat_blocks]
    of_dogs = [row for row in got if tuple(row) not in cat_blocks]
    assert len(of_cats) / len(got) == pytest.approx(0.75, abs=0.05)
    for found, source in ((of_cats, cats), (of_dogs, dogs)):  # in order, again and again, and all of it
        assert len(found) >= len(source)
        assert found == [source[number % len(source)] for number in range(len(found))]
    assert rows_of(mixed(tmp_path, tokenizer, **fields)[0]) == got
    assert rows_of(mixed(tmp_path, tokenizer, **fields, seed=1)[0])[:50] != got[:50]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_measurement_counts_no_block_twice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    blocks, packed = mixed(tmp_path, tokenizer, "test", **make_sources(tmp_path), streaming=streaming)
    got, cats, dogs = rows_of(blocks), rows_of(packed[0]), rows_of(packed[1])
    of_dogs = [row for row in got if row in dogs]
    of_cats = [row for row in got if row not in dogs]
    assert of_cats == cats[: len(of_cats)] and of_dogs == dogs[: len(of_dogs)]
    assert len(of_cats) == len(cats) or len(of_dogs) == len(dogs)
    assert len(of_cats) / len(got) == pytest.approx(0.75, abs=0.15)


def test_one_source_is_not_mixed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_files(tmp_path, **{f"c{number}": make_text(number, 2) for number in range(40)})
    plain = {"text_files": "c*.txt"}
    blocks, (packed,) = mixed(tmp_path, tokenizer, **plain)
    assert blocks is packed
    assert rows_of(mixed(tmp_path, tokenizer, sources=[{**plain, "weight": 7}])[0]) == rows_of(blocks)


# -- going on in the middle of a stream ------------------------------------------------------------------------

KINDS = ["files", "rows", "memory", "sources", "boundaries", "taken", "begun", "begun with boundaries"]


def make_stream(folder: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> IterableDataset:
    if kind == "memory":
        return pack(make_documents(150, 4).to_iterable_dataset(num_shards=3), tokenizer, 50)
    data = make_sources(folder) if not (folder / "dogs").exists() else {"sources": SOURCES}
    if kind == "sources":
        return mixed(folder, tokenizer, **data, streaming=True)[0]
    source = data["sources"][kind != "files"]
    fields = {name: value for name, value in source.items() if name != "weight"}
    documents = load_documents(DataConfig.model_validate({**fields, "streaming": True}), folder)
    if kind.startswith("begun"):
        tokenizer = tokenizer_with_beginning(make_documents())
    blocks = pack(split_documents(documents, 0.2, 0).train, tokenizer, 50, boundaries="boundaries" in kind)
    return blocks.take(120) if kind == "taken" else blocks


SOURCES = [{"text_files": "c*.txt", "weight": 3}, {"dataset": {"name": "dogs"}, "weight": 1}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_goes_on_where_it_was(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    expected = list(make_stream(tmp_path, tokenizer, kind))
    assert len(expected) > 100
    for stop in (1, 2, 39, 90, len(expected) - 1, len(expected)):
        stream = make_stream(tmp_path, tokenizer, kind)
        rows = iter(stream)
        assert [next(rows) for _ in range(stop)] == expected[:stop]
        state = json.loads(json.dumps(stream.state_dict()))
        rows.close()
        again = make_stream(tmp_path, tokenizer, kind)
        again.load_state_dict(state)
        rows = iter(again)
        middle = [row for _, row in zip(range(5), rows, strict=False)]
        state = again.state_dict()  # and a second time
        rows.close()
        last = make_stream(tmp_path, tokenizer, kind)
        last.load_state_dict(state)
        assert middle + list(last) == expected[stop:]


def test_going_on_reads_a_batch_again_and_not_the_text_before_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    make_files(tmp_path, **{f"f{number:03}": make_text(number, 6) for number in range(300)})
    config = DataConfig(text_files="*.txt", streaming=True)
    stream = pack(load_documents(config, tmp_path), tokenizer, 64)
    rows = iter(stream)
    for _ in range(400):
        next(rows)
    state, expected = stream.state_dict(), list(rows)
    position = state["examples_iterable"]["before"]["documents"]["shard_idx"]
    assert position > 100
    for path in sorted(tmp_path.iterdir())[:position]:  # what was read is not needed any more
        path.write_bytes(b"\xff")
    again = pack(load_documents(config, tmp_path), tokenizer, 64)
    again.load_state_dict(state)
    assert list(again) == expected


class Worker(TorchIterableDataset):
    """A stream with one state a worker, as torchdata's StatefulDataLoader has: rows, and the state after each."""

    def __init__(self, stream: IterableDataset, states: dict[int, Any] | None = None) -> None:
        self.stream = stream
        self.states = states or {}

    def __iter__(self) -> Iterator[tuple[int, Any, Any]]:
        worker = get_worker_info().id
        if worker in self.states:
            self.stream.load_state_dict(self.states[worker])
        for row in self.stream:
            yield worker, row["input_ids"], self.stream.state_dict()


def as_it_is(row: Any) -> Any:
    return row


def load(dataset: Any) -> DataLoader:
    return DataLoader(dataset, batch_size=None, num_workers=2, collate_fn=as_it_is)


@pytest.mark.parametrize("kind", ["files", "sources"])
def test_two_workers_share_a_stream_and_go_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    whole = list(load(Worker(make_stream(tmp_path, tokenizer, kind))))
    assert {worker for worker, _, _ in whole} == {0, 1}
    plain = [row["input_ids"] for row in load(make_stream(tmp_path, tokenizer, kind))]
    assert plain == [row for _, row, _ in whole]
    stop = 90
    states = {worker: state for worker, _, state in whole[:stop]}
    rest = list(load(Worker(make_stream(tmp_path, tokenizer, kind), states)))
    for worker in (0, 1):
        assert [row for w, row, _ in rest if w == worker] == [row for w, row, _ in whole[stop:] if w == worker]


def test_the_state_of_one_worker_is_refused_by_others(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = make_stream(tmp_path, tokenizer, "files")
    rows = iter(stream)
    for _ in range(200):
        next(rows)
    rows.close()
    stream.load_state_dict(stream.state_dict())
    with pytest.raises(RecipeError, match=r"is that of worker 0 of 1, and worker 0 of 2 cannot go on"):
        list(load(stream))


def test_every_epoch_has_the_same_blocks(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = make_stream(tmp_path, tokenizer, "files")
    first = list(stream)
    stream.set_epoch(3)
    assert list(stream) == first
