"""Distillation losses, chunked over tokens so that full-vocabulary logits never pile up.

A batch of 8 x 512 tokens over 49,152 words is 0.8 GB of float32 logits, and a student, a teacher and their
softmaxes need several such tensors. Yet the loss is a sum over tokens, so it can be walked a hundred
tokens at a time. For a linear head the gradient of each chunk has a closed form,

    d CE / d logits = softmax(z) - onehot(label)        d KL / d logits = (softmax(z/T) - softmax(t/T)) / T,

(:mod:`cbd_hub.losses.divergences` has those of the other divergences), so it is taken while the chunk's logits exist
and nothing has to be kept or computed again for the backward pass. Any other head is walked with activation
checkpointing, which costs a second forward pass of the head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cbd_hub.errors import RecipeError
from cbd_hub.losses.divergences import Divergence
from cbd_hub.losses.names import DivergenceName

__all__ = ["Head", "LossTerms", "Objective", "distillation_loss", "head_sums", "hidden_and_head", "hidden_state_loss"]

Head = Callable[[Tensor], Tensor]
"""A language-model head: maps hidden states (..., H) to logits (..., V)."""

# Config fields by which families alter logits behind the head (Gemma 2, Cohere, Granite, Falcon-H1 and others).
_LOGIT_FIELDS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


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


def hidden_and_head(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Tensor, Head]:
    """Runs a causal language model up to its head, so that the head can be applied to a few tokens at a time.

    ``head(hidden)`` equals ``model(input_ids).logits``. A family that alters the logits behind its head (soft
    capping, scaling) is run to the end instead: then `hidden` holds the logits and `head` returns its input.

    Args:
        model: any transformers causal language model.
        input_ids: (B, S) token ids.
        attention_mask: (B, S), 0 where a token is padding.
        position_ids: (B, S), starting again with each document of a packed block; None counts through.

    Returns:
        hidden states (B, S, H) and the head, a map from (..., H) to logits (..., V).

    Raises:
        RecipeError: the model has no output embeddings, so it is not a language model.

    B batch, S sequence, H hidden size, V vocabulary.
    """
    config = model.config.get_text_config()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    if any(getattr(config, field, None) not in (None, 1.0) for field in _LOGIT_FIELDS):
        return model(**inputs).logits, nn.Identity()
    head = model.get_output_embeddings()
    if head is None:
        raise RecipeError(f"{type(model).__name__} has no head; load it with AutoModelForCausalLM.")
    return model.base_model(**inputs).last_hidden_state, head


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


def hidden_state_loss(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    kept: Tensor | None = None,
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
        kept: (Hs,) the teacher's hidden coordinates that the student kept, in the student's order; None when
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
    total = student_states[0].new_zeros((), dtype=_wide(student_states[0].dtype))
    for student, teacher in zip(student_states, teacher_states, strict=True):
        s = student.to(_wide(student.dtype))
        t = teacher.detach().to(s.dtype)
        t = t if kept is None else t.index_select(-1, kept)
        if s.shape != t.shape:
            raise RecipeError(
                f"A student state {tuple(s.shape)} meets a teacher state {tuple(t.shape)}"
                f"{'' if kept is None else ' (after `kept`)'}; pass the `kept` that made the student."
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the loss arithmetic: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _is_plain_linear(head: Head) -> TypeGuard[nn.Linear]:
    """Whether calling `head` does nothing but ``F.linear`` (no hook, no offloading wrapper, no adapter)."""
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not head._forward_hooks
        and not head._forward_pre_hooks
    )


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
        return self.log_probabilities(teacher.to(_wide(logits.dtype)))

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """``log_softmax(logits / T)``, both (n, V)."""
        return torch.log_softmax(logits if self.temperature == 1 else logits / self.temperature, -1)

    def sums(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum, CE and divergence summed over some rows; differentiable in `logits` (n, V)."""
        target = self.teacher_log_probabilities(rows, logits)
        logits = logits.to(_wide(logits.dtype))
        ce = F.cross_entropy(logits, self.labels[rows], reduction="sum")
        kl = ce.new_zeros(())
        if target is not None:
            kl = self.temperature**2 * self.divergence.value(target, self.log_probabilities(logits))
        return self.ce * ce + self.kl * kl, ce, kl

    def sums_and_gradient(self, logits: Tensor, rows: slice) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The same as :meth:`sums`, and the weighted sum's gradient (n, V) in the logits, in closed form."""
        target = self.teacher_log_probabilities(rows, logits)
        logits = logits.to(_wide(logits.dtype))
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


class Objective(Protocol):
    """What a student's logits are judged by, a chunk of tokens at a time."""

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens; at least one, possibly empty."""

    def sums(self, logits: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """The loss over some rows, and its terms; the loss is differentiable in `logits` (n, V)."""

    def sums_and_gradient(self, logits: Tensor, rows: slice) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same, and the loss's gradient (n, V) in the logits."""


def head_sums(hidden: Tensor, head: Head, objective: Objective) -> tuple[Tensor, ...]:
    """Returns the loss of all tokens and its terms, none but the loss differentiable, from hidden states (N, H).

    Cost: logits of a chunk at a time. A linear head runs once, as gradients are taken in the forward pass; any other
        head runs again in the backward pass.
    """
    if torch.is_grad_enabled() and _is_plain_linear(head):
        linear: tuple[Tensor, ...] = _LinearHeadSums.apply(hidden, head.weight, head.bias, objective)
        return linear

    def sums(rows: slice) -> tuple[Tensor, ...]:
        return objective.sums(head(hidden[rows]), rows)

    parts = [checkpoint(sums, rows, use_reentrant=False) for rows in objective.chunks()]
    return tuple(torch.stack(terms).sum() for terms in zip(*parts, strict=True))


class _LinearHeadSums(torch.autograd.Function):
    """The sums for a linear head; gradients are taken chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, objective: Objective
    ) -> tuple[Tensor, ...]:
        """Args: hidden (N, H), weight (V, H), bias (V,). Returns the loss and its terms."""
        inputs = (hidden, weight, bias)
        gradients = [
            torch.zeros_like(x, dtype=_wide(x.dtype)) if x is not None and needed else None
            for x, needed in zip(inputs, ctx.needs_input_grad, strict=False)
        ]
        in_hidden, in_weight, in_bias = gradients
        parts = []
        for rows in objective.chunks():
            logits = F.linear(hidden[rows], weight, bias)
            sums, gradient = objective.sums_and_gradient(logits, rows)
            parts.append([x.detach() for x in sums])
            if in_bias is not None:
                in_bias += gradient.sum(0, dtype=in_bias.dtype)
            gradient = gradient.to(logits.dtype)
            if in_hidden is not None:
                in_hidden[rows] = (gradient @ weight).to(in_hidden.dtype)
            if in_weight is not None:
                if in_weight.dtype == gradient.dtype == hidden.dtype:
                    in_weight.addmm_(gradient.T, hidden[rows])  # without a second (V, H)
                else:
                    in_weight += gradient.T @ hidden[rows]
            del logits, sums, gradient  # or they would live beside the next chunk's
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        ctx.save_for_backward(*gradients)
        loss, *terms = (torch.stack(values).sum() for values in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*terms)
        return loss, *terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients that the forward pass left."""
        return *(
            None if gradient is None else (gradient * grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ), None
