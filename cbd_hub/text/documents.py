"""Where text comes from.

Text comes from files or from a dataset, on the Hub or on disk, and becomes *documents*: a dataset with one column,
``text``. Conversations become text through the tokenizer's chat template.
"""

import glob
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset, Value, disable_progress_bars, load_dataset
from datasets.exceptions import DatasetsError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from cbd_hub.errors import RecipeError, did_you_mean
from cbd_hub.text.settings import DataConfig, DatasetSource, SourceConfig
from cbd_hub.text.text_ends import find_ends

__all__ = [
    "Documents",
    "follow_hub_progress_setting",
    "load_documents",
    "read_source",
]

_JSON_LINES = (".jsonl", ".ndjson")
"""Suffixes of files that hold one JSON value a line."""

Documents: TypeAlias = Dataset | IterableDataset
"""Rows in memory or on disk, or a stream of them."""


def load_documents(
    config: DataConfig, base_dir: str | Path = ".", tokenizer: PreTrainedTokenizerBase | None = None
) -> Documents:
    """Reads the documents of a data config that has one source; see :func:`read_source`.

    Raises:
        RecipeError: there are several sources, or as :func:`read_source` says.
    """
    sources = config.each_source()
    if len(sources) > 1:
        raise RecipeError(f"The config names {len(sources)} sources; read each with read_source, or use load_splits.")
    return read_source(sources[0], base_dir, tokenizer, streaming=config.streaming, end_of_text=config.end_of_text)


def read_source(
    source: SourceConfig,
    base_dir: str | Path = ".",
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    streaming: bool = False,
    end_of_text: str = "auto",
) -> Documents:
    """Reads the documents of a source into a dataset with the one column ``text``.

    Files are read in the order of their paths; those that end in ``.gz`` are unpacked. ``.jsonl`` files hold one
    object a line, whose ``text`` is a document. In others line ends become ``\\n``, and a single file is cut into
    documents at its form feeds, if it has any. Rows of a dataset that are empty are left out. Where a chat template
    writes the end of text last it is left off: :func:`cbd_hub.text.packing.pack` writes one.

    Args:
        source: what to read.
        base_dir: folder that relative paths start from.
        tokenizer: needed for conversations alone: its chat template turns them into text.
        streaming: read one file or row at a time.
        end_of_text: as in :class:`cbd_hub.text.settings.DataConfig`.

    Returns:
        a ``Dataset``, or with `streaming` an ``IterableDataset``.

    Raises:
        RecipeError: nothing matches a pattern; a file cannot be read, is not UTF-8 or is empty; the dataset,
            its split or its column does not exist; the column holds neither text nor conversations; there is no chat
            template for them, or a message is malformed (for a stream: when read).
    """
    follow_hub_progress_setting()
    if source.dataset is not None:
        return _load_rows(source.dataset, Path(base_dir), streaming, tokenizer, end_of_text)
    paths = _match_files(source.text_files or [], Path(base_dir))
    cut = len(paths) == 1
    if streaming:  # each path of the list is a shard: a stream is taken up again at its file, not at the first
        return IterableDataset.from_generator(_read_documents, gen_kwargs={"paths": paths, "cut": cut})
    return Dataset.from_list(list(_read_documents(paths, cut)))


def follow_hub_progress_setting() -> None:
    """Silences the bars of `datasets`, which has a switch of its own, if ``HF_HUB_DISABLE_PROGRESS_BARS`` is set.

    So does a standard error that is no terminal.
    """
    silenced = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}
    if silenced or not sys.stderr.isatty():
        disable_progress_bars()


def _match_files(patterns: str | list[str], base_dir: Path) -> list[Path]:
    """All files that match any pattern, sorted by their path below `base_dir`, each once."""
    matched: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = glob.glob(_literal_folders(pattern, base_dir), root_dir=base_dir, recursive=True)
        names = [name for name in found if not (base_dir / name).is_dir()]
        if not names:
            hint = "it is a folder: add /*.txt" if (base_dir / pattern).is_dir() else "check the path or pattern"
            raise RecipeError(f"No text file matches {pattern!r} in {base_dir.resolve()}: {hint}.")
        matched.update(Path(name).as_posix() for name in names)
    return [base_dir / name for name in sorted(matched)]


def _literal_folders(pattern: str, base_dir: Path) -> str:
    """A pattern in which the file or the leading folders that are there by that very name are no patterns."""
    parts = Path(pattern).parts
    for count in range(len(parts), 0, -1):
        if glob.has_magic(head := str(Path(*parts[:count]))) and (base_dir / head).exists():
            return str(Path(glob.escape(head), *parts[count:]))
    return pattern


def _read_documents(paths: Sequence[Path], cut: bool) -> Iterator[dict[str, str]]:
    for path in paths:
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()  # with every line end as \n
        except UnicodeDecodeError as error:
            raise RecipeError(f"{path} is not UTF-8 (byte {error.start}); convert it to UTF-8.") from error
        except (OSError, EOFError, zlib.error) as error:  # BadGzipFile is an OSError
            raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
        if not text.strip():
            raise RecipeError(f"{path} is empty; remove it from text_files.")
        if (path.with_suffix("") if path.suffix == ".gz" else path).suffix in _JSON_LINES:
            yield from _json_lines(path, text)
            continue
        pieces = text.split("\f") if cut else [text]
        yield from ({"text": piece} for piece in pieces if piece.strip())


def _json_lines(path: Path, text: str) -> Iterator[dict[str, str]]:
    """One document a line, under the key ``text``; lines that are blank, and documents that are, are left out."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise RecipeError(f"{path}, line {number}, is no JSON ({error}); is the line cut off?") from None
        document = row.get("text") if isinstance(row, dict) else row
        if document is None and isinstance(row, dict) and "text" in row:
            continue
        if not isinstance(document, str):
            keys = (
                f"an object with {', '.join(map(str, row)) or 'no key'}" if isinstance(row, dict) else repr(row)[:40]
            )
            raise RecipeError(
                f"{path}, line {number}, holds {keys}; every line is an object with a `text` that is a string (for "
                "other columns, name the file's folder as a dataset)"
            )
        if document.strip():
            yield {"text": document}


def _broken_line(folder: Path) -> str:
    """Where a folder's JSON lines cannot be read, as the end of a sentence; empty if they can."""
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _JSON_LINES):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    if line.strip():
                        json.loads(line)
                except ValueError as error:
                    return f"{path}, line {number}, is no JSON ({error})"
    return ""


def _load_rows(
    source: DatasetSource,
    base_dir: Path,
    streaming: bool,
    tokenizer: PreTrainedTokenizerBase | None,
    end_of_text: str,
) -> Documents:
    folder = base_dir / source.name
    try:
        path = str(folder) if folder.is_dir() else source.name
        rows = load_dataset(path, source.config, split=source.split, revision=source.revision, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        where = _broken_line(folder) if folder.is_dir() else ""
        raise RecipeError(f"The dataset {source.name!r} cannot be loaded: {where or error}") from error
    columns = rows.column_names or list(next(iter(rows), {}))
    if source.column not in columns:
        raise RecipeError(
            f"The dataset {source.name!r} has no column {source.column!r}, only {', '.join(columns) or 'none'}."
            + did_you_mean(source.column, columns)
        )
    rows = rows.select_columns(source.column)
    if _holds_conversations(rows, source):
        tokenizer = _with_chat_template(tokenizer, source)
        end = str(tokenizer.convert_ids_to_tokens(find_ends(tokenizer, "none", end_of_text).end))
        rows = rows.map(
            _render,
            with_indices=True,
            input_columns=source.column,
            remove_columns=source.column,
            fn_kwargs={"tokenizer": tokenizer, "name": source.name, "end": end},
        )
    elif source.column != "text":
        rows = rows.rename_column(source.column, "text")
    return rows.filter(_has_text, input_columns="text")


def _holds_conversations(rows: Documents, source: DatasetSource) -> bool:
    if rows.features is not None and isinstance(kind := rows.features[source.column], Value):
        if kind.dtype not in ("string", "large_string", "string_view", "null"):
            raise RecipeError(
                f"The column {source.column!r} of the dataset {source.name!r} holds {kind.dtype} values; name one "
                "that holds text or conversations, which are lists of {role, content}."
            )
        return False
    first = next((row[source.column] for row in rows if row[source.column]), "")
    if not isinstance(first, str | list):
        raise RecipeError(
            f"The column {source.column!r} of the dataset {source.name!r} holds {type(first).__name__} values; name "
            "one that holds text or conversations, which are lists of {role, content}."
        )
    return isinstance(first, list)


def _with_chat_template(tokenizer: PreTrainedTokenizerBase | None, source: DatasetSource) -> PreTrainedTokenizerBase:
    if tokenizer is None or not tokenizer.chat_template:
        raise RecipeError(
            f"The dataset {source.name!r} holds conversations and the tokenizer has no chat template to write them "
            "with; use the tokenizer of a chat model, or set its chat_template."
        )
    return tokenizer


def _render(messages: Any, index: int, tokenizer: PreTrainedTokenizerBase, name: str, end: str) -> dict[str, str]:
    """A conversation as text, without the token that will be written after it."""
    where = f"row {index} of the dataset {name!r}"
    if not messages:
        return {"text": ""}
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            got = ", ".join(map(str, message)) if isinstance(message, dict) else repr(message)[:40]
            raise RecipeError(f"Message {number} in {where} is no {{role, content}} of two strings; it has {got}.")
    # A key that only other messages have is None in this one; templates ask whether it is there.
    present = [{key: value for key, value in message.items() if value is not None} for message in messages]
    try:
        text = str(tokenizer.apply_chat_template(present, tokenize=False))
    except TemplateError as error:
        raise RecipeError(f"The chat template refuses {where}: {error}") from error
    return {"text": text.rstrip().removesuffix(end) if end and text.rstrip().endswith(end) else text}


def _has_text(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip())
