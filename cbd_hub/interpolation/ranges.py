"""Which bytes of an anchor's tensors a plan needs, so that a pull can fetch these and no others.

Layers that the target lacks are not needed at all, and of other tensors only the rows (stored dimension 0) that the
target takes, widened to whole blocks of :data:`BLOCK` bytes: these have digests of their own, and for
less a request more would cost as much as the bytes. Integers only.
"""

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np

from cbd_hub.axes.sizing import Sizes
from cbd_hub.interpolation.control_points import factor_names, factor_shapes, leading_rows
from cbd_hub.interpolation.operations import TensorOp
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest.manifest import Anchor

__all__ = [
    "BLOCK",
    "ITEM_BYTES",
    "Run",
    "control_runs",
    "count_bytes",
    "merge",
    "needed_by",
    "needed_of_control",
    "needed_runs",
    "subtract",
]

BLOCK = 1 << 19
"""Bytes of a tensor that have a digest of their own, so that a part of it can be checked without the rest."""

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of one number, by dtype."""

Run = tuple[int, int]
"""First byte and the byte behind the last one."""


def merge(runs: Iterable[Run]) -> list[Run]:
    """Returns the runs in order, those that overlap or touch made one."""
    merged: list[Run] = []
    for start, stop in sorted(run for run in runs if run[0] < run[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def subtract(wanted: Iterable[Run], have: Iterable[Run]) -> list[Run]:
    """Returns what of ``wanted`` lies in no run of ``have``."""
    left = []
    covered = merge(have)
    for start, stop in merge(wanted):
        for a, b in covered:
            if b <= start or a >= stop:
                continue
            if a > start:
                left.append((start, a))
            start = b
        if start < stop:
            left.append((start, stop))
    return left


def count_bytes(runs: Iterable[Run]) -> int:
    """Returns how many bytes lie in the runs."""
    return sum(stop - start for start, stop in merge(runs))


def _row_runs(rows: np.ndarray | None, shape: Sequence[int], item_bytes: int) -> list[Run]:
    """The blocks of a tensor in which some rows lie, from its first byte on."""
    row = prod(shape[1:]) * item_bytes
    size = shape[0] * row
    if rows is None:
        return [(0, size)]
    ordered = np.sort(rows)
    first, last = ordered * row // BLOCK, (ordered * row + row - 1) // BLOCK
    gaps = np.flatnonzero(first[1:] > last[:-1] + 1)
    starts, stops = first[np.r_[0, gaps + 1]], last[np.r_[gaps, len(last) - 1]]
    return [(int(a) * BLOCK, min((int(b) + 1) * BLOCK, size)) for a, b in zip(starts, stops, strict=True)]


def needed_runs(
    operations: Iterable[TensorOp], pair: Pair, target: Sizes, item_bytes: tuple[int, int]
) -> tuple[dict[str, list[Run]], dict[str, list[Run]]]:
    """Returns, for the large and for the small anchor, parameter name → runs within the tensor that are needed.

    Args:
        operations: One a tensor of the target.
        pair: The two anchors. All of a small anchor's tensor is needed where any of it is.
        target: Sizes of the target.
        item_bytes: Bytes a number, of the large and of the small anchor.

    Cost: O(rows), integers only.
    """
    from_large: dict[str, list[Run]] = {}
    from_small: dict[str, list[Run]] = {}
    for op in operations:
        layout = pair.axis_map.layout(op.pattern)
        if op.large_name:
            taken = pair.taken(op, target)
            runs = _row_runs(layout.rows(0, pair.large, taken), layout.shape(pair.large), item_bytes[0])
            from_large[op.large_name] = merge([*from_large.get(op.large_name, []), *runs])
        if op.small_name:
            from_small[op.small_name] = [(0, layout.count(pair.small) * item_bytes[1])]
    return from_large, from_small


def control_runs(
    operations: Iterable[TensorOp], pair: Pair, target: Sizes, rank: int, item_bytes: int
) -> dict[str, list[Run]]:
    """Returns, for a pair's control point, tensor name → runs within it that are needed.

    Args:
        operations: One a tensor of the target.
        pair: The two anchors.
        target: Sizes of the target.
        rank: Columns of every factor.
        item_bytes: Bytes a number.

    Cost: O(rows), integers only.
    """
    shapes = factor_shapes(pair, rank)
    return {
        name: _row_runs(leading_rows(pair, op.pattern, dim, target), shapes[name], item_bytes)
        for op in operations
        if op.bend and op.large_name
        for dim, name in enumerate(factor_names(pair.axis_map, op.pattern, op.large_name))
    }


def needed_by(
    large: Anchor, small: Anchor, pair: Pair, target: Sizes, operations: tuple[TensorOp, ...]
) -> dict[str, dict[str, list[Run]]]:
    """Returns, by anchor, which byte runs of which parameters the operations need."""
    items = ITEM_BYTES[large.dtype], ITEM_BYTES[small.dtype]
    from_large, from_small = needed_runs(operations, pair, target, items)
    return {large.name: from_large} if large is small else {large.name: from_large, small.name: from_small}


def needed_of_control(
    large: Anchor, small: Anchor, pair: Pair, target: Sizes, operations: tuple[TensorOp, ...]
) -> dict[str, list[Run]]:
    """Returns which byte runs of the tensors of the pair's control point the operations need."""
    if small.control_point is None or not any(op.bend for op in operations):
        return {}
    return control_runs(operations, pair, target, small.control_point.rank, ITEM_BYTES[large.dtype])
