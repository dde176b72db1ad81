"""The recipe that a build was begun with: what an earlier version did not know, and what was changed since."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from cbd_hub.build.recipe import Recipe

__all__ = ["as_begun", "as_recorded", "list_changes", "step_fingerprint"]

_BEGUN = "begun.json"
_BEFORE = {"begin_of_text": "none", "end_of_text": "eos"}
"""How versions packed text that had no keys for it."""
_YOUNGER = (("distillation", "control_point", None), ("source", "served", None), ("spread", "round_widths", False))
"""Section, key and the value that stands for what a version did that did not have the key."""


def as_begun(recipe: Recipe, state: Path) -> Recipe:
    """The recipe as the version read it that began the build.

    An earlier one trained no control points by default, began and ended text as :func:`as_recorded` says, and did not
    round widths.
    """
    begun = state / _BEGUN
    if not (state / "step-0.json").is_file():
        if PartialState().is_main_process:
            state.mkdir(parents=True, exist_ok=True)
            news = dict.fromkeys(("control_points", "text_ends", "round_widths"), True)
            known: dict[str, Any] = {"version": version("cbd_hub"), **news}
            partial = begun.with_suffix(".partial")
            partial.write_text(json.dumps({**known, "recipe": recipe.model_dump(mode="json")}))
            partial.replace(begun)
        PartialState().wait_for_everyone()
        return recipe
    known = json.loads(begun.read_text(encoding="utf-8")) if begun.is_file() else {}
    if "control_points" not in known and "control_point" not in recipe.distillation.model_fields_set:
        distillation = recipe.distillation.model_copy(update={"control_point": None})
        recipe = recipe.model_copy(update={"distillation": distillation})
    if "round_widths" not in known and "round_widths" not in recipe.spread.model_fields_set:
        recipe = recipe.model_copy(update={"spread": recipe.spread.model_copy(update={"round_widths": False})})
    if "text_ends" not in known and recipe.data is not None:
        missing = {key: way for key, way in _BEFORE.items() if key not in recipe.data.model_fields_set}
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=missing)})
    return recipe


def as_recorded(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe in a chain's manifest, where what an earlier version did not know stands as that version did it."""
    data, spread = recipe.get("data"), {"round_widths": False, **recipe.get("spread", {})}
    return {**recipe, "spread": spread, **({} if data is None else {"data": {**_BEFORE, **data}})}


def step_fingerprint(recipe: Recipe, index: int) -> str:
    """Returns a SHA-256 over all that decides step ``index`` (0 is the source): later anchors play no part."""
    without = {"hub", "license", "anchors", "evaluation"} | ({"distillation"} if index == 0 else set())
    parts = recipe.model_dump(mode="json", exclude=without)
    parts["anchors"] = [a.model_dump(mode="json") for a in recipe.anchors[:index]]
    parts["evaluation_tokens"] = recipe.evaluation.tokens
    if parts["bridge"] is None:  # a build of an older recipe goes on where it stopped
        del parts["bridge"]
    for section, key, absent in _YOUNGER:
        if parts.get(section, {}).get(key, ...) is absent:
            del parts[section][key]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def list_changes(state: Path, recipe: Recipe) -> str:
    """Which keys differ from the recipe that a build was begun with; empty where that is not known."""
    try:
        before = json.loads((state / _BEGUN).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, KeyError):
        return ""
    now = recipe.model_dump(mode="json")
    return ", ".join(f"{key} was {old!r} and is {new!r}" for key, old, new in _differences(before, now, ""))


def _differences(before: Any, now: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields dotted key, old and new value of everything that differs between two recipes."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{where}.{key}" if where else str(key))
    elif before != now:
        yield where, before, now
