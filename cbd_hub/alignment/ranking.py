"""Which units a smaller neighbor keeps, and the order in which the others come back.

Units of an axis are ordered by importance (:mod:`cbd_hub.alignment.importance`). Layers do not add up like that, so
whole sets of layers are left out for real and compared by their loss. Everything is deterministic: ties are settled by
index, and nothing is drawn at random.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.alignment.importance import collect, from_weights
from cbd_hub.alignment.observe import LayerDrops
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import AxisMapError, SizeError
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.progress import progress_bar

__all__ = ["CALIBRATION_TOKENS", "CONFIRMED", "MAX_EVALUATIONS", "MAX_SINGLE_DROPS", "SCREEN_TOKENS", "rank"]

MAX_EVALUATIONS = 40
"""Losses that are measured to choose the layers to drop."""
MAX_SINGLE_DROPS = 24
"""Of these, layers that are left out alone; the most transforming ones (1 - cos) are not even tried."""
SCREEN_TOKENS = 1024
"""Predicted tokens of each of these losses."""
CONFIRMED = 4
"""Sets, the best ones, that are then compared on more tokens."""
CALIBRATION_TOKENS = 4096
"""Predicted tokens of each of those losses."""


def rank(
    model: PreTrainedModel,
    axis_map: AxisMap,
    large: Sizes,
    small: Sizes,
    blocks: Tensor | None,
    prefix_hidden: bool = False,
    progress: bool = False,
) -> IndexMap:
    """Decides which units of a model its smaller neighbor keeps, and the order in which the others come back.

    Units of an axis are ordered by importance, best first, so that every size in between is a prefix. Layers are
    chosen by loss: contiguous spans of the middle, the layers that cost least alone and those whose output differs
    least in direction from their input (1 - cos) compete as whole sets, because the costs of single layers do not
    add up.

    Args:
        model: The larger model; ``axis_map`` is its own and ``large`` its sizes.
        small: Sizes of the smaller neighbor; axes that do not differ get no order.
        blocks: (N, S) token ids to calibrate on, which must be no test text; None to look at the weights alone, which
            chooses much worse.
        prefix_hidden: The hidden units are in order already (see :mod:`cbd_hub.alignment.basis`).
        progress: Show progress bars.

    Returns:
        Orders int32, energies float32 (only where ``hidden`` differs), layers int64.

    Cost: one forward pass over the blocks, and where layers differ at most 40 more over 1,024 tokens and 4 over 4,096,
    of each only the layers behind the first one left out: about a fifth of what 40 whole passes over 4,096 take.

    Raises:
        SizeError: ``large`` is not the model's, or ``small`` is no smaller neighbor of it.
        AxisMapError: An axis that differs is read by no matrix of the map.
        RecipeError: ``blocks`` holds no token.
    """
    if (own := axis_map.sizes(model.config)) != dict(large):
        raise SizeError(f"the model has sizes {own}; got {dict(large)}")
    differing = [axis for axis in large if small[axis] != large[axis]]
    if wrong := [a for a in differing if a in axis_map.frozen or not 0 < small[a] < large[a]]:
        raise SizeError(
            f"axis {wrong[0]!r} is {large[wrong[0]]} and cannot become {small[wrong[0]]}: a smaller neighbor keeps "
            f"{', '.join(axis_map.frozen)} and has at least one and at most as many units on every other axis"
        )
    if blocks is None:
        statistics = from_weights(model.state_dict(), axis_map, large)
    else:
        statistics = collect(model, axis_map, large, blocks)
    orders, energy = {}, {}
    for axis in differing:
        if axis == "hidden":
            energy = {gain: value.astype(np.float32) for gain, value in statistics.energy.items()}
            if not prefix_hidden:
                orders[axis] = _best_first(statistics.hidden)
        elif axis in statistics.units:
            orders[axis] = _best_first(statistics.units[axis])
        elif axis != "layers":
            raise AxisMapError(f"axis {axis!r} shrinks, but no matrix of {axis_map.model_type!r} reads it")
    layers = np.arange(large["layers"], dtype=np.int64)
    if "layers" in differing:
        layers = _order_layers(model, axis_map, statistics.layers, small["layers"], blocks, progress)
    return IndexMap(layers, orders, energy)


def _order_layers(
    model: PreTrainedModel, axis_map: AxisMap, angles: np.ndarray, keep: int, blocks: Tensor | None, progress: bool
) -> np.ndarray:
    """The kept layers, ascending, then the dropped ones, the one that costs most to leave out first.

    ``angles`` is float64 (layers,), 1 - cos between what goes into a layer and what comes out.
    """
    num_layers = len(angles)
    count, middle = num_layers - keep, _droppable(num_layers, num_layers - keep)
    losses: dict[tuple[int, ...], float] = {}
    straightest = _lowest(middle, angles, angles, count)
    cost, candidates = angles, [straightest]
    if blocks is not None:
        screened, confirmed = (
            blocks[: max(1, tokens // max(1, blocks.shape[1] - 1))] for tokens in (SCREEN_TOKENS, CALIBRATION_TOKENS)
        )

        def measure(sets: Sequence[tuple[int, ...]], some: Tensor, label: str) -> None:
            drops = LayerDrops(model, axis_map, some)
            for dropped in progress_bar(sorted(sets), label, unit="set", enabled=progress):
                losses[dropped] = drops.loss(dropped)

        singles = [(i,) for i in _lowest(middle, angles, angles, MAX_SINGLE_DROPS)]
        measure(singles, screened, "layers one by one")
        cost = np.array([losses.get((i,), np.inf) for i in range(num_layers)])
        spans = [tuple(middle[i : i + count]) for i in range(len(middle) - count + 1)]
        spans.sort(key=lambda span: (angles[list(span)].sum(), span))
        candidates = list(dict.fromkeys([_lowest(middle, cost, angles, count), straightest, *spans]))
        new = [dropped for dropped in candidates if dropped not in losses]
        measure(new[: MAX_EVALUATIONS - len(losses)], screened, "sets of layers")
        candidates = sorted(candidates, key=lambda dropped: losses.get(dropped, np.inf))[:CONFIRMED]
        if len(confirmed) > len(screened):
            measure(candidates, confirmed, "the best sets again")
    best = min(candidates, key=lambda dropped: losses.get(dropped, np.inf))
    dropped_layers = sorted(best, key=lambda i: (-cost[i], -angles[i], i))
    return np.array([i for i in range(num_layers) if i not in best] + dropped_layers, dtype=np.int64)


def _droppable(num_layers: int, count: int) -> list[int]:
    """The layers between the vital first and last ones, as long as enough of them can be dropped."""
    for first, last in ((2, 2), (1, 1), (1, 0)):
        if num_layers - first - last >= count and (num_layers >= 8 or first + last < 4):
            break
    return list(range(first, num_layers - last))


def _lowest(layers: Sequence[int], key: np.ndarray, tie: np.ndarray, count: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(layers, key=lambda i: (key[i], tie[i], i))[:count]))


def _best_first(importance: np.ndarray) -> np.ndarray:
    return np.argsort(-importance, axis=-1, kind="stable").astype(np.int32)
