"""What people write for numbers: a truth value, infinity and numpy's own are read as they are meant, or refused."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_recipe import tiny_recipe

from cbd_hub.build.recipe import load_recipe
from cbd_hub.errors import RecipeError
from cbd_hub.settings import Settings


class Example(Settings):
    """Fields of every kind."""

    count: int = 1
    share: float = 0.5
    name: str | None = None
    switch: bool = False
    either: bool | int = 0
    many: list[int] = []


@pytest.mark.parametrize("field", ["count", "share", "name", "many"])
@pytest.mark.parametrize("value", [True, False, np.True_])
def test_a_truth_value_is_no_number(field: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"{field} holds"):
        Example.model_validate({field: [value] if field == "many" else value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float64("inf")])
def test_infinity_and_nan_are_no_settings(value: float) -> None:
    with pytest.raises(ValidationError, match="finite"):
        Example(share=value)


def test_truth_where_it_belongs_and_numbers_of_numpy() -> None:
    made = Example.model_validate({"switch": True, "either": True, "count": np.int64(3), "share": np.float32(0.25)})
    assert (made.switch, made.either, made.count, made.share) == (True, True, 3, 0.25)
    assert type(made.count) is int and type(made.share) is float


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"distillation": {"tokens": True}}, "tokens"),
        ({"distillation": {"learning_rate": float("inf")}}, "learning_rate"),
        ({"distillation": {"control_point": {"rank": True}}}, "rank"),
        ({"distillation": {"kl": float("nan")}}, "kl"),
        ({"calibration_tokens": True}, "calibration_tokens"),
        ({"name": True}, "name"),
        ({"anchors": [True]}, "anchors"),
        ({"anchors": [{"fraction": float("nan")}]}, "fraction"),
        ({"evaluation": {"curve_points": False}}, "curve_points"),
        ({"data": {"text_files": "a.txt", "sequence_length": True}}, "sequence_length"),
    ],
)
def test_recipes(change: dict[str, Any], named: str) -> None:
    with pytest.raises(RecipeError, match=named):
        load_recipe(tiny_recipe(**change))
