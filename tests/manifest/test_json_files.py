"""JSON of a repository: plain objects alone."""

import json
from pathlib import Path

import pytest

from cbd_hub.errors import IntegrityError
from cbd_hub.manifest.json_files import read_json


def test_an_object_is_read_as_it_is(tmp_path: Path) -> None:
    data = {"a": [1, 2.5, None, True, {"b": "é"}], "c": {}, "d": -0.0, "e": 10**30}
    (tmp_path / "f").write_text(json.dumps(data))
    assert read_json(tmp_path / "f", 1000) == data


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "no JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"a": NaN}', "NaN is no JSON number"),
        ('{"a": -Infinity}', "Infinity is no JSON number"),
        ('{"a": 1e999}', "too large a number"),
        ('{"a": 1, "a": 2}', "a key stands there twice"),
        ('{"a": ' + "[" * 64 + "]" * 64 + "}", "more than 64 levels deep"),
        ('{"a": ' + "[" * 100_000, "cannot be read as JSON"),
        ("x" * 1001, "has 1001 bytes; at most 1000 are read"),
    ],
    ids=lambda value: value[:20],
)
def test_anything_else_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "f").write_text(text)
    with pytest.raises(IntegrityError, match=why):
        read_json(tmp_path / "f", 1000 if len(text) == 1001 else 10**6)


def test_depth_that_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "f").write_text('{"a": ' + "[" * 62 + "]" * 62 + "}")
    assert read_json(tmp_path / "f", 1000)


def test_bytes_and_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff\xfe{}")
    with pytest.raises(IntegrityError, match="cannot be read as JSON"):
        read_json(tmp_path / "f", 1000)
    with pytest.raises(IntegrityError, match="No such file"):
        read_json(tmp_path / "none", 1000)
