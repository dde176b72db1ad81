"""A model, or every anchor of a chain, measured: perplexity on a user's own text, accuracy on tasks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.assemble import Chain
from cbd_hub.chain import MANIFEST_NAME
from cbd_hub.data import pack
from cbd_hub.documents import DataConfig, load_documents
from cbd_hub.errors import ChainNotFoundError, RecipeError
from cbd_hub.evaluation import bits_per_byte, evaluate_loss
from cbd_hub.tasks import ITEMS, evaluate_tasks, read_items
from cbd_hub.vocabulary import VocabularyReport, compare_vocabularies

__all__ = ["compare_tokenizers", "evaluate_on_tasks", "evaluate_on_text"]


def evaluate_on_text(
    model: str,
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

    Args:
        model: Folder or repo id of a chain or of a plain transformers model.
        text: UTF-8 files; a chain built from text can be measured on any other text this way.
        sequence_length: Tokens a block.
        max_tokens: Stop after so many predicted tokens.
        progress: Show progress bars.
        revision: Branch, tag or commit.
        token: Hub token.
        cache_dir: Another cache than ``HF_HOME``'s.
        local_files_only: Use the cache alone.

    Returns:
        One row a model: name, num_parameters, loss (nats a token), perplexity, num_tokens, bits_per_byte.

    Raises:
        RecipeError: No text is given, or it is too short.
        ChainNotFoundError: There is no such model or chain.
    """
    if not text:
        raise RecipeError("give text to measure on: --text FILE (UTF-8), text that no training used")
    documents = load_documents(
        DataConfig(text_files=[str(Path(t).absolute()) for t in text], sequence_length=sequence_length)
    )
    tokenizer, models = _open(model, revision, token, cache_dir, local_files_only, progress)
    blocks = pack(documents, tokenizer, sequence_length)
    rows = []
    for name, loaded in models:
        result = evaluate_loss(loaded, blocks, progress=progress, max_tokens=max_tokens)
        bits = bits_per_byte(result, blocks, tokenizer)
        told = {**result.as_dict(), "bits_per_byte": bits}
        rows.append({"name": name, "num_parameters": loaded.num_parameters(), **told})
    return rows


def evaluate_on_tasks(
    model: str,
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
    """Measures accuracy on tasks: see :func:`cbd_hub.tasks.evaluate_tasks`.

    Args:
        model: Folder or repo id of a chain or of a plain transformers model.
        tasks: Names out of :data:`cbd_hub.tasks.TASKS`.
        items: Folder with the tasks' JSONL files.
        limit: Only the first so many items of each task.
        batch_size: Prompts in a forward pass.
        progress: Show progress bars.
        revision: Branch, tag or commit.
        token: Hub token.
        cache_dir: Another cache than ``HF_HOME``'s.
        local_files_only: Use the cache alone.

    Returns:
        A row for each model, task and metric: name, num_parameters, task, metric, value, stderr, items, truncated.

    Raises:
        CbdError: lm-evaluation-harness is not installed.
        RecipeError: An unknown task, no items, or items that cannot be read.
        ChainNotFoundError: There is no such model or chain.
    """
    read_items(tasks, items)  # so that a slip costs no download
    tokenizer, models = _open(model, revision, token, cache_dir, local_files_only, progress)
    rows = []
    for name, loaded in models:
        measured = evaluate_tasks(loaded, tokenizer, tasks, items, limit, batch_size=batch_size, progress=progress)
        rows += [{"name": name, "num_parameters": loaded.num_parameters(), **row} for row in measured]
    return rows


def compare_tokenizers(
    chain: str, source: str, text: Sequence[str | Path], *, token: str | bool | None = None
) -> VocabularyReport:
    """Compares two tokenizers on text: see :func:`cbd_hub.vocabulary.compare_vocabularies`.

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


def _open(
    model: str,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | None,
    local_files_only: bool,
    progress: bool,
) -> tuple[Tokenizer, Iterator[tuple[str, PreTrainedModel]]]:
    """The tokenizer of a model or chain, and the model, or the anchors one after another, by name."""
    where: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    if not (Path(model) / "config.json").is_file() or (Path(model) / MANIFEST_NAME).is_file():
        try:
            chain = Chain.from_pretrained(model, **where)
        except ChainNotFoundError:
            if Path(model).exists():
                raise
        else:
            plans = {anchor.name: chain.plan(shape=anchor.shape) for anchor in chain.anchors}
            return chain.tokenizer, ((n, chain.initialize(plan, progress=progress)) for n, plan in plans.items())
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False, **where)
        loaded = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, trust_remote_code=False, **where)
    except (OSError, ValueError) as error:
        raise ChainNotFoundError(f"{model!r} is neither a chain nor a model that can be loaded: {error}") from error
    return tokenizer, iter([(model, loaded)])
