"""Text that a source model writes: sequence-level distillation's training corpus.

Prompts go in, documents come out, and everything on the way is kept: what was written lies in numbered shards under
a folder named after what decided it (generator, prompts and sampling). A rerun finds the folder and writes nothing; a
run that was killed goes on at its next shard, with the text that an unbroken run would have. The filters look at the
text when it is read, so other filter settings cost no new text.
"""

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path
from typing import Any, TypedDict

from datasets import Dataset
from filelock import FileLock
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_hub.errors import RecipeError
from cbd_hub.progress import counter
from cbd_hub.text.documents import read_source
from cbd_hub.text.generators import Generator, LocalGenerator
from cbd_hub.text.served_model import ServerGenerator
from cbd_hub.text.settings import DatasetSource, GenerationConfig, Sampling, SourceConfig

__all__ = [
    "corpus_prompts",
    "fingerprint",
    "keep",
    "make_generator",
    "read_prompts",
    "synthesize",
]

SHARD = 64
"""Texts in a shard: what a killed run loses at most. Another number makes other shards of the same text."""


class _Row(TypedDict):
    number: int
    prompt: str
    text: str
    """As written, without the prompt."""
    tokens: int


def make_generator(
    config: GenerationConfig, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> LocalGenerator | ServerGenerator:
    """Returns the generator that a config names: a server, or else the model given here.

    Raises:
        RecipeError: there is neither a server nor a model with its tokenizer, the variable with the key is not set, or
            as the generators say.
    """
    if (server := config.server) is not None:
        key = os.environ.get(server.api_key_env) if server.api_key_env else None
        if server.api_key_env and not key:
            raise RecipeError(f"The environment variable {server.api_key_env} is not set; it must hold the API key.")
        return ServerGenerator(**server.model_dump(exclude={"api_key_env"}), api_key=key, chat=config.chat)
    if model is None or tokenizer is None:
        raise RecipeError("There is neither a server nor a model with its tokenizer to write text; give one of them.")
    return LocalGenerator(model, tokenizer, config.batch_size, config.chat)


def read_prompts(
    config: GenerationConfig,
    documents: Iterable[Mapping[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    base_dir: str | Path = ".",
) -> list[str]:
    """Returns the prompts that a config asks for, at most ``config.documents`` of them.

    Args:
        config: names them.
        documents: rows with a column ``text``, the corpus; read only where the config names no other prompts.
        tokenizer: cuts documents, and turns conversations into text.
        base_dir: folder that relative paths start from.

    Raises:
        RecipeError: the file or dataset cannot be read, or there are no prompts.
    """
    if config.prompts is None:
        return corpus_prompts(documents, tokenizer, config)
    if isinstance(config.prompts, DatasetSource):
        rows = read_source(SourceConfig(dataset=config.prompts), base_dir, tokenizer)
        return _enough([row["text"] for row in rows], config)
    path = Path(base_dir) / config.prompts
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 (byte {error.start}); convert it to UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"The prompts {path} cannot be read: {error.strerror}.") from error
    return _enough([line.strip() for line in lines if line.strip()], config)


def corpus_prompts(
    documents: Iterable[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> list[str]:
    """Returns the first ``prompt_tokens`` tokens of each document as text, at most ``config.documents`` prompts.

    A character that is cut in two is left out, so a prompt may be a token or two shorter.

    Args:
        documents: rows with a column ``text``; a stream is read as far as it is needed.
        tokenizer: the one that counts.
        config: says how many, and how long.

    Raises:
        RecipeError: no document has text.
    """
    if config.prompt_tokens == 0:
        return _enough([""], config)
    prompts = []
    for row in islice(documents, config.documents):
        beginning = row["text"].lstrip()[: 64 * config.prompt_tokens]  # a whole book need not be read for 16 tokens
        ids: Any = tokenizer(beginning, add_special_tokens=False, verbose=False)["input_ids"]
        prompts.append(str(tokenizer.decode(ids[: config.prompt_tokens])).rstrip("\N{REPLACEMENT CHARACTER}"))
    return _enough([prompt for prompt in prompts if prompt.strip()], config)


def _enough(prompts: list[str], config: GenerationConfig) -> list[str]:
    if not prompts:
        raise RecipeError(
            "There are no prompts; give documents or a file that is not empty, or set prompt_tokens to 0."
        )
    return list(islice(cycle(prompts) if config.sampling.temperature > 0 else prompts, config.documents))


def keep(text: str, config: GenerationConfig, seen: set[str], tokens: int | None = None) -> str | None:
    """Returns None for a text to keep, which is then added to `seen`, or the reason why it is dropped.

    Args:
        text: what was written, without the prompt.
        config: the filters.
        seen: hashes of the texts kept so far.
        tokens: its length; None counts words.

    Returns:
        None, ``"empty"``, ``"too short"``, ``"repetitive"`` or ``"duplicate"``.
    """
    words = text.split()
    if not words:
        return "empty"
    if (len(words) if tokens is None else tokens) < config.min_tokens:
        return "too short"
    runs = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    if runs and 1 - len(set(runs)) / len(runs) > config.max_repetition:
        return "repetitive"
    folded = hashlib.sha256(" ".join(words).encode()).hexdigest()
    if config.deduplicate and folded in seen:
        return "duplicate"
    seen.add(folded)
    return None


def fingerprint(generator: Generator, prompts: Sequence[str], sampling: Sampling) -> str:
    """SHA-256 over all that decides the text: generator, prompts and sampling. 64 hexadecimal digits."""
    parts = {"generator": generator.identity, "prompts": list(prompts), "sampling": sampling.model_dump()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def synthesize(
    generator: Generator,
    prompts: Sequence[str],
    config: GenerationConfig,
    folder: str | Path,
    *,
    progress: bool = True,
) -> Dataset:
    """Has the generator write one text a prompt, and returns those that pass the filters.

    What was written lies under ``folder/<fingerprint>/`` and is not written again: shards of 64 texts, each named
    after the SHA-256 of its bytes and either whole or not there, and ``origin.json``, which says where the text comes
    from and what was dropped. A shard that is damaged is written anew. A second process waits for the first.

    Args:
        generator: what writes.
        prompts: their numbers, which decide their seeds, are their places here.
        config: sampling and filters; the origin of its prompts is ignored.
        folder: the cache; it can hold the text of many runs.
        progress: show a bar of texts.

    Returns:
        a dataset in memory with the columns ``text`` (the prompt and what was written after it; in a chat the answer
        alone), ``prompt`` and ``number``, in the order of the prompts.

    Raises:
        RecipeError: there are no prompts, the generator fails, or no text passes the filters.
    """
    if not prompts:
        raise RecipeError("There are no prompts to write text from; give at least one.")
    name = fingerprint(generator, prompts, config.sampling)
    place = Path(folder) / name
    place.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[Any]] = {"text": [], "prompt": [], "number": []}
    dropped: Counter[str] = Counter()
    seen: set[str] = set()
    written = kept_tokens = 0
    is_chat = bool(generator.identity.get("chat"))
    with FileLock(place / ".lock"):
        for row in _rows(generator, prompts, config.sampling, place, progress):
            written += row["tokens"]
            if (reason := keep(row["text"], config, seen, row["tokens"])) is not None:
                dropped[reason] += 1
                continue
            kept_tokens += row["tokens"]
            columns["text"].append(row["text"] if is_chat else row["prompt"] + row["text"])
            columns["prompt"].append(row["prompt"])
            columns["number"].append(row["number"])
        counts = {"written": len(prompts), "kept": len(columns["text"]), "dropped": dict(sorted(dropped.items()))}
        tokens = {"written": written, "kept": kept_tokens}
        filters = config.model_dump(include={"min_tokens", "max_repetition", "deduplicate"})
        _write_json(place / "origin.json", {**_origin(place), "filters": filters, "texts": counts, "tokens": tokens})
    if not columns["text"]:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.most_common())
        raise RecipeError(
            f"None of the {len(prompts)} texts passes the filters ({reasons}); lower min_tokens, raise max_repetition "
            "or take another source model."
        )
    return Dataset.from_dict(columns)


def _rows(
    generator: Generator, prompts: Sequence[str], sampling: Sampling, place: Path, progress: bool
) -> Iterator[_Row]:
    """All rows in order; shards that are missing or damaged are written first."""
    with counter("writing", len(prompts), unit="text", enabled=progress) as add:
        for first in range(0, len(prompts), SHARD):
            part, stem = prompts[first : first + SHARD], f"{first // SHARD:05d}"
            rows = _read_shard(place, stem)
            if rows is None:
                began = time.monotonic()
                rows = []
                for number, written in enumerate(generator.generate(part, sampling, first), first):
                    text = written.text.rstrip("\N{REPLACEMENT CHARACTER}")  # a character cut at the last token
                    prompt = prompts[number]
                    rows.append({"number": number, "prompt": prompt, "text": text, "tokens": written.tokens})
                    add(1)
                _write_shard(place, stem, rows)
                origin = _origin(place) or _new_origin(generator, prompts, sampling)
                origin["seconds"] = round(origin["seconds"] + time.monotonic() - began, 3)
                _write_json(place / "origin.json", origin)
            else:
                add(len(part))
            yield from rows


def _new_origin(generator: Generator, prompts: Sequence[str], sampling: Sampling) -> dict[str, Any]:
    return {
        "generator": generator.identity,
        "sampling": sampling.model_dump(),
        "prompts_sha256": hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest(),
        "versions": {name: version(name) for name in ("cbd_hub", "transformers", "torch", "tokenizers")},
        "seconds": 0.0,
    }


def _origin(place: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        origin = json.loads((place / "origin.json").read_text(encoding="utf-8"))
        if isinstance(origin, dict) and isinstance(origin.get("seconds"), float):
            return origin
    return {}


def _read_shard(place: Path, stem: str) -> list[_Row] | None:
    """The rows of a shard, or None if it is not there or its bytes are not those it is named after."""
    for path in place.glob(f"{stem}-*.jsonl"):
        data = path.read_bytes()
        if path.name == _shard_name(stem, data):
            return [json.loads(line) for line in data.splitlines()]
        path.unlink()
    return None


def _write_shard(place: Path, stem: str, rows: list[_Row]) -> None:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    _write(place / _shard_name(stem, data), data)


def _shard_name(stem: str, data: bytes) -> str:
    return f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}.jsonl"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=2) + "\n").encode())


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all: another name first, and the real one when the bytes are on the disk."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
