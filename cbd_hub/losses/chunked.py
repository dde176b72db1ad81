"""Losses of full-vocabulary logits that never exist all at once: a head applied to a chunk of tokens at a time.

A batch of 8 x 512 tokens over 49,152 words is 0.8 GB of float32 logits, and a student, a teacher and their softmaxes
need several such tensors. Yet a loss is a sum over tokens, so it can be walked a hundred tokens at a time. For a
linear head each chunk's gradient is taken while its logits exist, and nothing has to be kept or computed again for the
backward pass. Any other head is walked with activation checkpointing, which costs a second forward pass of the head.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = ["Head", "Objective", "head_sums", "wide_dtype"]


Head = Callable[[Tensor], Tensor]
"""A language-model head: maps hidden states (..., H) to logits (..., V)."""


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


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
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


class _LinearHeadSums(torch.autograd.Function):
    """The sums for a linear head; gradients are taken chunk by chunk in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, objective: Objective
    ) -> tuple[Tensor, ...]:
        """Args: hidden (N, H), weight (V, H), bias (V,). Returns the loss and its terms."""
        inputs = (hidden, weight, bias)
        gradients = [
            torch.zeros_like(x, dtype=wide_dtype(x.dtype)) if x is not None and needed else None
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
