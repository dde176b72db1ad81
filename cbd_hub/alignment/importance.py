"""Which units matter: from activation statistics to an order of every axis that shrinks.

An anchor starts as a subset of its larger neighbor, so something must say which ffn units, heads, hidden units and
layers to keep. A unit's importance is what it adds to the residual stream: its squared activation times the squared
norm of the weights that carry it there, as a share of what all units of the layer add for that token, averaged over
tokens. Shares, because the first position of a sequence carries activations a thousand times the others' and would
otherwise decide alone. Layers do not add up like that, so whole sets of layers are left out for real and compared by
their loss.

Everything is deterministic: ties are settled by index, and nothing is drawn at random.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.grammar import Layout, product
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import AxisMapError, RecipeError, SizeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.progress import progress_bar
from cbd_hub.text.packing import token_batches

__all__ = ["Statistics", "bypass_layers", "collect", "from_weights", "observe", "rank", "token_energy"]

MAX_EVALUATIONS = 40
"""Losses that are measured to choose the layers to drop."""
MAX_SINGLE_DROPS = 24
"""Of these, layers that are left out alone; the most transforming ones (1 - cos) are not even tried."""
CALIBRATION_TOKENS = 4096
"""Predicted tokens of each of these losses."""

_DEEP_MIDDLE = 0.7
"""Relative depth around which layers are dropped when there is no data to measure them with."""


@dataclass(frozen=True)
class Statistics:
    """Importance of the units of one model; larger is more important, and only the order within an array counts."""

    units: Mapping[str, np.ndarray]
    """Axis → float64 (layers, units), for the axes inside a layer: ffn, and kv_heads and q_per_kv, or heads."""
    hidden: np.ndarray
    """float64 (hidden,)."""
    layers: np.ndarray
    """float64 (layers,): 1 - cos(block in, block out), averaged over tokens."""
    energy: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Norm gain → :attr:`cbd_hub.manifest.manifest.IndexMap.energy`, float64, for every norm over the hidden units."""
    num_tokens: int = 0
    """Tokens that were seen; 0 where only weights were looked at."""


def token_energy(x: Tensor, center: bool = False) -> Tensor:
    """Each hidden unit's share in the mean square of its token, times the number of units: (..., H), mean 1 a token.

    Args:
        x: (..., H) residual stream, computed in float32 or better.
        center: Subtract the token's mean first, as LayerNorm does.
    """
    x = x.to(_wide(x))
    if center:
        x = x - x.mean(-1, keepdim=True)
    square = x.square()
    return square / square.mean(-1, keepdim=True).clamp(min=torch.finfo(square.dtype).tiny)


@torch.inference_mode()
def observe(
    model: PreTrainedModel,
    blocks: Tensor,
    batch_size: int,
    before: Mapping[str, Callable[[Tensor], None]],
    after: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None,
) -> int:
    """Streams token blocks through a model (without its head) once and shows what passes through some modules.

    The model's mode and hooks are left as they were.

    Args:
        model: Any transformers causal language model, run on the device that it is on.
        blocks: (N, S) token ids.
        batch_size: Blocks in a forward pass.
        before: Module name → called with the module's input, flattened to (tokens, units).
        after: Module name → called with its input and output, both flattened.

    Returns:
        The number of tokens.

    Raises:
        RecipeError: There is no token to see.
    """
    if blocks.ndim != 2 or not blocks.numel():
        raise RecipeError(f"calibration blocks have shape {tuple(blocks.shape)}; expected (blocks, tokens), not empty")

    def flat(value: Any) -> Tensor:
        value = value[0] if isinstance(value, tuple) else value
        return value.reshape(-1, value.shape[-1])

    was_training, handles = model.training, []
    try:
        for name, look in before.items():
            hook = partial(lambda look, _, args: look(flat(args)), look)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        for name, compare in (after or {}).items():
            hook = partial(lambda compare, _, args, out: compare(flat(args), flat(out)), compare)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        model.eval()
        for batch in token_batches(blocks, batch_size):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return blocks.numel()


def collect(
    model: PreTrainedModel, axis_map: AxisMap, sizes: Sizes, blocks: Tensor, batch_size: int = 8
) -> Statistics:
    """Measures the importance of every unit in one pass over calibration text.

    With a the input of a matrix W that writes the residual stream, unit i of token t scores
    ``a_ti^2 |W_i|^2 / sum_j a_tj^2 |W_j|^2``, averaged over tokens; a head is the sum of its coordinates. Hidden
    units score their :func:`token_energy` at the norms that read the stream, every norm an equal vote.

    Args:
        model: The model, on any device; ``axis_map`` and ``sizes`` are its own.
        blocks: (N, S) token ids.
        batch_size: Blocks in a forward pass.

    Cost: one forward pass without the head; memory of the accumulators is a few (layers, units) arrays.

    Raises:
        RecipeError: No token, or activations that are not finite.
    """
    sums: dict[str, Tensor] = {}

    def add(name: str, value: Tensor) -> None:
        value = value.sum(0, dtype=torch.float64)
        sums[name] = sums[name] + value if name in sums else value

    def shares(name: str) -> Callable[[Tensor], None]:
        weight = model.get_parameter(name)
        norms = weight.detach().to(_wide(weight)).square().sum(1 if axis_map.in_out else 0)

        def look(x: Tensor) -> None:
            part = x.to(norms.dtype).square() * norms
            add(name, part / part.sum(-1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny))

        return look

    center = axis_map.norm == "layer"

    def energies(name: str) -> Callable[[Tensor], None]:
        return lambda x: add(name, token_energy(x, center))

    def turns(name: str) -> Callable[[Tensor, Tensor], None]:
        def compare(x: Tensor, y: Tensor) -> None:
            add(name + " stream", token_energy(x, center))
            add(name, 1 - torch.cosine_similarity(x.to(_wide(x)), y.to(_wide(y)), dim=-1)[:, None])

        return compare

    axes = _unit_axes(axis_map)
    consumers = {pattern for axis in axes for pattern in axis_map.consumers(axis)}
    gains = [g for g in axis_map.norms if axis_map.layout(g).dims == ((("hidden",),),)]
    before = {
        name.removesuffix(".weight"): (shares if pattern in consumers else energies)(name)
        for name, pattern, _ in axis_map.names(sizes)
        if pattern in consumers or pattern in gains
    }
    layer_names = [f"{axis_map.layers_name}.{layer}" for layer in range(sizes["layers"])]
    num_tokens = observe(model, blocks, batch_size, before, {name: turns(name) for name in layer_names})
    means = {name: (value / num_tokens).cpu().numpy() for name, value in sums.items()}
    if bad := [name for name, mean in means.items() if not np.isfinite(mean).all()]:
        raise RecipeError(f"activations at {bad[0]!r} are not finite; load the model in float32 or bfloat16")

    def stacked(pattern: str) -> np.ndarray:
        return np.stack([means[pattern.replace("*", str(layer))] for layer in range(sizes["layers"])])

    dim = 0 if axis_map.in_out else 1
    units = {axis: np.zeros((sizes["layers"], sizes[axis])) for axis in axes}
    for axis in axes:
        for pattern in axis_map.consumers(axis):
            units[axis] += _per_unit(stacked(pattern), axis_map.layout(pattern), dim, axis, sizes)
    energy = {g: stacked(g) if "*" in g else means[g] for g in gains}
    stream = [energy[g] for g in gains if axis_map.norms[g]]
    if all(e.ndim == 1 for e in stream):  # no norm before the blocks' matrices (OLMo 2): look at the blocks' inputs
        stream.append(np.stack([means[name + " stream"] for name in layer_names]))
    return Statistics(
        units=units,
        hidden=np.concatenate([np.atleast_2d(e) for e in stream]).mean(0),
        layers=np.array([means[name][0] for name in layer_names]),
        energy=energy,
        num_tokens=num_tokens,
    )


def from_weights(state_dict: Mapping[str, Tensor], axis_map: AxisMap, sizes: Sizes) -> Statistics:
    """Estimates importance without data: the product of a unit's weight norms over the matrices that it occurs in.

    Hidden units score (share in what is written) x (share in what is read), every tensor an equal vote. Layers
    score by position alone: those around 70 % of the depth go first, the first two and the last two last. This is a
    last resort: on a trained 0.85M model it chose ffn units worse than chance, activations far better than chance.

    Args:
        state_dict: A model's tensors by parameter name; ``axis_map`` and ``sizes`` are its own.

    Cost: one pass over the weights.
    """
    num_layers, hidden = sizes["layers"], sizes["hidden"]
    units = {axis: np.ones((num_layers, sizes[axis])) for axis in _unit_axes(axis_map)}
    written, read = np.zeros(hidden), np.zeros(hidden)
    for name, pattern, layer in axis_map.names(sizes):
        layout = axis_map.layout(pattern)
        if len(layout.dims) != 2:
            continue
        square = state_dict[name].detach().double().square()
        for dim in (0, 1):
            along = square.sum(1 - dim).cpu().numpy()
            for axis in {factor for part in layout.dims[dim] for factor in part if factor in units}:
                units[axis][layer] *= np.sqrt(_per_unit(along[None], layout, dim, axis, sizes)[0])
            if layout.dims[dim] == (("hidden",),):
                readers = [g for g in axis_map.norms if pattern in axis_map.readers(g)]
                share = along / max(along.sum(), np.finfo(float).tiny)
                if axis_map.writes(pattern):
                    written += share
                if readers or not axis_map.writes(pattern):
                    for gain_pattern in readers:
                        gain = state_dict[gain_pattern.replace("*", str(layer))].detach().double().cpu().numpy()
                        share = share * (gain + (axis_map.norm == "rms+1")) ** 2
                    read += share
    depth = np.arange(num_layers)
    layers = np.abs(depth - _DEEP_MIDDLE * (num_layers - 1))
    layers[(depth < 2) | (depth >= num_layers - 2)] += num_layers
    return Statistics(units=units, hidden=written * read, layers=layers)


@contextmanager
def bypass_layers(model: PreTrainedModel, axis_map: AxisMap, layers: Collection[int]) -> Iterator[None]:
    """Within the context, some layers pass the residual stream on as it is, at no cost.

    The layers stay where they are, so every other layer keeps its own entry of ``layer_types`` and the like; the
    result is that of a model without these layers (but for a cache, which must not be used).
    """

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    stack = model.get_submodule(axis_map.layers_name)
    modules: list[nn.Module] = [stack.get_submodule(str(layer)) for layer in layers]
    previous = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            vars(module)["forward"] = skip
        yield
    finally:
        for module, forward in zip(modules, previous, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


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
    chosen by loss: contiguous spans of the middle, the layers that cost least alone and those that turn the stream
    least (1 - cos) compete as whole sets, because the costs of single layers do not add up.

    Args:
        model: The larger model; ``axis_map`` is its own and ``large`` its sizes.
        small: Sizes of the smaller neighbor; axes that do not differ get no order.
        blocks: (N, S) token ids to calibrate on, which must be no test text; None to look at the weights alone.
        prefix_hidden: The hidden units are in order already (see :mod:`cbd_hub.alignment.basis`).
        progress: Show progress bars.

    Returns:
        Orders int32, energies float32 (only where ``hidden`` differs and blocks are given), layers int64.

    Cost: one forward pass over the blocks, and where layers differ at most 40 more over 4,096 tokens.

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
    model: PreTrainedModel, axis_map: AxisMap, turn: np.ndarray, keep: int, blocks: Tensor | None, progress: bool
) -> np.ndarray:
    """The kept layers, ascending, then the dropped ones, the one that costs most to leave out first."""
    num_layers = len(turn)
    count, middle = num_layers - keep, _droppable(num_layers, num_layers - keep)
    cost = turn
    losses: dict[tuple[int, ...], float] = {}
    candidates = [_lowest(middle, turn, turn, count)]
    if blocks is not None:

        def measure(sets: Sequence[tuple[int, ...]], what: str) -> None:
            for dropped in progress_bar(sets, what, unit="set", enabled=progress):
                with bypass_layers(model, axis_map, dropped):
                    losses[dropped] = evaluate_loss(model, blocks, max_tokens=CALIBRATION_TOKENS).loss

        measure([(i,) for i in _lowest(middle, turn, turn, MAX_SINGLE_DROPS)], "layers one by one")
        cost = np.array([losses.get((i,), np.inf) for i in range(num_layers)])
        spans = [tuple(middle[i : i + count]) for i in range(len(middle) - count + 1)]
        spans.sort(key=lambda span: (turn[list(span)].sum(), span))
        candidates = list(dict.fromkeys([_lowest(middle, cost, turn, count), *candidates, *spans]))
        new = [dropped for dropped in candidates if dropped not in losses]
        measure(new[: MAX_EVALUATIONS - len(losses)], "sets of layers")
    best = min(candidates, key=lambda dropped: losses.get(dropped, np.inf))
    back = sorted(best, key=lambda i: (-cost[i], -turn[i], i))
    return np.array([i for i in range(num_layers) if i not in best] + back, dtype=np.int64)


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


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _unit_axes(axis_map: AxisMap) -> list[str]:
    """The axes inside a layer whose units can be left out."""
    return [a for a in axis_map.axes if a not in ("layers", "hidden", *axis_map.frozen) and axis_map.consumers(a)]


def _per_unit(values: np.ndarray, layout: Layout, dim: int, axis: str, sizes: Sizes) -> np.ndarray:
    """Sums values (rows, stored coordinates of ``dim``) over the coordinates of each unit: (rows, units)."""
    out, offset = np.zeros((len(values), sizes[axis])), 0
    for part in layout.dims[dim]:
        size = product(part, sizes)
        if axis in part:
            inner = product(part[part.index(axis) + 1 :], sizes)
            out += values[:, offset : offset + size].reshape(len(values), -1, sizes[axis], inner).sum((1, 3))
        offset += size
    return out
