"""The curve between two anchors while its control point is trained.

Each step draws a position r and makes the model theta(r) there (:mod:`cbd_hub.interpolation.control_points`),
differentiable in the control point and, where the anchor is trained along with it, in the small anchor; the loss is
the anchor's own, taken inside a model of the drawn shape that has no weights of its own. Learned curves: Garipov et
al. 2018 (arXiv 1802.10026); learned subspaces: Wortsman et al. 2021 (arXiv 2102.10472).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_hub.axes.sizing import Sizes, count_parameters, solve
from cbd_hub.errors import RecipeError, SizeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation.control_points import choose_rank, factor_names, factor_shapes, leading_rows
from cbd_hub.interpolation.materialize import blend, build_model, make_tensor, target_config
from cbd_hub.interpolation.operations import TensorOp, list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.interpolation.tensors import region_of
from cbd_hub.losses.heads import kept_hidden, with_weights
from cbd_hub.losses.hidden_states import ends_of_blocks
from cbd_hub.manifest.manifest import CONTROL_POINTS_NAME, file_entry
from cbd_hub.manifest.records import ControlPoint
from cbd_hub.text.documents import Documents

__all__ = [
    "MIDDLE",
    "POSITIONS",
    "Curve",
    "Point",
    "curve_learning_rate",
    "curve_points",
    "is_better",
    "save_control_point",
]

POSITIONS = (0.25, 0.5, 0.75)
"""Where the curve is compared with the straight line before it is kept."""

MIDDLE = 0.5
"""Where the curve is measured while it is trained."""

_GRID = 32
_MARGIN = 0.03
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Point:
    """One model on the curve."""

    sizes: Sizes
    num_parameters: int
    operations: tuple[TensorOp, ...]
    straight: tuple[TensorOp, ...]
    """The same on the straight line."""


def curve_learning_rate(hidden: int, steps: float) -> float:
    """Returns a peak learning rate for a control point.

    2e-3 was best for 393 steps at a width of 576, 1e-2 for 98 steps at a width of 96 (of 2e-3, 5e-3, 1e-2 and 2e-2):
    with the square roots of both ratios, and bounds.

    Args:
        hidden: Width of the large anchor.
        steps: Optimizer steps on the curve.
    """
    return 2e-3 * min(max((400 / max(steps, 1)) ** 0.5, 1.0), 4.0) * min(max((576 / hidden) ** 0.5, 0.5), 4.0)


def curve_points(pair: Pair, layers_last: bool = True) -> list[Point]:
    """Returns models evenly spread between two anchors, as their chain would make them; none where no size is there.

    Args:
        pair: The two anchors.
        layers_last: How sizes in between are solved (:func:`cbd_hub.axes.sizing.solve`).

    Cost: tens of milliseconds a model; integers only.
    """
    axis_map = pair.axis_map
    low, high = (count_parameters(axis_map, sizes) for sizes in (pair.small, pair.large))
    points: dict[int, Point] = {}
    for position in np.linspace(_MARGIN, 1 - _MARGIN, _GRID):
        try:
            target = round(low + position * (high - low))
            sizes = solve(axis_map, target, pair.small, pair.large, _TOLERANCE, shallow=layers_last)
        except SizeError:
            continue
        count = count_parameters(axis_map, sizes)
        if low < count < high and count not in points:
            alpha = 1 - pair.position(count)
            bent, straight = (list_operations(pair, sizes, m, alpha, 1 - alpha**2) for m in ("bezier", "interpolate"))
            points[count] = Point(sizes, count, bent, straight)
    return list(points.values())


class Curve:
    """A large anchor, a small one, and a control point between them."""

    def __init__(
        self,
        large: PreTrainedModel,
        small: PreTrainedModel,
        pair: Pair,
        rank: int | None = None,
        *,
        learning_rate: float,
        tokens: int,
        together: bool = True,
        points: Sequence[Point] | None = None,
        seed: int = 0,
    ) -> None:
        """Starts on the straight line: of every matrix one factor is random, the other zero.

        Args:
            large: The large anchor, on any device; not changed.
            small: The small anchor, in float32, in the units of the pair.
            pair: Their sizes and correspondence.
            rank: Columns of every factor; None picks (:func:`cbd_hub.interpolation.control_points.choose_rank`).
            learning_rate: Peak learning rate of the control point.
            tokens: Training tokens of the steps on the curve.
            together: Train the small anchor along with it.
            points: The models that steps draw from; None takes :func:`curve_points`.
            seed: Decides the random factor and the positions that are drawn.

        Raises:
            RecipeError: The rank is above what the matrices allow, or there is no size between the anchors.
        """
        self.large, self.small, self.pair = large, small, pair
        self.rank = choose_rank(pair, rank)
        self.learning_rate, self.tokens, self.together, self.seed = learning_rate, tokens, together, seed
        self.share = 1.0
        """Share of the optimizer steps that are on the curve; set when training begins."""
        generator = torch.Generator().manual_seed(seed)
        self.control = nn.Module()
        for name, shape in factor_shapes(pair, self.rank).items():
            value = torch.zeros(shape)
            if name.endswith(".rows"):
                value = torch.randn(shape, generator=generator) * (0.1 / self.rank**0.5)
            self.control.register_parameter(_parameter(name), nn.Parameter(value))
        self.points = curve_points(pair) if points is None else list(points)
        if not self.points:
            raise RecipeError("a control point needs a size between its anchors, and there is none; set it to null")
        self._shells: dict[int, PreTrainedModel] = {}

    def draw(self, step: int) -> Point:
        """Returns the point of an optimizer step; the same on every process."""
        return self.points[int(np.random.default_rng((self.seed, step)).integers(len(self.points)))]

    def nearest(self, position: float) -> Point:
        """Returns the point next to a position."""
        return min(self.points, key=lambda p: abs(self.pair.position(p.num_parameters) - position))

    def factors(self) -> dict[str, Tensor]:
        """Returns the control point: name → tensor on the CPU, detached."""
        return {_name(key): value.detach().cpu().contiguous() for key, value in self.control.named_parameters()}

    def weights(self, point: Point) -> dict[str, Tensor]:
        """Returns the weights theta(r) of a point, differentiable in the control point and the small anchor."""
        large, small = self.large.get_parameter, self.small.get_parameter
        return {
            op.name: _CurveTensor.apply(
                op,
                self.pair,
                point.sizes,
                None if op.large_name is None else large(op.large_name).detach(),
                None if op.small_name is None else small(op.small_name),
                *self._factors_of(op),
            )
            for op in point.operations
        }

    def _factors_of(self, op: TensorOp) -> list[Tensor]:
        if not op.bend or op.large_name is None:
            return []
        names = factor_names(self.pair.axis_map, op.pattern, op.large_name)
        return [self.control.get_parameter(_parameter(name)) for name in names]

    def run(self, point: Point, compute: Callable[[PreTrainedModel], Tensor]) -> Tensor:
        """Returns what a function makes of the model at a point, differentiable; the model lives for this call."""
        shell = self._shells.get(point.num_parameters)
        if shell is None:
            shell = self._shells[point.num_parameters] = self._shell(point)
        return with_weights(shell, self.weights(point), compute)

    def _shell(self, point: Point) -> PreTrainedModel:
        """A model of a point's shape without weights."""
        config = target_config(self.large.config, self.pair, point.sizes)
        config._attn_implementation = self.small.config._attn_implementation
        with init_empty_weights(include_buffers=False):
            shell: PreTrainedModel = type(self.small)(config)
        shell.tie_weights()
        device = self.small.device
        for module in shell.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        return shell.train()

    def ends(self, point: Point) -> list[int]:
        """Returns the layer of the large anchor that each layer of a point stands for the block up to."""
        return ends_of_blocks(self.pair.layers(point.sizes["layers"]), self.pair.large["layers"])

    def kept_units(self, point: Point) -> Tensor | None:
        """Returns the large anchor's hidden coordinates of a point, in its order; None for all in order."""
        return kept_hidden(self.pair.index_map, point.sizes["hidden"], self.pair.large["hidden"])

    @torch.no_grad()
    def model(self, point: Point, straight: bool = False) -> PreTrainedModel:
        """Returns the model of a point with weights of its own, in float32 on the small anchor's device.

        Args:
            point: Where.
            straight: Leave the control point out.
        """
        large, small = self.large.get_parameter, self.small.get_parameter
        operations = point.straight if straight else point.operations
        control = None if straight else lambda name: self.control.get_parameter(_parameter(name))
        tensors = dict(blend(operations, self.pair, point.sizes, large, small, torch.float32, control))
        config = target_config(self.large.config, self.pair, point.sizes)
        return nn.Module.to(build_model(config, tensors, torch.float32), self.small.device)

    def loss(self, position: float, blocks: Documents, straight: bool = False, batch_size: int = 8) -> float:
        """Returns the held-out loss of the model next to a position, nats a token."""
        return evaluate_loss(self.model(self.nearest(position), straight), blocks, batch_size).loss

    def judge(self, blocks: Documents, batch_size: int = 8) -> ControlPoint:
        """Compares curve and straight line on held-out text, at :data:`POSITIONS`.

        Returns:
            The manifest's record, without a file; :func:`is_better` says whether the control point is worth one.

        Cost: two models a position are made and evaluated.
        """
        points = list(dict.fromkeys(self.nearest(position).num_parameters for position in POSITIONS))
        chosen = [p for p in self.points if p.num_parameters in points]
        losses = [
            [evaluate_loss(self.model(point, straight), blocks, batch_size).loss for point in chosen]
            for straight in (False, True)
        ]
        return ControlPoint(
            rank=self.rank,
            tokens=self.tokens,
            seed=self.seed,
            together=self.together,
            sizes=[p.num_parameters for p in chosen],
            losses=losses[0],
            straight_losses=losses[1],
        )


def is_better(record: ControlPoint) -> bool:
    """Whether the curve's mean loss is below the straight line's; NaN is not."""
    return float(np.mean(record.losses)) < float(np.mean(record.straight_losses))


def save_control_point(
    factors: Mapping[str, Tensor], record: ControlPoint, chain: Path, anchor: str, dtype: torch.dtype
) -> ControlPoint:
    """Writes a control point into a chain's folder, whole or not at all; returns its record with the file.

    Args:
        factors: Name → tensor.
        record: What is known of it.
        chain: Folder of the chain.
        anchor: Name of the pair's smaller anchor.
        dtype: That of the anchors.
    """
    path = chain / CONTROL_POINTS_NAME / f"{anchor}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in sorted(factors.items())}, partial)
    partial.replace(path)
    return record.model_copy(update={"file": file_entry(path)})


class _CurveTensor(torch.autograd.Function):
    """One tensor of theta(r); keeps nothing but the factors for its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        op: TensorOp,
        pair: Pair,
        target: Sizes,
        large: Tensor | None,
        small: Tensor | None,
        *factors: Tensor,
    ) -> Tensor:
        """Returns the tensor in float32 (float64 where it is stored so)."""
        ctx.op, ctx.pair, ctx.target = op, pair, target
        ctx.small_shape = None if small is None else small.shape
        ctx.save_for_backward(*factors)
        either: Any = large if large is not None else small
        read_large, read_small = (partial(_given, tensor) for tensor in (large, small))
        dtype = torch.promote_types(either.dtype, torch.float32)
        names: Mapping[str, Tensor] = {}
        if factors and op.large_name is not None:
            names = dict(zip(factor_names(pair.axis_map, op.pattern, op.large_name), factors, strict=True))
        return make_tensor(op, pair, target, read_large, read_small, dtype, names.__getitem__)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """Gradients of the small anchor's tensor and of the factors."""
        op, pair, target = ctx.op, ctx.pair, ctx.target
        factors = ctx.saved_tensors
        layout = pair.axis_map.layout(op.pattern)
        to_small = None
        if ctx.small_shape is not None and ctx.needs_input_grad[4]:
            region = region_of(layout, pair.small, target, grad.device)
            to_small = grad[region] * ((op.alpha if op.large_name else 1.0) * op.small_scale)
        rows = [leading_rows(pair, op.pattern, dim, target) for dim in range(len(factors))]
        index = [slice(None) if r is None else torch.from_numpy(r).to(grad.device) for r in rows]
        to_factors: list[Tensor | None] = [None] * len(factors)
        for i, factor in enumerate(factors):
            if ctx.needs_input_grad[5 + i]:
                part = grad if len(factors) == 1 else (grad if i == 0 else grad.T) @ factors[1 - i][index[1 - i]]
                whole = to_factors[i] = torch.zeros_like(factor)
                whole[index[i]] = op.bend * part
        return None, None, None, None, to_small, *to_factors


def _given(tensor: Tensor | None, name: str) -> Tensor:
    """A reader of one tensor."""
    if tensor is None:
        raise KeyError(name)
    return tensor


def _parameter(name: str) -> str:
    """A tensor's name as torch allows it for a parameter."""
    return name.replace(".", "/")


def _name(parameter: str) -> str:
    return parameter.replace("/", ".")
