"""What ``benchmarks/quality.py`` compares: ours and its rivals, each as a function that makes a model.

Every rival gets the benefit of the doubt: where its authors leave a choice open (an alpha, a span of layers, the
blocks to patch), all choices are compared on validation text, and the best one is taken.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import sqrt
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes, count_parameters, solve
from cbd_hub.initialization.refit import refit
from cbd_hub.interpolation import pair as interpolation
from cbd_hub.interpolation.materialize import blend_models, build_model, cut
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.plan import Plan
from cbd_hub.losses.heads import kept_hidden
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.distill import block_ends, distill
from cbd_hub.training.settings import DistillationConfig

__all__ = [
    "Pair",
    "Settings",
    "best_of",
    "combine",
    "depth_only",
    "drop_layers",
    "duplicate",
    "patch",
    "plan_between",
    "pruned",
    "random_init",
    "random_map",
    "refitted",
    "subclone",
    "train",
]

Loss = Callable[[PreTrainedModel], float]


@dataclass(frozen=True)
class Pair:
    """Two neighbors and how their units correspond."""

    large: PreTrainedModel
    small: PreTrainedModel
    index_map: IndexMap

    @property
    def axis_map(self) -> AxisMap:
        """The family's map."""
        return axis_map_for(self.large.config)

    @property
    def sizes(self) -> tuple[Sizes, Sizes]:
        """Axis sizes of the small and of the large model."""
        return self.axis_map.sizes(self.small.config), self.axis_map.sizes(self.large.config)


def plan_between(pair: Pair, count: int) -> Plan:
    """The default plan of a model of ``count`` parameters between two models in memory; no operations in it."""
    small, large = pair.sizes
    sizes = solve(pair.axis_map, count, small, large)
    low, high, own = (count_parameters(pair.axis_map, s) for s in (small, large, sizes))
    position = (own - low) / (high - low)
    return Plan(
        shape=pair.axis_map.config_fields(sizes),
        num_parameters=own,
        alpha=1 - position,
        method="interpolate",
        small="",
        large="",
        position=position,
        operations=(),
        pair=interpolation.Pair(pair.axis_map, small, large, pair.index_map),
        bytes_to_read=0,
        bytes_to_fetch=0,
        expected_loss=None,
        sizes=sizes,
    )


def combine(plan: Plan, pair: Pair, method: str = "interpolate", alpha: float | None = None) -> PreTrainedModel:
    """Makes the plan's shape from a pair in memory, by one of the library's rules."""
    weight = {"expand": 1.0, "prune": 0.0}.get(method, plan.alpha if alpha is None else alpha)
    own_weight = 1 - weight**2 if method == "interpolate" else 1.0
    units = interpolation.Pair(pair.axis_map, *pair.sizes, pair.index_map)
    operations = list_operations(units, plan.sizes, method, weight, own_weight)
    return blend_models(operations, units, plan.sizes, pair.large, pair.small)


def best_of(candidates: Mapping[str, Callable[[], PreTrainedModel]], loss: Loss) -> tuple[str, PreTrainedModel]:
    """The candidate with the lowest loss, and its name."""
    made = {name: make() for name, make in candidates.items()}
    name = min(made, key=lambda n: loss(made[n]))
    return name, made[name]


def refitted(model: PreTrainedModel, large: PreTrainedModel, index_map: IndexMap, blocks: Tensor) -> PreTrainedModel:
    """The model, its output projections fitted to those of the model it was cut from."""
    axis_map = axis_map_for(large.config)
    sizes, whole = axis_map.sizes(model.config), axis_map.sizes(large.config)
    kept = kept_hidden(index_map, sizes["hidden"], whole["hidden"])
    refit(model, large, axis_map, index_map.layers_of(sizes["layers"]), kept, blocks)
    return model


def pruned(large: PreTrainedModel, sizes: Sizes, index_map: IndexMap) -> PreTrainedModel:
    """The units of a model that an index map puts first."""
    axis_map = axis_map_for(large.config)
    layers = index_map.layers.copy()
    layers[: sizes["layers"]].sort()  # ascending, as a target of more layers than the small anchor's needs them
    return cut(large, axis_map, axis_map.sizes(large.config), sizes, replace(index_map, layers=layers))


def random_map(axis_map: AxisMap, large: Sizes, target: Sizes, seed: int) -> IndexMap:
    """A random subset of units and of the layers between the first and the last, which stay."""
    generator = np.random.default_rng(seed)
    count, inner = large["layers"], large["layers"] - 2
    kept = np.sort(generator.permutation(inner)[: target["layers"] - 2] + 1)
    layers = np.concatenate([[0], kept, [count - 1]]).astype(np.int64)
    orders = {
        axis: np.stack([generator.permutation(large[axis]) for _ in range(count)]).astype(np.int32)
        for axis in large
        if axis not in ("layers", "hidden") and large[axis] != target[axis]
    }
    return IndexMap(np.concatenate([layers, np.setdiff1d(np.arange(count), layers)]), orders)


def subclone(large: PreTrainedModel, sizes: Sizes) -> PreTrainedModel:
    """Weight subcloning (Samragh et al. 2023): units of the greatest weights, layers of the middle left out, weights
    scaled so that the width left out does not change the variance."""
    axis_map = axis_map_for(large.config)
    whole = axis_map.sizes(large.config)
    score = np.ones((whole["layers"], whole["ffn"]))
    for pattern in _ffn(axis_map):
        rows = 1 - axis_map.layout(pattern).dims.index((("ffn",),))
        for layer in range(whole["layers"]):
            weight = large.get_parameter(pattern.replace("*", str(layer))).detach().double()
            score[layer] *= weight.square().sum(rows).sqrt().numpy()
    heaviest = np.argsort(-score, axis=-1, kind="stable").astype(np.int32)
    first = (sizes["layers"] + 1) // 2
    kept = [*range(first), *range(whole["layers"] - (sizes["layers"] - first), whole["layers"])]
    layers = np.array([*kept, *(i for i in range(whole["layers"]) if i not in kept)], dtype=np.int64)
    model = cut(large, axis_map, whole, sizes, IndexMap(layers, {"ffn": heaviest}))
    with torch.no_grad():
        for layer in range(sizes["layers"]):
            for pattern in _ffn(axis_map)[-1:]:
                weight = model.get_parameter(pattern.replace("*", str(layer)))
                weight.mul_(sqrt(whole["ffn"] / sizes["ffn"]))
    return model


def _ffn(axis_map: AxisMap) -> list[str]:
    """The matrices of an ffn; the one that writes the stream last."""
    found = [p for p in axis_map.tensors if "ffn" in axis_map.layout(p).axes and len(axis_map.layout(p).dims) == 2]
    return sorted(found, key=axis_map.writes)


def duplicate(plan: Plan, pair: Pair) -> PreTrainedModel:
    """HyperCloning-style expansion (Samragh et al. 2024): new ffn units are copies of old ones, all copies of a unit
    share its output; new layers are copies of the one before with no output. The function is the small anchor's."""
    model, (small, _), axis_map = combine(plan, pair, "expand"), pair.sizes, pair.axis_map
    copies = torch.arange(plan.sizes["ffn"]) % small["ffn"]
    share = 1 / torch.bincount(copies)[copies]
    with torch.no_grad():
        for layer in range(plan.sizes["layers"]):
            for pattern in _ffn(axis_map):
                weight = model.get_parameter(pattern.replace("*", str(layer)))
                dim = 1 if axis_map.writes(pattern) != axis_map.in_out else 0
                copied = weight.index_select(dim, copies)
                weight.copy_(copied * (share if dim else share[:, None]) if axis_map.writes(pattern) else copied)
    return model


def random_init(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model of fresh weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _stack(layers: Sequence[tuple[PreTrainedModel, int]], rest: PreTrainedModel) -> PreTrainedModel:
    """A model of chosen layers; embedding, final norm and head are another's."""
    axis_map = axis_map_for(rest.config)
    sizes = {**axis_map.sizes(rest.config), "layers": len(layers)}
    config = type(rest.config).from_dict(rest.config.to_dict() | axis_map.config_fields(sizes))
    state = {}
    for name, pattern, layer in axis_map.names(sizes):
        model, source = (rest, 0) if layer is None else layers[layer]
        state[name] = model.state_dict()[pattern.replace("*", str(source))].detach().cpu().clone()
    return build_model(config, state, torch.float32)


def drop_layers(large: PreTrainedModel, count: int, loss: Loss) -> tuple[str, PreTrainedModel]:
    """What a passthrough merge does: the large model without a span of its layers, the best span by loss."""
    whole = axis_map_for(large.config).sizes(large.config)["layers"]
    gone = whole - count
    spans = {f"layers {i} to {i + gone - 1} left out": i for i in range(whole - gone + 1)}

    def make(first: int) -> PreTrainedModel:
        kept = [i for i in range(whole) if not first <= i < first + gone]
        return _stack([(large, i) for i in kept], large)

    return best_of({name: lambda f=first: make(f) for name, first in spans.items()}, loss)


def patch(pair: Pair, count: int, loss: Loss) -> tuple[str, PreTrainedModel] | None:
    """Boomerang (2025): some of a depth-only student's layers give way to the teacher's blocks that they stand for,
    the best ones by loss; None where no choice gives that many layers."""
    small, large = pair.sizes
    kept = pair.index_map.layers_of(small["layers"])
    ends = block_ends(replace(pair.index_map, layers=np.array(kept)), small["layers"], large["layers"])
    blocks = [range(first, end + 1) for first, end in zip(kept, ends, strict=True)]
    gains = [len(block) - 1 for block in blocks]
    able = [j for j, gain in enumerate(gains) if gain]

    def make(chosen: Sequence[int]) -> PreTrainedModel:
        layers: list[tuple[PreTrainedModel, int]] = []
        for j, block in enumerate(blocks):
            layers += [(pair.large, i) for i in block] if j in chosen else [(pair.small, j)]
        return _stack(layers, pair.small)

    choices = [c for n in range(len(able) + 1) for c in combinations(able, n)]
    right = [c for c in choices if small["layers"] + sum(gains[j] for j in c) == count]
    names = {f"blocks {', '.join(map(str, c))} patched": c for c in right}
    return best_of({name: lambda c=chosen: make(c) for name, chosen in names.items()}, loss) if right else None


def depth_only(axis_map: AxisMap, sizes: Sizes, count: int, tolerance: float = 0.005) -> int | None:
    """How many layers of these sizes make ``count`` parameters, if any number does."""
    for layers in range(1, sizes["layers"]):
        if abs(count_parameters(axis_map, {**sizes, "layers": layers}) - count) <= tolerance * count:
            return layers
    return None


@dataclass(frozen=True)
class Settings:
    """How long and how fast a model is trained; ``every`` is the number of steps between two measurements."""

    tokens: int
    learning_rate: float
    batch_size: int
    seed: int
    schedule: str = "cosine"
    every: int | None = None
    work: Path = Path("work")


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    text: Dataset,
    held_out: Dataset,
    settings: Settings,
    index_map: IndexMap | None = None,
) -> dict[int, float]:
    """Trains a model in place; it ends with the weights that were best on `held_out`.

    Returns:
        Step → loss on `held_out`.
    """
    config = DistillationConfig(
        tokens=settings.tokens,
        learning_rate=settings.learning_rate,
        batch_size=settings.batch_size,
        schedule=settings.schedule,  # type: ignore[arg-type]
        eval_every=settings.every,
        seed=settings.seed,
    )
    distill(student, teacher, text, held_out, config, index_map=index_map, work_dir=settings.work, progress=False)
    for model in (student, teacher):
        if model is not None:
            nn.Module.to(model, "cpu")
    log = json.loads((settings.work / "trainer_state.json").read_text())["log_history"]
    return {row["step"]: round(row["eval_loss"], 5) for row in log if "eval_loss" in row}
