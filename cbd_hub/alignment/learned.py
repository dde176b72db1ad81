"""Learned alignment: what matching leaves of a barrier is lowered by maps that keep the small model's function.

Matching (:mod:`cbd_hub.alignment.align`) compares what two models compute, unit by unit. Here the models *between*
the two say what is better: maps under which the small model computes the same are learned by the cross-entropy of the
weights in between, at random alpha.

* The residual stream x becomes x R, where the head is not tied: any orthogonal R under RMSNorm, one that keeps the
  mean over the units under LayerNorm. With gains g, what reads the stream becomes W diag(g) R diag(1/g).
* The values of a KV group become v M, and the output projection reads them through the inverse of M: any invertible M.
* Queries and keys of a KV group become q M and k M'^-1: any invertible M, or with rotary embeddings one that rotates
  every pair (i, i + d/2) by an angle, which commutes with them. A norm over the coordinates of a head allows none.

Every map is the exponential of a matrix that starts at zero, so learning starts at the matching. Who is whose
partner stays as matched: permutations learned along (a straight-through gradient to an assignment) made it worse
(docs/design-notes.md). Weight matching: Git Re-Basin (arXiv 2209.04836); these symmetries of transformers: arXiv
2506.22712.
"""

import copy
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from cbd_hub.alignment.align import LEAST_GAIN, check_logits, first_logits, head_rows, projection_rows, rows_of
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.grammar import product
from cbd_hub.axes.sizing import Sizes, count_parameters, solve
from cbd_hub.devices import working_device
from cbd_hub.errors import SizeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation.materialize import blend_models, make_tensor
from cbd_hub.interpolation.operations import TensorOp, list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.interpolation.tensors import region_of
from cbd_hub.losses.distillation import distillation_loss
from cbd_hub.losses.heads import hidden_and_head, with_weights
from cbd_hub.progress import progress_bar

__all__ = ["LEARNING_TOKENS", "learn_maps"]

STEPS = 300
"""Optimizer steps: on the tiny pairs, 600 lowered the barrier by .01 more."""
BATCH_TOKENS = 1024
"""Tokens of a step."""
LEARNING_TOKENS = STEPS * BATCH_TOKENS
"""Training tokens that suffice for all steps without a repetition."""
LEARNING_RATE = 0.01
ALPHAS = (0.25, 0.75)
"""Between these the weight of the small model is drawn."""

_STREAM = (("hidden",),)


def learn_maps(
    large: PreTrainedModel,
    small: PreTrainedModel,
    pair: Pair,
    blocks: Tensor,
    held_out: Tensor,
    progress: bool = False,
    steps: int = STEPS,
) -> PreTrainedModel:
    """Rewrites a small model, its function unchanged, so that weights between it and a large one lose less.

    Args:
        large: The larger model; not changed.
        small: The smaller model as :func:`cbd_hub.alignment.align.align` returns it; not changed.
        pair: Their sizes and correspondence.
        blocks: (N, S) token ids to learn on; :data:`LEARNING_TOKENS` are enough.
        held_out: (M, S) token ids that decide whether the maps are kept.
        progress: Show a progress bar.
        steps: Optimizer steps.

    Returns:
        The rewritten copy of ``small``, in its dtype and in ``eval()`` mode; a plain copy where the loss at alpha .5,
        half-way between the sizes, is not lower on ``held_out``. The pair's index map stays as it is.

    Cost: ``steps`` training steps of a model between the two, of :data:`BATCH_TOKENS` tokens each (or one block);
    both models in float32, on the accelerator if there is one.

    Raises:
        AxisMapError: The map does not describe the models: maps that keep the function changed the logits.
    """
    device = working_device(float64=True)
    large, start = (copy.deepcopy(model).float().eval() for model in (large, small))
    maps = _Maps(start, pair).to(device)
    target = _halfway(pair)
    _learn(maps, large, start, pair, target, blocks, device, progress, steps)
    learned = copy.deepcopy(start)
    with torch.no_grad():
        turned = maps.double()({n: p.detach().to(device, torch.float64) for n, p in start.named_parameters()})
        for name, parameter in learned.named_parameters():
            parameter.copy_(turned[name])
    check_logits(first_logits(start, held_out), first_logits(learned, held_out), pair.axis_map)
    middle = list_operations(pair, target, "interpolate", 0.5, 0.75)
    losses = [
        evaluate_loss(blend_models(middle, pair, target, large, model), held_out).loss for model in (start, learned)
    ]
    return (learned if losses[1] < losses[0] else start).to(small.dtype)


class _Maps(nn.Module):
    """The maps of one small model, and the small model under them."""

    def __init__(self, model: PreTrainedModel, pair: Pair) -> None:
        super().__init__()
        axis_map, sizes = pair.axis_map, pair.small
        self.axis_map, self.sizes = axis_map, sizes
        groups, dim = product((axis_map.heads.split()[0],), sizes), sizes["head_dim"]
        queries, keys, values = (rows_of(axis_map, sizes, projection_rows(number)) for number in range(3))
        places = {"value": (values, head_rows(axis_map, sizes))}
        if all("hidden" in axis_map.layout(gain).axes for gain in axis_map.norms):
            places["query"] = (queries, keys)
        self.places = {
            key: [[(pattern, d, rows.reshape(groups, -1, dim)) for pattern, d, rows in side] for side in sides]
            for key, sides in places.items()
        }
        """For every map the rows that it multiplies, and those that its inverse does: (groups, n, head_dim)."""
        self.free = nn.ParameterDict(
            {key: nn.Parameter(torch.zeros(sizes["layers"], groups, dim, dim)) for key in places}
        )
        self.register_buffer("rotary", _rotary_pairs(model.config, dim))
        self.readers = {reader: gain for gain in axis_map.norms for reader in axis_map.readers(gain)}
        self.register_buffer("basis", None)
        if _can_rotate(model, axis_map, sizes):
            basis = torch.eye(sizes["hidden"], dtype=torch.float64)
            if axis_map.norm == "layer":  # the complement of the mean
                basis = torch.linalg.qr(torch.cat([torch.ones_like(basis[:, :1]), basis[:, 1:]], 1))[0][:, 1:]
            self.basis = basis.float()
            self.free["stream"] = nn.Parameter(torch.zeros(basis.shape[1], basis.shape[1]))

    def forward(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns all weights (name → tensor) of the model under the maps, differentiable in the maps."""
        turned = dict(weights)
        if self.basis is not None:
            self._turn_stream(turned)
        for key, sides in self.places.items():
            free = self.free[key]
            if key == "query" and self.rotary is not None:
                free = (free - free.mT) * self.rotary
            both = torch.linalg.matrix_exp(free), torch.linalg.matrix_exp(-free).mT
            for places, maps in zip(sides, both, strict=True):
                for pattern, dim, rows in places:
                    for layer in range(self.sizes["layers"]):
                        name = pattern.replace("*", str(layer))
                        tensor = turned[name].movedim(dim, -1).clone()
                        tensor[..., rows] = tensor[..., rows] @ maps[layer]
                        turned[name] = tensor.movedim(-1, dim)
        return turned

    def _turn_stream(self, weights: dict[str, Tensor]) -> None:
        """The residual stream x as x R, in place of the dictionary's entries."""
        axis_map, free = self.axis_map, self.free["stream"]
        rotation = torch.linalg.matrix_exp(self.basis @ (free - free.mT) @ self.basis.T)
        offset = 1.0 if axis_map.norm == "rms+1" else 0.0
        for name, pattern, layer in axis_map.names(self.sizes):
            if pattern in axis_map.norms:
                continue
            gain, bias = self.readers.get(pattern), axis_map.gain_of(pattern)
            over = gain or bias
            scale = rotation.new_ones(()) if over is None else weights[over.replace("*", str(layer))] + offset
            for dim, parts in enumerate(axis_map.layout(pattern).dims):
                if parts == _STREAM:
                    factor = scale if bias is None else 1 / scale
                    tensor = (weights[name].movedim(dim, -1) * factor) @ rotation / factor
                    weights[name] = tensor.movedim(-1, dim)


def _rotary_pairs(config: PreTrainedConfig, dim: int) -> Tensor | None:
    """(dim, dim), 1 where two coordinates of a head may be rotated into each other; None without rotary embeddings."""
    rotary = getattr(config, "rope_parameters", None)
    if rotary is None:
        return None
    half = int(dim * rotary.get("partial_rotary_factor", 1.0)) // 2
    pairs, first = torch.zeros(dim, dim), torch.arange(half)
    pairs[first, first + half] = pairs[first + half, first] = 1.0
    return pairs


def _can_rotate(model: PreTrainedModel, axis_map: AxisMap, sizes: Sizes) -> bool:
    """Whether a rotation of the stream passes every norm: each is read by matrices alone, through no tiny gain."""
    offset = 1.0 if axis_map.norm == "rms+1" else 0.0
    for gain in axis_map.norms:
        readers = axis_map.readers(gain)
        if "hidden" in axis_map.layout(gain).axes and (not readers or any(map(axis_map.writes, readers))):
            return False
    gains = [model.get_parameter(name) + offset for name, p, _ in axis_map.names(sizes) if p in axis_map.norms]
    return all(bool((g.abs() > LEAST_GAIN * g.abs().mean()).all()) for g in gains)


def _halfway(pair: Pair) -> dict[str, int]:
    """Sizes half-way between two models; the small one's where there are none."""
    counts = [count_parameters(pair.axis_map, sizes) for sizes in (pair.small, pair.large)]
    try:
        return solve(pair.axis_map, sum(counts) // 2, pair.small, pair.large)
    except SizeError:
        return dict(pair.small)


def _learn(
    maps: _Maps,
    large: PreTrainedModel,
    small: PreTrainedModel,
    pair: Pair,
    target: Sizes,
    blocks: Tensor,
    device: torch.device,
    progress: bool,
    steps: int,
) -> None:
    """Trains the maps in place."""
    operations = list_operations(pair, target, "interpolate", 0.5, 0.75)
    shell = blend_models(operations, pair, target, large, small)  # a shape; its weights are never used
    nn.Module.to(shell, device)
    weights = [
        {n: p.detach().to(device, torch.float32) for n, p in model.named_parameters()} for model in (large, small)
    ]
    optimizer = torch.optim.Adam(maps.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + float(np.cos(np.pi * step / steps)))
    )
    rng, batch_size = np.random.default_rng(0), max(1, BATCH_TOKENS // blocks.shape[1])
    for _ in progress_bar(range(steps), "learning the alignment", unit="step", enabled=progress):
        alpha = float(rng.uniform(*ALPHAS))
        batch = blocks[torch.from_numpy(rng.integers(len(blocks), size=batch_size))].to(device)
        turned = maps(weights[1])
        between = {
            op.name: _between(op, pair, target, weights[0], turned)
            for op in list_operations(pair, target, "interpolate", alpha, 1 - alpha**2)
        }
        loss = with_weights(shell, between, partial(_cross_entropy, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _cross_entropy(batch: Tensor, model: PreTrainedModel) -> Tensor:
    """Nats a token of a batch (B, S), a few tokens' logits at a time."""
    return distillation_loss(*hidden_and_head(model, batch), None, None, batch).loss


def _between(
    op: TensorOp, pair: Pair, target: Sizes, large: Mapping[str, Tensor], small: Mapping[str, Tensor]
) -> Tensor:
    """A tensor between the two models, differentiable in the small one's."""
    tensor = make_tensor(op, pair, target, large.__getitem__, lambda name: small[name].detach(), torch.float32)
    if op.small_name is None or not (own := small[op.small_name]).requires_grad:
        return tensor
    passed = torch.zeros_like(tensor)
    region = region_of(pair.axis_map.layout(op.pattern), pair.small, target, tensor.device)
    passed[region] = (own - own.detach()) * op.alpha * op.small_scale
    return tensor + passed
