"""The model families that are known: one line per tensor, no code.

See :mod:`cbd_hub.axes.axis_map` for what the fields mean and docs/how-to/add-an-architecture.md for how to add a
family.
"""

from dataclasses import replace
from typing import Any

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import UnknownArchitectureError, did_you_mean

__all__ = ["AXIS_MAPS", "axis_map_for", "register_axis_map"]

_QUERY, _KV = "(kv_heads q_per_kv head_dim)", "(kv_heads head_dim)"
_ATTN, _MLP = "model.layers.*.self_attn.", "model.layers.*.mlp."
_QKV = (_ATTN + "q_proj.weight", _ATTN + "k_proj.weight", _ATTN + "v_proj.weight")
_GATE_UP = (_MLP + "gate_proj.weight", _MLP + "up_proj.weight")

_LLAMA = AxisMap(
    model_type="llama",
    tensors={
        "model.embed_tokens.weight": "vocab hidden",
        "model.layers.*.self_attn.q_proj.weight": f"{_QUERY} hidden",
        "model.layers.*.self_attn.q_proj.bias": f"{_QUERY} if attention_bias",
        "model.layers.*.self_attn.k_proj.weight": f"{_KV} hidden",
        "model.layers.*.self_attn.k_proj.bias": f"{_KV} if attention_bias",
        "model.layers.*.self_attn.v_proj.weight": f"{_KV} hidden",
        "model.layers.*.self_attn.v_proj.bias": f"{_KV} if attention_bias",
        "model.layers.*.self_attn.o_proj.weight": f"hidden {_QUERY}",
        "model.layers.*.self_attn.o_proj.bias": "hidden if attention_bias",
        "model.layers.*.mlp.gate_proj.weight": "ffn hidden",
        "model.layers.*.mlp.gate_proj.bias": "ffn if mlp_bias",
        "model.layers.*.mlp.up_proj.weight": "ffn hidden",
        "model.layers.*.mlp.up_proj.bias": "ffn if mlp_bias",
        "model.layers.*.mlp.down_proj.weight": "hidden ffn",
        "model.layers.*.mlp.down_proj.bias": "hidden if mlp_bias",
        "model.layers.*.input_layernorm.weight": "hidden",
        "model.layers.*.post_attention_layernorm.weight": "hidden",
        "model.norm.weight": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    fields={
        "hidden_size": "hidden",
        "intermediate_size": "ffn",
        "num_hidden_layers": "layers",
        "num_attention_heads": "(kv_heads q_per_kv)",
        "num_key_value_heads": "kv_heads",
        "head_dim": "head_dim",
        "vocab_size": "vocab",
    },
    norms={
        "model.layers.*.input_layernorm.weight": _QKV,
        "model.layers.*.post_attention_layernorm.weight": _GATE_UP,
        "model.norm.weight": ("lm_head.weight",),
    },
    tied={"lm_head.weight": "model.embed_tokens.weight"},
    divides={"hidden": "kv_heads q_per_kv"},
    ignored=(_ATTN + "rotary_emb.inv_freq",),
)

_MISTRAL = replace(
    _LLAMA,
    model_type="mistral",
    tensors={name: text for name, text in _LLAMA.tensors.items() if not name.endswith(".bias")},
    free=("sliding_window",),
)

_SMOLLM3 = replace(
    _LLAMA,
    model_type="smollm3",
    layer_lists=("layer_types", "no_rope_layers"),
    free=("use_sliding_window", "sliding_window", "no_rope_layer_interval", "max_window_layers", "pretraining_tp"),
)

_QWEN2 = replace(
    _MISTRAL,
    model_type="qwen2",
    tensors=_MISTRAL.tensors
    | {
        "model.layers.*.self_attn.q_proj.bias": _QUERY,
        "model.layers.*.self_attn.k_proj.bias": _KV,
        "model.layers.*.self_attn.v_proj.bias": _KV,
    },
    layer_lists=("layer_types",),
    free=("use_sliding_window", "sliding_window", "max_window_layers"),
)

_QK_NORMS = {_ATTN + "q_norm.weight": "head_dim", _ATTN + "k_norm.weight": "head_dim"}
_ATTENTION_BIAS = {name: text for name, text in _LLAMA.tensors.items() if text.endswith("attention_bias")}

_QWEN3 = replace(
    _QWEN2,
    model_type="qwen3",
    tensors=_MISTRAL.tensors | _ATTENTION_BIAS | _QK_NORMS,
    norms=_LLAMA.norms | dict.fromkeys(_QK_NORMS, ()),
)

_GEMMA3 = replace(
    _LLAMA,
    model_type="gemma3_text",
    tensors=_QWEN3.tensors
    | {
        "model.layers.*.pre_feedforward_layernorm.weight": "hidden",
        "model.layers.*.post_feedforward_layernorm.weight": "hidden",
    },
    norms={
        "model.layers.*.input_layernorm.weight": _QKV,
        "model.layers.*.post_attention_layernorm.weight": (),
        "model.layers.*.pre_feedforward_layernorm.weight": _GATE_UP,
        "model.layers.*.post_feedforward_layernorm.weight": (),
        "model.norm.weight": ("lm_head.weight",),
        **dict.fromkeys(_QK_NORMS, ()),
    },
    norm="rms+1",
    layer_lists=("layer_types",),
    scaled=("model.embed_tokens.weight",),
    free=(
        "sliding_window",
        "sliding_window_pattern",
        "_sliding_window_pattern",
        "query_pre_attn_scalar",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    ),
)

_OLMO2 = replace(
    _LLAMA,
    model_type="olmo2",
    tensors=_MISTRAL.tensors
    | _ATTENTION_BIAS
    | {
        "model.layers.*.self_attn.q_norm.weight": _QUERY,
        "model.layers.*.self_attn.k_norm.weight": _KV,
        "model.layers.*.post_feedforward_layernorm.weight": "hidden",
    },
    norms={
        "model.layers.*.self_attn.q_norm.weight": (),
        "model.layers.*.self_attn.k_norm.weight": (),
        "model.layers.*.post_attention_layernorm.weight": (),
        "model.layers.*.post_feedforward_layernorm.weight": (),
        "model.norm.weight": ("lm_head.weight",),
    },
)
del _OLMO2.tensors["model.layers.*.input_layernorm.weight"]

_PHI3 = replace(
    _LLAMA,
    model_type="phi3",
    tensors={
        "model.embed_tokens.weight": "vocab hidden",
        "model.layers.*.self_attn.qkv_proj.weight": (
            "(kv_heads q_per_kv head_dim + kv_heads head_dim + kv_heads head_dim) hidden"
        ),
        "model.layers.*.self_attn.o_proj.weight": f"hidden {_QUERY}",
        "model.layers.*.mlp.gate_up_proj.weight": "(2 ffn) hidden",
        "model.layers.*.mlp.down_proj.weight": "hidden ffn",
        "model.layers.*.input_layernorm.weight": "hidden",
        "model.layers.*.post_attention_layernorm.weight": "hidden",
        "model.norm.weight": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    norms={
        "model.layers.*.input_layernorm.weight": (_ATTN + "qkv_proj.weight",),
        "model.layers.*.post_attention_layernorm.weight": (_MLP + "gate_up_proj.weight",),
        "model.norm.weight": ("lm_head.weight",),
    },
    free=("sliding_window", "original_max_position_embeddings", "full_attn_mod", "interpolate_factor"),
)

_GPT2 = AxisMap(
    model_type="gpt2",
    tensors={
        "transformer.wte.weight": "vocab hidden",
        "transformer.wpe.weight": "positions hidden",
        "transformer.h.*.ln_1.weight": "hidden",
        "transformer.h.*.ln_1.bias": "hidden",
        "transformer.h.*.attn.c_attn.weight": "hidden (3 heads head_dim)",
        "transformer.h.*.attn.c_attn.bias": "(3 heads head_dim)",
        "transformer.h.*.attn.c_proj.weight": "(heads head_dim) hidden",
        "transformer.h.*.attn.c_proj.bias": "hidden",
        "transformer.h.*.ln_2.weight": "hidden",
        "transformer.h.*.ln_2.bias": "hidden",
        "transformer.h.*.mlp.c_fc.weight": "hidden ffn",
        "transformer.h.*.mlp.c_fc.bias": "ffn",
        "transformer.h.*.mlp.c_proj.weight": "ffn hidden",
        "transformer.h.*.mlp.c_proj.bias": "hidden",
        "transformer.ln_f.weight": "hidden",
        "transformer.ln_f.bias": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    fields={
        "n_embd": "hidden",
        "n_inner": "ffn",
        "n_layer": "layers",
        "n_head": "heads",
        "n_positions": "positions",
        "vocab_size": "vocab",
    },
    norms={
        "transformer.h.*.ln_1.weight": ("transformer.h.*.attn.c_attn.weight",),
        "transformer.h.*.ln_2.weight": ("transformer.h.*.mlp.c_fc.weight",),
        "transformer.ln_f.weight": ("lm_head.weight",),
    },
    norm="layer",
    tied={"lm_head.weight": "transformer.wte.weight"},
    equal={"hidden": "heads head_dim"},
    defaults={"ffn": "4 hidden"},
    in_out=True,
    prefix="transformer.",
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
    free=(
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "n_ctx",
    ),
)

_NEOX = AxisMap(
    model_type="gpt_neox",
    tensors={
        "gpt_neox.embed_in.weight": "vocab hidden",
        "gpt_neox.layers.*.input_layernorm.weight": "hidden",
        "gpt_neox.layers.*.input_layernorm.bias": "hidden",
        "gpt_neox.layers.*.post_attention_layernorm.weight": "hidden",
        "gpt_neox.layers.*.post_attention_layernorm.bias": "hidden",
        "gpt_neox.layers.*.attention.query_key_value.weight": "(heads 3 head_dim) hidden",
        "gpt_neox.layers.*.attention.query_key_value.bias": "(heads 3 head_dim) if attention_bias",
        "gpt_neox.layers.*.attention.dense.weight": "hidden (heads head_dim)",
        "gpt_neox.layers.*.attention.dense.bias": "hidden if attention_bias",
        "gpt_neox.layers.*.mlp.dense_h_to_4h.weight": "ffn hidden",
        "gpt_neox.layers.*.mlp.dense_h_to_4h.bias": "ffn",
        "gpt_neox.layers.*.mlp.dense_4h_to_h.weight": "hidden ffn",
        "gpt_neox.layers.*.mlp.dense_4h_to_h.bias": "hidden",
        "gpt_neox.final_layer_norm.weight": "hidden",
        "gpt_neox.final_layer_norm.bias": "hidden",
        "lm_head.weight": "vocab hidden",
    },
    fields={
        "hidden_size": "hidden",
        "intermediate_size": "ffn",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "vocab_size": "vocab",
    },
    norms={
        "gpt_neox.layers.*.input_layernorm.weight": ("gpt_neox.layers.*.attention.query_key_value.weight",),
        "gpt_neox.layers.*.post_attention_layernorm.weight": ("gpt_neox.layers.*.mlp.dense_h_to_4h.weight",),
        "gpt_neox.final_layer_norm.weight": ("lm_head.weight",),
    },
    norm="layer",
    tied={"lm_head.weight": "gpt_neox.embed_in.weight"},
    equal={"hidden": "heads head_dim"},
    ignored=(
        "gpt_neox.layers.*.attention.bias",
        "gpt_neox.layers.*.attention.masked_bias",
        "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
    ),
    renamed={"embed_out.weight": "lm_head.weight"},
    free=("use_parallel_residual", "rotary_pct", "rotary_emb_base"),
)

_OPT_LAYER = "model.decoder.layers.*."
_OPT = AxisMap(
    model_type="opt",
    tensors={
        "model.decoder.embed_tokens.weight": "vocab hidden",
        "model.decoder.embed_positions.weight": "(positions + 2) hidden",
        "model.decoder.layers.*.self_attn_layer_norm.weight": "hidden if layer_norm_elementwise_affine",
        "model.decoder.layers.*.self_attn_layer_norm.bias": "hidden if layer_norm_elementwise_affine",
        "model.decoder.layers.*.self_attn.q_proj.weight": "(heads head_dim) hidden",
        "model.decoder.layers.*.self_attn.q_proj.bias": "(heads head_dim) if enable_bias",
        "model.decoder.layers.*.self_attn.k_proj.weight": "(heads head_dim) hidden",
        "model.decoder.layers.*.self_attn.k_proj.bias": "(heads head_dim) if enable_bias",
        "model.decoder.layers.*.self_attn.v_proj.weight": "(heads head_dim) hidden",
        "model.decoder.layers.*.self_attn.v_proj.bias": "(heads head_dim) if enable_bias",
        "model.decoder.layers.*.self_attn.out_proj.weight": "hidden (heads head_dim)",
        "model.decoder.layers.*.self_attn.out_proj.bias": "hidden if enable_bias",
        "model.decoder.layers.*.final_layer_norm.weight": "hidden if layer_norm_elementwise_affine",
        "model.decoder.layers.*.final_layer_norm.bias": "hidden if layer_norm_elementwise_affine",
        "model.decoder.layers.*.fc1.weight": "ffn hidden",
        "model.decoder.layers.*.fc1.bias": "ffn if enable_bias",
        "model.decoder.layers.*.fc2.weight": "hidden ffn",
        "model.decoder.layers.*.fc2.bias": "hidden if enable_bias",
        "model.decoder.final_layer_norm.weight": "hidden if layer_norm_elementwise_affine",
        "model.decoder.final_layer_norm.bias": "hidden if layer_norm_elementwise_affine",
        "lm_head.weight": "vocab hidden",
    },
    fields={
        "hidden_size": "hidden",
        "word_embed_proj_dim": "hidden",
        "ffn_dim": "ffn",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "positions",
        "vocab_size": "vocab",
    },
    norms={
        _OPT_LAYER + "self_attn_layer_norm.weight": tuple(_OPT_LAYER + f"self_attn.{p}_proj.weight" for p in "qkv"),
        _OPT_LAYER + "final_layer_norm.weight": (_OPT_LAYER + "fc1.weight",),
        "model.decoder.final_layer_norm.weight": ("lm_head.weight",),
    },
    norm="layer",
    tied={"lm_head.weight": "model.decoder.embed_tokens.weight"},
    equal={"hidden": "heads head_dim"},
    prefix="model.",
)

AXIS_MAPS: dict[str, AxisMap] = {
    m.model_type: m for m in (_LLAMA, _MISTRAL, _SMOLLM3, _QWEN2, _QWEN3, _GEMMA3, _OLMO2, _PHI3, _GPT2, _NEOX, _OPT)
}
"""Every family that is known, by ``model_type``; unresolved (see :meth:`AxisMap.resolve`)."""


def axis_map_for(config: Any) -> AxisMap:
    """Returns the resolved axis map for a transformers config.

    Raises:
        UnknownArchitectureError: No map is known for the config's ``model_type``.
        AxisMapError: The config has a field that the map does not handle.
    """
    if config.model_type not in AXIS_MAPS:
        raise UnknownArchitectureError(
            f"no axis map for architecture {config.model_type!r}; known: {', '.join(sorted(AXIS_MAPS))}."
            f"{did_you_mean(config.model_type, AXIS_MAPS)} Write one line per tensor and pass it with "
            "cbd_hub.axes.architectures.register_axis_map(AxisMap(...)) or the recipe's `axis_map` key "
            "(docs/how-to/add-an-architecture.md)."
        )
    return AXIS_MAPS[config.model_type].resolve(config)


def register_axis_map(axis_map: AxisMap) -> None:
    """Makes a map known under its ``model_type``, in place of one that was known before."""
    AXIS_MAPS[axis_map.model_type] = axis_map
