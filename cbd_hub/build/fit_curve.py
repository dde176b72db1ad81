"""``fit_curve``: control points for a chain that exists, whose anchors stay as they are."""

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from cbd_hub.build.begun import as_recorded
from cbd_hub.build.finish import STATE, measure_chain, write_checksums, write_description
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import Recipe, load_recipe
from cbd_hub.build.students import curve_to_train
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import ChainNotFoundError, RecipeError
from cbd_hub.files import locked_folder
from cbd_hub.interpolation.materialize import parse_dtype, plain_defaults
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest.manifest import MANIFEST_NAME, Anchor, ControlPoint, Manifest, check_file
from cbd_hub.training.curve import is_better, save_control_point
from cbd_hub.training.distill import distill
from cbd_hub.training.settings import AnchorDistillation, ControlPointConfig

__all__ = ["fit_curve"]


@plain_defaults()
def fit_curve(
    chain: str | Path,
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    *,
    tokens: int | str | None = None,
    rank: int | None = None,
    learning_rate: float | None = None,
    progress: bool = True,
) -> Chain:
    """Trains a control point for every pair of a chain that has none, and measures the chain again.

    A pair keeps its control point only where it lowers the validation loss between the anchors; the manifest says so
    either way. A call that was killed is finished by the next one with the same arguments, to the same bytes.

    Args:
        chain: Folder of a chain. (Of a published one: ``Chain.from_pretrained(repo_id).save_pretrained(folder)``.)
        recipe: Its ``data`` and ``distillation`` say what to train on, and how; losses compare with those of the
            anchors where it begins and ends text as theirs did (``data.begin_of_text``, ``data.end_of_text``). None
            takes the recipe that the chain was built with, whose relative paths start from the current folder.
        tokens: Training tokens a pair; None takes the recipe's.
        rank: Columns of the two factors of every matrix; None takes the recipe's, or picks.
        learning_rate: Peak learning rate of the control points; None takes the recipe's.
        progress: Show progress bars.

    Returns:
        The chain with its control points. Its anchors' files are unchanged.

    Cost: that of distilling an anchor for as many tokens, a pair; both anchors are in memory in float32.

    Raises:
        ChainNotFoundError: The folder holds no chain.
        RecipeError: There is no recipe, or no text in it, or a value is out of range.
        IntegrityError: The chain's files are not what its manifest says.
        OutputExistsError: Another process works in the folder.
    """
    folder = Path(chain).expanduser()
    if not (folder / MANIFEST_NAME).is_file():
        raise ChainNotFoundError(f"{folder} holds no {MANIFEST_NAME}; fit_curve works on a chain in a local folder")
    opened = Chain.from_pretrained(folder)
    if any(anchor.repo_id for anchor in opened.manifest.anchors):
        raise ChainNotFoundError(f"{folder} names anchors on the Hub; save the whole chain with save_pretrained first")
    inputs = BuildInputs(*_recipe(opened.manifest, recipe))
    config = _config(inputs.recipe.distillation, tokens, rank, learning_rate)
    if inputs.text is None:
        raise RecipeError("fit_curve needs text: name a recipe with `data`")
    with locked_folder(folder, "fit the curve") if PartialState().is_main_process else nullcontext():
        return _fit_all(opened, inputs, config, progress)


def _fit_all(opened: Chain, inputs: BuildInputs, config: AnchorDistillation, progress: bool) -> Chain:
    folder, anchors = Path(opened.location.place), [opened.manifest.anchors[0]]
    for large, small in zip(opened.manifest.anchors, opened.manifest.anchors[1:], strict=False):
        anchors.append(small if small.bent else _fit(opened, inputs, config, large, small, progress))
    if PartialState().is_main_process:
        # measured by the files' own hashes: the chain's checksums stay until its manifest is written as well
        needed = Manifest.needed_format(anchors, opened.manifest.round_widths)
        update = {"anchors": anchors, "format": needed, "checksums": None}
        measured = measure_chain(opened.manifest.model_copy(update=update), inputs, folder, progress)
        checksums = write_checksums(folder, anchors)
        write_description(measured.model_copy(update={"checksums": checksums}), folder)
        for record in (folder / STATE).glob("curve-*.json"):
            record.unlink()
    PartialState().wait_for_everyone()
    return Chain.from_pretrained(folder)


def _recipe(manifest: Manifest, recipe: str | Path | Mapping[str, Any] | Recipe | None) -> tuple[Recipe, Path]:
    if recipe is not None:
        return load_recipe(recipe)
    if manifest.recipe is None:
        raise RecipeError(f"the chain {manifest.name!r} does not say how it was built; name a recipe with its text")
    return load_recipe(as_recorded(manifest.recipe))


def _config(
    config: AnchorDistillation, tokens: int | str | None, rank: int | None, learning_rate: float | None
) -> AnchorDistillation:
    """The recipe's training, with what the call says instead."""
    wanted = {"tokens": tokens, "rank": rank, "learning_rate": learning_rate}
    control = config.control_point or ControlPointConfig()
    values = control.model_dump() | {name: value for name, value in wanted.items() if value is not None}
    try:
        control = ControlPointConfig.model_validate(values | {"together": False})
    except ValueError as error:
        raise RecipeError(f"the control point cannot be trained so: {error}") from None
    control = control.model_copy(update={"tokens": config.tokens if control.tokens is None else control.tokens})
    if not control.tokens:
        raise RecipeError("fit_curve needs training tokens: pass tokens, e.g. 1M")
    return config.model_copy(update={"tokens": 0, "control_point": control})


def _fit(
    chain: Chain, inputs: BuildInputs, config: AnchorDistillation, large: Anchor, small: Anchor, progress: bool
) -> Anchor:
    """Trains the control point of one pair, unless an earlier call did; returns the anchor's new entry."""
    folder = Path(chain.location.place)
    saved = folder / STATE / f"curve-{small.name}.json"
    wanted = {"config": config.model_dump(mode="json"), "files": small.model_dump(mode="json")["files"]}
    if saved.is_file() and (known := json.loads(saved.read_text(encoding="utf-8")))["wanted"] == wanted:
        record = ControlPoint.model_validate_json(json.dumps(known["record"]))
        if record.file is not None:
            check_file(folder / f"{small.control_point_name}.safetensors", record.file)
        return small.model_copy(update={"control_point": record})
    manifest = chain.manifest
    models = [chain.initialize(chain.plan(shape=a.shape), dtype=torch.float32, progress=False) for a in (large, small)]
    sizes = manifest.sizes(small), manifest.sizes(large)
    pair = Pair(manifest.resolved_axis_map, *sizes, chain.index_maps[small.name])
    length = 1 if inputs.recipe.data is None else inputs.recipe.data.sequence_length
    curve = curve_to_train(models[1], models[0], pair, config, manifest.layers_last, length)
    if curve is None or inputs.text is None or inputs.validation is None:
        return small
    index_map, work = pair.index_map, folder / STATE / "work"
    text = inputs.text.train, inputs.validation
    distill(models[1], models[0], *text, config, index_map=index_map, curve=curve, work_dir=work, progress=progress)
    record = curve.judge(inputs.validation)
    if PartialState().is_main_process:
        if is_better(record):
            record = save_control_point(curve.factors(), record, folder, small.name, parse_dtype(large.dtype))
        partial = saved.with_suffix(".partial")
        partial.write_text(json.dumps({"wanted": wanted, "record": record.model_dump(mode="json")}))
        partial.replace(saved)
    PartialState().wait_for_everyone()
    known = json.loads(saved.read_text(encoding="utf-8"))
    return small.model_copy(update={"control_point": ControlPoint.model_validate_json(json.dumps(known["record"]))})
