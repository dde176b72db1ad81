"""Items of tasks, written in both forms that are read."""

import json
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

WORDS = "the house of a nation, laws and states; peace with all men under one Union for the people".split()


Row = dict[str, Any]


def phrase(rng: random.Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))


@cache
def asked(name: str) -> list[tuple[str, list[str]]]:
    """A dozen questions of a task with their options, the same each time."""
    rng = random.Random(name)
    number = {"boolq": 2, "piqa": 2, "openbookqa": 4, "commonsense_qa": 5}[name]
    return [(phrase(rng, 3, 9), [phrase(rng, 1, 5) for _ in range(number)]) for _ in range(12)]


def passage(question: str) -> str:
    return f"Of {question} much is said."


def rendered(name: str, question: str, options: list[str], gold: int) -> Row:
    """An item whose options are one text."""
    if name == "boolq":
        return {"question": question, "title": "A title", "passage": passage(question), "answer": str(bool(gold))}
    lines = [f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False)]
    return {"question": question, "options": "\n".join(lines), "answer": lines[gold]}


def exported(name: str, question: str, options: list[str], gold: int) -> Row:
    """The same item with the fields of the Hub's data sets."""
    if name == "boolq":
        return {"question": question, "passage": f"A title -- {passage(question)}", "label": gold}
    if name == "piqa":
        return {"goal": question, "sol1": options[0], "sol2": options[1], "label": gold}
    letters = list("ABCDE"[: len(options)])
    stem = "question_stem" if name == "openbookqa" else "question"
    return {stem: question, "choices": {"text": options, "label": letters}, "answerKey": letters[gold]}


def write(folder: Path, name: str, golds: list[int], form: Callable[..., Row] = rendered) -> Path:
    """Writes a task's items, with these right answers, and returns the folder."""
    rows = [form(name, *item, gold) for item, gold in zip(asked(name), golds, strict=True)]
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
