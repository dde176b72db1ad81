"""How an anchor starts: the units of its larger neighbor that count most, with its output projections refitted."""

from typing import Any

from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.devices import on_accelerator
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.initialization.refit import can_refit, refit
from cbd_hub.interpolation.materialize import cut
from cbd_hub.interpolation.pair import Pair
from cbd_hub.losses.heads import kept_hidden
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.text.documents import Documents
from cbd_hub.training.curve import Curve, curve_learning_rate, curve_points
from cbd_hub.training.settings import AnchorDistillation

__all__ = ["curve_to_train", "cut_student", "refit_if_better"]


def cut_student(
    teacher: PreTrainedModel,
    axis_map: AxisMap,
    small: dict[str, int],
    index_map: IndexMap,
    blocks: Tensor | None,
    validation: Documents | None,
    progress: bool = True,
) -> tuple[PreTrainedModel, float | None]:
    """Cuts a student out of its teacher and refits it where that lowers its loss.

    Args:
        teacher: The larger neighbor; not changed.
        axis_map: Its resolved map.
        small: Sizes of the student.
        index_map: The teacher's units in their order; the first ones are kept.
        blocks: (N, S) token ids to fit on, never those of ``validation``; None refits nothing.
        validation: Blocks that decide whether the refit is kept.
        progress: Show a progress bar.

    Returns:
        The student, and the validation loss (nats a token) of the subset as it was cut; None where nothing was
        refitted.
    """
    student = cut(teacher, axis_map, axis_map.sizes(teacher.config), small, index_map)
    if blocks is None or validation is None or not can_refit(axis_map):
        return student, None
    return student, refit_if_better(student, teacher, axis_map, index_map, blocks, validation, progress)


def refit_if_better(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    axis_map: AxisMap,
    index_map: IndexMap,
    blocks: Tensor,
    validation: Documents,
    progress: bool = True,
) -> float:
    """Refits a student in place, unless that raises its loss; returns the loss (nats a token) that it had before.

    Arguments are those of :func:`cut_student`. Cost: two evaluations, and the passes of the refit.
    """
    small, large = axis_map.sizes(student.config), axis_map.sizes(teacher.config)
    kept_units = kept_hidden(index_map, small["hidden"], large["hidden"])
    with on_accelerator(student, teacher, float64=True):
        before = evaluate_loss(student, validation).loss
        weights: dict[str, Any] = {name: p.detach().clone() for name, p in student.named_parameters()}
        refit(student, teacher, axis_map, index_map.layers_of(small["layers"]), kept_units, blocks, progress=progress)
        if not evaluate_loss(student, validation).loss < before:
            student.load_state_dict(weights, strict=False)
    return before


def curve_to_train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    pair: Pair,
    config: AnchorDistillation,
    layers_last: bool,
    sequence_length: int,
) -> Curve | None:
    """Returns the curve to train along with an anchor; None where none is wanted, or no size lies between the two.

    Args:
        student: The anchor, as it starts.
        teacher: Its larger neighbor.
        pair: Their sizes and correspondence.
        config: How the anchor is trained.
        layers_last: How the chain solves sizes in between.
        sequence_length: Tokens of a block.

    Raises:
        RecipeError: The rank is above what the matrices allow.
    """
    control = config.control_point
    tokens = 0 if control is None else config.tokens if control.tokens is None else control.tokens
    points = curve_points(pair, layers_last) if tokens else []
    if control is None or not points:
        return None
    step = config.batch_size * config.gradient_accumulation * sequence_length * PartialState().num_processes
    return Curve(
        teacher,
        student,
        pair,
        control.rank,
        learning_rate=control.learning_rate or curve_learning_rate(pair.large["hidden"], tokens / step),
        tokens=tokens,
        together=control.together and config.tokens > 0,
        points=points,
        seed=config.seed,
    )
