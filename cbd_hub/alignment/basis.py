"""The aligned basis: rotate the residual stream of an RMSNorm model so that every width is a prefix.

RMSNorm without a gain commutes with rotations, so once its gains are folded into the matrices that read it, the
stream can be written in any orthonormal basis and the model stays the same. In the basis of the principal components
of its activations, the first n units carry as much of the stream as any n directions can: a narrower model is simply
the first n units, and neighbors of a chain share them.

A tied head is the exception: it reads the final norm through the embedding, whose rows also *write* the stream, so
the final gain cannot be folded away. It is halved instead: with s = sqrt(gain / mean gain), what writes the stream is
multiplied by s and what reads it divided by s, and a constant gain is left, which commutes. That changes the root
mean square a little, so a tied model is only nearly the same afterwards; the few units that dominate it, and those
whose gain is not positive, are kept out of this and come first.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.alignment.observe import observe
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import AxisMapError

__all__ = ["rotate"]

KEPT_AXES = 8
"""Units of highest energy that a tied model keeps as they are."""
LEAST_GAIN = 0.05
"""A tied model also keeps units whose final gain is below this share of the mean: 1 / s must stay moderate."""


_STREAM = ((("hidden",),),)


def rotate(model: PreTrainedModel, axis_map: AxisMap, sizes: Sizes, blocks: Tensor, batch_size: int = 8) -> float:
    """Rotates a model's residual stream into the principal components of its activations, in place.

    Untied: exact. Every gain over the hidden units becomes 1 and hidden units are ordered by the energy they carry.
    Tied: nearly exact, see above; the model stays tied. The units kept as they are come first. All arithmetic is in
    float64 and cast once; the signs of the components are fixed, so the same input gives the same bytes.

    Args:
        model: The model, on any device; ``axis_map`` and ``sizes`` are its own.
        blocks: (N, S) token ids to take the activations from.
        batch_size: Blocks in a forward pass.

    Returns:
        The largest difference of the logits, before and after, on the first block.

    Cost: a forward pass over the blocks, 2 H^2 operations a token and norm, and one H x H eigendecomposition.

    Raises:
        AxisMapError: The family's residual stream cannot be rotated; the model is left as it was.
        RecipeError: ``blocks`` holds no token.
    """
    _check(axis_map)
    gains = [g for g in axis_map.norms if axis_map.layout(g).dims == _STREAM]
    final = next((g for g in gains if any(axis_map.writes(r) for r in axis_map.readers(g))), None)
    reads = {reader: g for g in gains if g != final for reader in axis_map.readers(g)}
    offset = 1.0 if axis_map.norm == "rms+1" else 0.0
    gain = {
        name: model.get_parameter(name).detach().double().cpu() + offset
        for name, pattern, _ in axis_map.names(sizes)
        if pattern in gains
    }
    covariance, energy = _moments(model, list(gain), sizes["hidden"], blocks, batch_size)
    scale, unrotated = torch.ones(sizes["hidden"], dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    if final is not None:
        scale, unrotated = _halve_gain(gain[final], covariance.diagonal())
    rotation = _principal_axes(scale[:, None] * covariance * scale, unrotated)

    before = _logits(model, blocks[:1])
    with torch.no_grad():
        for name, pattern, layer in axis_map.names(sizes):
            parameter = model.get_parameter(name)
            if pattern in gains:
                flat = torch.ones_like(scale)
                if final is not None:  # the mean square that the norm sees has changed; its gain takes that up
                    flat *= (energy[name] * scale.square()).mean().sqrt()
                if pattern == final:
                    rest = (gain[name] / scale.square())[_others(unrotated, len(scale))]  # all the same, the mean gain
                    flat *= torch.cat([gain[name][unrotated], rest])
                parameter.copy_(flat - offset)
                continue
            factor = scale if axis_map.writes(pattern) else 1 / scale
            if pattern in reads:
                factor = factor * gain[reads[pattern].replace("*", str(layer))]
            for dim, parts in enumerate(axis_map.layout(pattern).dims):
                if parts == _STREAM[0]:
                    matrix = (factor[:, None] * rotation).to(parameter.device)
                    parameter.copy_((parameter.double().movedim(dim, -1) @ matrix).movedim(-1, dim))
    return (_logits(model, blocks[:1]) - before).abs().max().item()


def _check(axis_map: AxisMap) -> None:
    """Refuses families whose stream cannot be rotated, saying why."""
    why = None
    if axis_map.norm == "layer":
        why = "LayerNorm subtracts the mean over the hidden units, which no rotation leaves alone"
    elif not axis_map.rotatable:
        stuck = [g for g, readers in axis_map.norms.items() if not readers and "hidden" in axis_map.layout(g).axes]
        stuck += [g for g in axis_map.norms if g not in stuck and "hidden" in axis_map.layout(g).axes]
        why = f"no matrix follows the norm {stuck[0]!r} that its gain could be folded into"
    else:
        dims = ((p, parts) for p in axis_map.tensors for parts in axis_map.layout(p).dims)
        mixed = [p for p, parts in dims if parts != _STREAM[0] and any("hidden" in part for part in parts)]
        if mixed:
            why = f"{mixed[0]!r} mixes the hidden units with other axes in one dimension"
    if why:
        raise AxisMapError(
            f"the residual stream of {axis_map.model_type!r} cannot be rotated: {why}. Keep its native basis; its "
            "hidden units are then ranked by importance (cbd_hub.alignment.ranking.rank)."
        )


def _moments(
    model: PreTrainedModel, norms: list[str], hidden: int, blocks: Tensor, batch_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Second moments of the stream, every token brought to mean square 1, at the inputs of the named gains' norms.

    Returns:
        The uncentered covariance (H, H), every norm an equal vote, and its diagonal (H,) for every norm; float64, CPU.
    """
    covariance = torch.zeros(hidden, hidden, dtype=torch.float64, device=model.device)
    energy = {name: torch.zeros(hidden, dtype=torch.float64, device=model.device) for name in norms}

    def look(name: str, x: Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x * x.square().mean(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).rsqrt()
        covariance.add_(x.T @ x)
        energy[name].add_(x.square().sum(0, dtype=torch.float64))

    tokens = observe(model, blocks, batch_size, {n.removesuffix(".weight"): partial(look, n) for n in norms})
    return covariance.cpu() / (tokens * len(norms)), {name: value.cpu() / tokens for name, value in energy.items()}


def _halve_gain(gain: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    """How a final gain that a tied head reads is made constant.

    Args:
        gain: (H,) the final norm's gain.
        energy: (H,) of the stream.

    Returns:
        s (H,), the square root of gain / mean gain, 1 for units that are kept; and these units, by falling energy.
    """
    by_energy = torch.argsort(energy, descending=True, stable=True)
    excluded = gain < LEAST_GAIN * gain.abs().mean()
    excluded[by_energy[:KEPT_AXES]] = True
    unrotated = by_energy[excluded[by_energy]]
    if excluded.all():
        raise AxisMapError(
            f"all {len(gain)} hidden units dominate or have no positive final gain: none can be rotated"
        )
    scale = torch.where(excluded, 1.0, gain / gain[~excluded].mean()).sqrt()
    return scale, unrotated


def _others(unrotated: Tensor, hidden: int) -> Tensor:
    return torch.tensor(sorted(set(range(hidden)) - set(unrotated.tolist())))


def _principal_axes(covariance: Tensor, unrotated: Tensor) -> Tensor:
    """An orthogonal matrix (H, H): first the kept units, then the principal axes of the others by falling energy."""
    others = _others(unrotated, len(covariance))
    axes = torch.linalg.eigh(covariance[others[:, None], others]).eigenvectors.flip(1)
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    rotation = torch.zeros_like(covariance)
    rotation[unrotated, torch.arange(len(unrotated))] = 1
    rotation[others, len(unrotated) :] = axes * largest.sign()
    return rotation


@torch.inference_mode()
def _logits(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """The logits (B, S, V), with dropout off; the model's mode is left as it was."""
    was_training = model.training
    try:
        return model.eval()(input_ids=blocks.to(model.device), use_cache=False).logits
    finally:
        model.train(was_training)
