"""ROUGE and accuracy: by packaged implementations, or by the scripts of Hugging Face's `evaluate`.

`evaluate` fetches a metric as a Python file and runs it. Repositories are not trusted here, so a script runs only
where the caller names a place for it; otherwise ROUGE is the rouge-score package's, which the script calls too, and
accuracy is counted here. Whoever computed a number is named beside it. Means are taken over items here, never by a
script: what `evaluate` reports for ROUGE by itself is the median of a bootstrap, near the mean and not equal to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import config

from cbd_hub.errors import CbdError, RecipeError

__all__ = ["HUB", "ROUGE", "Scores", "accuracy", "rouge"]

HUB = "hub"
"""The place of scripts that stands for the Hub (``evaluate-metric/NAME``); any other place is a folder."""

ROUGE = ("rouge1", "rouge2", "rougeL")
"""What :func:`rouge` measures: words in common, pairs of words, and the longest common subsequence; F1 of each."""


@dataclass(frozen=True)
class Scores:
    """Metrics over some items."""

    values: dict[str, list[float]]
    """Metric -> one value an item (0 to 1), in the order of the items."""
    implementation: str
    """Who computed them, with its version, and why not the script where one was asked for."""

    @property
    def means(self) -> dict[str, float]:
        """Metric -> mean over items."""
        return {name: math.fsum(each) / len(each) for name, each in self.values.items()}

    @property
    def stderrs(self) -> dict[str, float | None]:
        """Metric -> standard error of the mean, from the sample variance; None for a single item."""
        return {name: _stderr(each) for name, each in self.values.items()}


def rouge(predictions: Sequence[str], references: Sequence[str], scripts: str | Path | None = None) -> Scores:
    """ROUGE-1, ROUGE-2 and ROUGE-L of texts against a reference each: F1 of stemmed words.

    Words are runs of a-z and 0-9, whatever their case; text in another script has none and scores 0.

    Args:
        predictions: Texts.
        references: One for each.
        scripts: None for the rouge-score package; :data:`HUB` or a folder that holds ``rouge/rouge.py`` for
            `evaluate`'s script. **Either is a program that runs here.** Without `evaluate`, or where the Hub's script
            cannot be had, rouge-score does it and :attr:`Scores.implementation` says so. The numbers are the same.

    Raises:
        RecipeError: No items, not as many of one as of the other, or a folder without the script.
        CbdError: rouge-score is not installed.

    Cost: milliseconds an item; `evaluate` takes seconds to import.
    """
    _check(predictions, references)
    script, told = _script("rouge", scripts)
    if script is not None:
        options = {"rouge_types": list(ROUGE), "use_stemmer": True, "use_aggregator": False}
        found = script(predictions=list(predictions), references=list(references), **options)
        return Scores({name: [float(value) for value in found[name]] for name in ROUGE}, told)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise CbdError(f"ROUGE needs rouge-score (no module {error.name!r}): pip install 'cbd_hub[eval]'") from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    pairs = [scorer.score(wanted, got) for got, wanted in zip(predictions, references, strict=True)]
    values = {name: [float(pair[name].fmeasure) for pair in pairs] for name in ROUGE}
    return Scores(values, f"rouge-score {version('rouge-score')}{told}")


def accuracy(predictions: Sequence[int], references: Sequence[int], scripts: str | Path | None = None) -> Scores:
    """The share of labels that are right, as the metric ``accuracy``.

    Args:
        predictions: Labels.
        references: The right ones.
        scripts: As of :func:`rouge`; a folder holds ``accuracy/accuracy.py``. A script is asked item by item, so that
            there is a standard error: some milliseconds each.

    Raises:
        RecipeError: As :func:`rouge` says.
    """
    _check(predictions, references)
    script, told = _script("accuracy", scripts)
    pairs = zip(predictions, references, strict=True)
    if script is not None:
        values = [float(script(predictions=[got], references=[wanted])["accuracy"]) for got, wanted in pairs]
        return Scores({"accuracy": values}, told)
    return Scores({"accuracy": [float(got == wanted) for got, wanted in pairs]}, f"cbd_hub {version('cbd_hub')}{told}")


def _check(predictions: Sequence[Any], references: Sequence[Any]) -> None:
    if len(predictions) != len(references) or not predictions:
        raise RecipeError(
            f"there are {len(predictions)} predictions and {len(references)} references; give one reference for each "
            "prediction, and at least one"
        )


def _script(name: str, scripts: str | Path | None) -> tuple[Callable[..., dict[str, Any]] | None, str]:
    """What computes a metric and what it is called; or None, and what to say of that."""
    if scripts is None:
        return None, ""
    place = f"evaluate-metric/{name}" if scripts == HUB else str(Path(scripts).absolute() / name)
    if scripts != HUB and not (Path(place) / f"{name}.py").is_file():
        raise RecipeError(f"no metric script {name}/{name}.py in {scripts}; name its folder, or {HUB!r} to fetch it")
    if scripts == HUB and config.HF_HUB_OFFLINE:  # which evaluate does not look at
        return None, " (HF_HUB_OFFLINE is set, so the script was not fetched)"
    try:
        import evaluate
    except ModuleNotFoundError as error:
        return None, f" (no module {error.name!r} for the script: pip install 'cbd_hub[eval]')"
    try:
        compute = evaluate.load(place, keep_in_memory=True).compute
    except (OSError, ImportError) as error:
        return None, f" (the script could not be loaded: {' '.join(str(error).split())})"
    return compute, f"evaluate {version('evaluate')}, script {place}"


def _stderr(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
