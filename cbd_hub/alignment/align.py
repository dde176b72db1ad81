"""Alignment of independent checkpoints: the small model is written in the units of the large one.

Two models that were trained apart may compute much the same with units in another order, of another sign, in another
basis; averaged weight by weight they are noise. Of the many ways to write one function, :func:`align` looks for the
one nearest to the large model, judged by what both compute on the same text:

* layers by the similarity of what they add to the stream (linear CKA), in order, first and last tied;
* the residual stream by a rotation (orthogonal Procrustes) where it can be rotated exactly: RMSNorm and an untied
  head. A tied head reads the stream with the rows that write it, through a gain that no rotation passes; there, and
  in LayerNorm models, units are matched one to one, and under RMSNorm also by sign;
* KV groups with their query heads by the similarity of their outputs, which are then rotated onto each other, as
  nothing but the output projection sees the basis of the values;
* ffn units by correlation, in gated models up to a sign, which the up projection takes.

Most of it is no change at all: an order of the large model's units in the pair's index map says which is whose
partner. What an order cannot say is done to the small model, exactly. Every token is brought to mean square 1 first,
or the first position of a sequence, whose activations are a thousand times the others', would decide alone.
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.alignment.basis import rotate
from cbd_hub.alignment.importance import collect
from cbd_hub.alignment.matching import Moments, Place, layer_similarity, match_layers, observe_pairs
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.grammar import Part, product
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import AxisMapError, RecipeError, SizeError
from cbd_hub.manifest.index_maps import IndexMap

__all__ = ["LEAST_GAIN", "Rows", "align", "check_logits", "first_logits", "head_rows", "projection_rows", "rows_of"]

LEAST_GAIN = 0.05
"""A norm gain below this share of the mean is not copied from the large model: it would be divided by."""
TOLERANCE = 1e-3
"""Largest change of the logits (as a share of the largest logit above 1) that rounding may explain."""

_STREAM = (("hidden",),)

Rows = tuple[str, int, Tensor]
"""Pattern, stored dimension, numbers of some of its rows."""


def align(
    large: PreTrainedModel,
    small: PreTrainedModel,
    axis_map: AxisMap,
    large_sizes: Sizes,
    small_sizes: Sizes,
    blocks: Tensor,
    *,
    progress: bool = False,
) -> tuple[PreTrainedModel, IndexMap]:
    """Re-expresses a small model, its function unchanged, so that its units correspond to a large model's.

    Where the stream is rotated, the small model's coordinates are brought in line with the large one's first ones, as
    those of the PCA basis (see :mod:`cbd_hub.alignment.basis`) matter most; no order of hidden units is then returned.

    Args:
        large: The larger model; not changed.
        small: The smaller model, of the same family and vocabulary; not changed.
        axis_map: The resolved map of both.
        large_sizes: Sizes of ``large``.
        small_sizes: Sizes of ``small``; no axis may be larger than in ``large``.
        blocks: (N, S) token ids that both models read; a few thousand tokens are enough.
        progress: Show a progress bar.

    Returns:
        The aligned copy of ``small``, in its dtype and in ``eval()`` mode, and the pair's index map: orders int32 of
        every axis inside a layer (and of ``hidden`` where it is not rotated), each with the partners of the small
        model's units first, then the others by importance; layers int64; energies float32 where ``hidden`` differs.

    Cost: two forward passes of the small and three of the large model over the blocks, (small units x large units)
    products a token for every matched layer, and as many float32 in memory; assignments of some thousand ffn units
    take about a second a layer.

    Raises:
        SizeError: The sizes are not the models', the vocabularies or another frozen axis differ, or the small model
            is larger on some axis.
        RecipeError: The models are of different families or differ in tensors, activation or rotary embedding, or
            ``blocks`` holds no token, or activations are not finite.
        AxisMapError: The map does not describe the models: an alignment that keeps the function changed the logits.
    """
    _check(large, small, axis_map, large_sizes, small_sizes)
    statistics = collect(large, axis_map, large_sizes, blocks)
    aligned = copy.deepcopy(small).float().eval()
    before = first_logits(aligned, blocks)
    if not before.isfinite().all():
        raise RecipeError("the small model's logits are not finite; load it in float32 or bfloat16")
    rotating = axis_map.rotatable and not any(axis_map.writes(r) for g in axis_map.norms for r in axis_map.readers(g))
    if rotating:
        rotate(aligned, axis_map, small_sizes, blocks)
    layers = match_layers(layer_similarity(aligned, large, axis_map, blocks))
    moments = observe_pairs(aligned, large, axis_map, layers, blocks, progress)

    def others_by_importance(partners: np.ndarray, importance: np.ndarray) -> np.ndarray:
        best_first = np.argsort(-importance, kind="stable")
        return np.concatenate([partners, best_first[~np.isin(best_first, partners)]]).astype(np.int32)

    orders: dict[str, np.ndarray] = {}
    with torch.no_grad():
        streams = [moments[place] for place in moments if place[0] in axis_map.norms]
        hidden_partners = np.arange(small_sizes["hidden"])
        if rotating:
            rotation = _nearest_rotation(torch.stack([m.cross[:, hidden_partners] for m in streams]).sum(0))
        else:
            similarity = torch.stack([m.correlation() for m in streams]).mean(0).numpy()
            hidden_partners, signs = _match_units(similarity, signed=axis_map.norm != "layer")
            orders["hidden"] = others_by_importance(hidden_partners, statistics.hidden)
            rotation = torch.diag(torch.from_numpy(signs))
        _rotate_stream(aligned, axis_map, small_sizes, rotation)
        for j, layer in enumerate(layers):
            layer_partners = _align_ffn(aligned, axis_map, small_sizes, j, moments)
            layer_partners |= _align_heads(aligned, axis_map, large_sizes, small_sizes, j, moments)
            for axis, partners in layer_partners.items():
                importance = statistics.units[axis]
                order = orders.setdefault(axis, np.argsort(-importance, axis=-1, kind="stable").astype(np.int32))
                order[layer] = others_by_importance(partners, importance[layer])
        _copy_gains(large, aligned, axis_map, small_sizes, layers, hidden_partners)
    check_logits(before, first_logits(aligned, blocks), axis_map)
    energy = {}
    if small_sizes["hidden"] != large_sizes["hidden"]:
        energy = {gain: value.astype(np.float32) for gain, value in statistics.energy.items()}
    dropped = sorted(set(range(large_sizes["layers"])) - set(layers), key=lambda i: (-statistics.layers[i], i))
    return aligned.to(small.dtype), IndexMap(np.array([*layers, *dropped], dtype=np.int64), orders, energy)


def _check(
    large: PreTrainedModel, small: PreTrainedModel, axis_map: AxisMap, large_sizes: Sizes, small_sizes: Sizes
) -> None:
    for name, model, sizes in (("large", large, large_sizes), ("small", small, small_sizes)):
        if model.config.model_type != axis_map.model_type:
            raise RecipeError(
                f"the {name} model is a {model.config.model_type!r}, the axis map one of {axis_map.model_type!r}; "
                "only models of one family can be aligned"
            )
        if (actual := axis_map.sizes(model.config)) != dict(sizes):
            raise SizeError(f"the {name} model has sizes {actual}; got {dict(sizes)}")
        shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
        if differing := sorted(set(shapes.items()) ^ set(axis_map.shapes(sizes).items())):
            raise RecipeError(
                f"the {name} model and the axis map differ in {differing[0][0]!r}: both models must have the same "
                "tensors (tied head, biases) as the map, which is resolved for one config"
            )
    for axis in large_sizes:
        if axis in axis_map.frozen and small_sizes[axis] != large_sizes[axis]:
            why = "; use models that share a tokenizer" if axis == "vocab" else ""
            raise SizeError(
                f"axis {axis!r} is {small_sizes[axis]} in the small and {large_sizes[axis]} in the large model and "
                f"must be equal{why}"
            )
        if small_sizes[axis] > large_sizes[axis]:
            raise SizeError(
                f"axis {axis!r} is {small_sizes[axis]} in the small and {large_sizes[axis]} in the large model; the "
                "small model may be larger on no axis, choose another pair"
            )
    for name in ("hidden_act", "activation_function", "rope_parameters"):
        of_small, of_large = getattr(small.config, name, None), getattr(large.config, name, None)
        if of_small != of_large:
            raise RecipeError(
                f"config field {name!r} is {of_small} in the small and {of_large} in the large model; "
                "models that compute differently cannot be averaged, choose another pair"
            )


# -- what is done to the small model ------------------------------------------------------------------------------


def _nearest_rotation(cross: Tensor) -> Tensor:
    """The orthogonal R that makes x @ R most like y, given the mean of x'y: (n, n) float64."""
    left, _, right = torch.linalg.svd(cross)
    return left @ right


def _match_units(correlation: np.ndarray, signed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The large unit of every small one and, for `signed`, -1 where the two run against each other."""
    partner = _best_columns(np.abs(correlation) if signed else correlation)
    against = correlation[np.arange(len(partner)), partner] < 0
    return partner, np.where(against & signed, -1.0, 1.0)


def _rotate_stream(model: PreTrainedModel, axis_map: AxisMap, sizes: Sizes, rotation: Tensor) -> None:
    """Rewrites the residual stream x as x @ rotation, (H, H) orthogonal; the norms must allow it."""
    for name, pattern, _ in axis_map.names(sizes):
        if axis_map.gain_of(pattern) is None:
            parameter = model.get_parameter(name)
            for dim, parts in enumerate(axis_map.layout(pattern).dims):
                if parts == _STREAM:
                    _rotate_rows(parameter, dim, torch.arange(sizes["hidden"]), rotation)


def _rotate_rows(parameter: Tensor, dim: int, rows: Tensor, rotations: Tensor) -> None:
    """Multiplies some rows (..., n) of a stored dimension with (n, n) matrices, in float64, in place."""
    view = parameter.movedim(dim, -1)
    rotated = view[..., rows].double() @ rotations.to(parameter.device)
    view[..., rows] = rotated.to(parameter.dtype)


def rows_of(axis_map: AxisMap, sizes: Sizes, choose: Callable[[str, Part, Tensor], Tensor | None]) -> list[Rows]:
    """What `choose` picks from every part of every stored dimension inside a layer.

    Args:
        axis_map: The map.
        sizes: The model's sizes.
        choose: Called with the pattern and the part's place ("... 3/3" is the last of three), the part, and the
            numbers of its rows, shaped as its factors.

    Returns:
        (pattern, dimension, chosen rows).
    """
    chosen_rows = []
    for pattern in (p for p in axis_map.tensors if "*" in p):
        for dim, parts in enumerate(axis_map.layout(pattern).dims):
            offset = 0
            for number, part in enumerate(parts):
                rows = torch.arange(offset, offset + product(part, sizes))
                offset += len(rows)
                name = f"{pattern} {number + 1}/{len(parts)}"
                chosen = choose(name, part, rows.reshape([sizes[f] if isinstance(f, str) else f for f in part]))
                if chosen is not None:
                    chosen_rows.append((pattern, dim, chosen))
    return chosen_rows


def _up(name: str, part: Part, rows: Tensor) -> Tensor | None:
    """Picks the rows of a gated ffn's up projection, which the activated gate is multiplied with."""
    if part == (2, "ffn"):
        return rows[1]
    return rows if part == ("ffn",) and ".up_proj." in name else None


def projection_rows(number: int) -> Callable[[str, Part, Tensor], Tensor | None]:
    """Picks the rows that make queries (0), keys (1) or values (2): alone, or a third of a fused projection."""

    def choose(name: str, part: Part, rows: Tensor) -> Tensor | None:
        if part[-1] != "head_dim":
            return None
        if 3 in part:
            return rows.select(part.index(3), number)
        return rows if f".{'qkv'[number]}_proj." in name or name.endswith(f" {number + 1}/3") else None

    return choose


def head_rows(axis_map: AxisMap, sizes: Sizes) -> list[Rows]:
    """The rows of the output projection that read heads."""
    axis = axis_map.heads.split()[0]
    out = axis_map.consumers(axis)[0]
    return rows_of(
        axis_map, sizes, lambda name, part, rows: rows if name.startswith(out + " ") and axis in part else None
    )


def _align_ffn(
    model: PreTrainedModel, axis_map: AxisMap, sizes: Sizes, layer: int, moments: Mapping[Place, Moments]
) -> dict[str, np.ndarray]:
    """Finds the partners of the ffn units; in gated models a unit that runs against its partner changes its sign."""
    down = axis_map.consumers("ffn")[0]
    up = rows_of(axis_map, sizes, _up)
    partner, signs = _match_units(moments[down, layer].correlation().numpy(), signed=bool(up))
    if up:
        read = rows_of(
            axis_map,
            sizes,
            lambda name, part, rows: rows if name.startswith(down + " ") and part == ("ffn",) else None,
        )
        for pattern, dim, rows in [*up, *read]:
            parameter = model.get_parameter(pattern.replace("*", str(layer)))
            _rotate_rows(parameter, dim, rows[:, None, None], torch.from_numpy(signs)[:, None, None])
    return {"ffn": partner}


def _align_heads(
    model: PreTrainedModel,
    axis_map: AxisMap,
    large: Sizes,
    small: Sizes,
    layer: int,
    moments: Mapping[Place, Moments],
) -> dict[str, np.ndarray]:
    """Finds the partners of KV groups and query heads; orders queries in their groups, rotates the values.

    Which query heads of a group the large model keeps is one choice for all groups of a layer, as an index map has it;
    within each group the small model's heads are then put in the order of their partners.
    """
    axis = axis_map.heads.split()[0]
    out = axis_map.consumers(axis)[0]
    (few, many), dim = (product((axis,), s) for s in (small, large)), small["head_dim"]
    q_few, q_many = small.get("q_per_kv", 1), large.get("q_per_kv", 1)
    moment = moments[out, layer]
    similarity = moment.group_similarity().numpy().reshape(few, q_few, many, q_many).transpose(0, 2, 1, 3)
    paired = np.array([[_best_sum(similarity[g, h]) for h in range(many)] for g in range(few)])
    groups = _best_columns(paired)
    matched = similarity[np.arange(few), groups]  # (few, q_few, q_many)
    kept_heads = np.argsort(-matched.max(1).sum(0), kind="stable")[:q_few] if q_few < q_many else np.arange(q_many)
    queries = np.stack(
        [np.argsort(_best_columns(m[:, kept_heads])) for m in matched]
    )  # (few, q_few): small head at each place
    for pattern, d, rows in rows_of(axis_map, small, lambda _, part, rows: rows if "q_per_kv" in part else None):
        view = model.get_parameter(pattern.replace("*", str(layer))).movedim(d, -1)
        view[..., rows] = view[..., rows[torch.arange(few)[:, None], torch.from_numpy(queries)]]
    values = rows_of(axis_map, small, projection_rows(2))
    if values:
        cross = moment.cross.reshape(few, q_few, dim, many, q_many, dim)
        small_groups = torch.arange(few)[:, None]
        pairs = cross[
            small_groups, torch.from_numpy(queries), :, torch.from_numpy(groups)[:, None], torch.from_numpy(kept_heads)
        ]
        rotations = _nearest_rotation(pairs.sum(1))  # (few, dim, dim)
        for pattern, d, rows in [*values, *head_rows(axis_map, small)]:
            parameter = model.get_parameter(pattern.replace("*", str(layer)))
            _rotate_rows(parameter, d, rows.reshape(few, -1, dim), rotations)
    rest = np.setdiff1d(np.arange(q_many), kept_heads)
    return {axis: groups} | ({"q_per_kv": np.concatenate([kept_heads, rest])} if q_few < q_many else {})


def _best_columns(score: np.ndarray) -> np.ndarray:
    """Gives every row of (rows, columns) a column of its own so that the summed score is largest: (rows,) columns."""
    return np.asarray(linear_sum_assignment(score, maximize=True)[1])


def _best_sum(score: np.ndarray) -> float:
    return float(score[linear_sum_assignment(score, maximize=True)].sum())


def _copy_gains(
    large: PreTrainedModel,
    small: PreTrainedModel,
    axis_map: AxisMap,
    sizes: Sizes,
    layers: Sequence[int],
    partner: np.ndarray,
) -> None:
    """Copies the large model's norm gains into the small one; the matrices that read them take up the ratio.

    Averaging gains and matrices apart would mix one model's gains with the other's matrices.
    """
    offset = 1.0 if axis_map.norm == "rms+1" else 0.0
    for name, gain, j in axis_map.names(sizes):
        readers = axis_map.readers(gain) if gain in axis_map.norms else ()
        if axis_map.layout(gain).dims != (_STREAM,) or not readers or any(map(axis_map.writes, readers)):
            continue
        parameter = small.get_parameter(name)
        neighbor = large.get_parameter(name if j is None else gain.replace("*", str(layers[j])))
        old, new = (p.detach().double().cpu() + offset for p in (parameter, neighbor))
        new = new[torch.from_numpy(partner)]
        usable = torch.minimum(old.abs() / old.abs().mean(), new.abs() / new.abs().mean()) > LEAST_GAIN
        ratio = torch.where(usable, old / new, 1.0).to(parameter.device)
        parameter.copy_((parameter.double() + offset) / ratio - offset)
        if (bias := gain.removesuffix(".weight") + ".bias") in axis_map.tensors:
            small.get_parameter(bias.replace("*", str(j))).div_(ratio)
        for reader in readers:
            matrix = small.get_parameter(reader.replace("*", str(j)))
            for dim, parts in enumerate(axis_map.layout(reader).dims):
                if parts == _STREAM:
                    matrix.copy_((matrix.double().movedim(dim, -1) * ratio).movedim(-1, dim))


@torch.inference_mode()
def first_logits(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """(1, S, V) of the first block."""
    return model(input_ids=blocks[:1].to(model.device), use_cache=False).logits.float()


def check_logits(before: Tensor, after: Tensor, axis_map: AxisMap) -> None:
    """Refuses a rewritten model that computes something else.

    Raises:
        AxisMapError: The logits (1, S, V) differ by more than rounding explains.
    """
    difference = (after - before).abs().max().item()
    if difference > TOLERANCE * max(1.0, before.abs().max().item()):
        raise AxisMapError(
            f"aligning changed the small model's logits by {difference:.2g}, so the axis map {axis_map.model_type!r} "
            "does not describe how the model uses its tensors; check its norms and the order of fused projections"
        )
