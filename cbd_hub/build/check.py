"""``check_recipe``: all that can be known of a build before it starts, and everything that would stop it, at once."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from cbd_hub.alignment.ready_made import check_neighbors
from cbd_hub.axes.architectures import axis_map_for, register_axis_map
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes, count_parameters, format_count, ladder
from cbd_hub.build.bridge import anchor_zero_config
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import AnchorSpec, Recipe, load_recipe
from cbd_hub.devices import working_device
from cbd_hub.errors import CbdError, RecipeError
from cbd_hub.initialization.fresh import fresh_config
from cbd_hub.interpolation.control_points import choose_rank
from cbd_hub.interpolation.pair import Pair
from cbd_hub.training.trackers import check_trackers

__all__ = ["BuildPlan", "PlannedAnchor", "anchor_sizes", "check_inputs", "check_recipe", "training_operations"]

_STATES = 4
"""Copies of the trained anchor in float32: weights, gradients, and AdamW's two moments."""
_SHARE_OF_PEAK = 0.3
"""Of the speed of a large matrix product, what a training step of a small model reaches."""


def training_operations(tokens: float, student: int, teacher: int = 0) -> float:
    """Returns floating-point operations: a token takes 6 a parameter of the student, 2 a parameter of the teacher.

    The usual count of forward and backward passes (Kaplan et al., arXiv 2001.08361), without attention's scores.
    """
    return float(tokens * (6 * student + 2 * teacher))


@dataclass(frozen=True)
class PlannedAnchor:
    """One anchor that a build will make."""

    num_parameters: int
    shape: dict[str, int]
    tokens: int
    """Training tokens, those on the curve included."""
    block_share: float
    """Parameters of its blocks over those of its larger neighbor's; 1 for the source. Embeddings never shrink with
    depth, so a fraction of all parameters takes a larger one of the blocks."""


@dataclass(frozen=True)
class BuildPlan:
    """What a build will do, and what would stop it."""

    name: str
    anchors: list[PlannedAnchor]
    problems: list[str]
    """Each would stop the build; empty where it can start."""
    warnings: list[str]
    memory: int = 0
    """Peak bytes, beside the libraries' own: the larger neighbor, and the anchor with its optimizer."""
    disk: int = 0
    """Bytes that the chain and the build's records will take."""
    errors: list[CbdError] = field(default_factory=list, repr=False, compare=False)
    """The problems as they were raised."""
    seconds: float | None = None
    """Training time on this machine, from the speed of one matrix product; None where nothing is trained."""

    @property
    def operations(self) -> float:
        """Floating-point operations of all training, by :func:`training_operations`."""
        teachers = [0, *(anchor.num_parameters for anchor in self.anchors)]
        both = zip(self.anchors, teachers, strict=False)
        return sum(training_operations(anchor.tokens, anchor.num_parameters, teacher) for anchor, teacher in both)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return {name: value for name, value in asdict(replace(self, errors=[])).items() if name != "errors"}

    def __str__(self) -> str:
        """A few lines for a person."""
        lines = [f"chain      {self.name}"]
        for i, anchor in enumerate(self.anchors):
            shape = ", ".join(f"{name} {value}" for name, value in anchor.shape.items())
            kept = f", {anchor.block_share:.0%} of its neighbor's blocks" if i else ""
            trained = f", {format_count(anchor.tokens)} tokens" if anchor.tokens else ""
            lines.append(f"{'anchor' if i else 'source':<11}{format_count(anchor.num_parameters)}{kept}{trained}")
            lines.append(f"           {shape}")
        if self.anchors:
            lines.append(f"memory     about {self.memory / 1e9:.2f} GB at most")
            lines.append(f"disk       about {self.disk / 1e9:.2f} GB")
        if self.seconds is not None:
            lines.append(f"time       about {_duration(self.seconds)} of training on this machine")
        lines += [f"warning    {text}" for text in self.warnings]
        lines += [f"problem    {text}" for text in self.problems] or ["           the build can start"]
        return "\n".join(lines)


def check_recipe(recipe: Any, output_dir: str | Path | None = None) -> BuildPlan:
    """Checks a recipe without training or loading a weight: source, tokenizer, text, sizes, memory and disk.

    Args:
        recipe: As :func:`cbd_hub.build.build.build_chain` takes it.
        output_dir: Where the build would go, whose disk is then looked at; None looks at the current folder's.

    Returns:
        What will be made and what it costs, with everything that would stop it.

    Cost: the text is read and split; of weights only the headers.

    Raises:
        RecipeError: The recipe itself cannot be read.
    """
    loaded, base = load_recipe(recipe)
    return check_inputs(BuildInputs(loaded, base), Path(output_dir or "."))


def check_inputs(inputs: BuildInputs, output: Path) -> BuildPlan:
    """As :func:`check_recipe`, for inputs that a build then goes on with."""
    recipe, noted = inputs.recipe, _Problems()
    warnings: list[str] = []
    if recipe.axis_map is not None:
        register_axis_map(AxisMap.from_dict(recipe.axis_map))
    config: PreTrainedConfig | None = None
    train = recipe.bridge or recipe.source.train
    with noted:
        if recipe.data is not None:
            check_trackers(recipe.distillation.report_to, "distillation.report_to")
    with noted:
        if train is not None:
            key = "source.train" if recipe.bridge is None else "bridge"
            check_trackers(train.training.report_to, f"{key}.training.report_to")
    with noted:
        if recipe.data is not None:
            _ = inputs.splits
    with noted:
        config = _source_config(inputs)
    tokenizer = None
    with noted:
        tokenizer = inputs.tokenizer
    if config is None:
        return BuildPlan(recipe.name, [], noted.found, warnings, errors=noted.errors)
    with noted:
        _check_tokens(config, tokenizer)
    with noted:
        _check_length(config, recipe)
    with noted:
        if recipe.source.model is not None and recipe.bridge is None:
            inputs.check_headers(recipe.source.model, recipe.source.revision, config)
    anchors: list[PlannedAnchor] = []
    peak = 0.0
    with noted:
        axis_map = axis_map_for(config)
        sizes: Sizes = axis_map.sizes(config)
        count, tokens = count_parameters(axis_map, sizes), 0 if train is None else train.training.tokens
        anchors.append(PlannedAnchor(count, axis_map.config_fields(sizes), tokens, 1.0))
    if (recipe.data is None or not recipe.calibration_tokens) and any(spec.init is None for spec in recipe.anchors):
        warnings.append(
            "without text, units are ranked by their weights alone, and on a trained model that chose worse than "
            "chance; give `data`, even where nothing is trained"
        )
    large_config = config
    for spec in recipe.anchors if anchors else ():
        with noted:
            large = sizes
            sizes, large_config = _next(inputs, spec, axis_map, large, large_config)
            anchors.append(_planned(recipe, spec, axis_map, large, sizes))
            if (share := anchors[-1].block_share) < _LEAST_SHARE and spec.init is None:
                warnings.append(
                    f"the anchor of {format_count(anchors[-1].num_parameters)} keeps {share:.0%} of its larger "
                    "neighbor's block weights, and below 60 % models in between get worse; put an anchor in between "
                    f"(about three quarters of the blocks are {_fraction_of_blocks(axis_map, large):.2f} of all "
                    "parameters here)"
                )
        if noted.found and len(anchors) < 2 + recipe.anchors.index(spec):
            break
    for large_anchor, small_anchor in pairwise(anchors):
        trained = _STATES if small_anchor.tokens else 1
        peak = max(peak, 4 * (large_anchor.num_parameters + trained * small_anchor.num_parameters))
    peak = max([peak, *(4.0 * a.num_parameters for a in anchors)])
    item = {"float32": 4, "bfloat16": 2, "float16": 2}[recipe.dtype]
    disk = sum(item * a.num_parameters for a in anchors) + max((4 * a.num_parameters for a in anchors[1:]), default=0)
    _check_room(output, disk, peak, noted.found, warnings)
    plan = BuildPlan(recipe.name, anchors, noted.found, warnings, errors=noted.errors, memory=int(peak), disk=disk)
    return replace(plan, seconds=plan.operations / (_SHARE_OF_PEAK * _speed())) if plan.operations else plan


class _Problems:
    """Within it, an error is written down and the check goes on."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.errors: list[CbdError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> bool:
        if not isinstance(error, CbdError):
            return False
        if (text := str(error)) not in self.found:
            self.found.append(text)
            self.errors.append(error)
        return True


_LEAST_SHARE = 0.6
"""Of the larger neighbor's block weights, below which an anchor is warned about."""


def _source_config(inputs: BuildInputs) -> PreTrainedConfig | None:
    """The config of the largest anchor; None where a tokenizer is missing to tell."""
    source, recipe = inputs.recipe.source, inputs.recipe
    if recipe.bridge is not None:
        own = None if source.model is None else inputs.checkpoint_config(source.model, source.revision)
        return None if inputs.tokenizer is None else anchor_zero_config(recipe.bridge, own, inputs.tokenizer)
    if source.model is not None:
        return inputs.checkpoint_config(source.model, source.revision)
    if source.train is None or inputs.tokenizer is None:
        return None
    return fresh_config(source.train.architecture, inputs.tokenizer, source.train.config, key="source.train.config")


def _check_tokens(config: PreTrainedConfig, tokenizer: Any) -> None:
    """Refuses a tokenizer with ids that the embedding has no row for."""
    size = config.get_text_config().vocab_size
    ids = [] if tokenizer is None else [*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder]
    if ids and max(ids) >= size:
        beyond = sorted({i for i in ids if i >= size})
        shown = ", ".join(repr(tokenizer.convert_ids_to_tokens(i)) for i in beyond[:3])
        raise RecipeError(
            f"the tokenizer has {len(beyond)} tokens beyond the {size} rows of the model's embedding ({shown}); "
            "resize the embedding to the tokenizer (model.resize_token_embeddings) and save it again, or name another "
            "tokenizer"
        )


def _check_length(config: PreTrainedConfig, recipe: Recipe) -> None:
    """Refuses blocks longer than the learned positions of a model."""
    axis_map = axis_map_for(config)
    most = axis_map.sizes(config).get("positions")
    if recipe.data is not None and most is not None and recipe.data.sequence_length > most:
        raise RecipeError(
            f"data.sequence_length is {recipe.data.sequence_length}, and the model has learned positions for {most} "
            f"tokens; at most {most} is possible"
        )


def anchor_sizes(
    recipe: Recipe, spec: AnchorSpec, axis_map: AxisMap, large: Sizes, config: Callable[[], PreTrainedConfig]
) -> dict[str, int]:
    """Returns the sizes of an anchor.

    Args:
        recipe: Says how a reduction is spread.
        spec: The anchor.
        axis_map: The resolved map of the family.
        large: Sizes of its larger neighbor.
        config: Returns the config of the checkpoint that it starts from; called only where there is one.

    Raises:
        RecipeError: A field or axis that the family does not have.
        SizeError: A size that cannot be had.
    """
    if spec.init is not None:
        loaded = config()
        return axis_map_for(loaded).sizes(loaded)
    if spec.shape is not None:
        for name in spec.shape:
            if name not in axis_map.fields:
                raise RecipeError(f"anchor shape has no field {name!r}; allowed: {', '.join(axis_map.fields)}")
        return axis_map.sizes({**axis_map.config_fields(large), **spec.shape})
    count = count_parameters(axis_map, large)
    target = spec.num_parameters or round(count * (spec.fraction or 0))
    named = {axis for point in recipe.spread.waypoints for axis in point}
    if unknown := named - set(large) - {"kv_heads"}:  # which not every family has, and the default names
        raise RecipeError(f"spread.waypoints names {sorted(unknown)[0]!r}; axes here: {', '.join(large)}")
    spread = recipe.spread
    return ladder(axis_map, large, target, waypoints=spread.waypoints, round_widths=spread.round_widths)


def _next(
    inputs: BuildInputs, spec: AnchorSpec, axis_map: AxisMap, large: Sizes, large_config: PreTrainedConfig
) -> tuple[dict[str, int], PreTrainedConfig]:
    """The sizes of the next anchor, and the config that the one after it is compared with."""
    if spec.init is None:
        sizes = anchor_sizes(inputs.recipe, spec, axis_map, large, lambda: large_config)
        return sizes, large_config
    if spec.align == "learned" and (inputs.recipe.data is None or not inputs.recipe.calibration_tokens):
        raise RecipeError("`align: learned` reads text: give `data`, and calibration_tokens above 0, or align: true")
    config = inputs.checkpoint_config(spec.init, spec.revision)
    check_neighbors(config, large_config, spec.init, sizes=large)
    inputs.check_tokenizer(spec.init, spec.revision)
    inputs.check_headers(spec.init, spec.revision, config)
    return axis_map_for(config).sizes(config), config


def _planned(recipe: Recipe, spec: AnchorSpec, axis_map: AxisMap, large: Sizes, small: Sizes) -> PlannedAnchor:
    """The anchor as the plan shows it."""
    tokens = recipe.distillation.tokens if spec.tokens is None else spec.tokens
    if (control := recipe.distillation.control_point) is not None:
        choose_rank(Pair.same(axis_map, large), control.rank)
        tokens += tokens if control.tokens is None else control.tokens
    share = _blocks(axis_map, small) / _blocks(axis_map, large)
    return PlannedAnchor(count_parameters(axis_map, small), axis_map.config_fields(small), tokens, share)


def _blocks(axis_map: AxisMap, sizes: Sizes) -> int:
    """Parameters of a model's blocks."""
    return count_parameters(axis_map, sizes) - count_parameters(axis_map, {**sizes, "layers": 0})


def _fraction_of_blocks(axis_map: AxisMap, sizes: Sizes) -> float:
    """The fraction of all parameters that three quarters of the blocks and everything else are."""
    whole = count_parameters(axis_map, sizes)
    return 1 - 0.25 * _blocks(axis_map, sizes) / whole


def _check_room(output: Path, disk: float, memory: float, problems: list[str], warnings: list[str]) -> None:
    """Compares what a build needs with what is free."""
    place = next(p for p in (output.absolute(), *output.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    there = sum(p.stat().st_size for p in output.rglob("*") if p.is_file()) if output.is_dir() else 0
    if disk - there > free:
        problems.append(
            f"the chain needs about {(disk - there) / 1e9:.2f} GB on the disk of {place}, and {free / 1e9:.2f} GB are "
            "free; free some, or name a folder on another disk"
        )
    available = _available_memory()
    if available is not None and memory > available:
        warnings.append(
            f"the build needs about {memory / 1e9:.2f} GB of memory, and {available / 1e9:.2f} GB are available"
        )


def _available_memory() -> int | None:
    """Bytes that processes may still take; None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def _speed(size: int = 768) -> float:
    """Floating-point operations a second of one matrix product on the device that trains. Cost: some 20 ms."""
    device = working_device()
    matrix = torch.ones(size, size, device=device)
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        float((matrix @ matrix)[0, 0])
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def _duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, as people say them."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"
