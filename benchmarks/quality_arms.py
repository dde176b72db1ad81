"""What ``benchmarks/quality.py`` compares: ours and its rivals, each as a function that makes a model.

Every rival gets the benefit of the doubt: where its authors leave a choice open (an alpha, a span of layers, the
blocks to patch), all choices are compared on validation text, and the best one is taken.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import sqrt

import numpy as np
import torch
from models import Pair, kept_first, pruned
from transformers import PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes, count_parameters
from cbd_hub.interpolation.materialize import build_model
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.distill import block_ends

Loss = Callable[[PreTrainedModel], float]
Made = tuple[PreTrainedModel, str]
"""A model, and what was chosen to make it."""


def best_of(candidates: Mapping[str, Callable[[], PreTrainedModel]], loss: Loss) -> Made:
    """The candidate with the lowest loss, and its name."""
    return min(((make(), name) for name, make in candidates.items()), key=lambda made: loss(made[0]))


def random_map(axis_map: AxisMap, large: Sizes, target: Sizes, seed: int) -> IndexMap:
    """A random subset of units and of the layers between the first and the last, which stay."""
    generator = np.random.default_rng(seed)
    count, inner = large["layers"], large["layers"] - 2
    kept = np.sort(generator.permutation(inner)[: target["layers"] - 2] + 1)
    layers = kept_first([0, *kept, count - 1], count)
    orders = {
        axis: np.stack([generator.permutation(large[axis]) for _ in range(count)]).astype(np.int32)
        for axis in large
        if axis not in ("layers", "hidden") and large[axis] != target[axis]
    }
    return IndexMap(layers, orders)


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
    model = pruned(large, sizes, IndexMap(kept_first(kept, whole["layers"]), {"ffn": heaviest}))
    with torch.no_grad():
        for layer in range(sizes["layers"]):
            weight = model.get_parameter(_ffn(axis_map)[-1].replace("*", str(layer)))
            weight.mul_(sqrt(whole["ffn"] / sizes["ffn"]))
    return model


def _ffn(axis_map: AxisMap) -> list[str]:
    """The matrices of an ffn; the one that writes the stream last."""
    found = [p for p in axis_map.tensors if "ffn" in axis_map.layout(p).axes and len(axis_map.layout(p).dims) == 2]
    return sorted(found, key=axis_map.writes)


def duplicate(target: Sizes, pair: Pair) -> PreTrainedModel:
    """HyperCloning-style expansion (Samragh et al. 2024): new ffn units are copies of old ones, all copies of a unit
    share its output; new layers are copies of the one before with no output. The function is the small anchor's."""
    model, small, axis_map = pair.combine(target, "expand", 1.0), pair.units.small, pair.units.axis_map
    copies = torch.arange(target["ffn"]) % small["ffn"]
    share = 1 / torch.bincount(copies)[copies]
    with torch.no_grad():
        for layer in range(target["layers"]):
            for pattern in _ffn(axis_map):
                weight = model.get_parameter(pattern.replace("*", str(layer)))
                dim = 1 if axis_map.writes(pattern) != axis_map.in_out else 0
                copied = weight.index_select(dim, copies)
                weight.copy_(copied * (share if dim else share[:, None]) if axis_map.writes(pattern) else copied)
    return model


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


def drop_layers(large: PreTrainedModel, count: int, loss: Loss) -> Made:
    """What a passthrough merge does: the large model without a span of its layers, the best span by loss."""
    whole = axis_map_for(large.config).sizes(large.config)["layers"]
    gone = whole - count

    def make(first: int) -> PreTrainedModel:
        return _stack([(large, i) for i in range(whole) if not first <= i < first + gone], large)

    spans = {f"layers {i} to {i + gone - 1} left out": partial(make, i) for i in range(whole - gone + 1)}
    return best_of(spans, loss)


def patch(pair: Pair, count: int, loss: Loss) -> Made | None:
    """Boomerang (2025): some of a depth-only student's layers give way to the teacher's blocks that they stand for,
    the best ones by loss; None where no choice gives that many layers."""
    small, large = pair.units.small, pair.units.large
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
    ways = {f"blocks {', '.join(map(str, c))} patched": partial(make, c) for c in right}
    return best_of(ways, loss) if ways else None


def depth_only(axis_map: AxisMap, sizes: Sizes, count: int, tolerance: float = 0.005) -> int | None:
    """How many layers of these sizes make ``count`` parameters, if any number does."""
    for layers in range(1, sizes["layers"]):
        if abs(count_parameters(axis_map, {**sizes, "layers": layers}) - count) <= tolerance * count:
            return layers
    return None
