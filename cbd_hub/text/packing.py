"""Documents to packed token blocks.

Documents are tokenized, joined with an end-of-text token after every one and cut into *blocks* of equal length, so
that no computation is spent on padding. Every block begins as the tokenizer begins a text
(:mod:`cbd_hub.text.text_ends`), so that a model reads it as it was trained to. Several sources are packed one by one
and their blocks are mixed: all blocks are equally long, so shares of blocks are shares of tokens.

Everything is deterministic: the same text gives the same tokenizer and the same blocks.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import DatasetInfo, Features, IterableDataset, List, Value, interleave_datasets
from datasets.iterable_dataset import _BaseExamplesIterable
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.text.documents import Documents, follow_hub_progress_setting
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.text_ends import TextEnds, find_ends

__all__ = ["block_batches", "mix", "pack", "pack_as", "token_batches", "train_tokenizer"]

END_OF_TEXT = "<|endoftext|>"
_DOCUMENTS_PER_CALL = 32  # tokenized at once; bounds the Python lists of token ids that a tokenizer returns


def train_tokenizer(documents: Iterable[Mapping[str, str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which can spell any text and give it back unchanged.

    ``<|endoftext|>``, id 0, begins, ends and pads. The vocabulary holds all 256 bytes and merges of pairs
    seen at least twice, so little text may fill less than `vocab_size`: size a model by ``len(tokenizer)``.

    Args:
        documents: rows with a column ``text``; of splits, pass `train`, and of several sources a chain of them.
        vocab_size: entries, special token included, at most; at least 257.

    Raises:
        RecipeError: `vocab_size` is below 257.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size <= len(alphabet):
        raise RecipeError(f"vocab_size must be 257 or more (256 bytes and {END_OF_TEXT}), got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def pack(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    boundaries: bool = False,
    ends: TextEnds | None = None,
) -> Documents:
    """Tokenizes documents, writes an end-of-text token after each, and cuts the lot into blocks.

    Where the tokenizer puts a token before a text, every block begins with it (with `boundaries` every document too);
    as the first of its block or document it is never predicted. Blocks cross document borders. The last tokens, fewer
    than a block, are left out. Text that spells a special token is read as that token, as everywhere in transformers;
    a begin-of-text token that a document spells first is not written twice. Blocks of documents in memory stay in
    memory; those of a dataset on disk are cached beside it.

    A stream of blocks has ``state_dict`` and ``load_state_dict``: loaded into a stream packed alike, it yields exactly
    the blocks that were still to come. At most 32 documents are tokenized again for it, and a source is read up to
    the place within its file. Each worker of a data loader packs files of its own, so a state belongs to one worker
    (``StatefulDataLoader`` of torchdata keeps them apart). The order is the same in every epoch.

    Args:
        documents: column ``text``.
        tokenizer: needs an ``eos_token``.
        sequence_length: S, tokens in a block, the one that it begins with included.
        boundaries: keep the documents of a block apart. Transformers then lets no token attend to another document,
            given `position_ids` and no attention mask (:func:`cbd_hub.evaluation.held_out.evaluate_loss` refuses a
            model that does not).
        ends: the tokens around a text; by default those of :func:`cbd_hub.text.text_ends.find_ends`.

    Returns:
        a dataset of the documents' kind with the one column ``input_ids``: (S,) int32 a row. With `boundaries` also
        ``position_ids``, which start again at 0 with each document (and with each block, where one goes on), and
        ``labels``: the ids, but -100 where the position is 0, so that no document is predicted from another.

    Raises:
        RecipeError: the tokenizer has no end-of-text token or puts several tokens before a text, or the text fills no
            block (for a stream: when read); when a stream is read: the state that it was given is another worker's.

    S sequence length.
    """
    ends = find_ends(tokenizer) if ends is None else ends
    follow_hub_progress_setting()
    columns = ("input_ids", "position_ids", "labels") if boundaries else ("input_ids",)
    features = Features({name: List(Value("int32"), length=sequence_length) for name in columns})
    packer = _Packer(tokenizer, sequence_length, boundaries, ends)
    if isinstance(documents, IterableDataset):
        packed = _PackedExamples(documents._ex_iterable, packer)
        return IterableDataset(packed, DatasetInfo(features=features), distributed=documents._distributed)
    blocks = documents.map(
        packer,
        batched=True,
        batch_size=_DOCUMENTS_PER_CALL,
        remove_columns=documents.column_names,
        features=features,
        desc="Packing",
    )
    if not len(blocks):
        had = sum(len(packer.token_ids([row["text"]])[0]) for row in documents)
        raise _no_block(had, sequence_length)
    return blocks


def pack_as(config: DataConfig, documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Documents:
    """Packs documents as a recipe's ``data`` says: see :func:`pack`."""
    ends = find_ends(tokenizer, config.begin_of_text, config.end_of_text)
    return pack(documents, tokenizer, config.sequence_length, config.document_boundaries, ends)


def mix(blocks: Sequence[Documents], shares: Sequence[float], seed: int, repeat: bool = True) -> Documents:
    """Mixes the packed blocks of several sources, each drawn with the probability that is its share of tokens.

    Blocks of a source keep their order. In memory, 8 bytes a block of the mixture are needed beside the blocks.

    Args:
        blocks: what :func:`pack` returns, once a source; all in memory or all streams.
        shares: probability of each, summing to 1 (:attr:`cbd_hub.text.documents.DataConfig.shares`).
        seed: decides the order.
        repeat: for training: a source that runs out starts again, until every block was used at least once. False is
            for measurements: the mixture ends where the first source does, so no block counts twice.
    """
    if len(blocks) == 1:
        return blocks[0]
    stop = "all_exhausted" if repeat else "first_exhausted"
    return interleave_datasets(list(blocks), probabilities=list(shares), seed=seed, stopping_strategy=stop)


def block_batches(blocks: Documents | Tensor, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Yields packed blocks in order, every column as LongTensors of shape (batch_size, S); the last may be shorter.

    Args:
        blocks: the result of :func:`pack` or :func:`mix`, or a tensor (N, S) of token ids.
        batch_size: rows of a batch.

    N blocks, S sequence length.
    """
    if isinstance(blocks, Tensor):
        yield from ({"input_ids": batch.long()} for batch in blocks.split(batch_size))
        return
    for batch in blocks.with_format("numpy").iter(batch_size=batch_size):
        yield {name: torch.from_numpy(np.asarray(rows, dtype=np.int64)) for name, rows in batch.items()}


def token_batches(blocks: Documents | Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yields the token ids of packed blocks alone; see :func:`block_batches`."""
    yield from (batch["input_ids"] for batch in block_batches(blocks, batch_size))


class _Packer:
    """Cuts batches of documents into blocks, keeping the tokens that fill no block for the next batch."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, sequence_length: int, boundaries: bool, ends: TextEnds
    ) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.boundaries = boundaries
        self.ends = ends
        self.rest = np.empty((2, 0), dtype=np.int32)
        """Token ids, and whether each is the first of its document."""

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        ids = self.token_ids(batch["text"])
        lengths = [len(document) for document in ids]
        tokens = np.zeros((2, sum(lengths)), dtype=np.int32)
        tokens[0] = np.concatenate(ids)
        tokens[1, np.cumsum([0, *lengths[:-1]])] = 1
        tokens = np.concatenate([self.rest, tokens], axis=1)
        (blocks, first), self.rest = self._cut(tokens)
        if not self.boundaries:
            return {"input_ids": blocks}
        place = np.arange(self.sequence_length, dtype=np.int32)
        positions = place - np.maximum.accumulate(np.where(first, place, 0), axis=1)
        return {"input_ids": blocks, "position_ids": positions, "labels": np.where(positions, blocks, -100)}

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text, its end and with boundaries its beginning included."""
        encoded: Any = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        begin, end = self.ends
        before = [begin] if self.boundaries and begin is not None else []
        return [[*before, *(ids[1:] if ids and ids[0] == begin else ids), end] for ids in encoded["input_ids"]]

    def _cut(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cuts a stream (2, n) of tokens and first places into blocks (2, N, S); returns what is left over, too."""
        length, begin = self.sequence_length, self.ends.begin
        if begin is None:
            full = tokens.shape[1] // length * length
            return tokens[:, :full].reshape(2, -1, length), tokens[:, full:]
        blocks, start = [], 0
        opening = np.array([[begin], [1]], dtype=np.int32)
        while True:
            begun = self.boundaries and start < tokens.shape[1] and tokens[1, start]
            stop = start + length - (not begun)
            if stop > tokens.shape[1]:
                break
            block = tokens[:, start:stop]
            blocks.append(block if begun else np.concatenate([opening, block], axis=1))
            start = stop
        return np.stack(blocks, 1) if blocks else np.empty((2, 0, length), dtype=np.int32), tokens[:, start:]


class _PackedExamples(_BaseExamplesIterable):  # the base of all streams of `datasets`, underscore or not
    """Blocks of a stream of documents.

    Its state is that of the documents before the batch that is being yielded, the tokens that were left over by then,
    and how many blocks of the batch were yielded.
    """

    def __init__(self, documents: _BaseExamplesIterable, packer: _Packer, shard: str = "") -> None:
        super().__init__()
        self.ex_iterable = documents
        self.packer = packer
        self.shard = shard

    def __iter__(self) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        packer = copy(self.packer)
        state: dict[str, Any] = self._init_state_dict() if self._state_dict is None else self._state_dict
        before, skipped = state["before"], state["blocks"]
        if before is not None:
            if before["shard"] != self.shard:
                raise RecipeError(
                    f"This state of a stream is that of worker {before['shard'] or '0 of 1'}, and worker "
                    f"{self.shard or '0 of 1'} cannot go on from it; use as many data loader workers as before, each "
                    "with its own state."
                )
            self.ex_iterable.load_state_dict(before["documents"])
            packer.rest = np.frombuffer(bytes.fromhex(before["rest"]), dtype=np.int32).reshape(2, -1)
        is_new = before is None and not skipped
        documents = iter(self.ex_iterable)
        while texts := [row["text"] for _, row in islice(documents, _DOCUMENTS_PER_CALL)]:
            columns = packer({"text": texts})
            for block in range(skipped, len(columns["input_ids"])):
                is_new, state["blocks"] = False, block + 1
                yield str(block), {name: rows[block] for name, rows in columns.items()}
            rest = packer.rest.tobytes().hex()  # immutable, so copying a state costs nothing
            state["before"] = {"documents": self.ex_iterable.state_dict(), "rest": rest, "shard": self.shard}
            skipped = state["blocks"] = 0
        if is_new:
            raise _no_block(packer.rest.shape[1], packer.sequence_length)

    def _init_state_dict(self) -> dict[str, Any]:
        self.ex_iterable._init_state_dict()
        self._state_dict = {"before": None, "blocks": 0, "type": type(self).__name__}
        return self._state_dict

    @property
    def num_shards(self) -> int:
        """As many as the documents have: files, as a rule."""
        return int(self.ex_iterable.num_shards)

    def shard_data_sources(self, num_shards: int, index: int, contiguous: bool = True) -> "_PackedExamples":
        """The part that one of several workers or nodes packs."""
        documents = self.ex_iterable.shard_data_sources(num_shards, index, contiguous=contiguous)
        own = [self.shard] if self.shard else []
        own += [f"{index} of {num_shards}"] if num_shards > 1 else []
        return _PackedExamples(documents, self.packer, ", ".join(own))

    def shuffle_data_sources(self, generator: np.random.Generator) -> "_PackedExamples":
        """The same: every epoch has the order of the first."""
        return self

    def reshard_data_sources(self) -> "_PackedExamples":
        """The same: files are not taken apart."""
        return self


def _no_block(had: int, needed: int) -> RecipeError:
    return RecipeError(f"The text has {had} tokens and one block needs {needed}. Add text or lower sequence_length.")
