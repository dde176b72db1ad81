"""An untrained model: a config of any family for a tokenizer, and random weights."""

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.errors import RecipeError, did_you_mean

__all__ = ["fresh_config", "fresh_model"]


def fresh_config(
    architecture: str,
    tokenizer: Tokenizer,
    fields: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    *,
    key: str,
) -> PreTrainedConfig:
    """Returns a family's config with a tokenizer's vocabulary size and special tokens.

    Args:
        architecture: The ``model_type``.
        tokenizer: The one that the model will read.
        fields: What the recipe says, which comes before anything else.
        base: Fields to take where neither recipe nor tokenizer says; None is the family's defaults.
        key: Where `fields` stands in the recipe, for messages.

    Raises:
        RecipeError: The fields are none of the family's config, or the vocabulary is smaller than the tokenizer's. A
            larger one is allowed: its last rows belong to no token.
        UnknownArchitectureError: The family has no axis map; said here, before hours are spent.
    """
    roles = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        values = {**(base or {}), "vocab_size": len(tokenizer), **roles, **fields}
        config = AutoConfig.for_model(architecture, **values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise RecipeError(f"{key} is no {architecture} config: {error}") from error
    declared = {**type(config)().to_dict(), **type(config).attribute_map}
    if unknown := [name for name in fields if name not in declared and not hasattr(type(config), name)]:
        raise RecipeError(
            f"{key} has {unknown[0]!r}, which is no field of a {architecture} config."
            + did_you_mean(unknown[0], declared)
        )
    axis_map_for(config)
    if (rows := config.get_text_config().vocab_size) < len(tokenizer):
        raise RecipeError(f"{key}.vocab_size is {rows}, and the tokenizer has {len(tokenizer)} tokens; leave it out")
    return config


def fresh_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Returns a model in float32 with random weights, the same for the same seed; seeds torch."""
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model
