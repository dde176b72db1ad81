"""Which units of two models are alike, and who is whose partner: activations and layers compared."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.alignment.observe import observe
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.grammar import product
from cbd_hub.progress import progress_bar
from cbd_hub.text.packing import token_batches

__all__ = ["Moments", "Place", "layer_similarity", "match_layers", "observe_pairs"]

LAYER_TOKENS = 1024
"""Tokens that layers are compared on: similarities need a (tokens, tokens) matrix for every layer."""
BATCH_TOKENS = 1024
"""Tokens in a forward pass of both models."""

Place = tuple[str, int | None]
"""A module whose input is compared: the pattern of its weight and the small model's layer."""


class Moments:
    """Sums over tokens of what one module of each model reads: a (T, A) of the small, b (T, B) of the large.

    Args:
        groups: How many equal groups of units (heads) each side has, whose own second moments are kept; 0 for none.
        center: Subtract every token's mean over the units first, as LayerNorm does.
    """

    def __init__(self, groups: tuple[int, int], center: bool) -> None:
        self.center = center
        self.groups = groups
        self.count = 0
        self.sums: list[Tensor] = []

    def add(self, a: Tensor, b: Tensor) -> None:
        """Takes in further tokens, each brought to mean square 1: a (T, A), b (T, B)."""
        a, b = self._unit(a).to(b.device), self._unit(b)
        own = [torch.einsum("tgi,tgj->gij", x, x) for x in (self._split(a, 0), self._split(b, 1))]
        new = [a.T @ b, a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), *own]
        new = [value.cpu() for value in new]
        self.sums = [old.add_(value) for old, value in zip(self.sums, new, strict=True)] if self.count else new
        self.count += len(a)

    def _unit(self, x: Tensor) -> Tensor:
        """Every token at mean square 1, for LayerNorm without its mean."""
        x = x.float()
        x = x - x.mean(-1, keepdim=True) if self.center else x
        return x * x.square().mean(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).rsqrt()

    def _split(self, x: Tensor, side: int) -> Tensor:
        groups = self.groups[side]
        return x.reshape(len(x), groups, -1) if groups else x.new_zeros(len(x), 0, 1)

    @property
    def cross(self) -> Tensor:
        """(A, B) mean product, float64."""
        return self.sums[0].double() / self.count

    def covariance(self) -> Tensor:
        """(A, B), float64."""
        return self.cross - torch.outer(self.sums[1], self.sums[2]).double() / self.count**2

    def correlation(self) -> Tensor:
        """(A, B), float64; 0 where a unit never changes."""
        deviations = [
            (self.sums[3 + i].double() / self.count - (self.sums[1 + i].double() / self.count).square()).clamp(min=0)
            for i in (0, 1)
        ]
        scale = torch.outer(*deviations).sqrt()
        return torch.where(scale > 0, self.covariance() / scale.clamp(min=1e-30), 0.0)

    def group_similarity(self) -> Tensor:
        """Linear CKA of every group with every group: (groups of a, groups of b), in 0..1, whatever their bases."""
        few, many = self.groups
        shared = self.covariance().reshape(few, -1, many, self.sums[0].shape[1] // many).square().sum((1, 3))
        norms = []
        for i, groups in enumerate(self.groups):
            mean = (self.sums[1 + i].double() / self.count).reshape(groups, -1)
            own = self.sums[5 + i].double() / self.count - mean[:, :, None] * mean[:, None, :]
            norms.append(own.square().sum((1, 2)).sqrt())
        return shared / torch.outer(*norms).clamp(min=1e-30)


def layer_similarity(small: PreTrainedModel, large: PreTrainedModel, axis_map: AxisMap, blocks: Tensor) -> np.ndarray:
    """Compares what the layers of two models add to the stream, by direction: linear CKA of every pair.

    Layers of different kinds (sliding or full attention) lose 1, so that they are matched only as a last choice.

    Args:
        small: One model.
        large: The other, of the same family.
        axis_map: Its map.
        blocks: (N, S) token ids, of which :data:`LAYER_TOKENS` are read.

    Returns:
        float64 (small layers, large layers).

    Cost: a forward pass of both; a (tokens, tokens) float32 matrix for every layer in memory.
    """
    some = blocks[: max(1, LAYER_TOKENS // max(1, blocks.shape[-1])), :LAYER_TOKENS]
    first, second = (_layer_grams(model, axis_map, some) for model in (small, large))
    similarity = np.array([[(a * b.to(a.device)).sum().item() for b in second] for a in first])
    for name in axis_map.layer_lists:
        if kinds := getattr(small.config, name, None):
            similarity -= np.array(kinds)[:, None] != np.array(getattr(large.config, name))[None, :]
    return similarity


def _layer_grams(model: PreTrainedModel, axis_map: AxisMap, blocks: Tensor) -> list[Tensor]:
    """For every layer the centered inner products of its tokens' updates, each (T, T) of norm 1."""
    grams: list[Tensor] = []

    def compare(x: Tensor, y: Tensor) -> None:
        update = torch.nn.functional.normalize((y - x).float(), dim=-1)
        update = update - update.mean(0)
        gram = update @ update.T
        grams.append(gram / gram.norm().clamp(min=1e-30))

    names = [f"{axis_map.layers_name}.{layer}" for layer in range(axis_map.sizes(model.config)["layers"])]
    observe(model, blocks, len(blocks), {}, dict.fromkeys(names, compare))
    return grams


def observe_pairs(
    small: PreTrainedModel,
    large: PreTrainedModel,
    axis_map: AxisMap,
    layers: Sequence[int],
    blocks: Tensor,
    progress: bool = False,
) -> dict[Place, Moments]:
    """Compares what both models' norms over the stream and output projections read, layer by matched layer.

    Args:
        small: The small model.
        large: The large model.
        axis_map: The map of both.
        layers: The large layer of every small one.
        blocks: (N, S) token ids.
        progress: Show a progress bar.

    Cost: a forward pass of both; (small units x large units) float32 for every place.
    """
    small_sizes, large_sizes = (axis_map.sizes(model.config) for model in (small, large))
    of_heads = axis_map.consumers(axis_map.heads.split()[0])
    projections = of_heads + axis_map.consumers("ffn")
    modules: dict[Place, tuple[str, str]] = {}
    moments: dict[Place, Moments] = {}
    for name, pattern, j in axis_map.names(small_sizes):
        is_gain = pattern in axis_map.norms and axis_map.layout(pattern).dims == ((("hidden",),),)
        if is_gain or pattern in projections:
            partner = name if j is None else pattern.replace("*", str(layers[j]))
            modules[pattern, j] = name.removesuffix(".weight"), partner.removesuffix(".weight")
            heads = [
                product(tuple(axis_map.heads.split()), s) if pattern in of_heads else 0
                for s in (small_sizes, large_sizes)
            ]
            moments[pattern, j] = Moments((heads[0], heads[1]), center=is_gain and axis_map.norm == "layer")
    batch_size = max(1, BATCH_TOKENS // max(1, blocks.shape[-1]))
    total = -(-len(blocks) // batch_size)
    for batch in progress_bar(
        token_batches(blocks, batch_size), "comparing", total=total, unit="batch", enabled=progress
    ):
        seen = [
            _inputs(model, batch, [pair[i] for pair in modules.values()]) for i, model in enumerate((small, large))
        ]
        for place, pair in modules.items():
            moments[place].add(seen[0][pair[0]], seen[1][pair[1]])
    return moments


def _inputs(model: PreTrainedModel, blocks: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What modules read: (tokens, units) by module name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        return lambda x: seen.__setitem__(name, x)

    observe(model, blocks, len(blocks), {name: keep(name) for name in names})
    return seen


def match_layers(similarity: np.ndarray) -> list[int]:
    """Matches every small layer to a large one of its own, in order, first to first and last to last.

    Args:
        similarity: (small layers, large layers); the sum over the matched pairs is made largest.

    Returns:
        For every small layer its large one, ascending (a single layer gets the one most like it).

    Cost: O(small layers x large layers) by dynamic programming.
    """
    few, many = similarity.shape
    best = np.full((few, many), -np.inf)
    best[0] = similarity[0]
    if few > 1:
        best[0, 1:] = -np.inf
    for j in range(1, few):
        best[j, 1:] = np.maximum.accumulate(best[j - 1])[:-1] + similarity[j, 1:]
    layers = [int(best[-1].argmax()) if few == 1 else many - 1]
    for j in range(few - 2, -1, -1):
        layers.append(int(best[j, : layers[-1]].argmax()))
    return layers[::-1]
