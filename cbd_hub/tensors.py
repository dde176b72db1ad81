"""The only tensor arithmetic of assembly: take a subset, place a small tensor in a large one, blend the two.

A target unit is either shared by both anchors or owned by the large one alone. In target coordinates the small
anchor's units always come first on every axis, so a small tensor fills a *region* of the target tensor that
:meth:`cbd_hub.axes.Layout.rows` names. Arithmetic is in float32 whatever the storage, and cast once.
"""

from collections.abc import Iterator

import numpy as np
import torch

from cbd_hub.axes import Indices, Layout
from cbd_hub.sizing import Sizes

__all__ = ["blend", "expand", "rescale", "take", "weigh_unshared"]

_CHUNK = 1 << 22
"""Elements that are blended at a time (16 MiB in float32), so that temporaries stay small beside the tensors."""

Rows = torch.Tensor | slice


def _as_index(rows: np.ndarray | None) -> Rows:
    """A slice where the rows are contiguous (no copy is then needed), an int64 tensor otherwise."""
    if rows is None:
        return slice(None)
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return slice(int(rows[0]), int(rows[0]) + len(rows))
    return torch.from_numpy(rows)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of arithmetic: float32, or float64 where it is stored so."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def take(tensor: torch.Tensor, layout: Layout, sizes: Sizes, taken: Indices) -> torch.Tensor:
    """Returns the part of a tensor that belongs to the units taken on each axis (``Trans`` of the large anchor).

    Args:
        tensor: (layout.shape(sizes)), any dtype.
        layout: Its layout.
        sizes: Sizes of the model it comes from.
        taken: Axis → units to take, in order; other axes whole.

    Returns:
        The subset, same dtype; a view where the rows are contiguous.
    """
    for dim in range(tensor.dim()):
        rows = _as_index(layout.rows(dim, sizes, taken))
        where = (slice(None),) * dim + (rows,)
        tensor = tensor[where] if isinstance(rows, slice) else tensor.index_select(dim, rows)
    return tensor


def _region(layout: Layout, small: Sizes, target: Sizes) -> list[Rows]:
    """Where, in a target tensor, the units that the small anchor has are stored: one index a dimension."""
    shared = {a: np.arange(small[a], dtype=np.int64) for a in layout.axes if small[a] != target[a]}
    return [_as_index(layout.rows(dim, target, shared)) for dim in range(len(layout.dims))]


def _grid(region: list[Rows], start: int, stop: int) -> tuple[Rows, ...]:
    """The index of rows start..stop of a region (dimension 0), the other dimensions whole."""
    first = region[0]
    if isinstance(first, slice):
        offset = first.start or 0
        first = slice(offset + start, offset + stop)
    else:
        first = first[start:stop]
    if len(region) == 2 and isinstance(first, torch.Tensor) and isinstance(region[1], torch.Tensor):
        return first[:, None], region[1]
    return (first, *region[1:])


def _chunks(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    rows = max(1, _CHUNK // max(1, tensor[0].numel()))
    for start in range(0, tensor.shape[0], rows):
        yield start, min(start + rows, tensor.shape[0])


def blend(
    large: torch.Tensor, small: torch.Tensor, alpha: float, layout: Layout, small_sizes: Sizes, target: Sizes
) -> torch.Tensor:
    """Masked average: ``alpha * small + (1 - alpha) * large`` where the small anchor has the unit, large elsewhere.

    Args:
        large: The large anchor's part, already in target shape; overwritten and returned.
        small: The small anchor's tensor, (layout.shape(small_sizes)).
        alpha: Weight of the small anchor, 0..1.
        layout: The layout of both.
        small_sizes: Sizes of the small anchor.
        target: Sizes of the target.

    Cost: one pass over the region where it has no gaps and both have one dtype; otherwise three, with float32
    temporaries of 16 MiB at most.
    """
    region = _region(layout, small_sizes, target)
    for start, stop in _chunks(small):
        where = _grid(region, start, stop)
        if large.dtype == small.dtype and all(isinstance(rows, slice) for rows in where):
            large[where].lerp_(small[start:stop], alpha)  # a view; half precision is widened in registers
            continue
        mixed = alpha * _wide(small[start:stop]) + (1 - alpha) * _wide(large[where])
        large[where] = mixed.to(large.dtype)
    return large


def weigh_unshared(
    large: torch.Tensor, weight: float, layout: Layout, small_sizes: Sizes, target: Sizes
) -> torch.Tensor:
    """Multiplies what the units that only the large anchor has write into the residual stream.

    Args:
        large: A matrix between some units and the stream, in target shape; overwritten and returned.
        weight: Factor for the units that the small anchor lacks.
        layout: Its layout; one dimension is ``hidden``, the other the units.
        small_sizes: Sizes of the small anchor.
        target: Sizes of the target.
    """
    for dim, parts in enumerate(layout.dims):
        if parts != (("hidden",),):
            shared = _region(layout, small_sizes, target)[dim]
            own = torch.ones(large.shape[dim], dtype=torch.bool)
            own[shared] = False
            if own.any():
                rows = _as_index(own.nonzero().squeeze(1).numpy())
                where = (slice(None),) * dim + (rows,)
                if isinstance(rows, slice):
                    large[where].mul_(weight)
                else:
                    large[where] = large[where].mul_(weight)
    return large


def expand(
    small: torch.Tensor, layout: Layout, small_sizes: Sizes, target: Sizes, mean_axis: str | None = None
) -> torch.Tensor:
    """Returns the small anchor's tensor in target shape, new units filled with zeros (``Trans`` of the small anchor).

    Args:
        small: (layout.shape(small_sizes)), any dtype.
        layout: Its layout.
        small_sizes: Sizes of the small anchor.
        target: Sizes of the target, none smaller.
        mean_axis: An axis along whose stored dimension new units get the mean of the old ones instead of zero. Norm
            gains want that, and so does everything that writes a LayerNorm model's residual stream: LayerNorm
            subtracts the mean over all units, which then stays what it was.

    Returns:
        (layout.shape(target)), same dtype; the same tensor when nothing grows.
    """
    shape = layout.shape(target)
    if tuple(small.shape) == shape:
        return small
    out = torch.zeros(shape, dtype=small.dtype)
    region = _region(layout, small_sizes, target)
    out[_grid(region, 0, small.shape[0])] = small
    for dim, parts in enumerate(layout.dims):
        if parts == ((mean_axis,),) and small_sizes[mean_axis] != target[mean_axis]:  # type: ignore[index]
            have = small_sizes[mean_axis]  # type: ignore[index]
            old = out.narrow(dim, 0, have)
            new = out.narrow(dim, have, shape[dim] - have)
            new.copy_(_wide(old).mean(dim, keepdim=True).to(out.dtype).expand_as(new))
    return out


def rescale(tensor: torch.Tensor, factor: float, offset: float = 0.0) -> torch.Tensor:
    """Multiplies a tensor (or a gain stored as ``gain - offset``) by a factor; the result stays in float32.

    ``RMSNorm`` over d' of d units sees another root mean square; its gain takes up the ratio (factor). Gemma stores
    its gains less one, hence ``offset=1`` there: ``(w + 1) * factor - 1``.
    """
    if factor == 1.0:
        return tensor
    return (_wide(tensor) + offset) * factor - offset
