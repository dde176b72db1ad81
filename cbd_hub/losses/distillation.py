"""Distillation losses: cross-entropy with the labels, and a divergence from a teacher.

The gradient of each chunk of tokens (:mod:`cbd_hub.losses.chunked`) has a closed form,

    d CE / d logits = softmax(z) - onehot(label)        d KL / d logits = (softmax(z/T) - softmax(t/T)) / T,

and :mod:`cbd_hub.losses.divergences` has those of the other divergences.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import RecipeError
from cbd_hub.losses.chunked import Head, head_sums, wide_dtype
from cbd_hub.losses.divergences import Divergence
from cbd_hub.losses.names import DivergenceName

__all__ = ["LossTerms", "distillation_loss"]


class LossTerms(NamedTuple):
    """What :func:`distillation_loss` returns. All terms are in nats per item."""

    loss: Tensor
    """The weighted sum ``ce_weight * ce + kl_weight * kl``, the only differentiable member. Scalar."""
    ce: Tensor
    """Cross-entropy with the labels, unweighted. Scalar, detached."""
    kl: Tensor
    """T^2 times the chosen divergence, by default KL(teacher || student), unweighted; 0 without a teacher. Scalar,
    detached."""
    num_tokens: int
    """Predicted tokens in this batch (labels that are not -100, less the first column)."""


def distillation_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor | None,
    teacher_head: Head | None,
    labels: Tensor,
    *,
    ce: float = 1.0,
    kl: float = 1.0,
    divergence: DivergenceName = "forward_kl",
    skew: float = 0.1,
    temperature: float = 1.0,
    num_items: int | Tensor | None = None,
    chunk_tokens: int = 128,
) -> LossTerms:
    """Cross-entropy with the labels plus a divergence from a teacher, both per predicted token.

        loss = sum over predicted tokens of (ce * CE + kl * T^2 * D(teacher_T, student_T)) / num_items

    after Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), whose T^2 keeps the gradient's
    size independent of T. D is KL(teacher || student) unless `divergence` says otherwise. It is summed over the
    vocabulary, never averaged, so both terms are in nats and comparable. The softmaxes are computed in float32
    (float64 for float64 input) whatever the dtype of the model. Only positions that predict a label are
    computed. No gradient reaches the teacher.

    Args:
        student_hidden: (B, S, Hs).
        student_head: maps (N, Hs) to (N, V). An ``nn.Linear``, tied or not, takes the fast path.
        teacher_hidden: (B, S, Ht), or None for cross-entropy alone.
        teacher_head: maps (N, Ht) to (N, V), or None.
        labels: (B, S) token ids, not shifted: position t predicts ``labels[:, t + 1]``. -100 is ignored.
        ce: weight of the cross-entropy.
        kl: weight of the divergence, whichever it is.
        divergence: one of those of :meth:`cbd_hub.losses.divergences.Divergence.named`, which has their formulas.
        skew: share of the other distribution that the two skewed divergences mix in, in [0, 1).
        temperature: T, softens both distributions of the divergence.
        num_items: predicted tokens of the whole optimizer step, over all accumulated micro batches (and
            devices); then the summed gradient does not depend on how the step is cut. By default those of
            this batch.
        chunk_tokens: tokens whose logits exist at once; memory is about eight times ``chunk_tokens * V * 4`` bytes.
            Fewer than 64 make the head's matrix products slower.

    Raises:
        RecipeError: shapes or vocabularies disagree, one teacher argument is missing, a number is out of range,
            or there is no such divergence.

    B batch, S sequence, N tokens of a chunk, Hs / Ht hidden size of student / teacher, V vocabulary.
    """
    if (teacher_hidden is None) != (teacher_head is None):
        raise RecipeError("teacher_hidden and teacher_head go together: pass both, or None for both.")
    for name, hidden in (("student_hidden", student_hidden), ("teacher_hidden", teacher_hidden)):
        if hidden is not None and hidden.shape[:-1] != labels.shape:
            raise RecipeError(f"{name} {tuple(hidden.shape)} and labels {tuple(labels.shape)} differ in (B, S).")
    if temperature <= 0 or chunk_tokens < 1:
        raise RecipeError(
            f"temperature must be above 0 and chunk_tokens at least 1, got {temperature} and {chunk_tokens}."
        )

    targets = labels[:, 1:]
    valid = targets != -100
    hidden = student_hidden[:, :-1][valid]
    objective = _Objective(
        labels=targets[valid],
        teacher_hidden=None if teacher_hidden is None else teacher_hidden[:, :-1][valid].detach(),
        teacher_head=teacher_head,
        ce=ce,
        kl=kl,
        divergence=Divergence.named(divergence, skew),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    sums = head_sums(hidden, student_head, objective)
    total, ce_sum, kl_sum = sums
    items = max(len(hidden), 1) if num_items is None else num_items
    return LossTerms(total / items, ce_sum.detach() / items, kl_sum.detach() / items, len(hidden))


@dataclass(frozen=True)
class _Objective:
    """What the student's logits are compared with: N tokens, walked in chunks."""

    labels: Tensor  # (N,)
    teacher_hidden: Tensor | None  # (N, Ht)
    teacher_head: Head | None
    ce: float
    kl: float
    divergence: Divergence
    temperature: float
    chunk_tokens: int

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens. At least one, possibly empty, so that a fully masked batch has gradients too."""
        for start in range(0, max(len(self.labels), 1), self.chunk_tokens):
            yield slice(start, start + self.chunk_tokens)

    @torch.no_grad()
    def teacher_log_probabilities(self, rows: slice, logits: Tensor) -> Tensor | None:
        """The teacher's ``log_softmax(t / T)`` (n, V) for some rows, in the dtype of the loss arithmetic."""
        if self.teacher_hidden is None or self.teacher_head is None:
            return None
        teacher = self.teacher_head(self.teacher_hidden[rows])
        if teacher.shape[-1] != logits.shape[-1]:
            raise RecipeError(
                f"The student's vocabulary has {logits.shape[-1]} entries, the teacher's {teacher.shape[-1]}. KL "
                "needs one vocabulary: use one tokenizer, and resize a padded embedding to the other's size."
            )
        return self.log_probabilities(teacher.to(wide_dtype(logits.dtype)))

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """``log_softmax(logits / T)``, both (n, V)."""
        return torch.log_softmax(logits if self.temperature == 1 else logits / self.temperature, -1)

    def sums(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum, CE and divergence summed over some rows; differentiable in `logits` (n, V)."""
        target = self.teacher_log_probabilities(rows, logits)
        logits = logits.to(wide_dtype(logits.dtype))
        ce = F.cross_entropy(logits, self.labels[rows], reduction="sum")
        kl = ce.new_zeros(())
        if target is not None:
            kl = self.temperature**2 * self.divergence.value(target, self.log_probabilities(logits))
        return self.ce * ce + self.kl * kl, ce, kl

    def sums_and_gradient(self, logits: Tensor, rows: slice) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The same as :meth:`sums`, and the weighted sum's gradient (n, V) in the logits, in closed form."""
        target = self.teacher_log_probabilities(rows, logits)
        logits = logits.to(wide_dtype(logits.dtype))
        labels = self.labels[rows, None]
        log_p = torch.log_softmax(logits, -1)
        ce = -log_p.gather(1, labels).sum()
        log_q = log_p if self.temperature == 1 or target is None else self.log_probabilities(logits)
        kl = ce.new_zeros(())
        if target is None:
            gradient = log_p.exp().mul_(self.ce)
        else:
            value, gradient = self.divergence.value_and_gradient(target, log_q)
            kl = self.temperature**2 * value
            gradient.mul_(self.kl * self.temperature).add_(log_p.exp(), alpha=self.ce)
        gradient.scatter_add_(1, labels, gradient.new_full(labels.shape, -self.ce))
        return (self.ce * ce + self.kl * kl, ce, kl), gradient
