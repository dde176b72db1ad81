"""Distillation between models with different vocabularies.

Where student and teacher have read the same bytes (:mod:`cbd_hub.token_groups`), what they expect next is compared on
outcomes that both can express:

- every token that both vocabularies have (:class:`cbd_hub.vocabulary.Pairs`);
- the string G that follows, where it takes a side more than one token: a model's mass of G is the product of the
  probabilities of its tokens, and is taken out of the outcome that its first token belongs to;
- the rest.

Both coarse distributions sum to 1, so any :class:`cbd_hub.divergences.Divergence` applies; with one vocabulary it is
the plain one. What the rest lumps together can be compared by shape: Universal Logit Distillation (Boizard et al.,
2024, arXiv:2402.12030) takes the L1 distance between sorted probabilities.

Logits are made a chunk of positions at a time and again for the backward pass. The chunks are walked from the last to
the first, so that the probabilities of a group's later tokens are known where the group starts, and a position's
logits are made once in the forward pass.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cbd_hub.divergences import Divergence, DivergenceName
from cbd_hub.errors import RecipeError
from cbd_hub.losses import Head
from cbd_hub.token_groups import TokenAligner
from cbd_hub.vocabulary import Pairs

__all__ = ["Across", "CrossTerms", "cross_vocabulary_loss"]

_FLOOR = math.log(torch.finfo(torch.float32).tiny)  # the log of the least mass that an outcome has, on both sides


@dataclass(frozen=True)
class Across:
    """What a trainer needs to compare a student with a teacher of another vocabulary."""

    aligner: TokenAligner
    """Writes the teacher's tokens of a batch beside the student's."""
    pairs: Pairs
    """The tokens that both have."""
    uld: float = 0.0
    """Weight of the distance between the tokens that only one has."""


class CrossTerms(NamedTuple):
    """What :func:`cross_vocabulary_loss` returns, per item."""

    loss: Tensor
    """``ce_weight * ce + kl_weight * kl + uld_weight * uld``, the only differentiable member. Scalar."""
    ce: Tensor
    """Cross-entropy with the labels in nats, unweighted. Scalar, detached."""
    kl: Tensor
    """T^2 times the divergence of the coarse distributions in nats, unweighted. Scalar, detached."""
    uld: Tensor
    """L1 distance between sorted probabilities, unweighted; 0 where its weight is 0. Scalar, detached."""
    num_tokens: int
    """Predicted student tokens in this batch."""


def cross_vocabulary_loss(
    student_hidden: Tensor,
    student_head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    labels: Tensor,
    student_ids: Tensor,
    teacher_ids: Tensor,
    groups: Tensor,
    pairs: Pairs,
    *,
    ce: float = 1.0,
    kl: float = 1.0,
    uld: float = 0.0,
    divergence: DivergenceName = "forward_kl",
    skew: float = 0.1,
    temperature: float = 1.0,
    num_items: int | Tensor | None = None,
    chunk_tokens: int = 256,
) -> CrossTerms:
    """Cross-entropy with the labels plus divergences from a teacher with another vocabulary.

        loss = (ce * sum over predicted tokens of CE
                + sum over groups of (kl * T^2 * D(teacher_T, student_T) + uld * L1_T)) / num_items

    The probabilities of the group terms are softened by T before they are made coarse. A mass below 1.2e-38 counts as
    that much. No gradient reaches the teacher.

    Args:
        student_hidden: (B, S, Hs).
        student_head: maps (N, Hs) to (N, V).
        teacher_hidden: (B, T, Ht).
        teacher_head: maps (N, Ht) to (N, W).
        labels: (B, S) not shifted; -100 is ignored.
        student_ids: (B, S) what the student read.
        teacher_ids: (B, T) what the teacher read.
        groups: (G, 5) of :meth:`cbd_hub.token_groups.TokenAligner.align`.
        pairs: the tokens that both have.
        ce: weight of the cross-entropy.
        kl: weight of the divergence.
        uld: weight of the L1 distance between the sorted probabilities of the tokens without a partner, which costs
            two sorts of them per group.
        divergence: one of those of :meth:`cbd_hub.divergences.Divergence.named`.
        skew: see there.
        temperature: T, softens both sides' distributions in the group terms.
        num_items: what the sums are divided by; by default the predicted student tokens of this batch.
        chunk_tokens: positions whose logits exist at once; memory is a dozen times ``chunk_tokens * V * 4`` bytes.

    Raises:
        RecipeError: shapes disagree, a number is out of range, a group holds a token that is not predicted, or a head
            gives fewer logits than the vocabulary has tokens.

    B batch, S / T tokens of a row, G groups, N tokens of a chunk, V / W student's / teacher's vocabulary.
    """
    for name, hidden, ids in (("student", student_hidden, student_ids), ("teacher", teacher_hidden, teacher_ids)):
        if hidden.shape[:-1] != ids.shape:
            raise RecipeError(f"{name}_hidden {tuple(hidden.shape)} and {name}_ids {tuple(ids.shape)} differ.")
    if labels.shape != student_ids.shape or len(labels) != len(teacher_ids):
        raise RecipeError("labels and student_ids must have one shape, and as many rows as teacher_ids.")
    if groups.ndim != 2 or groups.shape[1] != 5:
        raise RecipeError(f"groups must be (G, 5), as TokenAligner.align returns them, got {tuple(groups.shape)}.")
    if temperature <= 0 or chunk_tokens < 1:
        raise RecipeError(
            f"temperature must be above 0 and chunk_tokens at least 1, got {temperature} and {chunk_tokens}."
        )
    measure = Divergence.named(divergence, skew)
    valid = labels[:, 1:] != -100
    flat_hidden, flat_labels = student_hidden[:, :-1][valid], labels[:, 1:][valid]
    flat_ids = student_ids[:, 1:][valid]
    flat = (valid.flatten().cumsum(0) - 1).view(valid.shape).masked_fill(~valid, -1)
    row, start, length, teacher_start, teacher_length = groups.to(labels.device).unbind(1)
    at, last = flat[row, start], flat[row, start + length - 1]
    if bool(((at < 0) | (last - at != length - 1)).any()):
        raise RecipeError("A group holds a token whose label is -100; give TokenAligner.align the same labels.")
    order = at.argsort()
    row, at, length = row[order], at[order], length[order]
    teacher_start, teacher_length = teacher_start[order], teacher_length[order]
    teacher_first = teacher_ids[row, teacher_start + 1]
    several = (length > 1) | (teacher_length > 1)
    # The teacher's tokens of a group after its first.
    following = _following(row, teacher_start, teacher_length)
    teacher = teacher_hidden.detach()
    chains = teacher_hidden.new_zeros(len(row), dtype=_wide(teacher.dtype))
    with torch.no_grad():
        for part in range(0, len(following[0]), chunk_tokens):
            g, r, p = (x[part : part + chunk_tokens] for x in following)
            z = _log_probabilities(teacher_head(teacher[r, p]), temperature)
            chains.index_add_(0, g, z.gather(1, teacher_ids[r, p + 1][:, None])[:, 0].to(chains.dtype))

    device = labels.device
    ours, theirs = pairs.student_ids.to(device), pairs.teacher_ids.to(device)
    reach = int(length.max()) - 1 if len(length) else 0
    starts = list(range(0, max(len(flat_labels), 1), chunk_tokens))
    bounds = torch.searchsorted(at, torch.tensor([*starts, len(flat_labels)], device=device)).tolist()

    def chunk(index: int, tail: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """CE, divergence and L1 summed over a chunk; log-probabilities (n,) of its tokens at T."""
        rows = slice(starts[index], starts[index] + chunk_tokens)
        logits = student_head(flat_hidden[rows])
        logits = logits.to(_wide(logits.dtype))
        log_q = _log_probabilities(logits, temperature)
        plain = log_q if temperature == 1 else torch.log_softmax(logits, -1)
        entropy = F.nll_loss(plain, flat_labels[rows], reduction="sum")
        own = log_q.gather(1, flat_ids[rows][:, None])[:, 0]
        zero = entropy.new_zeros(())
        g = slice(bounds[index], bounds[index + 1])
        if g.start == g.stop:
            return entropy, zero, zero, own
        here = at[g] - rows.start
        chain = _chained(torch.cat([own, tail]), here, length[g], reach)
        with torch.no_grad():
            log_p = _log_probabilities(teacher_head(teacher[row[g], teacher_start[g]]), temperature).to(log_q.dtype)
        whole = len(here) == len(log_q)  # then they are all of the chunk's positions, in order
        log_q = log_q if whole else log_q[here]
        student_side = _Side(log_q, ours, flat_ids[at[g]], chain, several[g])
        teacher_side = _Side(log_p, theirs, teacher_first[g], chains[g].to(log_p.dtype), several[g])
        has_rest = bool(len(student_side.others) + len(teacher_side.others))
        p, p_extra = teacher_side.coarse(has_rest)
        q, q_extra = student_side.coarse(has_rest)
        distance = measure.value(p, q) + measure.value(p_extra, q_extra)
        gap = _sorted_gap(teacher_side.alone(), student_side.alone()) if uld and has_rest else zero
        return entropy, temperature**2 * distance, gap, own

    sums, tail = [], student_hidden.new_zeros(0, dtype=_wide(student_hidden.dtype))
    for index in reversed(range(len(starts))):
        *terms, own = checkpoint(chunk, index, tail, use_reentrant=False)
        sums.append(terms)
        tail = torch.cat([own, tail])[:reach]
    entropy, distance, gap = (torch.stack(terms).sum() for terms in zip(*sums, strict=True))
    items = max(len(flat_labels), 1) if num_items is None else num_items
    loss = (ce * entropy + kl * distance + uld * gap) / items
    return CrossTerms(
        loss, entropy.detach() / items, distance.detach() / items, gap.detach() / items, len(flat_labels)
    )


class _Side:
    """One model's distributions (g, V) at the starts of g groups, seen through the paired ids (M,)."""

    def __init__(self, log_p: Tensor, ids: Tensor, first: Tensor, chain: Tensor, several: Tensor) -> None:
        if len(ids) > log_p.shape[-1] or int(ids.max()) >= log_p.shape[-1]:
            raise RecipeError(f"A head gives {log_p.shape[-1]} logits, and its vocabulary has more tokens.")
        self.log_p, self.ids, self.first, self.chain, self.several = log_p, ids, first, chain, several
        self.slots = torch.full(log_p.shape[-1:], -1, dtype=torch.int64, device=log_p.device)
        self.slots[ids] = torch.arange(len(ids), device=log_p.device)
        self.others = (self.slots < 0).nonzero()[:, 0]

    def coarse(self, has_rest: bool) -> tuple[Tensor, Tensor]:
        """Log masses of the paired tokens (g, M), and of G and the rest (g, 1 or 2)."""
        matched = self.log_p.index_select(1, self.ids)
        rest = self.log_p.new_full(self.first.shape, _FLOOR)
        if len(self.others):
            rest = self.log_p.index_select(1, self.others).logsumexp(-1)
        slot = self.slots[self.first]
        in_rest, column = slot < 0, slot.clamp(min=0)[:, None]
        before = matched.gather(1, column)[:, 0]
        whole = self.log_p.gather(1, self.first[:, None])[:, 0] + self.chain
        left = _log_difference(torch.where(in_rest, rest, before), whole)
        matched = matched.scatter(1, column, torch.where(self.several & ~in_rest, left, before)[:, None])
        rest = torch.where(self.several & in_rest, left, rest)
        group = whole.masked_fill(~self.several, _FLOOR)
        extra = torch.stack([group, rest] if has_rest else [group], 1)
        return matched.clamp(min=_FLOOR), extra.clamp(min=_FLOOR)

    def alone(self) -> Tensor:
        """Probabilities (g, V - M) of the tokens without a partner, falling."""
        return self.log_p.index_select(1, self.others).exp().sort(-1, descending=True).values


def _sorted_gap(a: Tensor, b: Tensor) -> Tensor:
    """The L1 distance between rows of falling numbers, the shorter followed by zeros; a scalar."""
    width = max(a.shape[1], b.shape[1])
    return (F.pad(a, (0, width - a.shape[1])) - F.pad(b, (0, width - b.shape[1]))).abs().sum()


def _log_difference(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``log(a - b)`` for b up to a; the floor, without a gradient, where nothing is left."""
    least = -torch.finfo(log_a.dtype).eps
    gap = log_b - log_a
    left = log_a + torch.log(-torch.expm1(gap.clamp(max=least)))
    return torch.where(gap < least, left, _FLOOR)


def _chained(own: Tensor, here: Tensor, length: Tensor, reach: int) -> Tensor:
    """Sums (g,) of log-probabilities of the tokens after each group's first."""
    steps = torch.arange(1, reach + 1, device=own.device)
    places = (here[:, None] + steps).clamp(max=len(own) - 1)
    return own[places].masked_fill(steps >= length[:, None], 0.0).sum(1)


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    """``log_softmax(logits / T)`` in float32 (float64 for float64)."""
    logits = logits.to(_wide(logits.dtype))
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the loss arithmetic: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _following(row: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Group, row and position of every place that predicts a token of a group after its first."""
    group = torch.arange(len(row), device=row.device).repeat_interleave(length - 1)
    ends = (length - 1).cumsum(0)
    step = torch.arange(len(group), device=row.device) - (ends - length + 1)[group] + 1
    return group, row[group], start[group] + step
