"""The only tensor arithmetic of assembly: take a subset, place a small tensor in a large one, blend the two.

A target unit is either shared by both anchors or owned by the large one alone. In target coordinates the small
anchor's units always come first on every axis, so a small tensor fills a *region* of the target tensor that
:meth:`cbd_hub.axes.grammar.Layout.rows` names. Arithmetic is in float32 whatever the storage, and cast once.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from cbd_hub.axes.grammar import Indices, Layout
from cbd_hub.axes.sizing import Sizes

__all__ = ["Bend", "combine", "expand", "region_of", "rescale", "take"]

Bend = tuple[float, torch.Tensor, torch.Tensor | None]
"""Weight 4 r (1 - r), and what it weighs: factors (n, k) and (k, m) of a matrix (n, m), or a vector (n,) and None."""

_CHUNK = 1 << 19
"""Bytes of a tensor that are worked on at a time: what was just taken is still in the processor's cache."""

Rows = torch.Tensor | slice
"""Rows of a stored dimension: a slice where they are contiguous (no copy is needed then), int64 (n,) otherwise."""


def _as_index(rows: np.ndarray | None) -> Rows:
    if rows is None:
        return slice(None)
    if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
        return slice(int(rows[0]), int(rows[0]) + len(rows))
    return torch.from_numpy(rows)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the dtype of arithmetic: float32, or float64 where it is stored so."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _select(tensor: torch.Tensor, rows: Sequence[Rows], out: torch.Tensor | None = None) -> torch.Tensor:
    """Some rows of each dimension: a view where they are contiguous, otherwise a copy, in ``out`` if it is given."""
    lists = {dim: which for dim, which in enumerate(rows) if isinstance(which, torch.Tensor)}
    tensor = tensor[tuple(slice(None) if isinstance(which, torch.Tensor) else which for which in rows)]
    for dim, which in lists.items():
        to = out if dim == max(lists) else None
        if (
            dim and tensor.itemsize == 2 and tensor.device.type == "cpu"
        ):  # numpy gathers columns of two bytes three times as fast as torch
            halves = tensor.view(torch.int16).numpy()
            made = np.take(halves, which.numpy(), dim, to if to is None else to.view(torch.int16).numpy(), "clip")
            tensor = torch.from_numpy(made).view(tensor.dtype)
        else:
            tensor = torch.index_select(tensor, dim, which, out=to)
    return tensor


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
    return _select(tensor, _rows(layout, sizes, taken))


def _rows(layout: Layout, sizes: Sizes, taken: Indices) -> list[Rows]:
    """Which rows of each stored dimension belong to the units that are taken."""
    return [_as_index(layout.rows(dim, sizes, taken)) for dim in range(len(layout.dims))]


def _region(layout: Layout, small: Sizes, target: Sizes) -> list[Rows]:
    """Where, in a target tensor, the units that the small anchor has are stored: ascending rows of each dimension."""
    shared = {a: np.arange(small[a], dtype=np.int64) for a in layout.axes if small[a] != target[a]}
    return _rows(layout, target, shared)


def region_of(layout: Layout, small: Sizes, target: Sizes, device: torch.device) -> tuple[Rows, ...]:
    """Returns the index of a target tensor under which the units that the small anchor has lie, as it stores them."""
    return _grid(_on(device, _region(layout, small, target)))


def _grid(region: Sequence[Rows]) -> tuple[Rows, ...]:
    """The index of a region, as tensors are indexed."""
    if len(region) == 2 and isinstance(region[0], torch.Tensor) and isinstance(region[1], torch.Tensor):
        return region[0][:, None], region[1]
    return tuple(region)


def _on(device: torch.device, rows: list[Rows]) -> list[Rows]:
    """The rows as a device indexes with them."""
    return [which.to(device) if isinstance(which, torch.Tensor) else which for which in rows]


def _part(rows: Rows, start: int, stop: int) -> Rows:
    """The rows at places ``start`` to ``stop``."""
    if isinstance(rows, slice):
        first = rows.start or 0
        return slice(first + start, first + stop)
    return rows[start:stop]


def _within(rows: Rows, count: int, start: int, stop: int) -> tuple[slice, Rows]:
    """Which of ``count`` ascending rows lie in start..stop: their places among them, and they counted from start."""
    if isinstance(rows, slice):
        first = rows.start or 0
        low, high = (min(max(end - first, 0), count) for end in (start, stop))
        return slice(low, high), slice(first + low - start, first + high - start)
    low, high = (int(torch.searchsorted(rows, end)) for end in (start, stop))
    return slice(low, high), rows[low:high] - start


def _weights(
    layout: Layout, region: Sequence[Rows], target: Sizes, large_only_weight: float, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Factors of rows (n, 1) or columns (m,) of units: ``large_only_weight`` where only the large anchor has them."""
    weights = []
    for dim, (parts, size) in enumerate(zip(layout.dims, layout.shape(target), strict=True)):
        if parts != (("hidden",),):
            factors = torch.full((size, 1) if dim == 0 else (size,), large_only_weight, dtype=dtype)
            factors[region[dim]] = 1.0
            weights.append(factors)
    return [factors for factors in weights if (factors != 1.0).any()]


def combine(
    out: torch.Tensor,
    large: torch.Tensor,
    layout: Layout,
    large_sizes: Sizes,
    taken: Indices,
    target: Sizes,
    factors: Iterable[tuple[float, float]] = (),
    small: torch.Tensor | None = None,
    small_sizes: Sizes | None = None,
    alpha: float = 0.0,
    large_only_weight: float = 1.0,
    bend: Bend | None = None,
) -> torch.Tensor:
    """Fills a target tensor: the large anchor's units, averaged with the small anchor's where both have one.

    ``alpha * small + (1 - alpha) * large`` where the small anchor has the unit, the large anchor's value elsewhere.

    Args:
        out: (layout.shape(target)), overwritten and returned.
        large: The large anchor's tensor, (layout.shape(large_sizes)); only read.
        layout: The layout of all three.
        large_sizes: Sizes of the large anchor.
        taken: Axis → its units to take, in order; other axes whole.
        target: Sizes of the target.
        factors: For :func:`rescale`, each in its turn, on what is taken of ``large``.
        small: The small anchor's tensor, (layout.shape(small_sizes)); None leaves ``large`` alone.
        small_sizes: Sizes of the small anchor.
        alpha: Weight of the small anchor, 0..1.
        large_only_weight: Factor for what the units that only the large anchor has write into the residual stream;
            of a matrix between units and the stream alone.
        bend: What a control point adds at the end (:mod:`cbd_hub.interpolation.control_points`); 2 k operations a
            number for a matrix of rank k.

    Cost: memory is read once and written once: all is done in pieces that stay in the processor's cache. In float32
        (float64 where tensors are stored so), cast once; half precision that needs no factor is widened in registers.
    """
    rows = _on(large.device, _rows(layout, large_sizes, taken))
    region = [] if small is None or small_sizes is None else _on(large.device, _region(layout, small_sizes, target))
    wide = _wide(large[:0]).dtype
    weights = (
        _weights(layout, region, target, large_only_weight, wide)
        if large_only_weight != 1.0 and len(region) == 2
        else []
    )
    weights = [weight.to(out.device) for weight in weights]
    factors = [(factor, offset) for factor, offset in factors if factor != 1.0]
    same = not factors and large.dtype == out.dtype and (small is None or small.dtype == out.dtype)
    if bend is not None:
        same, bend = same and out.dtype == wide, (bend[0], _wide(bend[1]), None if bend[2] is None else _wide(bend[2]))
    step = max(1, _CHUNK // max(1, out[:1].nbytes)) if out.device.type == "cpu" else max(1, out.shape[0])
    for start in range(0, out.shape[0], step):
        stop = min(start + step, out.shape[0])
        to = out[start:stop]
        piece = _select(large, [_part(rows[0], start, stop), *rows[1:]], to if same else None)
        for factor, offset in factors:
            piece = rescale(piece, factor, offset)
        mixed = to if same else torch.empty(to.shape, dtype=wide, device=out.device)
        if mixed.data_ptr() != piece.data_ptr():
            mixed.copy_(piece)
        for weight in weights:
            mixed.mul_(weight[start:stop] if weight.dim() == 2 else weight)
        if small is not None:
            places, first = _within(region[0], small.shape[0], start, stop)
            _blend(mixed, small[places], alpha, _grid([first, *region[1:]]))
        if bend is not None:
            height, left, right = bend
            if right is None:
                mixed.add_(left[start:stop], alpha=height)
            else:
                mixed.addmm_(left[start:stop], right, alpha=height)
        if mixed is not to:
            to.copy_(mixed)
    return out


def _blend(large: torch.Tensor, small: torch.Tensor, alpha: float, where: tuple[Rows, ...]) -> None:
    """Averages ``small`` into a part of ``large``, in place."""
    if large.dtype == small.dtype and all(isinstance(rows, slice) for rows in where):
        large[where].lerp_(small, alpha)
    else:
        large[where] = (alpha * _wide(small) + (1 - alpha) * _wide(large[where])).to(large.dtype)


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
    out[_grid(region)] = small
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
