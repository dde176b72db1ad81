"""An anchor that starts as a public checkpoint instead of a subset of its neighbor: the paper's own kind of chain."""

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.alignment.align import align
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import RecipeError
from cbd_hub.manifest.index_maps import IndexMap

__all__ = ["check_neighbors", "load_ready_made", "positional_map"]


def check_neighbors(small: PreTrainedModel, large: PreTrainedModel, name: str) -> None:
    """Refuses a checkpoint that cannot be the smaller neighbor of a model.

    Raises:
        RecipeError: Another architecture, another vocabulary or head size, or larger on some axis.
    """
    own, other = axis_map_for(small.config), axis_map_for(large.config)
    if own.model_type != other.model_type or set(own.tensors) != set(other.tensors):
        raise RecipeError(
            f"{name!r} is a {own.model_type} model with other tensors than its neighbor, a {other.model_type} model; "
            "the anchors of a chain have one architecture"
        )
    mine, theirs = own.sizes(small.config), other.sizes(large.config)
    for axis, size in mine.items():
        if axis in own.frozen and size != theirs[axis]:
            raise RecipeError(f"{name!r} has {axis} {size} and its neighbor {theirs[axis]}; a chain keeps one {axis}")
        if size > theirs[axis]:
            raise RecipeError(f"{name!r} has {axis} {size}, more than its larger neighbor's {theirs[axis]}")


def load_ready_made(
    small: PreTrainedModel, large: PreTrainedModel, axis_map: AxisMap, blocks: Tensor | None, progress: bool = True
) -> tuple[PreTrainedModel, IndexMap]:
    """Makes a checkpoint the smaller neighbor of a model.

    Args:
        small: The checkpoint; its function is not changed.
        large: The larger neighbor.
        axis_map: The resolved map of both.
        blocks: (N, S) token ids to align it on (:func:`cbd_hub.alignment.align.align`); None takes its units in the
            order that they have, as the paper does.
        progress: Show a progress bar.

    Raises:
        RecipeError: It cannot be aligned.
    """
    sizes = axis_map.sizes(large.config), axis_map.sizes(small.config)
    if blocks is not None:
        return align(large, small, axis_map, *sizes, blocks, progress=progress)
    return small, positional_map(axis_map, *sizes)


def positional_map(axis_map: AxisMap, large: Sizes, small: Sizes) -> IndexMap:
    """Pairs units in the order that they have and layers evenly spread, first with first and last with last."""
    count, kept_count = large["layers"], small["layers"]
    kept = np.unique(np.round(np.linspace(0, count - 1, kept_count)).astype(np.int64))
    rest = np.setdiff1d(np.arange(count), kept)
    orders = {}
    for axis in large:
        if small[axis] != large[axis] and axis != "layers" and (axis == "hidden" or axis_map.consumers(axis)):
            plain = np.arange(large[axis], dtype=np.int32)
            orders[axis] = plain if axis == "hidden" else np.tile(plain, (count, 1))
    return IndexMap(np.concatenate([kept, rest]), orders)
