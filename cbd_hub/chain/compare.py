"""Models and the anchors of chains measured side by side: on a user's own text, on tasks, on what they write."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.chain.chain import Chain
from cbd_hub.devices import on_accelerator
from cbd_hub.errors import ChainNotFoundError, RecipeError
from cbd_hub.evaluation.held_out import bits_per_byte, evaluate_loss
from cbd_hub.evaluation.metrics import rouge
from cbd_hub.evaluation.summaries import evaluate_summaries, read_summaries
from cbd_hub.evaluation.task_items import ITEMS, read_items
from cbd_hub.evaluation.tasks import evaluate_tasks
from cbd_hub.hub.load import load_model
from cbd_hub.hub.read import Location
from cbd_hub.manifest.manifest import MANIFEST_NAME
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import pack, token_batches
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.vocabulary import VocabularyReport, compare_vocabularies

__all__ = ["Models", "compare_tokenizers", "evaluate_on_summaries", "evaluate_on_tasks", "evaluate_on_text"]

Models = str | Location | Sequence[str | Location]
"""What is measured: chains and plain transformers models, each a folder, a repo id or a location."""


def evaluate_on_text(
    models: Models,
    text: Sequence[str | Path],
    *,
    sequence_length: int = 512,
    max_tokens: int | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measures next-token loss and perplexity on text files.

    Losses a token compare between rows of one ``tokenizer``; bits a byte compare between all, though with `max_tokens`
    each tokenizer comes to its end at another place of the text.

    Args:
        models: Folders or repo ids of chains, each of which stands for its anchors, or of plain transformers models;
            or their locations, which hold a revision, a token and a cache.
        text: UTF-8 files; a chain built from text can be measured on any other text this way.
        sequence_length: Tokens a block.
        max_tokens: Stop after so many predicted tokens.
        progress: Show progress bars.

    Returns:
        One row a model: name, num_parameters, loss (nats a token), perplexity, num_tokens, bits_per_byte, tokenizer
        (equal where the text was cut into the same tokens), of (the element of `models` that it belongs to).

    Raises:
        RecipeError: No text or no model, or the text is too short.
        ChainNotFoundError: There is no such model or chain; found before anything is measured.
    """
    if not text:
        raise RecipeError("give text to measure on: --text FILE (UTF-8), text that no training used")
    documents = load_documents(
        DataConfig(text_files=[str(Path(t).absolute()) for t in text], sequence_length=sequence_length)
    )
    rows = []
    for opened in _open_all(models, progress):
        blocks = pack(documents, opened.tokenizer, sequence_length)
        digest = hashlib.sha256()
        for ids in token_batches(blocks, 64):
            digest.update(ids.numpy().tobytes())
        for name, loaded in opened.models:
            with on_accelerator(loaded):
                result = evaluate_loss(loaded, blocks, progress=progress, max_tokens=max_tokens)
            bits = bits_per_byte(result, blocks, opened.tokenizer)
            losses = {**result.as_dict(), "bits_per_byte": bits, "tokenizer": digest.hexdigest()[:12]}
            rows.append({"name": name, "num_parameters": loaded.num_parameters(), **losses, "of": opened.of})
    return rows


def evaluate_on_tasks(
    models: Models,
    tasks: Sequence[str],
    items: str | Path = ITEMS,
    *,
    limit: int | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measures accuracy on tasks: see :func:`cbd_hub.evaluation.tasks.evaluate_tasks`.

    Args:
        models: As of :func:`evaluate_on_text`.
        tasks: Names out of :data:`cbd_hub.evaluation.task_items.TASKS`.
        items: Folder with the tasks' JSONL files.
        limit: Only the first so many items of each task.
        batch_size: Prompts in a forward pass.
        progress: Show progress bars.

    Returns:
        A row for each model, task and metric: name, num_parameters, task, metric, value, stderr, items, truncated, of.

    Raises:
        CbdError: lm-evaluation-harness is not installed.
        RecipeError: No model, an unknown task, no items, or items that cannot be read.
        ChainNotFoundError: There is no such model or chain; found before anything is measured.
    """
    read_items(tasks, items)  # so that a slip costs no download
    rows = []
    for opened in _open_all(models, progress):
        for name, loaded in opened.models:
            measured = evaluate_tasks(
                loaded, opened.tokenizer, tasks, items, limit, batch_size=batch_size, progress=progress
            )
            model_columns = {"name": name, "num_parameters": loaded.num_parameters()}
            rows += [{**model_columns, **row, "of": opened.of} for row in measured]
    return rows


def evaluate_on_summaries(
    models: Models,
    file: str | Path,
    *,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    metric_scripts: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measures ROUGE of what models write behind prompts: see :func:`cbd_hub.evaluation.summaries.evaluate_summaries`.

    Args:
        models: As of :func:`evaluate_on_text`.
        file: JSONL with ``prompt`` and ``reference`` a line.
        limit: Only the first so many items.
        max_new_tokens: Most tokens written an item.
        batch_size: Prompts that are continued together.
        metric_scripts: Who computes ROUGE; see :func:`cbd_hub.evaluation.metrics.rouge`.
        progress: Show progress bars.

    Returns:
        A row for each model and metric: name, num_parameters, task (the file's name), metric, value, stderr, items,
        truncated, implementation (who computed ROUGE), of.

    Raises:
        CbdError: rouge-score is not installed.
        RecipeError: No model, items that cannot be read, or a context without room for a prompt.
        ChainNotFoundError: There is no such model or chain; found before anything is measured.
    """
    read_summaries(file)  # so that a slip costs no download
    rouge(["a"], ["a"], metric_scripts)
    rows = []
    for opened in _open_all(models, progress):
        for name, loaded in opened.models:
            measured = evaluate_summaries(
                loaded,
                opened.tokenizer,
                file,
                limit,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                metric_scripts=metric_scripts,
                progress=progress,
            )
            model_columns = {"name": name, "num_parameters": loaded.num_parameters()}
            rows += [{**model_columns, **row, "of": opened.of} for row in measured]
    return rows


def compare_tokenizers(chain: str | Location, source: str | Location, text: Sequence[str | Path]) -> VocabularyReport:
    """Compares two tokenizers on text: see :func:`cbd_hub.text.vocabulary.compare_vocabularies`.

    Args:
        chain: Folder, repo id or location of the chain's tokenizer.
        source: The same of the source's.
        text: UTF-8 files.

    Raises:
        RecipeError: No text, or a tokenizer that cannot spell every text.
        ChainNotFoundError: A tokenizer that cannot be loaded.
    """
    if not text:
        raise RecipeError("give text to count on: --text FILE (UTF-8)")
    documents = load_documents(DataConfig(text_files=[str(Path(t).absolute()) for t in text]))
    tokenizers = []
    for location in (Location.of(chain), Location.of(source)):
        try:
            loaded = AutoTokenizer.from_pretrained(location.place, trust_remote_code=False, **location.options)
        except (OSError, ValueError) as error:
            raise ChainNotFoundError(f"the tokenizer of {location.place!r} cannot be loaded: {error}") from error
        tokenizers.append(loaded)
    return compare_vocabularies(tokenizers[0], tokenizers[1], [row["text"] for row in documents])


class _Opened(NamedTuple):
    """An argument whose tokenizer is loaded."""

    of: str
    """The argument."""
    tokenizer: Tokenizer
    models: Iterator[tuple[str, PreTrainedModel]]
    """The model, or the anchors, by name; each is loaded when it is asked for."""


def _open_all(models: Models, progress: bool) -> list[_Opened]:
    """Opens every argument, each once, before a weight of any is loaded."""
    several = [models] if isinstance(models, str | Location) else models
    locations = list(dict.fromkeys(Location.of(model) for model in several))
    if not locations:
        raise RecipeError("name a model or chain to measure: a folder or a repo id")
    return [_open(location, progress) for location in locations]


def _open(location: Location, progress: bool) -> _Opened:
    folder = Path(location.place)
    if not (folder / "config.json").is_file() or (folder / MANIFEST_NAME).is_file():
        try:
            chain = Chain.open(location)
        except ChainNotFoundError:
            if folder.exists():
                raise
        else:
            plans = {anchor.name: chain.plan(shape=anchor.shape) for anchor in chain.anchors}
            anchors = ((name, chain.initialize(plan, progress=progress)) for name, plan in plans.items())
            return _Opened(location.place, chain.tokenizer, anchors)
    with _clear_errors(location.place):
        tokenizer = AutoTokenizer.from_pretrained(location.place, trust_remote_code=False, **location.options)
    return _Opened(location.place, tokenizer, _load(location))


def _load(location: Location) -> Iterator[tuple[str, PreTrainedModel]]:
    try:
        loaded = load_model(location, "auto")
    except RecipeError as error:
        raise ChainNotFoundError(
            f"{location.place!r} is neither a chain nor a model that can be loaded: {error}"
        ) from error
    yield location.place, loaded


@contextmanager
def _clear_errors(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ChainNotFoundError(f"{model!r} is neither a chain nor a model that can be loaded: {error}") from error
