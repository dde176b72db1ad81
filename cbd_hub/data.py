"""Text to packed token blocks.

Text comes from files or from a dataset on the Hub and becomes *documents* (a dataset with one column,
``text``). Whole documents are held out before anything is trained: ``validation`` chooses checkpoints and
calibrates, ``test`` is only ever reported. The rest is tokenised, joined with an end-of-text token after
every document and cut into *blocks* of equal length, so that no computation is spent on padding.

Everything is deterministic: the same text gives the same splits, the same tokenizer and the same blocks.
"""

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetsError
from pydantic import BaseModel, Field, model_validator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError, did_you_mean

__all__ = [
    "DataConfig",
    "DatasetSource",
    "Splits",
    "load_documents",
    "pack",
    "split_documents",
    "token_batches",
    "train_tokenizer",
]

Documents: TypeAlias = Dataset | IterableDataset

END_OF_TEXT = "<|endoftext|>"
_DOCUMENTS_PER_CALL = 32  # tokenised at once; bounds the Python lists of token ids that a tokenizer returns


class DatasetSource(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """A text column of a dataset on the Hub, or of a local dataset folder."""

    name: str
    """Repo id on the Hub, or a folder of data files relative to the recipe."""
    config: str | None = None
    """Configuration (subset) of the dataset, where it has several."""
    split: str = "train"
    """Split to read; slices such as "train[:1%]" work too, except when streaming."""
    column: str = "text"
    """The column that holds the text, one document a row."""
    revision: str | None = None
    """Branch, tag or commit of the dataset repository; a commit makes the build repeatable."""


class DataConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """Which text a chain is distilled on: exactly one of `text_files` and `dataset`."""

    text_files: str | list[str] | None = None
    """Paths or glob patterns of UTF-8 text files, relative to the recipe's folder. Each file is one
    document."""
    dataset: DatasetSource | None = None
    """A dataset to read the text from."""
    sequence_length: int = Field(default=512, ge=2)
    """Length of a block, in tokens."""
    held_out_fraction: float = Field(default=0.1, gt=0, le=0.5)
    """Share of the text that is never trained on, 0 to 0.5: half validates, half tests."""
    streaming: bool = False
    """Read the documents as they are needed instead of loading them first, for text larger than memory or
    disk."""
    seed: int = 0
    """Decides which documents are held out."""

    @model_validator(mode="after")
    def _exactly_one_source(self) -> "DataConfig":
        if bool(self.text_files) == (self.dataset is not None):
            given = "both" if self.dataset else "neither"
            raise ValueError(f"give exactly one of text_files and dataset, got {given}")
        return self


@dataclass(frozen=True)
class Splits:
    """Documents of three disjoint splits."""

    train: Documents
    """Trained on."""
    validation: Documents
    """Chooses checkpoints and calibrates; never trained on."""
    test: Documents
    """Reported, and used for nothing else."""


def load_documents(config: DataConfig, base_dir: str | Path = ".") -> Documents:
    """Reads the documents of a data config into a dataset with the one column ``text``.

    Files are read in the order of their paths, line ends become ``\\n``, and a single file is cut into
    documents at its form feeds, if it has any. Rows of a dataset that are empty are left out.

    Args:
        config: what to read.
        base_dir: folder that relative paths start from.

    Returns:
        a ``Dataset``, or with `config.streaming` an ``IterableDataset`` that reads one file or row at a time.

    Raises:
        RecipeError: nothing matches a pattern; a file cannot be read, is not UTF-8 or is empty; the dataset,
            its split or its column does not exist.
    """
    _follow_hub_progress_setting()
    if config.dataset is not None:
        return _load_rows(config.dataset, Path(base_dir), config.streaming)
    paths = _match_files(config.text_files or [], Path(base_dir))
    if config.streaming:
        return IterableDataset.from_generator(_read_documents, gen_kwargs={"paths": tuple(paths)})
    return Dataset.from_list(list(_read_documents(paths)))


def split_documents(documents: Documents, held_out_fraction: float, seed: int) -> Splits:
    """Holds out whole documents, chosen by a hash of the seed and their text.

    Documents are taken in the order of their hashes until ``held_out_fraction / 2`` of all characters are in
    `validation`, then as many in `test`; the rest is `train`. Copies of one text share a hash and a split.
    Where whole documents would leave less than half of the promised text to train on (one document, or very
    few), every document is cut by position instead: its tail is held out, cut at a paragraph or a space.

    A stream is never counted, so there each document is held out with probability `held_out_fraction`, by its
    hash alone. Its held-out splits are as long as the stream allows: evaluate them with a limit.

    Args:
        documents: column ``text``.
        held_out_fraction: share of the characters (of the documents, for a stream) held out, 0 to 0.5.
        seed: another seed holds out other documents.

    Raises:
        RecipeError: `held_out_fraction` is out of range, or there is too little text for three splits.
    """
    if not 0 < held_out_fraction <= 0.5:
        raise RecipeError(f"held_out_fraction must be above 0 and at most 0.5, got {held_out_fraction}.")
    half = held_out_fraction / 2
    if isinstance(documents, IterableDataset):

        def between(low: float, high: float) -> IterableDataset:
            return documents.filter(_hash_between, fn_kwargs={"seed": seed, "low": low, "high": high})

        return Splits(between(2 * half, 1.0), validation=between(0.0, half), test=between(half, 2 * half))

    hashes, lengths = [], []
    for row in documents:
        hashes.append(_hash(row["text"], seed))
        lengths.append(len(row["text"]))
    total = sum(lengths)
    chosen: dict[str, list[int]] = {"validation": [], "test": [], "train": []}
    held, previous, name = 0, -1.0, "validation"
    for index in sorted(range(len(hashes)), key=lambda i: (hashes[i], i)):
        if hashes[index] != previous:  # copies stay together
            name = "validation" if held < half * total else "test" if held < 2 * half * total else "train"
        chosen[name].append(index)
        held, previous = held + lengths[index], hashes[index]
    in_train = sum(lengths[index] for index in chosen["train"])
    if all(chosen.values()) and in_train >= (1 - held_out_fraction) / 2 * total:
        return Splits(**{name: documents.select(sorted(indices)) for name, indices in chosen.items()})
    return _cut_by_position([row["text"] for row in documents], held_out_fraction)


def train_tokenizer(documents: Documents, vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer, which can spell any text and give it back unchanged.

    ``<|endoftext|>``, id 0, begins, ends and pads. The vocabulary holds all 256 bytes and merges of pairs
    seen at least twice, so little text may fill less than `vocab_size`: size a model by ``len(tokenizer)``.

    Args:
        documents: column ``text``; of a split, pass `train`.
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


def pack(documents: Documents, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> Documents:
    """Tokenises documents, writes an end-of-text token after each, and cuts the lot into blocks.

    Blocks cross document borders. The last tokens, fewer than a block, are left out. Text that spells a
    special token is read as that token, as everywhere in transformers. Blocks of documents in memory stay in
    memory; those of a dataset on disk are cached beside it.

    Args:
        documents: column ``text``.
        tokenizer: needs an ``eos_token``.
        sequence_length: S, tokens in a block.

    Returns:
        a dataset of the documents' kind with the one column ``input_ids``: (S,) int32 a row.

    Raises:
        RecipeError: the tokenizer has no end-of-text token, or the text fills no block (for a stream: when
            read).

    S sequence length.
    """
    if tokenizer.eos_token_id is None:
        raise RecipeError("The tokenizer has no eos_token, which ends a document; set tokenizer.eos_token.")
    _follow_hub_progress_setting()
    features = Features({"input_ids": List(Value("int32"), length=sequence_length)})
    if isinstance(documents, IterableDataset):
        arguments = {"documents": documents, "tokenizer": tokenizer, "sequence_length": sequence_length}
        return IterableDataset.from_generator(_stream_blocks, features=features, gen_kwargs=arguments)
    blocks = documents.map(
        _Packer(tokenizer, sequence_length),
        batched=True,
        batch_size=_DOCUMENTS_PER_CALL,
        remove_columns=documents.column_names,
        features=features,
        desc="Packing",
    )
    if not len(blocks):
        had = sum(len(_token_ids([row["text"]], tokenizer)[0]) for row in documents)
        raise _no_block(had, sequence_length)
    return blocks


def token_batches(blocks: Documents | Tensor, batch_size: int) -> Iterator[Tensor]:
    """Yields packed blocks in order as LongTensors of shape (batch_size, S); the last may have fewer rows.

    Args:
        blocks: the result of :func:`pack`, or a tensor (N, S) of token ids.
        batch_size: rows of a batch.

    N blocks, S sequence length.
    """
    if isinstance(blocks, Tensor):
        yield from (batch.long() for batch in blocks.split(batch_size))
        return
    for batch in blocks.with_format("numpy").iter(batch_size=batch_size):
        yield torch.from_numpy(np.asarray(batch["input_ids"], dtype=np.int64))


def _follow_hub_progress_setting() -> None:
    """The variable that turns the Hub's progress bars off turns those of `datasets`, which has its own, off too."""
    if os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}:
        disable_progress_bars()


def _match_files(patterns: str | list[str], base_dir: Path) -> list[Path]:
    """All files that match any pattern, sorted by their path below `base_dir`, each once."""
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [
            name for name in glob.glob(pattern, root_dir=base_dir, recursive=True) if not (base_dir / name).is_dir()
        ]
        if not names:
            hint = "it is a folder: add /*.txt" if (base_dir / pattern).is_dir() else "check the path or pattern"
            raise RecipeError(f"No text file matches {pattern!r} in {base_dir.resolve()}: {hint}.")
        matched.update(Path(name).as_posix() for name in names)
    return [base_dir / name for name in sorted(matched)]


def _read_documents(paths: Sequence[Path]) -> Iterator[dict[str, str]]:
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8 (byte {error.start}); convert it to UTF-8.") from error
        except OSError as error:
            raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error
        if not text.strip():
            raise RecipeError(f"{path} is empty; remove it from text_files.")
        pieces = text.split("\f") if len(paths) == 1 else [text]
        yield from ({"text": piece} for piece in pieces if piece.strip())


def _load_rows(source: DatasetSource, base_dir: Path, streaming: bool) -> Documents:
    folder = base_dir / source.name
    try:
        path = str(folder) if folder.is_dir() else source.name
        rows = load_dataset(path, source.config, split=source.split, revision=source.revision, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise RecipeError(f"The dataset {source.name!r} cannot be loaded: {error}") from error
    columns = rows.column_names or list(next(iter(rows), {}))
    if source.column not in columns:
        raise RecipeError(
            f"The dataset {source.name!r} has no column {source.column!r}, only {', '.join(columns) or 'none'}."
            + did_you_mean(source.column, columns)
        )
    rows = rows.select_columns(source.column)
    if source.column != "text":
        rows = rows.rename_column(source.column, "text")
    return rows.filter(_has_text, input_columns="text")


def _has_text(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())


def _hash(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the seed and the text alone, on every machine."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _hash_between(row: dict[str, str], seed: int, low: float, high: float) -> bool:
    return low <= _hash(row["text"], seed) < high


def _cut_by_position(texts: list[str], held_out_fraction: float) -> Splits:
    """Cuts the tail of every document off: its first half validates, its second half tests."""
    pieces: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for text in texts:
        first = _boundary(text, round(len(text) * (1 - held_out_fraction)))
        second = max(first, _boundary(text, round(len(text) * (1 - held_out_fraction / 2))))
        for name, piece in zip(pieces, (text[:first], text[first:second], text[second:]), strict=True):
            if piece.strip():
                pieces[name].append(piece)
    for name, kept in pieces.items():
        if not kept:
            raise RecipeError(
                f"Too little text: {sum(map(len, texts))} characters in {len(texts)} document(s) leave nothing for "
                f"the {name} split (held_out_fraction {held_out_fraction}). Add text or raise held_out_fraction."
            )
    return Splits(**{name: Dataset.from_dict({"text": kept}) for name, kept in pieces.items()})


def _boundary(text: str, position: int) -> int:
    """The end of the last paragraph, or else of the last word, within 2 % before `position`; else `position`."""
    start = position - len(text) // 50
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, start, position)
        if found >= 0:
            return found + len(separator)
    return position


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of each text, end of text included."""
    encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]


class _Packer:
    """Cuts batches of documents into blocks, keeping the tokens that fill no block for the next batch."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sequence_length: int) -> None:
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.rest = np.empty(0, dtype=np.int32)

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, np.ndarray]:
        ids = [np.asarray(ids, dtype=np.int32) for ids in _token_ids(batch["text"], self.tokenizer)]
        tokens = np.concatenate([self.rest, *ids])
        full = len(tokens) // self.sequence_length * self.sequence_length
        self.rest = tokens[full:]
        return {"input_ids": tokens[:full].reshape(-1, self.sequence_length)}


def _stream_blocks(
    documents: IterableDataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int
) -> Iterator[dict[str, np.ndarray]]:
    packer = _Packer(tokenizer, sequence_length)
    empty = True
    for batch in documents.iter(batch_size=_DOCUMENTS_PER_CALL):
        for block in packer(batch)["input_ids"]:
            empty = False
            yield {"input_ids": block}
    if empty:
        raise _no_block(len(packer.rest), sequence_length)


def _no_block(had: int, needed: int) -> RecipeError:
    return RecipeError(f"The text has {had} tokens and one block needs {needed}. Add text or lower sequence_length.")
