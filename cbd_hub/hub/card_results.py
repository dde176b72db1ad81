"""Measured results in the README.md of a model or chain, where the Hub reads them: its metadata's ``model-index``.

A result is known by its task, data set and metric; a newer one takes the place of the older, all others stay, and so
do the text and the other metadata (all but comments in the metadata, which :class:`huggingface_hub.ModelCard` reads
and writes). The file is replaced as a whole, so whoever is interrupted has the old card or the new one. Where a
generated card is written again, :func:`add_results` takes them over.
"""

import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cbd_hub.errors import RecipeError
from cbd_hub.hub.cards import OWN_TEXT
from cbd_hub.manifest.manifest import MANIFEST_NAME

__all__ = ["add_results", "open_card", "update_card"]

_LOSSES = ("loss", "perplexity", "bits_per_byte")


def open_card(place: str | Path) -> ModelCard:
    """Reads the card of a folder; a minimal one where there is none, which is not written yet.

    Args:
        place: A local folder of a model or chain.

    Raises:
        RecipeError: No local folder, or a card whose metadata cannot be read or would not survive being written.
    """
    folder = Path(place)
    if not folder.is_dir():
        raise RecipeError(
            f"{place} is no local folder, so its card cannot be updated here; download it (hf download {place} "
            "--local-dir FOLDER) and name that folder, or measure a folder before it is pushed"
        )
    path = folder / "README.md"
    if not path.exists():
        tags = ["cbd-hub"] if (folder / MANIFEST_NAME).is_file() else None  # by which publishing knows its own
        data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=tags)
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {_name(folder)}\n")
    try:
        card = ModelCard.load(path)
        if card.data.eval_results is not None:  # so that there is metadata, and it can be read
            index = next(yaml.safe_load_all(path.read_text(encoding="utf-8-sig")))["model-index"]
            if len(index) > 1:
                raise ValueError(f"its model-index is of {len(index)} models, and the results are of one")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RecipeError(f"the metadata of {path} cannot be updated: {error}; correct it by hand first") from error
    return card


def update_card(place: str | Path, rows: Sequence[Mapping[str, Any]], dataset: str | None = None) -> Path:
    """Writes results into the card of a folder, and returns the card's path.

    Args:
        place: A local folder of a model or chain.
        rows: Those that :mod:`cbd_hub.chain.compare` measured of it; values that are no finite numbers are left out.
        dataset: What the text was that losses were measured on; tasks and summaries say it themselves.

    Raises:
        RecipeError: As :func:`open_card` says; nothing was changed then.
    """
    card = open_card(place)
    data: Any = card.data
    new = [result for row in rows for result in _results(row, str(place), dataset or "text")]
    data.model_name = data.model_name or _name(Path(place))
    data.eval_results = _merged(data.eval_results, new)
    path = Path(place) / "README.md"
    partial = path.with_name("README.md.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:  # the card has its own line ends
            file.write(str(card))
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def add_results(card: ModelCard, held: str) -> ModelCard:
    """Adds the results of an earlier card to one that is to take its place, and returns the latter.

    Args:
        card: The new card; its own results take the place of those that they measure again.
        held: Text of the earlier card. Of what the chain's build measured nothing is taken: the manifest knows it.
            Results that :class:`huggingface_hub.ModelCard` cannot read are left behind.
    """
    if "\nmodel-index:" not in held:
        return card
    try:
        earlier: Any = ModelCard(held).data
    except (ValueError, yaml.YAMLError):
        return card
    measured_elsewhere = [result for result in earlier.eval_results or [] if result.dataset_name != OWN_TEXT]
    if measured_elsewhere:
        data: Any = card.data
        data.model_name = data.model_name or earlier.model_name
        data.eval_results = _merged(measured_elsewhere, data.eval_results or [])
    return card


def _merged(old: Sequence[EvalResult] | None, new: Sequence[EvalResult]) -> list[EvalResult]:
    """The new ones behind those of the old that they do not replace."""
    replaced = {_key(result) for result in new}
    return [result for result in old or [] if _key(result) not in replaced] + list(new)


def _results(row: Mapping[str, Any], place: str, dataset: str) -> Iterator[EvalResult]:
    """One row as results: loss, perplexity and bits a byte of text, or the one metric of a task or of summaries."""
    of = "" if row["name"] == place else f" of {row['name']}"
    facts: tuple[str, ...] = ("num_tokens",)
    if "loss" in row:
        values = {name: row[name] for name in _LOSSES}
        what: dict[str, Any] = {"task_type": "text-generation", "dataset_type": "text", "dataset_name": dataset}
    else:
        values, facts = {row["metric"]: row["value"]}, ("stderr", "items", "truncated", "implementation")
        what = {"task_type": "multiple-choice", "dataset_type": row["task"], "dataset_name": row["task"]}
        if "implementation" in row:
            what |= {"task_type": "text-generation", "dataset_type": "text"}
    # huggingface_hub puts results together that agree in all but the data set's name, so the name is the config too.
    config = None if what["dataset_type"] == what["dataset_name"] else what["dataset_name"]
    for metric, value in values.items():
        if math.isfinite(value):
            yield EvalResult(
                **what,
                dataset_config=config,
                metric_type=metric,
                metric_name=f"{metric}{of}",
                metric_value=value,
                metric_args={name: row[name] for name in facts if row.get(name) is not None},
            )


def _key(result: EvalResult) -> tuple[Any, ...]:
    """The key of a result; the metric's name distinguishes the anchors of a chain."""
    return (*result.unique_identifier, result.dataset_name, result.metric_type, result.metric_name)


def _name(folder: Path) -> str:
    return " ".join(folder.resolve().name.split()) or "model"
