"""Carrying a plan out: read, interpolate, and hand back an ordinary transformers model.

The two anchors' headers are checked against the plan, and only then are weights read: each tensor once, blended in
float32, cast once, and its sources dropped before the next. Peak memory stays near the target's size plus the largest
pair of source tensors.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from cbd_hub.axes.architectures import AXIS_MAPS, axis_map_for
from cbd_hub.errors import IntegrityError, ManifestError
from cbd_hub.hub.read import anchor_place, checked_file
from cbd_hub.hub.sources import open_checkpoint, open_control_point, reader, weight_files
from cbd_hub.hub.untrusted import guarded, read_config, read_generation_config
from cbd_hub.interpolation.checkpoints import Checkpoint
from cbd_hub.interpolation.control_points import factor_shapes
from cbd_hub.interpolation.materialize import (
    Read,
    blend,
    build_model,
    empty_model,
    parse_dtype,
    plain_defaults,
    saved_names,
    target_config,
)
from cbd_hub.interpolation.operations import TensorOp
from cbd_hub.interpolation.plan import Plan
from cbd_hub.interpolation.ranges import Run
from cbd_hub.interpolation.weight_file import write_tensors
from cbd_hub.manifest.manifest import Anchor
from cbd_hub.progress import progress_bar

if TYPE_CHECKING:
    from cbd_hub.chain.chain import Chain

__all__ = ["anchor_config", "assemble", "assemble_into", "open_weights"]


def open_weights(
    chain: "Chain", anchor: Anchor, needed: Mapping[str, Sequence[Run]] | None = None, progress: bool = True
) -> Checkpoint:
    """Opens an anchor's weights and checks their headers against the manifest; reads no weight.

    Args:
        chain: The chain.
        anchor: One of its anchors.
        needed: Parameter → byte runs of it that will be read, so that no more is fetched; None is everything.
        progress: Show a progress bar while ranges are fetched.

    Raises:
        IntegrityError: Damaged files, or other tensors than the manifest says.
    """
    place, checksums = anchor_place(chain.location, anchor), chain.checksums.get(anchor.name)
    return open_checkpoint(place, anchor, chain.manifest.resolved_axis_map, checksums, needed, progress)


def anchor_config(chain: "Chain", anchor: Anchor) -> PreTrainedConfig:
    """Returns an anchor's transformers config, checked against the manifest.

    Raises:
        IntegrityError: The file differs from the manifest's hash.
        ManifestError: The config contradicts the manifest's shape or axis map.
    """
    place, axis_map = anchor_place(chain.location, anchor), chain.manifest.resolved_axis_map
    path = checked_file(place, "config.json", anchor.files["config.json"])
    what = f"config.json of anchor {anchor.name!r}"
    config = read_config(path, what, chain.manifest.architecture, axis_map, anchor.shape)
    if config.model_type in AXIS_MAPS:
        known = axis_map_for(config)
        if replace(known, free=()) != replace(axis_map, free=()):
            raise ManifestError(
                f"the manifest's axis map is not that of {config.model_type!r} models; the chain was made by "
                "another version or altered"
            )
    return config


@plain_defaults()
def assemble(
    chain: "Chain", plan: Plan, refine: bool = False, dtype: str | torch.dtype = "auto", progress: bool = True
) -> PreTrainedModel:
    """Carries out a plan: reads, interpolates and returns the model.

    :meth:`cbd_hub.chain.chain.Chain.initialize` is the way in, and says what the arguments mean and what it costs.

    Raises:
        IntegrityError: The anchors' files are not what the manifest says.
        ManifestError: A config contradicts the manifest, or the chain ships no calibration tokens to refine on.
    """
    entries = {entry.name: entry for entry in chain.manifest.anchors}
    large, small = entries[plan.large], entries[plan.small]
    out_dtype = parse_dtype(large.dtype if dtype == "auto" else dtype)
    if refine and plan.method != "anchor":
        if chain.calibration is None:
            raise ManifestError(f"the chain {chain.manifest.name!r} ships no calibration tokens to refine on")
        for anchor in (large, small):  # the candidates differ in what they need, and one needs everything
            for name in weight_files(anchor):
                anchor_place(chain.location, anchor).file(name)
        make = partial(assemble, chain, dtype=torch.float32, progress=False)
        load_large = partial(assemble, chain, chain.plan(shape=large.shape), dtype=torch.float32)
        from cbd_hub.chain.refine import choose  # which brings datasets along

        return choose(plan, chain.manifest, make, load_large, chain.calibration, out_dtype, progress)
    config = _target_config(chain, plan, large, small)
    state = dict(_tensors(chain, plan, large, small, plan.operations, out_dtype, progress))
    model = guarded(f"config.json of anchor {large.name!r}", partial(build_model, config, state, out_dtype))
    _finish(chain, model, plan, large)
    return model


@plain_defaults()
def assemble_into(
    chain: "Chain", plan: Plan, folder: Path, dtype: str | torch.dtype = "auto", progress: bool = True
) -> PreTrainedConfig:
    """Carries out a plan into a folder: weights, config and generation config, the weights one tensor at a time.

    The files are those that ``assemble(...).save_pretrained(folder)`` writes, byte for byte.

    Args:
        chain: The chain.
        plan: From ``chain.plan``.
        folder: An existing folder.
        dtype: ``"auto"`` keeps the anchors'.
        progress: Show a progress bar.

    Returns:
        The model's config.

    Memory: the largest pair of source tensors and what is made of them.

    Raises:
        IntegrityError: The anchors' files are not what the manifest says.
        ManifestError: A config contradicts the manifest.
    """
    entries = {entry.name: entry for entry in chain.manifest.anchors}
    large, small = entries[plan.large], entries[plan.small]
    out_dtype = parse_dtype(large.dtype if dtype == "auto" else dtype)
    config = _target_config(chain, plan, large, small)
    shapes = {op.name: op.shape for op in plan.operations}
    model = guarded(f"config.json of anchor {large.name!r}", partial(empty_model, config, shapes, out_dtype))
    keys = saved_names(model)
    operations = sorted(plan.operations, key=lambda op: keys[op.name])
    tensors = _tensors(chain, plan, large, small, operations, out_dtype, progress)
    named = ((keys[name], tensor) for name, tensor in tensors)
    write_tensors(folder / "model.safetensors", {keys[n]: shape for n, shape in shapes.items()}, out_dtype, named)
    _finish(chain, model, plan, large)
    model.config.dtype = str(out_dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return model.config


def _target_config(chain: "Chain", plan: Plan, large: Anchor, small: Anchor) -> PreTrainedConfig:
    """The target's config, from the large anchor's; the small one's is checked."""
    config = target_config(anchor_config(chain, large), plan.pair, plan.sizes)
    if small is not large:
        anchor_config(chain, small)  # what a model needs of it stands in the manifest
    return config


def _tensors(
    chain: "Chain",
    plan: Plan,
    large: Anchor,
    small: Anchor,
    operations: Sequence[TensorOp],
    dtype: torch.dtype,
    progress: bool,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Opens the anchors; returns the target's tensors in the order of some operations, made as they are asked for."""

    def read(entry: Anchor) -> Read:
        if not plan.needed[entry.name]:
            return _unread
        checkpoint = open_weights(chain, entry, plan.needed[entry.name], progress)
        return reader(anchor_place(chain.location, entry), checkpoint)

    read_control = _control_reader(chain, small, plan, large.dtype, progress) if plan.needed_control else None
    read_large = read(large)
    read_small = read_large if small is large else read(small)
    label = f"{plan.method} {chain.manifest.name}"
    shown = progress_bar(operations, label, unit="tensor", enabled=progress)
    return blend(shown, plan.pair, plan.sizes, read_large, read_small, dtype, read_control)


def _finish(chain: "Chain", model: PreTrainedModel, plan: Plan, large: Anchor) -> None:
    """Gives a model its generation config, and its origin."""
    if "generation_config.json" in large.files:
        place = anchor_place(chain.location, large)
        path = checked_file(place, "generation_config.json", large.files["generation_config.json"])
        model.generation_config = read_generation_config(path)
    _sign(chain, model, plan)


def _control_reader(chain: "Chain", small: Anchor, plan: Plan, dtype: str, progress: bool) -> Read:
    """Opens the pair's control point and returns what reads its tensors."""
    if small.control_point is None:
        return _unread
    shapes = factor_shapes(plan.pair, small.control_point.rank)
    sums = chain.checksums.get(small.control_point_name)
    place = chain.location
    read = reader(
        place, open_control_point(place, small, shapes, parse_dtype(dtype), sums, plan.needed_control, progress)
    )

    def finite(name: str) -> torch.Tensor:
        factor = read(name)
        if not bool(torch.isfinite(factor).all()):
            raise IntegrityError(f"control point of anchor {small.name!r}: {name!r} holds NaN or infinity")
        return factor

    return finite


def _sign(chain: "Chain", model: PreTrainedModel, plan: Plan) -> None:
    """Writes the model's origin into its config."""
    place = chain.manifest.name if chain.location.is_local else chain.location.place
    model.config.cbd_hub = {
        "chain": place,
        "revision": chain.location.revision,
        "anchors": list(dict.fromkeys([plan.small, plan.large])),
        "alpha": plan.alpha,
        "method": plan.method,
        "version": version("cbd_hub"),
    }
    named = "" if chain.location.is_local else place  # cards would take a local chain's name for a repository
    model.config._name_or_path = model.name_or_path = named


def _unread(name: str) -> torch.Tensor:
    raise IntegrityError(f"{name!r} was not planned to be read")
