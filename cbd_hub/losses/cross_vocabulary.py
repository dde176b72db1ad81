"""Distillation between models with different vocabularies.

Where student and teacher have read the same bytes (:mod:`cbd_hub.text.token_groups`), what they expect next is
compared on outcomes that both can express:

- every token that both vocabularies have (:class:`cbd_hub.text.vocabulary.Pairs`);
- the string G that follows, where it takes a side more than one token: a model's mass of G is the product of the
  probabilities of its tokens, and is taken out of the outcome that its first token belongs to;
- the rest.

Both coarse distributions sum to 1, so any :class:`cbd_hub.losses.divergences.Divergence` applies; with one vocabulary
it is the plain one. What the rest lumps together can be compared by shape: Universal Logit Distillation (Boizard et
al., 2024, arXiv:2402.12030) takes the L1 distance between sorted probabilities.

Logits are made a chunk of positions at a time. Chunks end where groups end, so all that a group needs is there at
once, and for a linear head the chunk's gradients are taken while its logits exist: each head runs once a position. Any
other head is walked with activation checkpointing, which runs both once more.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cbd_hub.errors import RecipeError
from cbd_hub.losses.chunked import Head, head_sums
from cbd_hub.losses.divergences import Divergence
from cbd_hub.losses.names import DivergenceName
from cbd_hub.text.token_groups import TokenAligner
from cbd_hub.text.vocabulary import Pairs

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
    chunk_tokens: int = 128,
) -> CrossTerms:
    """Cross-entropy with the labels plus divergences from a teacher with another vocabulary.

        loss = (ce * sum over predicted tokens of CE
                + sum over groups of (kl * T^2 * D(teacher_T, student_T) + uld * L1_T)) / num_items

    The probabilities of the group terms are softened by T before they are made coarse. A mass below 1.2e-38 counts as
    that much. So where every token of the student has a partner and not every one of the teacher's, the student's rest
    is that floor, and the forward KL is larger by ``p log(p / 1.2e-38)`` a group for the teacher's rest p: a constant,
    without a gradient. Logits behind the last token of a tokenizer, which padded embeddings have, belong to the rest.
    No gradient reaches the teacher.

    Args:
        student_hidden: (B, S, Hs).
        student_head: maps (N, Hs) to (N, V).
        teacher_hidden: (B, T, Ht).
        teacher_head: maps (N, Ht) to (N, W).
        labels: (B, S) not shifted; -100 is ignored.
        student_ids: (B, S) what the student read.
        teacher_ids: (B, T) what the teacher read.
        groups: (G, 5) of :meth:`cbd_hub.text.token_groups.TokenAligner.align`.
        pairs: the tokens that both have.
        ce: weight of the cross-entropy.
        kl: weight of the divergence.
        uld: weight of the L1 distance between the sorted probabilities of the tokens without a partner, which costs
            two sorts of them per group.
        divergence: one of those of :meth:`cbd_hub.losses.divergences.Divergence.named`.
        skew: see there.
        temperature: T, softens both sides' distributions in the group terms.
        num_items: what the sums are divided by; by default the predicted student tokens of this batch.
        chunk_tokens: positions whose logits exist at once (a longer group is not cut); memory is a dozen times
            ``chunk_tokens * V * 4`` bytes.

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
    comparison = _Comparison(
        labels=flat_labels,
        ids=flat_ids,
        at=at,
        length=length,
        several=(length > 1) | (teacher_length > 1),
        ours=pairs.student_ids.to(device),
        theirs=pairs.teacher_ids.to(device),
        teacher_hidden=teacher[row, teacher_start],
        teacher_first=teacher_ids[row, teacher_start + 1],
        teacher_chain=chains,
        teacher_head=teacher_head,
        measure=measure,
        weights=(ce, kl, uld),
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    loss, *sums = head_sums(flat_hidden, student_head, comparison)
    items = max(len(flat_labels), 1) if num_items is None else num_items
    entropy, distance, gap = (x.detach() / items for x in sums)
    return CrossTerms(loss / items, entropy, distance, gap, len(flat_labels))


@dataclass(frozen=True, eq=False)
class _Comparison:
    """What the student's logits are compared with: N predicted tokens and G groups of them, walked in chunks."""

    labels: Tensor  # (N,)
    ids: Tensor  # (N,) what the student read
    at: Tensor  # (G,) places among the tokens where groups start, rising
    length: Tensor  # (G,) tokens of each
    several: Tensor  # (G,) whether a side takes more than one
    ours: Tensor  # (M,) paired ids
    theirs: Tensor  # (M,)
    teacher_hidden: Tensor  # (G, Ht) where groups start
    teacher_first: Tensor  # (G,) the teacher's first token of each
    teacher_chain: Tensor  # (G,) log-probability of its further ones
    teacher_head: Head
    measure: Divergence
    weights: tuple[float, float, float]
    temperature: float
    chunk_tokens: int

    def chunks(self) -> Iterator[slice]:
        """Slices of the tokens that cut no group in two. At least one, possibly empty, so that there are gradients."""
        starts, ends = self.at.tolist(), (self.at + self.length).tolist()
        begin = 0
        while True:
            end = min(begin + self.chunk_tokens, len(self.labels))
            last = bisect_left(starts, end) - 1  # the last group that starts before the end
            if last >= 0 and ends[last] > end:
                end = starts[last] if starts[last] > begin else ends[last]
            yield slice(begin, end)
            if (begin := end) >= len(self.labels):
                return

    def sums(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted sum, CE, divergence and L1 over some rows; differentiable in `logits` (n, V)."""
        logits = logits.to(_wide(logits.dtype))
        log_q = _log_probabilities(logits, self.temperature)
        plain = log_q if self.temperature == 1 else torch.log_softmax(logits, -1)
        ce = F.nll_loss(plain, self.labels[rows], reduction="sum")
        distance, gap = self._distance(log_q, rows)
        return self.weights[0] * ce + self.weights[1] * distance + self.weights[2] * gap, ce, distance, gap

    def sums_and_gradient(self, logits: Tensor, rows: slice) -> tuple[tuple[Tensor, ...], Tensor]:
        """The same, and the weighted sum's gradient in the logits."""
        with torch.enable_grad():
            sums = self.sums(logits.requires_grad_(), rows)
            (gradient,) = torch.autograd.grad(sums[0], logits)
        return sums, gradient

    def _distance(self, log_q: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Divergence and L1 over the groups of some rows, from their log-probabilities (n, V)."""
        zero = log_q.new_zeros(())
        first, last = torch.searchsorted(self.at, self.at.new_tensor([rows.start, rows.stop])).tolist()
        g = slice(first, last)
        if first == last:
            return zero, zero
        here, several = self.at[g] - rows.start, self.several[g]
        own = log_q.gather(1, self.ids[rows][:, None])[:, 0]
        chain = _chained(own, here, self.length[g])
        with torch.no_grad():
            log_p = _log_probabilities(self.teacher_head(self.teacher_hidden[g]), self.temperature).to(log_q.dtype)
        log_q = log_q if len(here) == len(log_q) else log_q[here]  # the same: they are all, in order
        student = _Side(log_q, self.ours, self.ids[rows][here], chain, several)
        teacher = _Side(log_p, self.theirs, self.teacher_first[g], self.teacher_chain[g].to(log_p.dtype), several)
        has_rest = bool(len(student.others) + len(teacher.others))
        p, p_extra = teacher.coarse(has_rest)
        q, q_extra = student.coarse(has_rest)
        distance = self.measure.value(p, q) + self.measure.value(p_extra, q_extra)
        gap = _sorted_gap(teacher.alone(), student.alone()) if self.weights[2] and has_rest else zero
        return self.temperature**2 * distance, gap


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


def _chained(own: Tensor, here: Tensor, length: Tensor) -> Tensor:
    """Sums (g,) of log-probabilities of the tokens after each group's first."""
    steps = torch.arange(1, int(length.max()), device=own.device)
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
