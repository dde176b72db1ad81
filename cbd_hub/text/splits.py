"""What of the documents is held out.

Whole documents are held out before anything is trained: ``validation`` chooses checkpoints and calibrates, ``test`` is
only ever reported. Several sources are split one by one, before they are mixed. The same text gives the same splits.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from cbd_hub.errors import RecipeError
from cbd_hub.text.documents import Documents, read_source
from cbd_hub.text.settings import DataConfig

__all__ = ["Splits", "load_splits", "split_documents"]


@dataclass(frozen=True)
class Splits:
    """Documents of three disjoint splits."""

    train: Documents
    """Trained on."""
    validation: Documents
    """Chooses checkpoints and calibrates; never trained on."""
    test: Documents
    """Reported, and used for nothing else."""


def load_splits(
    config: DataConfig, base_dir: str | Path = ".", tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Splits]:
    """Reads every source of a data config and holds documents of each out.

    What one source holds out is left out of the training text of all others too, and the validation text of one out
    of the test text of all others (whole documents; the tails of documents cut by position are not compared).

    Args:
        config: what to read.
        base_dir: folder that relative paths start from.
        tokenizer: needed for conversations alone: its chat template turns them into text.

    Returns:
        the splits of each source, in the order of ``config.sources``.

    Raises:
        RecipeError: as :func:`cbd_hub.text.documents.read_source` and :func:`split_documents` say.
    """
    splits = []
    for source in config.each_source():
        documents = read_source(
            source, base_dir, tokenizer, streaming=config.streaming, end_of_text=config.end_of_text
        )
        splits.append(split_documents(documents, config.held_out_fraction, config.seed))
    # The splits of a stream are a function of each text alone, so there copies are together already.
    return splits if config.streaming or len(splits) == 1 else _without_copies(splits)


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


def _without_copies(splits: list[Splits]) -> list[Splits]:
    """Leaves out of each split, in memory, what an earlier one of validation, test and train has in any source."""
    seen: set[float] = set()
    distinct: dict[str, list[Dataset]] = {}
    for name in ("validation", "test", "train"):
        hashes = [[_hash(row["text"], 0) for row in getattr(split, name)] for split in splits]
        distinct[name] = [
            getattr(split, name).select([index for index, value in enumerate(values) if value not in seen])
            for split, values in zip(splits, hashes, strict=True)
        ]
        seen.update(*hashes)
    return [Splits(**{name: parts[index] for name, parts in distinct.items()}) for index in range(len(splits))]


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
    for name, texts_of_split in pieces.items():
        if not texts_of_split:
            raise RecipeError(
                f"Too little text: {sum(map(len, texts))} characters in {len(texts)} document(s) leave nothing for "
                f"the {name} split (held_out_fraction {held_out_fraction}). Add text or raise held_out_fraction."
            )
    return Splits(**{name: Dataset.from_dict({"text": texts_of_split}) for name, texts_of_split in pieces.items()})


def _boundary(text: str, position: int) -> int:
    """The end of the last paragraph, or else of the last word, within 2 % before `position`; else `position`."""
    start = position - len(text) // 50
    for separator in ("\n\n", "\n", " "):
        place = text.rfind(separator, start, position)
        if place >= 0:
            return place + len(separator)
    return position
