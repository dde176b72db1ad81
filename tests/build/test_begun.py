"""What decides a step, and what a build or chain of an earlier version did where it had no key for it."""

import json
from pathlib import Path
from typing import Any

from cbd_hub.build.begun import as_begun, as_recorded, step_fingerprint
from cbd_hub.build.recipe import load_recipe

OLDER = ["0262046723f13e86", "482fe84bc392d9ee", "0f13152a8cc66841"]  # of the version before round widths


def trained(**changes: Any) -> dict[str, Any]:
    return {
        "name": "chain",
        "source": {"train": {}},
        "tokenizer": {"vocab_size": 512},
        "data": {"text_files": "*.txt"},
        "anchors": [0.7, 0.5],
        "distillation": {"tokens": 1000},
        **changes,
    }


def prints(recipe: dict[str, Any]) -> list[str]:
    read = load_recipe(recipe)[0]
    return [step_fingerprint(read, i) for i in range(len(read.anchors) + 1)]


def test_a_step_depends_on_what_came_before_it_alone() -> None:
    before = prints(trained())
    assert len(set(before)) == 3 and all(len(digest) == 64 for digest in before)

    def changed(**changes: Any) -> list[bool]:
        return [one != other for one, other in zip(before, prints(trained(**changes)), strict=False)]

    assert changed(anchors=[0.7, 0.6]) == [False, False, True]
    assert changed(anchors=[0.7, 0.5, 0.5]) == [False, False, False]
    assert changed(anchors=[0.6, 0.5]) == [False, True, True]
    assert changed(anchors=[{"fraction": 0.7, "tokens": 5}, 0.5]) == [False, True, True]
    assert changed(distillation={"tokens": 2000}) == [False, True, True]
    assert changed(source={"train": {"config": {"hidden_size": 8}}}) == [True, True, True]
    for key, value in {"name": "x", "dtype": "float16", "data": {"text_files": "x"}, "calibration_tokens": 1}.items():
        assert changed(**{key: value}) == [True, True, True], key
    for key, value in {"license": "mit", "hub": {"repo_id": "a/b"}, "evaluation": {"curve_points": 1}}.items():
        assert changed(**{key: value}) == [False, False, False], key


def test_a_build_that_an_earlier_version_began_goes_on_as_that_version_would(tmp_path: Path) -> None:
    recipe = load_recipe(trained())[0]
    assert as_begun(recipe, tmp_path) == recipe  # begun now: everything is known
    (tmp_path / "step-0.json").write_text("{}")
    assert as_begun(recipe, tmp_path) == recipe
    (tmp_path / "begun.json").write_text(json.dumps({"version": "0.1.0"}))
    older = as_begun(recipe, tmp_path)
    assert older.distillation.control_point is None
    assert not older.spread.round_widths
    assert older.data is not None and (older.data.begin_of_text, older.data.end_of_text) == ("none", "eos")
    asked = load_recipe(trained(spread={"round_widths": True}))[0]
    assert as_begun(asked, tmp_path).spread.round_widths


def test_keys_that_an_earlier_version_did_not_have_leave_its_fingerprints_as_they_were() -> None:
    for change in ({"distillation": {"tokens": 1000, "control_point": None}}, {"spread": {"round_widths": False}}):
        recipe = load_recipe(trained(**change))[0]
        assert step_fingerprint(recipe, 1) != prints(trained())[1]
    both = {"distillation": {"tokens": 1000, "control_point": None}, "spread": {"round_widths": False}}
    assert [digest[:16] for digest in prints(trained(**both))] == OLDER


def test_a_recorded_recipe_says_what_its_version_did() -> None:
    recorded = as_recorded({"name": "a", "data": {"text_files": "a"}})
    assert recorded["spread"] == {"round_widths": False} and recorded["data"]["end_of_text"] == "eos"
    kept = as_recorded({"spread": {"round_widths": True, "layers_last": False}})
    assert kept == {"spread": {"round_widths": True, "layers_last": False}}
