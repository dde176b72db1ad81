"""Accuracy on multiple-choice questions, judged by lm-evaluation-harness in this process, from local items.

The harness's own tasks of the same names say how a question is put and how an answer is scored (``task_files/``); the
items come from JSONL files that the user has. Nothing is fetched: no data set, and no metric script either, accuracy
being the harness's own.
"""

import copy
import io
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import is_progress_bar_enabled

from cbd_hub.errors import CbdError, RecipeError
from cbd_hub.evaluation.task_items import ITEMS, Row, read_items

__all__ = ["evaluate_tasks"]


_FILES = Path(__file__).parent / "task_files"
_SEED = 0


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    items: str | Path = ITEMS,
    limit: int | None = None,
    *,
    batch_size: int = 4,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measures accuracy on multiple-choice tasks, zero-shot, as lm-evaluation-harness does.

    An answer's score is its log-likelihood behind the prompt, the highest wins (``acc``); ``acc_norm`` divides it by
    the answer's number of characters first. The model stays on its device and in its train or eval mode, the
    tokenizer and the global random states as they were. The same model gives the same rows.

    Args:
        model: Any causal language model, also one that was never saved.
        tokenizer: Its tokenizer.
        tasks: Names out of :data:`cbd_hub.evaluation.task_items.TASKS`.
        items: Folder with the tasks' JSONL files; see :func:`cbd_hub.evaluation.task_items.read_items`.
        limit: Only the first so many items of each task.
        batch_size: Prompts in a forward pass; changes speed and memory, results only by rounding.
        progress: Show the harness's progress bars, unless ``HF_HUB_DISABLE_PROGRESS_BARS`` is set.

    Returns:
        A row for each task and metric: ``task``, ``metric``, ``value`` (0 to 1), ``stderr`` (the harness's standard
        error of the mean; None for a single item), ``items`` (how many were judged) and ``truncated`` (how many of
        them were longer than the model's context and lost their beginning).

    Raises:
        CbdError: lm-evaluation-harness is not installed.
        RecipeError: An unknown task, no items, items that cannot be read, or an answer longer than the context.

    Cost: one forward pass over every prompt with each of its answers, where answers are single tokens one for all;
        logits of `batch_size` prompts in float32, twice.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"limit must be 1 or more, not {limit}")
    harness, base = _harness()
    read = read_items(tasks, items)
    show_bars = progress and is_progress_bar_enabled()
    truncated: dict[str, set[int]] = {name: set() for name in read}

    class Judge(base):  # type: ignore[misc, valid-type]
        """The harness's model, which says what it had to cut, and shows bars only when they are wanted."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.asked = [(request.task_name, request.doc_id) for request in requests]
            return super().loglikelihood(requests, disable_tqdm=not show_bars)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **more: Any) -> Any:
            for (task, number), (_, context, answer) in zip(self.asked, requests, strict=True):
                if len(answer) > self.max_length:
                    raise RecipeError(
                        f"item {number + 1} of {task} has an answer of {len(answer)} tokens, and the model a context "
                        f"of {self.max_length}"
                    )
                if len(context) + len(answer) > self.max_length + 1:
                    truncated[task].add(number)
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **more)

    with _as_it_was(model, show_bars):
        judge = Judge(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
            softmax_dtype=torch.float32,
        )
        manager = harness.tasks.TaskManager(include_defaults=False)
        loaded = manager.load([_config(name, rows) for name, rows in read.items()])
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=_SEED)
        # What simple_evaluate does, but for its description of the machine, which takes seconds a model.
        evaluated = harness.evaluate(lm=judge, task_dict=loaded, limit=limit, log_samples=False)
    return [
        {
            "task": name,
            "metric": metric,
            "value": float(evaluated["results"][name][f"{metric},none"]),
            "stderr": _number(evaluated["results"][name][f"{metric}_stderr,none"]),
            "items": int(evaluated["n-samples"][name]["effective"]),
            "truncated": len(truncated[name]),
        }
        for name in read
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in evaluated["results"][name]
    ]


def _harness() -> tuple[Any, Any]:
    """The harness and its class of transformers models, imported late: that takes seconds."""
    try:
        import lm_eval
        import lm_eval.tasks
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError as error:
        raise CbdError(
            f"tasks need lm-evaluation-harness (no module {error.name!r}): pip install 'cbd_hub[eval]'"
        ) from error
    return lm_eval, HFLM


@contextmanager
def _as_it_was(model: PreTrainedModel, shown: bool) -> Iterator[None]:
    """Sets the seeds; leaves mode, random states and the harness's logger as they were; silent where no bars show."""
    log = logging.getLogger("lm_eval")  # warns about each argument that a ready model leaves unused
    level, training, states = log.level, model.training, (random.getstate(), np.random.get_state())
    log.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            random.seed(_SEED)
            np.random.seed(_SEED)
            torch.manual_seed(_SEED)
            if shown:
                yield
            else:  # the bars of reading and of building prompts have no switch
                with redirect_stderr(io.StringIO()):
                    yield
    finally:
        log.setLevel(level)
        model.train(training)
        random.setstate(states[0])
        np.random.set_state(states[1])


def _config(name: str, rows: list[Row]) -> dict[str, Any]:
    """A task's config with its items as data; `datasets` would report a file that it reads to the Hub."""
    config: dict[str, Any] = yaml.safe_load((_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    (split,) = config.pop("dataset_kwargs")["data_files"]
    data = DatasetDict({split: Dataset.from_list(rows)})
    return {**config, "custom_dataset": lambda **_: data, "num_fewshot": 0}


def _number(value: Any) -> float | None:
    """A standard error; the harness says "N/A" or NaN where there is none."""
    return float(value) if isinstance(value, int | float) and value == value else None
