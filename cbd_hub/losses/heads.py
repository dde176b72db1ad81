"""One call of a model for the losses: what its head reads, and all hidden states."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from cbd_hub.losses.distillation import Head, hidden_and_head
from cbd_hub.manifest.index_maps import IndexMap

__all__ = ["head_of", "kept_hidden", "run_model", "unhooked"]


def head_of(model: PreTrainedModel) -> Head:
    """Returns the head that turns ``hidden_states[-1]`` into logits, or an identity where that is not all (soft
    capping, scaling): then the model's own logits are used."""
    was_training, token = model.training, torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.eval()
    with torch.no_grad():
        hidden, head = hidden_and_head(model, token)
        last = model(input_ids=token, use_cache=False, output_hidden_states=True).hidden_states[-1]
    model.train(was_training)
    plain = "logits_to_keep" in signature(type(model).forward).parameters
    return head if plain and last.shape == hidden.shape and torch.allclose(last, hidden) else nn.Identity()


def unhooked(head: Head) -> Head:
    """The same linear head without the hooks of FSDP 2, which gathered its weight for this forward already.

    They count the calls of a group of modules, and expect one.
    """
    if not (isinstance(head, nn.Linear) and isinstance(head, FSDPModule)):
        return head
    plain = nn.Linear(1, 1, bias=False, device="meta")
    plain.weight, plain.bias = head.weight, head.bias
    return plain


def run_model(
    forward: Callable[..., Any], head: Head, batch: Mapping[str, Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Calls a whole model; returns what `head` reads, (B, S, H), and all hidden states."""
    whole = isinstance(head, nn.Identity)
    few = {} if whole else {"logits_to_keep": 1}
    outputs = forward(**batch, use_cache=False, output_hidden_states=True, **few)
    return outputs.logits if whole else outputs.hidden_states[-1], outputs.hidden_states


def kept_hidden(index_map: IndexMap, small_hidden: int, large_hidden: int) -> Tensor | None:
    """Returns the teacher's hidden coordinates that the student kept, (small_hidden,) int64; None for all in order."""
    kept = torch.from_numpy(index_map.order("hidden", None, large_hidden)[:small_hidden].copy())
    return None if torch.equal(kept, torch.arange(large_hidden)) else kept
