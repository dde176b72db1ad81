"""Experiment trackers: whether those that ``report_to`` names can be had here, asked before any work."""

from transformers.integrations import integration_utils

from cbd_hub.errors import RecipeError

__all__ = ["check_trackers"]

_ASKED_AS = {"azure_ml": "azureml", "comet_ml": "comet", "flyte": "flytekit"}
"""Trackers whose question in transformers, ``is_..._available``, has another name than they."""
_PACKAGES = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow", "flyte": "flytekit"}
"""What to install, where it is not called as the tracker is."""


def check_trackers(report_to: str | list[str], key: str = "report_to") -> None:
    """Refuses trackers that are unknown or not installed.

    Args:
        report_to: One name or several, as in :class:`cbd_hub.training.settings.DistillationConfig`; ``"all"`` takes
            what there is.
        key: Name of the setting, for the error.

    Raises:
        RecipeError: A name that transformers does not know, or a tracker whose package is not installed.
    """
    names = [report_to] if isinstance(report_to, str) else report_to
    if names in (["none"], ["all"]):
        return
    for name in names:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK:
            allowed = ", ".join(sorted(integration_utils.INTEGRATION_TO_CALLBACK))
            raise RecipeError(f"{key} names {name!r}; allowed: {allowed}, and alone none or all")
        if not getattr(integration_utils, f"is_{_ASKED_AS.get(name, name)}_available")():
            how = f"pip install {_PACKAGES.get(name, name)}"
            if name == "kubeflow":
                how = "it reports from within a Kubeflow TrainJob"
            raise RecipeError(f"{key} names {name!r}, which cannot be used here: {how}, or set {key} to none")
