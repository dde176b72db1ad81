"""ROUGE of what a model writes behind prompts, against a reference for each: summaries, translations, answers.

A JSONL file holds the items, a ``prompt`` and a ``reference`` a line; the prompt is put to the model as it is, so it
ends where the model continues ("... TL;DR:"). The model writes greedily until it ends its text or has written
enough. As in :mod:`cbd_hub.evaluation.tasks`, a prompt that leaves no room in the model's context loses its
beginning; the rows count how many did.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.metrics import rouge
from cbd_hub.progress import progress_bar
from cbd_hub.text.generators import LocalGenerator
from cbd_hub.text.settings import Sampling

__all__ = ["Item", "evaluate_summaries", "read_summaries"]


class Item(NamedTuple):
    """One thing to write."""

    prompt: str
    """What the model goes on from."""
    reference: str
    """What a person wrote there."""


def evaluate_summaries(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    file: str | Path,
    limit: int | None = None,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    metric_scripts: str | Path | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measures ROUGE-1, ROUGE-2 and ROUGE-L of a model's greedy continuations of prompts.

    The model stays on its device and in its train or eval mode. What its ``generation_config`` says beside sampling (a
    repetition penalty, tokens that end the text) holds. The same model gives the same rows.

    Args:
        model: Any causal language model, also one that was never saved.
        tokenizer: Its tokenizer.
        file: JSONL with the items; see :func:`read_summaries`.
        limit: Only the first so many items.
        max_new_tokens: Most tokens written an item; fewer where the model ends its text.
        batch_size: Prompts that are continued together, padded on the left; changes results only by rounding.
        metric_scripts: Who computes ROUGE; see :func:`cbd_hub.evaluation.metrics.rouge`.
        progress: Show a progress bar.

    Returns:
        A row for each metric: ``task`` (the file's name), ``metric``, ``value`` (F1, 0 to 1, the mean over items),
        ``stderr`` (its standard error; None for a single item), ``items``, ``truncated`` (how many prompts were too
        long for the model's context and lost their beginning) and ``implementation`` (who computed ROUGE).

    Raises:
        RecipeError: Items that cannot be read, a number below 1, or a context without room for a prompt.
        CbdError: rouge-score is not installed.

    Cost: for each batch one forward pass over its prompts and one a new token; the key-value cache is the memory.
    """
    for name, value in (("limit", limit), ("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise RecipeError(f"{name} must be 1 or more, not {value}")
    items = read_summaries(file)[:limit]
    writer = _Writer(model, tokenizer, batch_size, max_new_tokens)
    texts = writer.generate([item.prompt for item in items], Sampling(max_new_tokens=max_new_tokens, temperature=0))
    written = progress_bar(texts, "writing", total=len(items), unit="text", enabled=progress)
    scores = rouge([text.text for text in written], [item.reference for item in items], metric_scripts)
    return [
        {
            "task": Path(file).name,
            "metric": metric,
            "value": value,
            "stderr": scores.stderrs[metric],
            "items": len(items),
            "truncated": writer.truncated,
            "implementation": scores.implementation,
        }
        for metric, value in scores.means.items()
    ]


def read_summaries(file: str | Path) -> list[Item]:
    """Reads the items of a JSONL file, and checks every line; empty lines and further fields are passed over.

    Args:
        file: UTF-8, each line a JSON object with the texts ``prompt`` and ``reference``, neither of them empty.

    Raises:
        RecipeError: No such file, a line that is no item, or no item at all.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")  # splitlines() would cut at more than line ends
    except OSError as error:
        raise RecipeError(f"{file} cannot be read: {error.strerror}; name a JSONL file with --summaries") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file} is no UTF-8 text: {error}") from error
    items = [_item(line, f"{file}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise RecipeError(f"{file} holds no item; give it lines with 'prompt' and 'reference'")
    return items


def _item(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise RecipeError(f"{where} is no JSON object; give it the fields 'prompt' and 'reference'")
    for name in Item._fields:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise RecipeError(f"{where}: field {name!r} must be text, not {row.get(name)!r:.60}")
    return Item(row["prompt"], row["reference"])


class _Writer(LocalGenerator):
    """Cuts the beginning off a prompt that leaves no room for new tokens, but for a begin-of-text token."""

    def __init__(self, model: PreTrainedModel, tokenizer: Tokenizer, batch_size: int, max_new_tokens: int) -> None:
        super().__init__(model, tokenizer, batch_size)
        context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        self.room = context - max_new_tokens
        self.truncated = 0
        if self.room < 2:
            raise RecipeError(
                f"max_new_tokens is {max_new_tokens} and the model's context {context}: no prompt fits; lower it"
            )

    def _prompt_ids(self, prompt: str) -> list[int]:
        ids = super()._prompt_ids(prompt)
        if len(ids) <= self.room:
            return ids
        self.truncated += 1
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return begin + ids[len(begin) - self.room :]
