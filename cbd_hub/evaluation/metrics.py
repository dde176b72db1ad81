"""ROUGE, by the rouge-score package or by the script of Hugging Face's `evaluate`.

`evaluate` fetches a metric as a Python file and runs it. Repositories are not trusted here, so a script runs only
where the caller names a place for it; otherwise ROUGE is the rouge-score package's, which the script calls too. A
result names who computed it. Means are taken over items here, never by a script: what `evaluate` reports for ROUGE by
itself is the median of a bootstrap, near the mean and not equal to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import config

from cbd_hub.errors import CbdError, RecipeError

__all__ = ["HUB", "ROUGE", "Scores", "rouge"]

HUB = "hub"
"""The place of scripts that stands for the Hub (``evaluate-metric/rouge``); any other place is a folder."""

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
            cannot be loaded, rouge-score computes it, as :attr:`Scores.implementation` states. The numbers agree.

    Raises:
        RecipeError: No items, not as many of one as of the other, or a folder without the script.
        CbdError: rouge-score is not installed.

    Cost: milliseconds an item; `evaluate` takes seconds to import.
    """
    if len(predictions) != len(references) or not predictions:
        raise RecipeError(
            f"there are {len(predictions)} predictions and {len(references)} references; give one reference for each "
            "prediction, and at least one"
        )
    script, origin = _script(scripts)
    if script is not None:
        options = {"rouge_types": list(ROUGE), "use_stemmer": True, "use_aggregator": False}
        computed = script(predictions=list(predictions), references=list(references), **options)
        return Scores({name: [float(value) for value in computed[name]] for name in ROUGE}, origin)
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise CbdError(f"ROUGE needs rouge-score (no module {error.name!r}): pip install 'cbd_hub[eval]'") from error
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    pairs = [scorer.score(wanted, got) for got, wanted in zip(predictions, references, strict=True)]
    values = {name: [float(pair[name].fmeasure) for pair in pairs] for name in ROUGE}
    return Scores(values, f"rouge-score {version('rouge-score')}{origin}")


def _script(scripts: str | Path | None) -> tuple[Callable[..., dict[str, Any]] | None, str]:
    """The script's function and its name; or None, and why rouge-score computes instead."""
    if scripts is None:
        return None, ""
    place = "evaluate-metric/rouge" if scripts == HUB else str(Path(scripts).absolute() / "rouge")
    if scripts != HUB and not (Path(place) / "rouge.py").is_file():
        raise RecipeError(f"no metric script rouge/rouge.py in {scripts}; name its folder, or {HUB!r} to fetch it")
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
