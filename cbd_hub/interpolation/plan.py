"""The plan: everything that will be done to make one model, decided before a single weight is read.

A plan is a frozen list of operations, one a tensor, and the numbers a person wants to know first: exact parameter
count, alpha, bytes to read, expected loss. Printing it is the dry run; :mod:`cbd_hub.chain.chain` carries it out.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from textwrap import fill
from typing import Any

import numpy as np

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.disk_size import QUANTS, disk_size, format_bytes, parse_bytes
from cbd_hub.axes.sizing import as_real, count_parameters, format_count, parse_count, solve
from cbd_hub.errors import AxisMapError, SizeError, did_you_mean
from cbd_hub.interpolation.operations import TensorOp, list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.interpolation.ranges import ITEM_BYTES, Run, count_bytes, needed_by, needed_of_control
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.manifest.manifest import Anchor, Manifest

__all__ = [
    "METHODS",
    "WHOLE_ABOVE",
    "Plan",
    "make_plan",
    "nearly_all",
]

METHODS = ("auto", "bezier", "interpolate", "paper", "expand", "prune")
"""What ``method=`` accepts."""

EXPAND_BELOW = 0.45
"""Where the width differs, the zero-padded small anchor beats interpolation below this position (measured)."""

WHOLE_ABOVE = 0.9
"""Share of an anchor above which its files are fetched whole, into the ordinary cache."""

FAR = 0.25
"""Share of a pair's span: where no measured size is nearer, a plan says that its expected loss is a guess."""

_SNAP = 0.001


_INDENT = " " * 11
_SHAPE: dict[str, Any] = {"initial_indent": "shape      ", "subsequent_indent": _INDENT, "break_on_hyphens": False}


@dataclass(frozen=True)
class Plan:
    """One model to be made: its shape, how, and what that costs."""

    shape: Mapping[str, int]
    """Sizes in the architecture's own config fields."""
    num_parameters: int
    """Exact; tied weights counted once."""
    alpha: float
    """Weight of the small anchor."""
    method: str
    """``anchor`` where the target is an anchor itself."""
    small: str
    large: str
    """Names of the two anchors; the same where the target is an anchor itself."""
    position: float
    """r: 0 at the small anchor, 1 at the large one, linear in parameters."""
    operations: tuple[TensorOp, ...] = field(repr=False)
    pair: Pair = field(repr=False)
    """The two anchors, with the correspondence of their units that this plan follows."""
    bytes_to_read: int
    """Bytes of tensors that are read from disk: whole tensors, each once."""
    bytes_to_fetch: int
    """Bytes of weights that a pull transfers where nothing is cached: only the rows that are needed, or whole files
    where that is nearly everything (:data:`WHOLE_ABOVE`). Headers (kilobytes) come on top."""
    expected_loss: float | None
    """Held-out nats a token, from the chain's measured curve; None when it was not measured."""
    notes: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Sizes by axis."""
    needed: Mapping[str, Mapping[str, list[Run]]] = field(default_factory=dict, repr=False)
    """Anchor → parameter → byte runs of it that the operations read (:mod:`cbd_hub.interpolation.ranges`)."""
    needed_control: Mapping[str, list[Run]] = field(default_factory=dict, repr=False)
    """Tensor of the pair's control point → byte runs of it that the operations read; empty on the straight line."""
    large_only_weight: float = 1.0
    """The large-only weight: with it, units that only the large anchor has write into the residual stream."""

    def disk_size(self, quant: str = "bf16") -> int:
        """Returns the bytes of the model's weights on disk: see :mod:`cbd_hub.axes.disk_size`.

        Raises:
            SizeError: An unknown kind.
        """
        return disk_size(self.pair.axis_map, self.sizes, quant)

    def _repr_html_(self) -> str:
        """The table, in a notebook."""
        return f"<pre>{escape(str(self))}</pre>"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; operations as name, shape and kind."""
        return {
            "num_parameters": self.num_parameters,
            "shape": dict(self.shape),
            "method": self.method,
            "alpha": self.alpha,
            "position": self.position,
            "small": self.small,
            "large": self.large,
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_fetch": self.bytes_to_fetch,
            "expected_loss": self.expected_loss,
            "disk": {quant: self.disk_size(quant) for quant in QUANTS},
            "notes": list(self.notes),
            "operations": [{"name": op.name, "shape": list(op.shape), "kind": op.kind} for op in self.operations],
        }

    def __str__(self) -> str:
        """Tables for a person, 80 columns wide: one for each way that tensors are made, a line for each pattern."""
        source = f"anchor {self.large!r} as it is"
        if self.method != "anchor":
            source = f"{self.method} between {self.small!r} and {self.large!r}, at position {self.position:.3f}"
        expected = "not measured" if self.expected_loss is None else f"{self.expected_loss:.3f} nats a token expected"
        lines = [
            f"model      {format_count(self.num_parameters)} parameters ({self.num_parameters:,})",
            fill(", ".join(f"{name}\xa0{n}" for name, n in self.shape.items()), 80, **_SHAPE).replace("\xa0", " "),
            fill(source, 80, initial_indent="made by    ", subsequent_indent=_INDENT),
            f"alpha      {self.alpha:.3f} (weight of the small anchor)",
            f"to read    {self.bytes_to_read / 1e6:,.1f} MB of weights "
            f"({self.bytes_to_fetch / 1e6:,.1f} MB to fetch where nothing is cached)",
            "on disk    " + ", ".join(f"{format_bytes(self.disk_size(q))} as {q}" for q in QUANTS),
            f"loss       {expected}",
            *(fill(note, 80, initial_indent="note       ", subsequent_indent=_INDENT) for note in self.notes),
        ]
        shapes = {op.pattern: " x ".join(map(str, op.shape)) for op in self.operations}
        width, wide = max(map(len, shapes)), max(map(len, shapes.values()))
        for kind in dict.fromkeys(op.kind for op in self.operations):
            lines += ["", f"tensors = {kind}"]
            counts = Counter(op.pattern for op in self.operations if op.kind == kind)
            lines += [f"  {name:<{width}}  {shapes[name]:<{wide}}  {count}" for name, count in counts.items()]
        return "\n".join(lines)


def make_plan(
    manifest: Manifest,
    index_maps: Mapping[str, IndexMap],
    num_parameters: int | str | None = None,
    shape: Mapping[str, int] | None = None,
    alpha: float | str = "auto",
    method: str = "auto",
    tolerance: float = 0.01,
    memory: int | str | None = None,
    quant: str = "bf16",
) -> Plan:
    """Decides how a model is made: the shape, the adjacent pair of anchors, and one operation a tensor.

    Args:
        manifest: The chain's manifest.
        index_maps: Correspondence of each pair, by the smaller anchor's name.
        num_parameters: Parameter count, as an int or a string such as ``"138M"``.
        shape: Or the shape, in the architecture's config fields; fields left out are those that both anchors share.
        alpha: Weight of the small anchor, 0..1; ``"auto"`` is 1 - r (docs/design-notes.md has the measurements).
        method: One of :data:`METHODS`.
        tolerance: Largest relative error of the parameter count.
        memory: Or the most bytes that the weights may take on disk, as an int or a string such as ``"512MB"``: the
            largest model that fits.
        quant: As what, for `memory`: one of :data:`cbd_hub.axes.disk_size.QUANTS`.

    Cost: milliseconds (with `memory` some tens of a second); integers only.

    Raises:
        SizeError: Not exactly one of count, shape and memory given, a count or amount that cannot be parsed, a target
            outside the chain's range, or an unusable ``alpha``, ``method``, ``tolerance`` or ``quant``.
    """
    if (num_parameters, shape, memory).count(None) != 2:
        raise SizeError("give exactly one of num_parameters, shape and memory")
    if method not in METHODS:
        raise SizeError(f"method is {method!r}; allowed: {', '.join(METHODS)}.{did_you_mean(str(method), METHODS)}")
    automatic = isinstance(alpha, str) and alpha == "auto"
    given = None if automatic else as_real(alpha)
    if not automatic and (given is None or not 0 <= given <= 1):
        raise SizeError(f"alpha is {alpha!r}; allowed: a number from 0 (large anchor) to 1 (small anchor), or 'auto'")
    if (most := as_real(tolerance)) is None or not 0 <= most < 1:
        raise SizeError(f"tolerance is {tolerance!r}; allowed: 0 up to 1, e.g. 0.01 for one percent")
    axis_map = manifest.resolved_axis_map
    if shape is not None:
        small, large, sizes = _pair_for_shape(manifest, axis_map, shape)
    elif memory is not None:
        small, large, sizes = _pair_for_memory(manifest, axis_map, parse_bytes(memory), quant, tolerance)
    else:
        small, large, sizes = _pair_for_count(manifest, axis_map, parse_count(num_parameters or 0), tolerance)
    count = count_parameters(axis_map, sizes)
    span = large.num_parameters - small.num_parameters
    position = (count - small.num_parameters) / span if span else 0.0
    weight, notes = 1 - position if given is None else float(given), []
    chosen = method
    own = next((a for a in (small, large) if manifest.sizes(a) == sizes), None)
    if method == "auto":
        width_differs = (
            small.shape != large.shape and manifest.sizes(small)["hidden"] != manifest.sizes(large)["hidden"]
        )
        chosen = "expand" if width_differs and position < EXPAND_BELOW and automatic else "interpolate"
        if small is not large and small.bent:
            chosen = "bezier"
        elif small is not large and not small.aligned:
            chosen = "expand" if position < 0.5 else "prune"
            notes.append(
                f"anchors {small.name!r} and {large.name!r} are not aligned: their weights cannot be averaged, "
                f"so only the nearer one is used ({chosen})"
            )
    if chosen == "bezier" and small is not large and not small.bent:
        raise SizeError(
            f"anchors {small.name!r} and {large.name!r} have no control point; allowed: "
            f"{', '.join(m for m in METHODS if m != 'bezier')} (`cbd-hub fit-curve` trains one)"
        )
    weight = {"expand": 1.0, "prune": 0.0}.get(chosen, weight)
    if own is not None and (small is large or weight == (1.0 if own is small else 0.0)):
        small = large = own
        chosen, weight, large_only_weight = "anchor", 1.0, 1.0
        pair = Pair.same(axis_map, sizes)
        operations = tuple(
            TensorOp(n, p, axis_map.layout(p).shape(sizes), n, None) for n, p, _ in axis_map.names(sizes)
        )
    else:
        pair = Pair(axis_map, manifest.sizes(small), manifest.sizes(large), index_maps[small.name])
        # A trained anchor, or one of a training of its own, makes up for the units it lacks; at full weight their work
        # would be done twice. A curve was trained so. Chains before format 3 give what they gave.
        trained = small.training is None or small.training.tokens > 0 or (small.init and manifest.format > 2)
        made_up_for = chosen == "bezier" or (chosen == "interpolate" and trained)
        large_only_weight = 1 - weight**2 if made_up_for else 1.0
        operations = list_operations(pair, sizes, chosen, weight, large_only_weight)
    expected = _expected_loss(manifest, count, chosen)
    if expected is not None and chosen != "anchor":
        nearest = min(_measured(manifest, chosen), key=lambda n: abs(n - count))
        if abs(nearest - count) > FAR * span:
            notes.append(
                f"the loss was measured at no size nearer than {format_count(nearest)}; what is expected here is read "
                "off a straight line"
            )
    needed = needed_by(large, small, pair, sizes, operations)
    control = needed_of_control(large, small, pair, sizes, operations)
    return Plan(
        shape=axis_map.config_fields(sizes),
        num_parameters=count,
        alpha=weight,
        method=chosen,
        small=small.name,
        large=large.name,
        position=position,
        operations=operations,
        bytes_to_read=_bytes(axis_map, manifest, small, large, operations) + sum(map(count_bytes, control.values())),
        bytes_to_fetch=_fetch_bytes(manifest, needed) + sum(map(count_bytes, control.values())),
        expected_loss=expected,
        notes=tuple(notes),
        sizes=sizes,
        pair=pair,
        needed=needed,
        needed_control=control,
        large_only_weight=large_only_weight,
    )


def _pair_for_count(
    manifest: Manifest, axis_map: AxisMap, target: int, tolerance: float
) -> tuple[Anchor, Anchor, dict[str, int]]:
    anchors = manifest.anchors
    counts = [a.num_parameters for a in anchors]
    nearest = min(anchors, key=lambda a: abs(a.num_parameters - target))
    error = abs(nearest.num_parameters - target) / target
    outside = not counts[-1] <= target <= counts[0]
    if error <= min(_SNAP, tolerance) or (outside and error <= tolerance):
        return nearest, nearest, manifest.sizes(nearest)
    if outside:
        raise SizeError(
            f"{format_count(target)} parameters ({target}) is outside this chain, which covers "
            f"{format_count(counts[-1])} to {format_count(counts[0])} ({counts[-1]} to {counts[0]}); "
            f"the nearest size is {format_count(nearest.num_parameters)} ({nearest.num_parameters})"
        )
    i = next(i for i, count in enumerate(counts) if count < target)
    small, large = anchors[i], anchors[i - 1]
    pair = manifest.sizes(small), manifest.sizes(large)
    rounded = bool(manifest.round_widths)
    sizes = solve(axis_map, target, *pair, tolerance, shallow=manifest.layers_last, round_widths=rounded)
    return small, large, sizes


def _pair_for_memory(
    manifest: Manifest, axis_map: AxisMap, most: int, quant: str, tolerance: float
) -> tuple[Anchor, Anchor, dict[str, int]]:
    """The largest size whose weights take no more than so many bytes, found by halving the range of counts."""
    least = manifest.anchors[-1]
    if (smallest := disk_size(axis_map, manifest.sizes(least), quant)) > most:
        raise SizeError(
            f"the smallest model of this chain, {format_count(least.num_parameters)}, takes {format_bytes(smallest)} "
            f"as {quant}, more than {format_bytes(most)}; allow more, or name a smaller kind ({', '.join(QUANTS)})"
        )
    low, high = least.num_parameters, manifest.anchors[0].num_parameters
    best = _pair_for_count(manifest, axis_map, low, tolerance)
    while low <= high:
        target = (low + high) // 2
        try:
            found = _pair_for_count(manifest, axis_map, target, tolerance)
        except SizeError:  # a gap of a tiny chain: what lies below it fits if this target would
            low = target + 1
            continue
        if disk_size(axis_map, found[2], quant) <= most:
            if count_parameters(axis_map, found[2]) >= count_parameters(axis_map, best[2]):
                best = found
            low = target + 1
        else:
            high = target - 1
    return best


def _pair_for_shape(
    manifest: Manifest, axis_map: AxisMap, shape: Mapping[str, int]
) -> tuple[Anchor, Anchor, dict[str, int]]:
    shape = {name: value if (n := as_real(value)) is None or n != int(n) else int(n) for name, value in shape.items()}
    for name, value in shape.items():
        if name not in axis_map.fields:
            hint = did_you_mean(str(name), axis_map.fields)
            raise SizeError(f"shape has no field {name!r}; allowed: {', '.join(axis_map.fields)}.{hint}")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SizeError(f"shape field {name!r} is {value!r}; expected a positive integer")
    pairs = list(zip(manifest.anchors[1:], manifest.anchors, strict=False)) or [(manifest.anchors[0],) * 2]
    problems = []
    for small, large in pairs:
        low, high = manifest.sizes(small), manifest.sizes(large)
        common = {f: v for f, v in small.shape.items() if large.shape[f] == v}
        if missing := [f for f in axis_map.fields if f not in shape and f not in common]:
            problems.append(f"shape lacks {', '.join(missing)}, in which {small.name!r} and {large.name!r} differ")
            continue
        try:
            sizes = axis_map.sizes({**common, **shape})
        except AxisMapError as error:
            problems.append(f"shape {dict(shape)} is impossible: {error}")
            continue
        if all(low[a] <= sizes[a] <= high[a] for a in sizes):
            return small, large, sizes
    if len(problems) == len(pairs):
        raise SizeError(problems[0])
    ranges = ", ".join(
        f"{f} {manifest.anchors[-1].shape[f]} to {manifest.anchors[0].shape[f]}" for f in axis_map.fields
    )
    raise SizeError(f"shape {dict(shape)} lies between no two adjacent anchors; the chain covers {ranges}")


def _bytes(
    axis_map: AxisMap, manifest: Manifest, small: Anchor, large: Anchor, operations: tuple[TensorOp, ...]
) -> int:
    """Every operation reads its sources once (the layers that ``expand`` copies are read once a copy)."""
    low, high = manifest.sizes(small), manifest.sizes(large)
    total = 0
    for op in operations:
        layout = axis_map.layout(op.pattern)
        total += ITEM_BYTES[small.dtype] * layout.count(low) if op.small_name else 0
        total += ITEM_BYTES[large.dtype] * layout.count(high) if op.large_name else 0
    return total


def nearly_all(anchor: Anchor, needed: Mapping[str, Sequence[Run]]) -> bool:
    """Whether so much of an anchor is needed that its files are fetched whole (:data:`WHOLE_ABOVE`)."""
    return sum(map(count_bytes, needed.values())) >= WHOLE_ABOVE * _weight_bytes(anchor)


def _weight_bytes(anchor: Anchor) -> int:
    return anchor.num_parameters * ITEM_BYTES[anchor.dtype]


def _fetch_bytes(manifest: Manifest, needed: Mapping[str, Mapping[str, list[Run]]]) -> int:
    """The bytes of the needed runs; of a whole anchor where that is nearly all of it."""
    return sum(
        _weight_bytes(anchor) if nearly_all(anchor, runs) else sum(map(count_bytes, runs.values()))
        for anchor in manifest.anchors
        if (runs := needed.get(anchor.name))
    )


def _measured(manifest: Manifest, method: str) -> dict[int, float]:
    """Parameters → held-out loss, at the anchors and at the curve's points that were made alike."""
    alike = ("auto", "interpolate", *(("bezier",) if method != "interpolate" else ()))  # the later one counts
    chosen = sorted((p for p in manifest.curve if p.method in alike), key=lambda p: alike.index(p.method))
    points = {p.num_parameters: p.loss for p in chosen}
    return points | {a.num_parameters: a.evaluation.loss for a in manifest.anchors if a.evaluation}


def _expected_loss(manifest: Manifest, count: int, method: str) -> float | None:
    """Straight lines between the measured sizes; None where an anchor was not measured."""
    if any(a.evaluation is None for a in manifest.anchors):
        return None
    points = _measured(manifest, method)
    sizes = sorted(points)
    return float(np.interp(count, sizes, [points[n] for n in sizes]))
