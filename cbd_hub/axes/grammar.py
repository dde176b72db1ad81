"""The axis grammar: how a stored tensor is laid out, as one short string.

``"(kv_heads q_per_kv head_dim) hidden"`` says that the first stored dimension runs over KV groups, then over the
query heads of a group, then over the coordinates of a head (row-major), and that the second one runs over the
residual stream. ``+`` concatenates (a fused query/key/value projection), integers are allowed (``(2 ffn)`` is a
fused gate and up projection). Names of axes are the same in every tensor of a model, so from such strings alone
follow shapes, parameter counts, and which rows of which tensor belong to, say, attention head 3.

No torch and no transformers here: the core is integers, and is tested with integers.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from cbd_hub.errors import AxisMapError

__all__ = ["Factor", "Indices", "Layout", "Part", "parse", "product"]

Factor = str | int
"""One factor of a product: an axis name or a constant."""

Part = tuple[Factor, ...]
"""A row-major product of factors; a stored dimension is a concatenation of parts."""

Indices = Mapping[str, np.ndarray]
"""For some axes, the (int64) units that are taken, in the order in which they are taken."""

_TOKEN = re.compile(r"\s*([()+]|[A-Za-z_][A-Za-z_0-9]*|[0-9]{1,9}(?!\w))")


def _factor_size(factor: Factor, sizes: Mapping[str, int]) -> int:
    if isinstance(factor, int):
        return factor
    try:
        return sizes[factor]
    except KeyError:
        raise AxisMapError(f"axis {factor!r} has no size; sizes are known for {sorted(sizes)}") from None


def product(part: Part, sizes: Mapping[str, int]) -> int:
    """Returns the number of units of one part, e.g. ``("kv_heads", "head_dim")`` → 3 * 64.

    Raises:
        AxisMapError: An axis has no size.
    """
    return prod(_factor_size(factor, sizes) for factor in part)


@dataclass(frozen=True)
class Layout:
    """A parsed axis string: for every stored dimension, the parts concatenated along it."""

    dims: tuple[tuple[Part, ...], ...]

    @property
    def axes(self) -> frozenset[str]:
        """The names of all axes that occur."""
        return frozenset(f for dim in self.dims for part in dim for f in part if isinstance(f, str))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Returns the stored shape for given axis sizes.

        Raises:
            AxisMapError: An axis has no size.
        """
        return tuple(sum(product(part, sizes) for part in dim) for dim in self.dims)

    def count(self, sizes: Mapping[str, int]) -> int:
        """Returns the number of elements for given axis sizes.

        Raises:
            AxisMapError: An axis has no size.
        """
        return prod(self.shape(sizes))

    def rows(self, dim: int, sizes: Mapping[str, int], taken: Indices) -> np.ndarray | None:
        """Returns which rows of stored dimension ``dim`` remain when each axis takes only some of its units.

        Args:
            dim: The stored dimension.
            sizes: The axis sizes of the tensor as it is stored.
            taken: For some axes, the units to take; axes not named are taken whole.

        Returns:
            int64 row numbers in the order of the result, or None when the dimension is taken whole, in order.

        Cost: O(rows of the result), integers only.

        Raises:
            AxisMapError: An axis has no size, or a unit is taken that it does not have.
        """
        if not any(f in taken for part in self.dims[dim] for f in part):
            return None
        pieces = []
        offset = 0
        for part in self.dims[dim]:
            rows = np.zeros(1, dtype=np.int64)
            for factor in part:
                size = _factor_size(factor, sizes)
                units = taken[factor] if factor in taken else np.arange(size, dtype=np.int64)  # type: ignore[index]
                if len(units) and not 0 <= units.min() <= units.max() < size:
                    raise AxisMapError(
                        f"axis {factor!r} has units 0 to {size - 1}; got {units.min()} to {units.max()}"
                    )
                rows = (rows[:, None] * size + units[None, :]).reshape(-1)
            pieces.append(rows + offset)
            offset += product(part, sizes)
        rows = np.concatenate(pieces)
        whole = len(rows) == offset and np.array_equal(rows, np.arange(offset))
        return None if whole else rows

    def __str__(self) -> str:
        """The string form, which :func:`parse` reads back to an equal layout."""

        def show(dim: tuple[Part, ...]) -> str:
            text = " + ".join(" ".join(map(str, part)) for part in dim)
            return text if len(dim) == 1 and len(dim[0]) == 1 else f"({text})"

        return " ".join(show(dim) for dim in self.dims)


def _groups(tokens: Sequence[str], spec: str) -> Iterable[list[str]]:
    """Splits tokens into stored dimensions: a name or number alone, or what stands in parentheses."""
    group: list[str] | None = None
    for token in tokens:
        if token == "(":
            if group is not None:
                raise AxisMapError(f"axis string {spec!r}: parentheses cannot be nested")
            group = []
        elif token == ")":
            if not group:
                raise AxisMapError(f"axis string {spec!r}: ')' without '(' or with nothing before it")
            yield group
            group = None
        elif group is not None:
            group.append(token)
        elif token == "+":
            raise AxisMapError(f"axis string {spec!r}: '+' must stand inside parentheses")
        else:
            yield [token]
    if group is not None:
        raise AxisMapError(f"axis string {spec!r}: '(' is never closed")


@lru_cache(maxsize=1024)
def parse(spec: str) -> Layout:
    """Parses an axis string, e.g. ``"(heads 3 head_dim) hidden"``.

    Raises:
        AxisMapError: The string is not of the grammar: names, integers above 0, ``( )`` for row-major products
            and ``+`` inside them for concatenation.
    """
    tokens, position = [], 0
    while position < len(spec.rstrip()):
        match = _TOKEN.match(spec, position)
        if match is None:
            raise AxisMapError(f"axis string {spec!r}: unexpected {spec[position:].strip()[:10]!r}")
        tokens.append(match.group(1))
        position = match.end()
    dims = []
    for group in _groups(tokens, spec):
        parts: list[list[Factor]] = [[]]
        for token in group:
            if token == "+":
                parts.append([])
            else:
                parts[-1].append(int(token) if token.isdigit() else token)
        if any(not part for part in parts) or any(f == 0 for part in parts for f in part):
            raise AxisMapError(f"axis string {spec!r}: empty or zero-sized part in {' '.join(group)!r}")
        dims.append(tuple(tuple(part) for part in parts))
    if not dims:
        raise AxisMapError("axis string is empty; a tensor has at least one axis, e.g. 'hidden'")
    return Layout(tuple(dims))
