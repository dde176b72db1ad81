"""From a parameter count to a shape, and back: integers only.

A *size* here is a dict of axis sizes, ``{"layers": 30, "hidden": 576, "ffn": 1536, ...}``. Three questions are
answered: how many parameters has a model of these sizes (:func:`count_parameters`), which shape between two
neighbors has a given count (:func:`solve`), and which shape should the next smaller anchor have (:func:`ladder`).
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from math import isfinite, prod
from numbers import Integral, Real
from typing import Any

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.grammar import product
from cbd_hub.errors import AxisMapError, SizeError

__all__ = [
    "MULTIPLES",
    "ROUND",
    "WAYPOINTS",
    "Sizes",
    "as_real",
    "count_parameters",
    "format_count",
    "gap_free",
    "ladder",
    "parse_count",
    "solve",
]

Sizes = Mapping[str, int]
"""Axis → number of units."""

MULTIPLES: Mapping[int, float] = {128: 0.0, 64: 0.0, 32: 0.01, 16: 0.02, 8: 0.04, 4: 0.3, 2: 0.4, 1: 0.5}
"""Multiples that widths are rounded to → the price of that multiple, in units of deviation from the ideal shape
(1 = the whole way between the two neighbors). Tensor cores like 64 and more; below 8 only as a last resort."""

ROUND: Sequence[int] = (256, 64, 32)
"""Multiples that widths are rounded to wherever the tolerance allows, the first that it does: formats such as Q4_K_M
store rows in blocks of 256 numbers, Q8_0 and Q4_0 in blocks of 32, and leave rows that are no multiple in 16 bits."""

WAYPOINTS: Sequence[Mapping[str, float]] = (
    {"ffn": 5 / 6},
    {"ffn": 1 / 2, "layers": 5 / 8},
    {"ffn": 1 / 4, "hidden": 1 / 2},
    {"ffn": 1 / 8, "layers": 1 / 4},
    {"ffn": 1 / 16, "kv_heads": 1 / 2, "hidden": 1 / 4},
)
"""The order in which a reduction is spent, as fractions of the larger neighbor: ffn units first, then ffn units and
layers together, width when those cannot carry it, KV groups last; ffn moves in every step because it is the axis fine
enough to meet a count. Measured on SmolLM2-135M: per parameter removed,
ffn units cost the least loss, width and depth about twice as much, heads the most (docs/design-notes.md)."""

_GOAL = 0.002
_ASTRAY = 0.25  # how far from the line round widths may lead, as deviation below
_MOST = 10**15
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


_COUNT = re.compile(r"\s*(?:((?:\d[\d_]*(?:\.\d+)?)|\.\d+)\s*([kmbt]?)|(\d{1,3}(?:,\d{3})+))\s*")
"""Digits with an optional unit, or groups of three digits with commas between them."""


def as_real(value: Any) -> float | int | None:
    """Returns a number of any library (numpy, torch, fractions) as Python's own; None for what is none.

    Truth values are no numbers, nor are NaN and infinity.
    """
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return None
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real | Decimal):
        return float(value) if isfinite(value) else None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # an array or a tensor that holds one number
        return as_real(value.item())
    return None


def parse_count(value: int | float | str) -> int:
    """Reads a parameter count: a number, or a string such as ``"138M"``, ``"1.2B"``, ``"853k"`` or ``"1_000_000"``.

    Commas are read between groups of three digits alone, and not beside a unit: ``"1,5M"`` might be meant as 1.5M.

    Raises:
        SizeError: Not a positive count.
    """
    number = as_real(value)
    if number is None:
        match = _COUNT.fullmatch(str(value).lower()) if isinstance(value, str) else None
        if match is None:
            comma = isinstance(value, str) and "," in value
            hint = "; a decimal point is '.', and commas stand between groups of three digits only" if comma else ""
            raise SizeError(
                f"{value!r} is not a parameter count; write a number such as 138000000, '138M' or '1.2B'{hint}"
            )
        digits, unit = match.group(1) or match.group(3), match.group(2) or ""
        number = round(Decimal(re.sub("[_,]", "", digits)) * _UNITS[unit])
    if number != round(number):
        raise SizeError(f"{value!r} is not a parameter count: a count is whole")
    number = round(number)
    if not 1 <= number < _MOST:
        raise SizeError(f"a model has between 1 and 10^15 parameters; got {str(value)[:40]!r}")
    return number


def format_count(count: int) -> str:
    """Writes a parameter count for a person, e.g. 134515008 → ``"134.5M"``."""
    for unit, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:.4g}{letter}"
    return str(count)


def count_parameters(axis_map: AxisMap, sizes: Sizes) -> int:
    """Returns the exact number of parameters, tied weights counted once, as ``model.num_parameters()`` counts.

    Cost: microseconds a tensor pattern; no tensor is made.

    Raises:
        AxisMapError: An axis has no size.
    """
    layers = sizes["layers"]
    return sum(
        axis_map.layout(pattern).count(sizes) * (layers if "*" in pattern else 1) for pattern in axis_map.tensors
    )


def _values(low: int, high: int, multiple: int, ideal: float, most: int) -> list[int]:
    """The multiples between low and high, with both ends, the ``most`` nearest to ``ideal``."""
    middle = round(min(max(ideal, low), high) / multiple)
    first, last = max(-(-low // multiple), middle - most), min(high // multiple, middle + most)
    inside = range(first * multiple, last * multiple + 1, multiple)
    return sorted({low, high, *inside}, key=lambda v: (abs(v - ideal), v))[:most]


def _ideal(axis_map: AxisMap, target: int, small: Sizes, large: Sizes) -> float:
    """The position t in 0..1 at which the straight line from small to large has ``target`` parameters."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        point = {a: small[a] + middle * (large[a] - small[a]) for a in small}  # the count, with fractions of units
        low, high = (middle, high) if count_parameters(axis_map, point) < target else (low, middle)  # type: ignore[arg-type]
    return (low + high) / 2


def _candidates(
    axis_map: AxisMap, target: int, small: Sizes, large: Sizes, ideal: Mapping[str, float], multiple: int
) -> Iterator[tuple[int, dict[str, int]]]:
    """Shapes between two neighbors, with their counts; the finest axis (ffn, if it varies) meets the target."""
    derived = {axis: text for axis, text in axis_map.equal.items() if small[axis] != large[axis]}
    varying = [a for a in small if small[a] != large[a] and a not in derived]
    fine = "ffn" if "ffn" in varying else None
    coarse = [a for a in varying if a != fine]
    most = max(3, int(600 ** (1 / max(1, len(coarse)))))
    choices = [_values(small[a], large[a], multiple if a == "hidden" else 1, ideal[a], most) for a in coarse]
    for values in itertools.product(*choices):
        sizes = {**small, **dict(zip(coarse, values, strict=True))}
        for axis, text in derived.items():
            sizes[axis] = product(tuple(text.split()), sizes)
        if any(not min(small[a], large[a]) <= sizes[a] <= max(small[a], large[a]) for a in derived):
            continue
        try:
            axis_map.check_sizes(sizes)
        except AxisMapError:
            continue
        if fine is None:
            yield count_parameters(axis_map, sizes), sizes
            continue
        base = count_parameters(axis_map, {**sizes, fine: 0})
        slope = count_parameters(axis_map, {**sizes, fine: 1}) - base
        exact = (target - base) / slope
        for width in _values(small[fine], large[fine], multiple, exact, 2):
            yield base + slope * width, {**sizes, fine: width}


def solve(
    axis_map: AxisMap,
    target: int,
    small: Sizes,
    large: Sizes,
    tolerance: float = 0.01,
    multiples: Mapping[int, float] = MULTIPLES,
    shallow: bool = True,
    accept: Callable[[Sizes], bool] = lambda sizes: True,
    round_widths: bool = False,
) -> dict[str, int]:
    """Returns the sizes between two neighbors that have ``target`` parameters.

    Every axis in which the neighbors differ is moved along the straight line between them, as far as whole KV groups
    and hardware-friendly multiples allow; layers are added last, when the other axes cannot carry the count
    (``shallow``), or along the line as well. The finest axis then meets the count. Shapes within 0.2 % of the target
    come first; if there is none, the nearest count within ``tolerance``. With ``round_widths``, widths that are
    multiples of 256, else of 64, else of 32 come before nearness, wherever the tolerance has a shape of as few layers
    (or as near to the line) with them.

    Args:
        axis_map: The resolved map of the family.
        target: Number of parameters.
        small: Sizes of the smaller neighbor; no axis may be larger than in ``large``.
        large: Sizes of the larger neighbor.
        tolerance: Largest relative error of the count.
        multiples: Multiple → price; see :data:`MULTIPLES`.
        shallow: Prefer the fewest layers. Right for interpolated models, where a layer that only the large anchor has
            disturbs more than ffn units that only it has (measured: docs/design-notes.md).
        accept: Leaves out sizes for which it is False.
        round_widths: Prefer the multiples of :data:`ROUND` for the hidden and ffn sizes in which the neighbors differ.

    Cost: at most a few tens of milliseconds; integers only.

    Raises:
        SizeError: The target lies outside the two neighbors' range, or no shape between them meets the tolerance;
            the message names the range and the nearest size.
    """
    low, high = count_parameters(axis_map, small), count_parameters(axis_map, large)
    if target in (low, high):
        return dict(small if target == low else large)
    if not low < target < high:
        nearest = low if target < low else high
        raise SizeError(
            f"{format_count(target)} parameters ({target}) is outside the range {format_count(low)} to "
            f"{format_count(high)} ({low} to {high}); the nearest size is {format_count(nearest)} ({nearest})"
        )
    t = _ideal(axis_map, target, small, large)
    ideal = {a: small[a] + t * (large[a] - small[a]) for a in small}
    along_line = [a for a in small if small[a] != large[a] and not (shallow and a in ("layers", "ffn"))]
    fewest = next(
        n
        for n in range(small["layers"], large["layers"] + 1)
        if count_parameters(axis_map, {**large, "layers": n}) >= target
    )

    def deviation(sizes: Sizes) -> float:
        """How far from the line, 1 is the whole way between the neighbors."""
        return max((abs(sizes[a] - ideal[a]) / (large[a] - small[a]) for a in along_line), default=0.0)

    widths = [a for a in ("hidden", "ffn") if small.get(a) != large.get(a)]
    both_then_ffn = (widths, widths[1:])
    for axes, multiple in itertools.product(both_then_ffn, ROUND if round_widths else ()):
        found: list[tuple[tuple[float, ...], dict[str, int]]] = []
        for count, sizes in _candidates(axis_map, target, small, large, ideal, multiple):
            error, astray = abs(count - target) / target, deviation(sizes)
            fits = error <= tolerance and astray <= _ASTRAY and not any(sizes[a] % multiple for a in axes)
            if axes and fits and (not shallow or sizes["layers"] <= fewest) and accept(sizes):
                found.append(((sizes["layers"] if shallow else 0, round(astray, 2), error), sizes))
        if found:
            return min(found, key=lambda each: each[0])[1]
    best: tuple[tuple[float, int, float], dict[str, int]] | None = None
    nearest_count: tuple[int, dict[str, int]] | None = None
    for multiple, price in sorted(multiples.items(), key=lambda item: item[1]):
        if best is not None:
            excess, layers, cost = best[0]
            if excess == 0 and layers <= (fewest if shallow else 0) and cost <= price:
                break  # a finer multiple cannot do better
        for count, sizes in _candidates(axis_map, target, small, large, ideal, multiple):
            try:
                axis_map.check_sizes(sizes)
            except AxisMapError:
                continue
            error = abs(count - target) / target
            if nearest_count is None or abs(count - target) < abs(nearest_count[0] - target):
                nearest_count = (count, sizes)
            if error > tolerance or not accept(sizes):
                continue
            score = (max(0.0, error - _GOAL), sizes["layers"] if shallow else 0, deviation(sizes) + price)
            if best is None or score < best[0]:
                best = (score, sizes)
    if best is not None:
        return best[1]
    near = f"; the nearest size is {nearest_count[0]} parameters" if nearest_count else ""
    raise SizeError(
        f"no shape between {format_count(low)} and {format_count(high)} has {target} parameters within "
        f"{tolerance:.2%}{near}. Ask for that size, or pass a larger tolerance."
    )


def gap_free(axis_map: AxisMap, small: Sizes, large: Sizes, tolerance: float = 0.01) -> bool:
    """Whether every parameter count between two neighbors is reached within the tolerance.

    A layer is the coarsest step there is. With one layer less and everything else at the large end a model must not
    be smaller than with that layer and everything else at the small end, or sizes in between are out of reach.
    """
    return all(
        count_parameters(axis_map, {**small, "layers": layers + 1}) * (1 - tolerance)
        <= count_parameters(axis_map, {**large, "layers": layers}) * (1 + tolerance)
        for layers in range(small["layers"], large["layers"])
    )


def ladder(
    axis_map: AxisMap,
    large: Sizes,
    target: int,
    tolerance: float = 0.01,
    waypoints: Sequence[Mapping[str, float]] = WAYPOINTS,
    round_widths: bool = False,
) -> dict[str, int]:
    """Returns the sizes of the next smaller anchor: ``target`` parameters, taken from ``large`` in a stated order.

    The waypoints are walked until the target lies between two of them; :func:`solve` finds the shape there, among
    those from which every size up to ``large`` is reached (:func:`gap_free`), ``round_widths`` as it says.

    Raises:
        SizeError: ``target`` is not below ``large``, or below the last waypoint.
    """
    upper = dict(large)
    if target >= count_parameters(axis_map, large):
        raise SizeError(
            f"an anchor of {format_count(target)} parameters is not smaller than its neighbor "
            f"({format_count(count_parameters(axis_map, large))})"
        )
    for waypoint in waypoints:
        lower = _shrink(axis_map, large, upper, waypoint)
        if lower != upper and count_parameters(axis_map, lower) <= target:

            def accept(sizes: Sizes) -> bool:
                return gap_free(axis_map, sizes, large, tolerance)

            how: dict[str, Any] = {"shallow": False, "accept": accept, "round_widths": round_widths}
            try:
                return solve(axis_map, target, lower, upper, tolerance, **how)
            except SizeError:  # steps of the coarse axes too wide here: give the fine axis more room
                room = {**lower, "ffn": max(1, lower["ffn"] // 2)}, {**upper, "layers": large["layers"]}
                return solve(axis_map, target, *room, tolerance, **how)
        upper = lower
    raise SizeError(
        f"{format_count(target)} parameters is too far below {format_count(count_parameters(axis_map, large))} for "
        f"one step; the smallest shape offered is {format_count(count_parameters(axis_map, upper))}. "
        "Put an anchor in between, or give its shape."
    )


def _shrink(axis_map: AxisMap, large: Sizes, current: Sizes, waypoint: Mapping[str, float]) -> dict[str, int]:
    """Brings the axes of a waypoint down to their fraction of ``large``, keeping the rules of the family."""
    sizes = dict(current)
    for axis, fraction in waypoint.items():
        if axis not in sizes:
            continue
        if axis in axis_map.equal:  # GPT-2: the width follows the heads
            others = axis_map.equal[axis].split()
            free = [a for a in others if a not in axis_map.frozen]
            unit = product(tuple(a for a in others if a not in free), sizes)
            sizes[free[0]] = max(1, round(fraction * large[axis] / unit))
            sizes[axis] = unit * prod(sizes[a] for a in free)
        else:
            unit = product(tuple(axis_map.divides[axis].split()), sizes) if axis in axis_map.divides else 1
            goal = fraction * large[axis]
            step = unit * 8 if axis == "hidden" and goal >= unit * 8 else unit
            sizes[axis] = min(current[axis], max(step, round(goal / step) * step))
    return sizes
