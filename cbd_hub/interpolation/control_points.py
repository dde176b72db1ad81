"""The control point of a pair: what bends the straight line between two anchors into a curve through both.

With r the position between the anchors and T(r) the target's units,

    theta(r) = average(small, large)[T(r)] + 4 r (1 - r) * C[T(r)],

a quadratic Bezier curve (Garipov et al. 2018, arXiv 1802.10026) whose control point C is learned once a pair. At
r = 0 and r = 1 the second term vanishes, so the anchors stay what they are. C has the shape of the large anchor and
its layers. Of every matrix of a layer two factors are stored, ``C = rows @ columns.T``, vectors whole; embeddings and
heads are not bent. Units stand in the order of the pair's index map: a target takes the first ones of each factor.
"""

import numpy as np

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes, count_parameters
from cbd_hub.errors import RecipeError
from cbd_hub.interpolation.pair import Pair

__all__ = ["LARGEST_SHARE", "choose_rank", "factor_names", "factor_shapes", "leading_rows"]

LARGEST_SHARE = 0.075
"""Share of the large anchor's numbers that a control point of the default rank may have."""


def factor_names(axis_map: AxisMap, pattern: str, name: str) -> tuple[str, ...]:
    """Returns the names under which the control point stores a tensor, one a dimension; none where it is not bent."""
    if not axis_map.is_bent(pattern):
        return ()
    return (name,) if len(axis_map.layout(pattern).dims) == 1 else (f"{name}.rows", f"{name}.columns")


def factor_shapes(pair: Pair, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns name → shape of every tensor of a control point: (n, rank) and (m, rank), or (n,) for a vector."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, pattern, _ in pair.axis_map.names(pair.large):
        names, stored = factor_names(pair.axis_map, pattern, name), pair.axis_map.layout(pattern).shape(pair.large)
        for key, size in zip(names, stored, strict=bool(names)):
            shapes[key] = (size, rank) if len(stored) == 2 else (size,)
    return shapes


def choose_rank(pair: Pair, rank: int | None = None) -> int:
    """Returns the rank of a pair's control point.

    Args:
        pair: The two anchors.
        rank: What was asked for; None is 32, or as much as :data:`LARGEST_SHARE` allows.

    Raises:
        RecipeError: The rank is above :meth:`cbd_hub.axes.axis_map.AxisMap.largest_rank`.
    """
    most = pair.axis_map.largest_rank(pair.large)
    if rank is not None:
        if not 1 <= rank <= most:
            raise RecipeError(
                f"control_point.rank is {rank}; allowed: 1 to {most} (the smallest matrix of this pair), or null, "
                "which picks one"
            )
        return rank
    shapes = factor_shapes(pair, 1).values()
    vectors, factors = (sum(shape[0] for shape in shapes if len(shape) == n) for n in (1, 2))
    room = LARGEST_SHARE * count_parameters(pair.axis_map, pair.large) - vectors
    return max(1, min(32, most // 2, int(room / factors)))


def leading_rows(pair: Pair, pattern: str, dim: int, target: Sizes) -> np.ndarray | None:
    """Returns the rows of a factor that a target takes, int64 ascending; None where it takes all."""
    layout = pair.axis_map.layout(pattern)
    first = {a: np.arange(target[a], dtype=np.int64) for a in layout.axes if target[a] != pair.large[a]}
    return layout.rows(dim, pair.large, first)
