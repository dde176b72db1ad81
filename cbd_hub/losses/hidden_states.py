"""The distance between hidden states of a student and of its teacher, layer by layer."""

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import RecipeError
from cbd_hub.losses.chunked import wide_dtype

__all__ = ["ends_of_blocks", "hidden_state_loss"]


def ends_of_blocks(kept_layers: Sequence[int], count: int) -> list[int]:
    """Returns, for every kept layer, the last layer of the block that it stands for.

    The kept layers k_0 < k_1 < ... cut ``count`` layers into blocks: layer j stands for the layers k_j to k_{j+1} - 1,
    and the last block ends with the teacher.
    """
    return [following - 1 for following in kept_layers[1:]] + [count - 1]


def hidden_state_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    kept_units: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    kind: Literal["mse", "cosine"] = "mse",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """Distance between matching hidden states, normalized per token, meaned over layers and tokens.

    ``"mse"`` is ``|s - t|^2 / |t|^2`` and ``"cosine"`` is ``1 - cos(s, t)``, in float32. The normalization is
    per token because the first position of a sequence carries activations a thousand times those of the
    others and would otherwise be all that is learned. No gradient reaches the teacher.

    Args:
        student_states: L tensors (B, S, Hs).
        teacher_states: L tensors (B, S, Ht), matched one to one.
        kept_units: (Hs,) the teacher's hidden coordinates that the student kept, in the student's order; None when
            Ht = Hs.
        mask: (B, S), false where a token is padding.
        kind: "mse" or "cosine".
        num_items: tokens to divide by (see :func:`distillation_loss`); by default the unmasked ones of this
            batch.

    Raises:
        RecipeError: the numbers of layers or the widths disagree, there is no layer, or `kind` is unknown.

    L layers compared, B batch, S sequence, Hs / Ht hidden size of student / teacher.
    """
    if not student_states or len(student_states) != len(teacher_states):
        raise RecipeError(
            f"Got {len(student_states)} student and {len(teacher_states)} teacher states; pass them in pairs."
        )
    if kind not in ("mse", "cosine"):
        raise RecipeError(f"Unknown kind of hidden-state loss {kind!r}; use 'mse' or 'cosine'.")
    total = student_states[0].new_zeros((), dtype=wide_dtype(student_states[0].dtype))
    for student, teacher in zip(student_states, teacher_states, strict=True):
        s = student.to(wide_dtype(student.dtype))
        t = teacher.detach().to(s.dtype)
        t = t if kept_units is None else t.index_select(-1, kept_units)
        if s.shape != t.shape:
            raise RecipeError(
                f"A student state {tuple(s.shape)} meets a teacher state {tuple(t.shape)}"
                f"{'' if kept_units is None else ' (after `kept_units`)'}; "
                "pass the `kept_units` that made the student."
            )
        if kind == "mse":
            distance = (s - t).square().sum(-1) / (t.square().sum(-1) + 1e-6)
        else:
            distance = 1 - F.cosine_similarity(s, t, dim=-1)
        total = total + (distance if mask is None else distance.masked_fill(mask == 0, 0.0)).sum()
    if num_items is None:
        tokens = student_states[0][..., 0].numel() if mask is None else mask.count_nonzero().clamp(min=1)
    else:
        tokens = num_items
    return total / (tokens * len(student_states))
