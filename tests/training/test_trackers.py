"""Trackers that cannot be had are named before any work, with what to install."""

import importlib.util
from typing import Any

import pytest
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from cbd_hub.errors import RecipeError
from cbd_hub.training.trackers import check_trackers

PACKAGES = {"wandb": "wandb", "comet_ml": "comet-ml", "swanlab": "swanlab", "flyte": "flytekit", "dvclive": "dvclive"}


@pytest.mark.parametrize("name", sorted(PACKAGES))
def test_a_missing_package_is_named(name: str) -> None:
    if importlib.util.find_spec(name if name != "flyte" else "flytekit"):
        pytest.skip(f"{name} is installed")
    with pytest.raises(RecipeError) as error:
        check_trackers(name)
    assert f"pip install {PACKAGES[name]}," in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(INTEGRATION_TO_CALLBACK))
def test_every_tracker_of_transformers_is_passed_or_refused_by_name(name: str) -> None:
    try:
        check_trackers([name], "distillation.report_to")
    except RecipeError as error:
        assert f"distillation.report_to names {name!r}" in str(error)


@pytest.mark.parametrize("value", ["none", "all", ["none"], ["all"], []])
def test_none_and_all_ask_for_nothing(value: Any) -> None:
    check_trackers(value)


@pytest.mark.parametrize("value", ["wanbd", ["tensorboard", "wanbd"], ["none", "wanbd"]])
def test_an_unknown_name_is_refused_with_the_known_ones(value: Any) -> None:
    if "tensorboard" in value and not importlib.util.find_spec("tensorboard"):
        value = ["wanbd"]
    with pytest.raises(RecipeError, match=r"(?s)'(wanbd|none)'; allowed: .*wandb"):
        check_trackers(value)
