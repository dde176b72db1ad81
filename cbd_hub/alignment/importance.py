"""Which units matter: from activation statistics to a number for every unit of every axis that shrinks.

An anchor starts as a subset of its larger neighbor, so something must say which ffn units, heads and hidden units to
keep. A unit's importance is what it adds to the residual stream: its squared activation times the squared norm of the
weights that carry it there, as a share of what all units of the layer add for that token, averaged over tokens.
Shares, because the first position of a sequence carries activations a thousand times the others' and would otherwise
decide alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.alignment.observe import observe
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.grammar import Layout, product
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import RecipeError

__all__ = ["Statistics", "collect", "from_weights", "token_energy"]

_DEEP_MIDDLE = 0.7
"""Relative depth around which layers are dropped when there is no text to measure them with."""


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
