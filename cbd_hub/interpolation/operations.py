"""From two anchors and a target shape to one operation a tensor.

Here it is decided which block and which units of either anchor a target tensor is made from, with which weights, and
how norm gains and embeddings are rescaled so that a model of another width computes the same. No tensor is touched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import numpy as np

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest.index_maps import IndexMap

__all__ = [
    "TensorOp",
    "list_operations",
]


@dataclass(frozen=True)
class TensorOp:
    """How one tensor of the target is made."""

    name: str
    pattern: str
    shape: tuple[int, ...]
    large_name: str | None
    """Parameter of the large anchor to take a subset of, or None."""
    small_name: str | None
    """Parameter of the small anchor to place, or None. Neither: zeros."""
    layer: int | None = None
    """Layer of the large anchor whose unit orders apply."""
    alpha: float = 0.0
    """Weight of the small anchor where both contribute."""
    masked: bool = True
    """Whether units that only the large anchor has keep full weight (False: the paper's zero filling)."""
    large_only_weight: float = 1.0
    """The large-only weight: with it, units that only the large anchor has write into the residual stream."""
    large_scale: float = 1.0
    small_scale: float = 1.0
    mean_axis: str | None = None
    """Axis on which new units of an expanded tensor get the mean instead of zero."""
    bend: float = 0.0
    """Weight of the pair's control point, 4 r (1 - r); 0 leaves the straight line."""

    @property
    def kind(self) -> str:
        """What is done, in a word or two."""
        if self.large_name and not self.small_name:
            weight = self.large_only_weight if self.masked else 1 - self.alpha
            bent = f" + {self.bend:.3g} control point" if self.bend else ""
            return ("large" if weight == 1 else f"{weight:.3g} large") + bent
        if self.large_name and self.small_name:
            bent = f" + {self.bend:.3g} control point" if self.bend else ""
            return f"{self.alpha:.3g} small + {1 - self.alpha:.3g} large{bent}"
        return "large" if self.large_name else "small" if self.small_name else "zeros"


def list_operations(
    pair: Pair, target: Sizes, method: str, alpha: float, large_only_weight: float = 1.0
) -> tuple[TensorOp, ...]:
    """Returns one operation a tensor. Which blocks correspond follows from the pair's order of layers.

    Args:
        pair: The two anchors.
        target: Sizes of the target.
        method: ``interpolate``, ``bezier``, ``paper``, ``expand`` or ``prune``.
        alpha: Weight of the small anchor.
        large_only_weight: The large-only weight: with it, units that only the large anchor has write into the residual
            stream. With 1 - alpha**2, alpha = 1 is the small anchor expanded exactly, and alpha = 0 the large one
            alone.
    """
    axis_map, small, large, index_map = pair.axis_map, pair.small, pair.large, pair.index_map
    large_layers = pair.layers(target["layers"])
    partner = {int(i): j for j, i in enumerate(index_map.layers[: small["layers"]])}
    operations = []
    for name, pattern, layer in axis_map.names(target):
        layout = axis_map.layout(pattern)
        large_layer = None if layer is None else large_layers[layer]
        small_layer = None if large_layer is None else partner.get(large_layer)
        from_large: str | None = pattern.replace("*", str(large_layer))
        has_partner = layer is None or small_layer is not None
        from_small: str | None = pattern.replace("*", str(small_layer)) if has_partner else None
        weight = alpha
        if method == "prune" or (alpha == 0 and method != "expand"):
            from_small, weight = None, 0.0
        elif method == "expand":
            from_large = None
            if not has_partner:
                from_small = None if axis_map.writes(pattern) else pattern.replace("*", _before(partner, large_layer))
        elif alpha == 1 and from_small and (method == "paper" or layout.shape(small) == layout.shape(target)):
            from_large = None
        plain = method == "paper"
        operations.append(
            TensorOp(
                name,
                pattern,
                layout.shape(target),
                from_large,
                from_small,
                layer=large_layer,
                alpha=weight,
                masked=not plain,
                large_only_weight=_large_only_weight(axis_map, pattern, has_partner, large_only_weight),
                large_scale=1.0 if plain else _large_scale(axis_map, pattern, large_layer, large, target, index_map),
                small_scale=1.0 if plain else _small_scale(axis_map, pattern, small, target),
                mean_axis="hidden" if method == "expand" and _mean_filled(axis_map, pattern) else None,
                bend=4 * alpha * (1 - alpha) if method == "bezier" and axis_map.is_bent(pattern) else 0.0,
            )
        )
    return tuple(operations)


def _large_only_weight(axis_map: AxisMap, pattern: str, has_partner: bool, large_only_weight: float) -> float:
    """The large-only weight, for what writes the stream; 1 for everything else.

    Where a norm follows a block's output (OLMo 2, Gemma 3), it undoes any factor on the whole block, so its gain takes
    the factor instead.
    """
    after = pattern in axis_map.norms and "hidden" in axis_map.layout(pattern).axes and not axis_map.norms[pattern]
    if "*" in pattern and (axis_map.writes(pattern) or (after and not has_partner)):
        return large_only_weight
    return 1.0


def _before(partner: Mapping[int, int], large_layer: int | None) -> str:
    """The small layer that a layer without a partner is copied from: the one before it, else the first."""
    return str(max((j for i, j in partner.items() if i < (large_layer or 0)), default=0))


def _mean_filled(axis_map: AxisMap, pattern: str) -> bool:
    return pattern in axis_map.norms or (axis_map.norm == "layer" and axis_map.writes(pattern))


def _stream_scale(axis_map: AxisMap, pattern: str, old: Sizes, new: Sizes) -> float:
    """What undoes the change of sqrt(hidden) that some families multiply their embedding with (Gemma)."""
    factor = sqrt(old["hidden"] / new["hidden"])
    if pattern in axis_map.scaled:
        return factor
    if pattern in axis_map.norms and any(reader in axis_map.scaled for reader in axis_map.readers(pattern)):
        return 1 / factor  # a tied head reads the rescaled embedding
    return 1.0


def _small_scale(axis_map: AxisMap, pattern: str, small: Sizes, target: Sizes) -> float:
    """Zero padding n units to m shrinks their root mean square by sqrt(n / m); the gain takes that up, exactly."""
    scale = _stream_scale(axis_map, pattern, small, target)
    if pattern in axis_map.norms:
        layout = axis_map.layout(pattern)
        scale *= sqrt(layout.count(small) / layout.count(target))
    return scale


def _large_scale(
    axis_map: AxisMap, pattern: str, layer: int | None, large: Sizes, target: Sizes, index_map: IndexMap
) -> float:
    """Keeping some hidden units changes their root mean square; the gain takes up the ratio that was measured."""
    scale = _stream_scale(axis_map, pattern, large, target)
    energy = index_map.energy.get(pattern)
    if energy is not None and large["hidden"] != target["hidden"]:
        kept = index_map.order("hidden", None, large["hidden"])[: target["hidden"]]
        row = energy if energy.ndim == 1 else energy[layer]
        scale *= float(np.sqrt(row[kept].mean(dtype=np.float64)))
    return scale
