"""Least-squares refit of a cut model: what the missing units did is made up for by those that are left.

A subset of a model lacks what the units left out wrote into the residual stream. Layer by layer, the matrices that
write the stream (the attention's and the ffn's output projections) are fitted so that the stream follows the larger
model's again: the attention's towards the stream in the middle of the same layer, the ffn's towards the stream at the
end of the block of layers that this one stands for. Each fit sees the layers before it as they are by then. With A
the input of a matrix W and E what the stream lacks, one row a token, the change of W is that of ridge regression,

    D = argmin |A D - E|^2 + ridge * mean(diag(A'A)) |D|^2,   every token weighted with 1 / |target|^2,

since the first position of a sequence carries a thousand times the others' activations. It helps a cut model and can
hurt an interpolated one, whose trained part it undoes (docs/design-notes.md): a start, or a candidate, not a default.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import RecipeError
from cbd_hub.progress import progress_bar
from cbd_hub.text.packing import token_batches

__all__ = ["REFIT_TOKENS", "RIDGE", "can_refit", "refit"]

REFIT_TOKENS = 16_384
"""Tokens that a refit looks at. Its loss on these very tokens says nothing: it overfits them."""
RIDGE = 0.3
"""Strength of the ridge, as a share of the mean squared input."""


def can_refit(axis_map: AxisMap) -> bool:
    """Whether a layer adds its output projections to the stream as they are, with no norm behind them (OLMo 2 has)."""
    gains = [gain for gain in axis_map.norms if "*" in gain and "hidden" in axis_map.layout(gain).axes]
    return bool(gains) and all(axis_map.norms[gain] for gain in gains)


@torch.no_grad()
def refit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    axis_map: AxisMap,
    layers: Sequence[int],
    kept: Tensor | None,
    blocks: Tensor,
    *,
    ridge: float = RIDGE,
    batch_size: int = 8,
    progress: bool = False,
) -> int:
    """Fits the output projections of a cut model, in place.

    Args:
        student: The cut (or interpolated) model, on the teacher's device.
        teacher: The larger model.
        axis_map: The family's map, the same for both.
        layers: The teacher layer that each student layer was taken from, ascending.
        kept: (Hs,) int64, the teacher's hidden coordinates in the student's order; None where the widths agree.
        blocks: (N, S) token ids; :data:`REFIT_TOKENS` of them are enough.
        ridge: Strength of the ridge; larger stays nearer to the start.
        batch_size: Blocks in a forward pass.
        progress: Show a progress bar.

    Returns:
        The number of matrices fitted: 0 where :func:`can_refit` is False.

    Cost: about two forward passes of the teacher and three of the student. Besides the models, some streams of both
    (tokens x H), the inputs of one layer's projections (tokens x units) and a (units x units) matrix stand in memory.

    Raises:
        RecipeError: `layers` are not ascending teacher layers, one for each of the student's, `kept` are not as many
            coordinates as the student has, or there is no token.
    """
    count = teacher.config.get_text_config().num_hidden_layers
    mine = student.config.get_text_config().num_hidden_layers
    if sorted(set(layers)) != list(layers) or len(layers) != mine or not 0 <= layers[0] <= layers[-1] < count:
        raise RecipeError(f"layers {list(layers)} are not {mine} ascending layers out of {count}")
    if blocks.ndim != 2 or not blocks.numel():
        raise RecipeError(f"calibration blocks have shape {tuple(blocks.shape)}; expected (blocks, tokens), not empty")
    width = teacher.config.get_text_config().hidden_size if kept is None else len(kept)
    if width != student.config.get_text_config().hidden_size:
        raise RecipeError(
            f"{width} hidden coordinates of the teacher are to be followed, and the student has "
            f"{student.config.get_text_config().hidden_size}; pass as many in `kept`"
        )
    if not can_refit(axis_map):
        return 0
    writers = [p for p in axis_map.tensors if "*" in p and axis_map.writes(p) and len(axis_map.layout(p).dims) == 2]
    middle = _middle_norm(axis_map)
    training = student.training, teacher.training
    student.eval()
    teacher.eval()
    try:
        left, right = _Stack(student, axis_map, blocks, batch_size), _Stack(teacher, axis_map, blocks, batch_size)
        ends = [*(layer - 1 for layer in layers[1:]), count - 1]
        right.skip_to(layers[0])
        for j, (first, end) in enumerate(
            zip(progress_bar(layers, "refit", unit="layer", enabled=progress), ends, strict=True)
        ):
            seen = right.run(first, [middle])
            between = _kept_columns(seen[middle], kept)
            right.advance()
            right.skip_to(end + 1)
            target = _kept_columns(right.stream, kept)
            seen = left.run(j, [*writers, middle])
            parallel = all(torch.equal(a, b.flatten(0, -2)) for a, b in zip(seen[middle], left.stream, strict=True))
            if parallel:  # attention and ffn read the same stream
                _fit(student, axis_map, writers, j, seen, target, left.output, ridge)
            else:
                _fit(student, axis_map, writers[:1], j, seen, between, seen[middle], ridge)
                seen = left.run(j, writers[1:])
                _fit(student, axis_map, writers[1:], j, seen, target, left.output, ridge)
            left.advance()
    finally:
        student.train(training[0])
        teacher.train(training[1])
    return mine * len(writers)


def _middle_norm(axis_map: AxisMap) -> str:
    """The norm that the ffn reads through; its input is the stream between attention and ffn."""
    norms = [g for g in axis_map.norms if "*" in g and axis_map.layout(g).axes == {"hidden"}]
    ffn = [g for g in norms if any("ffn" in axis_map.layout(reader).axes for reader in axis_map.readers(g))]
    return (ffn or norms)[-1]


def _kept_columns(stream: Sequence[Tensor], kept: Tensor | None) -> list[Tensor]:
    return [x if kept is None else x.index_select(-1, kept.to(x.device)) for x in stream]


@dataclass
class _Call:
    """How the model itself calls one of its layers for one batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Stack:
    """The layers of a model, run one at a time over all batches."""

    def __init__(self, model: PreTrainedModel, axis_map: AxisMap, blocks: Tensor, batch_size: int) -> None:
        self.model = model
        self.stack = model.get_submodule(axis_map.layers_name)
        self.stream: list[Tensor] = []  # (B, S, H) a batch: the input of the layer that comes next
        self.output: list[Tensor] = []  # and its output, once it has run
        self.next = 0
        self.calls: list[list[_Call]] = [[] for _ in range(model.config.get_text_config().num_hidden_layers)]
        handles = [
            self.stack.get_submodule(str(layer)).register_forward_pre_hook(self._note(layer), with_kwargs=True)
            for layer in range(len(self.calls))
        ]
        try:
            for batch in token_batches(blocks, batch_size):
                model.base_model(input_ids=batch.to(model.device), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, layer: int) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            rest = dict(kwargs)
            stream = args[0] if args else rest.pop("hidden_states")
            if layer == 0:
                self.stream.append(stream)
            self.calls[layer].append(_Call(args[1:], rest))

        return note

    def skip_to(self, layer: int) -> None:
        """Runs the layers before this one."""
        while self.next < layer:
            self.run(self.next, [])
            self.advance()

    def advance(self) -> None:
        """Hands the output on to the next layer."""
        self.stream, self.output, self.next = self.output, [], self.next + 1

    def run(self, layer: int, watched: Sequence[str]) -> dict[str, list[Tensor]]:
        """Runs a layer over all batches; returns the inputs of watched modules, (B S, units) a batch."""
        seen: dict[str, list[Tensor]] = {pattern: [] for pattern in watched}
        handles = []
        for pattern in watched:
            module = self.model.get_submodule(pattern.replace("*", str(layer)).removesuffix(".weight"))
            look = partial(lambda rows, _, args: rows.append(args[0].flatten(0, -2)), seen[pattern])
            handles.append(module.register_forward_pre_hook(look))
        self.output = []
        try:
            for x, call in zip(self.stream, self.calls[layer], strict=True):
                out = self.stack.get_submodule(str(layer))(x, *call.args, **call.kwargs)
                self.output.append(out[0] if isinstance(out, tuple) else out)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _fit(
    model: PreTrainedModel,
    axis_map: AxisMap,
    patterns: Sequence[str],
    layer: int,
    seen: Mapping[str, Sequence[Tensor]],
    target: Sequence[Tensor],
    got: Sequence[Tensor],
    ridge: float,
) -> None:
    """Changes the matrices jointly so that `got` comes as near to `target` as they can bring it; updates `got`."""
    weights = [model.get_parameter(pattern.replace("*", str(layer))) for pattern in patterns]
    rows = [seen[pattern] for pattern in patterns]
    units = sum(r[0].shape[-1] for r in rows)
    gram = torch.zeros(units, units, device=got[0].device)
    cross = torch.zeros(units, got[0].shape[-1], device=got[0].device)
    for batch, (goal, reached) in enumerate(zip(target, got, strict=True)):
        a = torch.cat([r[batch] for r in rows], -1).float()
        goal, reached = goal.flatten(0, -2).float(), reached.flatten(0, -2).float()
        per_token = goal.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt()
        scaled, error = a * per_token, (goal - reached) * per_token
        gram.addmm_(scaled.T, scaled)
        cross.addmm_(scaled.T, error)
    gram.diagonal().add_(ridge * gram.diagonal().mean().clamp(min=1e-12))
    place = torch.device("cpu") if gram.device.type == "mps" else gram.device  # Metal has no float64
    factor = torch.linalg.cholesky(gram.to(place).double())
    change = torch.cholesky_solve(cross.to(place).double(), factor).to(gram)
    for batch, reached in enumerate(got):
        a = torch.cat([r[batch] for r in rows], -1)
        reached += (a.float() @ change).view_as(reached).to(reached.dtype)
    for weight, part in zip(weights, change.split([r[0].shape[-1] for r in rows]), strict=True):
        weight.add_((part if axis_map.in_out else part.T).to(weight.dtype))
