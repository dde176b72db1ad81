"""Tiny real models of every supported family, with weights that give nothing away.

A freshly initialized model has norm gains of exactly one and biases of exactly zero, so a mistake in either goes
unseen: permuting ones changes nothing. :func:`tiny_model` therefore draws *every* parameter at random.
"""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

__all__ = ["FAMILIES", "VARIANTS", "tiny_config", "tiny_model"]

_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GATED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2, "intermediate_size": 80}

# Where a family has its own `head_dim` field it is set apart from hidden_size / heads (12), so that
# an attention output that only fits by accident does not pass.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GATED, "head_dim": 8},
    "mistral": {**_GATED, "head_dim": 8, "sliding_window": 5},
    "smollm3": {**_GATED, "num_hidden_layers": 4},
    "qwen2": _GATED,
    "qwen3": {**_GATED, "head_dim": 16},
    "gemma3_text": {
        **_GATED,
        "head_dim": 8,
        "query_pre_attn_scalar": 10,
        "num_hidden_layers": 4,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2": _GATED,
    "phi3": {**_GATED, "original_max_position_embeddings": 64},
    "gpt2": {**_COMMON, "n_inner": 112, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {**_COMMON, "hidden_size": 64, "intermediate_size": 112},
    "opt": {**_COMMON, "ffn_dim": 112, "dropout": 0.0},
}
"""model_type -> the config fields of its tiny member (2 to 6 layers, hidden 32 to 64)."""

_SLIDING: dict[str, Any] = {
    "num_hidden_layers": 5,
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral-tied-mha": ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 4, "sliding_window": None}),
    "smollm3-untied-biases": (
        "smollm3",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "smollm3-nope": ("smollm3", {"num_hidden_layers": 6, "no_rope_layers": [1, 0, 1, 1, 0, 1]}),
    "smollm3-nope-sliding": (
        "smollm3",
        {"no_rope_layers": [0, 1, 1, 0], "use_sliding_window": True, "sliding_window": 5},
    ),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-mha": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2-sliding": ("qwen2", _SLIDING),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"attention_bias": True}),
    "qwen3-sliding": ("qwen3", _SLIDING),
    "gemma3_text-untied-mha": ("gemma3_text", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
    "gemma3_text-biases": ("gemma3_text", {"attention_bias": True}),
    "gemma3_text-softcap": ("gemma3_text", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "olmo2-tied-mha": ("olmo2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "olmo2-biases": ("olmo2", {"attention_bias": True}),
    "phi3-tied": ("phi3", {"tie_word_embeddings": True}),
    "phi3-mha": ("phi3", {"num_key_value_heads": 4}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2-default-inner": ("gpt2", {"n_inner": None}),
    "gpt_neox-tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-no-attention-bias": ("gpt_neox", {"attention_bias": False}),
    "opt-untied": ("opt", {"tie_word_embeddings": False}),
    "opt-no-bias": ("opt", {"enable_bias": False}),
}
"""name -> (family, overrides): heads tied and untied, biases, per-layer lists, MHA, GQA and MQA."""


def tiny_config(family: str, **overrides: Any) -> PreTrainedConfig:
    """Returns the tiny config of a family, some fields replaced. Attention is "eager", the plain maths."""
    config = AutoConfig.for_model(family, **{**FAMILIES[family], **overrides})
    config._attn_implementation = "eager"
    return config


def tiny_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Returns an ``eval()`` model of a config with every parameter drawn at random.

    Matrices are N(0, 1/columns), norm gains 1 + N(0, 0.1) (Gemma stores the gain minus one) and biases
    N(0, 0.02). Values are drawn in float64 and cast once, so one seed means the same model in every dtype up to
    rounding, and torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    gain = 0.0 if config.model_type.startswith("gemma") else 1.0
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if name.endswith("bias"):
                value = 0.02 * noise
            elif parameter.ndim == 1:
                value = gain + 0.1 * noise
            else:
                value = noise * parameter.shape[-1] ** -0.5
            parameter.copy_(value)
    return model.eval()
