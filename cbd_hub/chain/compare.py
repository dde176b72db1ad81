"""Models and the anchors of chains measured side by side: on a user's own text, on tasks, on what they write."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.chain.chain import Chain
from cbd_hub.errors import ChainNotFoundError, RecipeError
from cbd_hub.evaluation.held_out import bits_per_byte, evaluate_loss
from cbd_hub.evaluation.metrics import rouge
from cbd_hub.evaluation.summaries import evaluate_summaries, read_summaries
from cbd_hub.evaluation.tasks import ITEMS, evaluate_tasks, read_items
from cbd_hub.manifest.manifest import MANIFEST_NAME
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import pack, token_batches
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.vocabulary import VocabularyReport, compare_vocabularies

__all__ = ["compare_tokenizers", "evaluate_on_summaries", "evaluate_on_tasks", "evaluate_on_text"]


def evaluate_on_text(
    models: str | Sequence[str],
    text: Sequence[str | Path],
    *,
    sequence_length: int = 512,
    max_tokens: int | None = None,
    progress: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> list[dict[str, Any]]:
    """Measures next-token loss and perplexity on text files.

    Losses a token compare between rows of one ``tokenizer``; bits a byte compare between all, though with `max_tokens`
    each tokenizer comes to its end at another place of the text.

    Args:
        models: Folders or repo ids of chains, each of which stands for its anchors, or of plain transformers models.
        text: UTF-8 files; a chain built from text can be measured on any other text this way.
        sequence_length: Tokens a block.
        max_tokens: Stop after so many predicted tokens.
        progress: Show progress bars.
        revision: Branch, tag or commit, of each that is on the Hub.
        token: Hub token.
        cache_dir: Another cache than ``HF_HOME``'s.
        local_files_only: Use the cache alone.

    Returns:
        One row a model: name, num_parameters, loss (nats a token), perplexity, num_tokens, bits_per_byte, tokenizer
        (equal where the text was cut into the same tokens), of (the element of `models` that it belongs to).

    Raises:
        RecipeError: No text or model is given, or the text is too short.
        ChainNotFoundError: There is no such model or chain; found before anything is measured.
    """
    if not text:
        raise RecipeError("give text to measure on: --text FILE (UTF-8), text that no training used")
    documents = load_documents(
        DataConfig(text_files=[str(Path(t).absolute()) for t in text], sequence_length=sequence_length)
    )
    rows = []
    for opened in _open_all(models, progress, revision, token, cache_dir, local_files_only):
        blocks = pack(documents, opened.tokenizer, sequence_length)
        digest = hashlib.sha256()
        for ids in token_batches(blocks, 64):
            digest.update(ids.numpy().tobytes())
        for name, loaded in opened.models:
            result = evaluate_loss(loaded, blocks, progress=progress, max_tokens=max_tokens)
            bits = bits_per_byte(result, blocks, opened.tokenizer)
            told = {**result.as_dict(), "bits_per_byte": bits, "tokenizer": digest.hexdigest()[:12]}
            rows.append({"name": name, "num_parameters": loaded.num_parameters(), **told, "of": opened.of})
    return rows


def evaluate_on_tasks(
    models: str | Sequence[str],
    tasks: Sequence[str],
    items: str | Path = ITEMS,
    *,
    limit: int | None = None,
    batch_size: int = 4,
    progress: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> list[dict[str, Any]]:
    """Measures accuracy on tasks: see :func:`cbd_hub.evaluation.tasks.evaluate_tasks`.

    Args:
        models: As of :func:`evaluate_on_text`.
        tasks: Names out of :data:`cbd_hub.evaluation.tasks.TASKS`.
        items: Folder with the tasks' JSONL files.
        limit: Only the first so many items of each task.
        batch_size: Prompts in a forward pass.
        progress: Show progress bars.
        revision: Branch, tag or commit, of each that is on the Hub.
        token: Hub token.
        cache_dir: Another cache than ``HF_HOME``'s.
        local_files_only: Use the cache alone.

    Returns:
        A row for each model, task and metric: name, num_parameters, task, metric, value, stderr, items, truncated, of.

    Raises:
        CbdError: lm-evaluation-harness is not installed.
        RecipeError: No model, an unknown task, no items, or items that cannot be read.
        ChainNotFoundError: There is no such model or chain; found before anything is measured.
    """
    read_items(tasks, items)  # so that a slip costs no download
    rows = []
    for opened in _open_all(models, progress, revision, token, cache_dir, local_files_only):
        for name, loaded in opened.models:
            measured = evaluate_tasks(
                loaded, opened.tokenizer, tasks, items, limit, batch_size=batch_size, progress=progress
            )
            head = {"name": name, "num_parameters": loaded.num_parameters()}
            rows += [{**head, **row, "of": opened.of} for row in measured]
    return rows


def evaluate_on_summaries(
    models: str | Sequence[str],
    file: str | Path,
    *,
    limit: int | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    metric_scripts: str | Path | None = None,
    progress: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
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
        revision: Branch, tag or commit, of each that is on the Hub.
        token: Hub token.
        cache_dir: Another cache than ``HF_HOME``'s.
        local_files_only: Use the cache alone.

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
    for opened in _open_all(models, progress, revision, token, cache_dir, local_files_only):
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
            head = {"name": name, "num_parameters": loaded.num_parameters()}
            rows += [{**head, **row, "of": opened.of} for row in measured]
    return rows


def compare_tokenizers(
    chain: str, source: str, text: Sequence[str | Path], *, token: str | bool | None = None
) -> VocabularyReport:
    """Compares two tokenizers on text: see :func:`cbd_hub.text.vocabulary.compare_vocabularies`.

    Args:
        chain: Folder or repo id of the chain's tokenizer.
        source: The same of the source's.
        text: UTF-8 files.
        token: Hub token.

    Raises:
        RecipeError: No text, or a tokenizer that cannot spell every text.
        ChainNotFoundError: A tokenizer that cannot be loaded.
    """
    if not text:
        raise RecipeError("give text to count on: --text FILE (UTF-8)")
    documents = load_documents(DataConfig(text_files=[str(Path(t).absolute()) for t in text]))
    loaded = []
    for place in (chain, source):
        try:
            loaded.append(AutoTokenizer.from_pretrained(place, trust_remote_code=False, token=token))
        except (OSError, ValueError) as error:
            raise ChainNotFoundError(f"the tokenizer of {place!r} cannot be loaded: {error}") from error
    return compare_vocabularies(loaded[0], loaded[1], [row["text"] for row in documents])


class _Opened(NamedTuple):
    """An argument whose tokenizer is loaded."""

    of: str
    """The argument."""
    tokenizer: Tokenizer
    models: Iterator[tuple[str, PreTrainedModel]]
    """The model, or the anchors, by name; each is loaded when it is asked for."""


def _open_all(
    models: str | Sequence[str],
    progress: bool,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | None,
    local_files_only: bool,
) -> list[_Opened]:
    """Opens every argument, each once, before a weight of any is loaded."""
    where: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    names = [models] if isinstance(models, str) else list(dict.fromkeys(models))
    if not names:
        raise RecipeError("name a model or chain to measure: a folder or a repo id")
    return [_open(name, where, progress) for name in names]


def _open(model: str, where: dict[str, Any], progress: bool) -> _Opened:
    if not (Path(model) / "config.json").is_file() or (Path(model) / MANIFEST_NAME).is_file():
        try:
            chain = Chain.from_pretrained(model, **where)
        except ChainNotFoundError:
            if Path(model).exists():
                raise
        else:
            plans = {anchor.name: chain.plan(shape=anchor.shape) for anchor in chain.anchors}
            anchors = ((name, chain.initialize(plan, progress=progress)) for name, plan in plans.items())
            return _Opened(model, chain.tokenizer, anchors)
    with _told(model):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **where)
    return _Opened(model, tokenizer, _load(model, where))


def _load(model: str, where: dict[str, Any]) -> Iterator[tuple[str, PreTrainedModel]]:
    with _told(model):
        loaded = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, trust_remote_code=False, **where)
    yield model, loaded


@contextmanager
def _told(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ChainNotFoundError(f"{model!r} is neither a chain nor a model that can be loaded: {error}") from error
