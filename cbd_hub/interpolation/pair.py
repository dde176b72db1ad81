"""Two adjacent anchors as one thing: their family, their sizes, and how their units correspond."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes, count_parameters
from cbd_hub.manifest.index_maps import IndexMap

if TYPE_CHECKING:
    from cbd_hub.interpolation.operations import TensorOp

__all__ = ["Pair"]


@dataclass(frozen=True)
class Pair:
    """A small and a large anchor of one family. Both may be the same one: a model copied as it is."""

    axis_map: AxisMap
    """The family's resolved map."""
    small: Sizes
    large: Sizes
    index_map: IndexMap
    """Correspondence of their units, in the large anchor's numbering."""

    @classmethod
    def same(cls, axis_map: AxisMap, sizes: Sizes) -> "Pair":
        """Returns the pair of an anchor and itself: every unit stands for itself."""
        return cls(axis_map, sizes, sizes, IndexMap(np.arange(sizes["layers"])))

    def position(self, num_parameters: int) -> float:
        """Returns r of a parameter count: 0 at the small anchor, 1 at the large one, linear in parameters."""
        low, high = (count_parameters(self.axis_map, sizes) for sizes in (self.small, self.large))
        return (num_parameters - low) / (high - low) if high != low else 0.0

    def layers(self, count: int) -> list[int]:
        """Returns the large anchor's layers, ascending, that a model of ``count`` layers is made from."""
        return self.index_map.layers_of(count)

    def taken(self, op: "TensorOp", target: Sizes) -> dict[str, np.ndarray]:
        """Returns which units of the large anchor's tensor an operation takes: axis → units in order; others whole."""
        return {
            axis: self.index_map.order(axis, op.layer, self.large[axis])[: target[axis]]
            for axis in self.axis_map.layout(op.pattern).axes
            if axis in self.index_map.orders or target[axis] != self.large[axis]
        }
