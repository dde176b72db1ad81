"""One call of a model for the losses: what its head reads, and all hidden states."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.func import functional_call
from transformers import PreTrainedModel

from cbd_hub.errors import RecipeError
from cbd_hub.losses.chunked import Head
from cbd_hub.manifest.index_maps import IndexMap

__all__ = ["head_of", "hidden_and_head", "kept_hidden", "run_model", "unhooked", "with_weights"]


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
    kept_units = torch.from_numpy(index_map.order("hidden", None, large_hidden)[:small_hidden].copy())
    return None if torch.equal(kept_units, torch.arange(large_hidden)) else kept_units


# Config fields by which families alter logits behind the head (Gemma 2, Cohere, Granite, Falcon-H1 and others).
_LOGIT_FIELDS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)


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


def with_weights(
    model: PreTrainedModel, weights: Mapping[str, Tensor], compute: Callable[[PreTrainedModel], Tensor]
) -> Tensor:
    """Returns what a function makes of a model that has other weights for this call, differentiable in them.

    Args:
        model: A shape; its own weights may lie on the meta device.
        weights: Parameter name → tensor, tied ones once.
        compute: Called with the model.
    """
    named = {f"model.{name}": tensor for name, tensor in weights.items()}
    result: Tensor = functional_call(_Inside(model), named, (compute,))
    return result


class _Inside(nn.Module):
    """Calls a function with a model, as part of a module's call."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[PreTrainedModel], Tensor]) -> Tensor:
        return compute(self.model)
