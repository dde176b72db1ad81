"""The recipe that a build was begun with: what an earlier version did not know, and what was changed since."""

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from cbd_hub.build.recipe import Recipe

__all__ = ["as_begun", "list_changes"]

_BEGUN = "begun.json"


def as_begun(recipe: Recipe, state: Path) -> Recipe:
    """The recipe as the version read it that began the build: an earlier one knew no control points by default."""
    begun = state / _BEGUN
    if begun.is_file() or not (state / "step-0.json").is_file():
        if PartialState().is_main_process and not (state / "step-0.json").is_file():
            state.mkdir(parents=True, exist_ok=True)
            known = recipe.model_dump(mode="json")
            partial = begun.with_suffix(".partial")
            partial.write_text(json.dumps({"version": version("cbd_hub"), "control_points": True, "recipe": known}))
            partial.replace(begun)
        PartialState().wait_for_everyone()
        return recipe
    if "control_point" in recipe.distillation.model_fields_set:
        return recipe
    distillation = recipe.distillation.model_copy(update={"control_point": None})
    return recipe.model_copy(update={"distillation": distillation})


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
