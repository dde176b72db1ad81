"""The axis map as data: names, sizes, configs. What the maps say of real models is in test_architectures.py."""

import json
from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import VARIANTS, tiny_config, tiny_model
from transformers import AutoConfig, PreTrainedConfig

from cbd_hub.axes.architectures import AXIS_MAPS, axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import AxisMapError

each_family = pytest.mark.parametrize("family", sorted(AXIS_MAPS))
each_variant = pytest.mark.parametrize("variant", VARIANTS)


def variant_config(variant: str) -> PreTrainedConfig:
    family, overrides = VARIANTS[variant]
    return tiny_config(family, **overrides)


def small_map(**changes: Any) -> AxisMap:
    """A complete map of a made-up family."""
    fields: dict[str, Any] = {
        "model_type": "toy",
        "tensors": {"embed": "vocab hidden", "h.*.up": "ffn hidden", "h.*.down": "hidden ffn", "h.*.norm": "hidden"},
        "fields": {"width": "hidden", "ffn": "ffn", "depth": "layers", "vocab": "vocab"},
        "norms": {"h.*.norm": ("h.*.up",)},
    }
    return AxisMap(**{**fields, **changes})


# -- a map that contradicts itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"norm": "batch"}, "norm is 'batch'; allowed: rms, rms\\+1, layer"),
        ({"tensors": {"h.*.e.*.up": "ffn hidden"}}, "more than one '\\*'"),
        ({"tensors": {"h.*.up": "(ffn hidden"}}, "never closed"),
        ({"norms": {"h.*.nrm": ()}}, "'h.\\*.nrm' is not among its tensors. Did you mean 'h.\\*.norm'"),
        ({"norms": {"h.*.norm": ("h.*.upp",)}}, "'h.\\*.upp' is not among its tensors. Did you mean 'h.\\*.up'"),
        ({"scaled": ("embedding",)}, "'embedding' is not among its tensors"),
    ],
)
def test_a_malformed_map_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(AxisMapError, match=complaint):
        small_map(**changes)


def test_a_map_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        small_map().norm = "layer"  # type: ignore[misc]


# -- names ------------------------------------------------------------------------------------------------------------


@each_variant
def test_every_name_matches_its_own_pattern(variant: str) -> None:
    config = variant_config(variant)
    axis_map = axis_map_for(config)
    names = list(axis_map.names(axis_map.sizes(config)))
    assert len({name for name, _, _ in names}) == len(names)
    for name, pattern, layer in names:
        assert axis_map.match(name) == (pattern, layer)
        assert axis_map.parameter_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        "*",
        "h.*.up",
        "h..up",
        "h.0.upp",
        "x.h.0.up",
        "h.0.up.weight",
        "h.0.up\n",
        "h.-1.up",
        "h.01.up",
        "h.0.0.up",
        "h.٣.up",
        "hx0.up",
        "h.0xup",
        f"h.{'9' * 5000}.up",
    ],
)
def test_no_pattern_matches(name: str) -> None:
    with pytest.raises(AxisMapError, match="matches no pattern of the axis map 'toy'"):
        small_map().match(name)
    assert small_map().parameter_name(name) == name  # not swallowed: `match` must get to refuse it


def test_an_ambiguous_name_is_refused() -> None:
    axis_map = small_map(tensors={"h.*.up": "ffn hidden", "h.3.up": "ffn hidden"}, norms={})
    assert axis_map.match("h.2.up") == ("h.*.up", 2)
    with pytest.raises(AxisMapError, match=r"'h.3.up' matches more than one pattern \(h.\*.up, h.3.up\)"):
        axis_map.match("h.3.up")


def test_layer_numbers_have_more_than_one_digit() -> None:
    assert small_map().match("h.117.up") == ("h.*.up", 117)


@pytest.mark.parametrize(
    ("variant", "key", "parameter"),
    [
        # old GPT-2 checkpoints have no prefix, hold causal masks, and a copy of the tied head
        ("gpt2", "wte.weight", "transformer.wte.weight"),
        ("gpt2", "h.2.attn.c_attn.bias", "transformer.h.2.attn.c_attn.bias"),
        ("gpt2", "transformer.h.2.attn.c_attn.bias", "transformer.h.2.attn.c_attn.bias"),
        ("gpt2", "h.11.attn.bias", None),
        ("gpt2", "transformer.h.0.attn.masked_bias", None),
        ("gpt2", "lm_head.weight", None),
        ("gpt2-untied", "lm_head.weight", "lm_head.weight"),
        ("gpt2", "h.2.attn.mask", "h.2.attn.mask"),
        ("gpt_neox", "embed_out.weight", "lm_head.weight"),
        ("gpt_neox-tied", "embed_out.weight", None),
        ("gpt_neox", "gpt_neox.layers.5.attention.rotary_emb.inv_freq", None),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias", None),
        ("opt", "decoder.embed_positions.weight", "model.decoder.embed_positions.weight"),
        ("opt", "lm_head.weight", None),
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("llama-tied", "lm_head.weight", None),
        ("llama", "model.layers.31.self_attn.rotary_emb.inv_freq", None),
        ("llama", "layers.0.self_attn.q_proj.weight", "layers.0.self_attn.q_proj.weight"),
    ],
)
def test_checkpoint_keys(variant: str, key: str, parameter: str | None) -> None:
    assert axis_map_for(variant_config(variant)).parameter_name(key) == parameter


def test_tensors_of_a_switched_off_feature_are_unknown() -> None:
    axis_map = axis_map_for(tiny_config("llama"))
    with pytest.raises(AxisMapError, match="matches no pattern"):
        axis_map.match("model.layers.0.self_attn.q_proj.bias")


# -- sizes and config fields ------------------------------------------------------------------------------------------


@each_variant
def test_sizes_and_config_fields_are_inverse(variant: str) -> None:
    config = variant_config(variant)
    axis_map = axis_map_for(config)
    sizes = axis_map.sizes(config)
    assert set(sizes) == set(axis_map.axes)
    stated = axis_map.config_fields(sizes)
    assert set(stated) == set(axis_map.fields)
    assert axis_map.sizes(stated) == sizes  # a dict of fields is read like a config
    for name, value in stated.items():
        # what the config itself leaves to a default (head_dim, n_inner) is now stated
        assert getattr(config, name, None) in (value, None)
    again = type(config).from_dict({**config.to_dict(), **stated})
    assert axis_map_for(again).sizes(again) == sizes


def test_sizes_by_hand() -> None:
    config = tiny_config("qwen3")
    assert axis_map_for(config).sizes(config) == {
        "layers": 3,
        "hidden": 48,
        "ffn": 80,
        "kv_heads": 2,
        "q_per_kv": 2,
        "head_dim": 16,
        "vocab": 97,
    }


def test_defaults_of_the_families() -> None:
    gpt2 = tiny_config("gpt2", n_inner=None)
    assert axis_map_for(gpt2).sizes(gpt2)["ffn"] == 4 * 48
    qwen2 = tiny_config("qwen2")
    assert not hasattr(qwen2, "head_dim")
    assert axis_map_for(qwen2).sizes(qwen2)["head_dim"] == 48 // 4


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        ("llama", {"num_attention_heads": 5}, "'num_attention_heads' is 5; it must be kv_heads x q_per_kv"),
        ("llama", {"num_key_value_heads": 3}, "'num_attention_heads' is 4; it must be kv_heads x q_per_kv"),
        ("llama", {"num_key_value_heads": 8}, "'num_attention_heads' is 4"),
        ("llama", {"hidden_size": 0}, "'hidden_size' is 0; expected a positive integer"),
        ("llama", {"hidden_size": -48}, "'hidden_size' is -48"),
        ("llama", {"hidden_size": 48.0}, "'hidden_size' is 48.0"),
        ("llama", {"hidden_size": "48"}, "'hidden_size' is '48'"),
        ("llama", {"num_hidden_layers": True}, "'num_hidden_layers' is True"),
        ("llama", {"hidden_size": [48]}, "'hidden_size' is \\[48\\]"),
        ("llama", {"intermediate_size": None}, "does not give the size of ffn; it is read from .*intermediate_size"),
        ("llama", {"vocab_size": None}, "does not give the size of vocab"),
        ("llama", {"hidden_size": 50}, "hidden = 50 must be a multiple of kv_heads x q_per_kv = 4 in llama"),
        ("gpt2", {"n_head": 5}, "it must be heads x head_dim"),
        ("gpt2", {"n_embd": 50}, "it must be heads x head_dim"),
        ("gpt_neox", {"num_attention_heads": 3}, "it must be heads x head_dim"),
        ("opt", {"word_embed_proj_dim": 32}, "'word_embed_proj_dim' is 32; it must be hidden"),
        ("opt", {"num_attention_heads": None}, "heads"),
    ],
)
def test_contradictions_are_refused(family: str, changes: dict[str, Any], complaint: str) -> None:
    config = tiny_config(family)
    axis_map = axis_map_for(config)
    fields = {**axis_map.config_fields(axis_map.sizes(config)), **changes}
    with pytest.raises(AxisMapError, match=complaint):
        axis_map.sizes(fields)


def test_an_empty_config_is_refused() -> None:
    for axis_map in AXIS_MAPS.values():
        with pytest.raises(AxisMapError):
            axis_map.sizes({})


@pytest.mark.parametrize(
    ("family", "sizes", "complaint"),
    [
        ("llama", {"hidden": 48, "kv_heads": 5, "q_per_kv": 2}, "hidden = 48 must be a multiple of kv_heads x q_per"),
        ("phi3", {"hidden": 48, "kv_heads": 7, "q_per_kv": 1}, "must be a multiple of kv_heads x q_per_kv = 7"),
        ("gpt2", {"hidden": 48, "heads": 3, "head_dim": 12}, "hidden = 48 must equal heads x head_dim in gpt2"),
        ("gpt_neox", {"hidden": 40, "heads": 3, "head_dim": 16}, "hidden = 40 must equal heads x head_dim"),
        ("opt", {"hidden": 64, "heads": 3, "head_dim": 16}, "hidden = 64 must equal heads x head_dim in opt"),
    ],
)
def test_check_sizes(family: str, sizes: dict[str, int], complaint: str) -> None:
    with pytest.raises(AxisMapError, match=complaint):
        AXIS_MAPS[family].check_sizes(sizes)


@each_variant
def test_check_sizes_accepts_what_transformers_accepts(variant: str) -> None:
    config = variant_config(variant)
    axis_map = axis_map_for(config)
    axis_map.check_sizes(axis_map.sizes(config))


# -- resolving: fails closed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "changes", "complaint"),
    [
        (
            "llama",
            {"pretraining_tp": 2},
            "'llama' does not handle pretraining_tp = 2 \\(default: 1\\).*`free`",
        ),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before = False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm = True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ],
)
def test_a_config_that_changes_the_maths_is_refused(family: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(AxisMapError, match=complaint):
        axis_map_for(tiny_config(family, **changes))


def test_all_that_is_not_handled_is_listed_at_once() -> None:
    with pytest.raises(AxisMapError, match=r"scale_attn_weights = False.*scale_attn_by_inverse_layer_idx = True"):
        axis_map_for(tiny_config("gpt2", scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False))


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"unsloth_version": "2026.1", "my_note": {"a": [1]}}),
        ("llama", {"num_experts": 8, "made_up_multiplier": 0.5}),
        ("mistral", {"attention_bias": True}),
        ("qwen3", {"attn_bias": 1}),
    ],
)
def test_what_a_config_class_does_not_declare_changes_no_model(family: str, fields: dict[str, Any]) -> None:
    """Tools leave notes in config.json; transformers builds the same model with and without them."""
    plain, noted = tiny_config(family), tiny_config(family, **fields)
    assert axis_map_for(noted) == axis_map_for(plain)
    states = [tiny_model(config, seed=0).state_dict() for config in (plain, noted)]
    ids = torch.arange(3, 11)[None]
    assert states[0].keys() == states[1].keys()
    logits = [tiny_model(config, seed=0)(ids).logits for config in (plain, noted)]
    assert torch.equal(logits[0], logits[1])


def test_opt_with_a_projection_of_its_embeddings_is_refused() -> None:
    """As opt-350m has: the widths disagree, and two further matrices exist."""
    config = tiny_config("opt", word_embed_proj_dim=32)
    with pytest.raises(AxisMapError, match="'word_embed_proj_dim' is 32; it must be hidden"):
        axis_map_for(config).sizes(config)


# config.json files as they are published: what a family's class does not know stays in the config as an attribute.
PUBLISHED: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "pretraining_tp": 1,
        "rope_scaling": None,
        "rope_theta": 100000,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 30,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
    },
    "SmolLM3-3B": {
        "model_type": "smollm3",
        "max_window_layers": 28,
        "pretraining_tp": 2,  # stands in the file, is read by nothing in the family's code
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "layer_types": ["full_attention"] * 36,
        "rope_theta": 5000000.0,
        "use_sliding_window": False,
        "sliding_window": None,
    },
    "Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "use_mrope": False,
        "max_window_layers": 24,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "gemma-3-1b-it": {
        "model_type": "gemma3_text",
        "cache_implementation": "hybrid",
        "rope_local_base_freq": 10000,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "eos_token_id": [1, 106],
    },
    "Phi-4-mini-instruct": {
        "model_type": "phi3",
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "partial_rotary_factor": 0.75,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "sliding_window": 262144,
    },
    "distilgpt2": {
        "model_type": "gpt2",
        "_num_labels": 1,
        "n_ctx": 1024,
        "n_layer": 6,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "summary_type": "cls_index",
        "summary_first_dropout": 0.1,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "pythia-70m": {
        "model_type": "gpt_neox",
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
    },
    "opt-125m": {
        "model_type": "opt",
        "activation_dropout": 0.0,
        "prefix": "</s>",
        "_remove_final_layer_norm": False,
        "do_layer_norm_before": True,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_accepted(name: str) -> None:
    fields = dict(PUBLISHED[name])
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    axis_map = axis_map_for(config)
    assert axis_map.sizes(config)["layers"] == config.num_hidden_layers


@each_variant
def test_resolving_settles_conditions_and_ties(variant: str) -> None:
    config = variant_config(variant)
    axis_map = axis_map_for(config)
    assert not any(" if " in text for text in axis_map.tensors.values())
    assert bool(axis_map.tied) == config.tie_word_embeddings
    assert not set(axis_map.tied) & set(axis_map.tensors)
    assert set(axis_map.tied.values()) <= set(axis_map.tensors)
    for gain in axis_map.norms:
        assert set(axis_map.readers(gain)) <= set(axis_map.tensors)
        assert len(axis_map.readers(gain)) == len(axis_map.norms[gain])


def test_the_tied_head_is_read_as_the_embedding() -> None:
    assert axis_map_for(tiny_config("llama")).readers("model.norm.weight") == ("lm_head.weight",)
    tied = axis_map_for(tiny_config("llama", tie_word_embeddings=True))
    assert tied.readers("model.norm.weight") == ("model.embed_tokens.weight",)


def test_a_condition_may_be_negated() -> None:
    """The switch is a field of the config, so ``if not`` reads as it does in Python."""

    class ToyConfig(SimpleNamespace):
        def to_dict(self) -> dict[str, Any]:
            return {"shared": False, **vars(self)}

    axis_map = small_map(
        tensors={"embed": "vocab hidden", "head": "vocab hidden if not shared", "bias": "vocab if shared"}, norms={}
    )
    assert set(axis_map.resolve(ToyConfig(shared=True)).tensors) == {"embed", "bias"}
    assert set(axis_map.resolve(ToyConfig(shared=False)).tensors) == {"embed", "head"}


def test_norms_of_tensors_that_are_not_there_are_dropped() -> None:
    axis_map = axis_map_for(tiny_config("opt", layer_norm_elementwise_affine=False))
    assert axis_map.norms == {}


# -- roles ------------------------------------------------------------------------------------------------------------


def test_gain_of() -> None:
    gpt2 = axis_map_for(tiny_config("gpt2"))
    assert gpt2.gain_of("transformer.h.*.ln_1.weight") == "transformer.h.*.ln_1.weight"
    assert gpt2.gain_of("transformer.h.*.ln_1.bias") == "transformer.h.*.ln_1.weight"
    assert gpt2.gain_of("transformer.h.*.attn.c_attn.bias") is None
    assert gpt2.gain_of("transformer.wte.weight") is None


# -- plain data -------------------------------------------------------------------------------------------------------


@each_variant
def test_resolved_maps_survive_json(variant: str) -> None:
    axis_map = axis_map_for(variant_config(variant))
    assert AxisMap.from_dict(json.loads(json.dumps(axis_map.to_dict()))) == axis_map


@each_family
def test_unresolved_maps_survive_json(family: str) -> None:
    axis_map = AXIS_MAPS[family]
    assert AxisMap.from_dict(json.loads(json.dumps(axis_map.to_dict()))) == axis_map


def test_only_the_essential_fields_are_required() -> None:
    data = small_map().to_dict()
    essential = {key: data[key] for key in ("model_type", "tensors", "fields", "norms")}
    assert AxisMap.from_dict(essential) == small_map()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"frozn": []}, "no field 'frozn'. Did you mean 'frozen'?"),
        ({7: []}, "no field 7"),
        ({"tensors": None}, "axis map field tensors: "),
        ({"tensors": {"embed": 3}}, "axis map field tensors.embed: "),
        ({"tensors": {"embed": "(vocab"}}, "never closed"),
        ({"norms": {"h.*.norm": "h.*.up"}}, "axis map field norms.h.\\*.norm: "),
        ({"free": "abc"}, "axis map field free: "),
        ({"norm": "x"}, "allowed: rms"),
        ({"model_type": 3}, "axis map field model_type: "),
    ],
)
def test_malformed_data_is_refused(changes: dict[Any, Any], complaint: str) -> None:
    with pytest.raises(AxisMapError, match=complaint):
        AxisMap.from_dict({**small_map().to_dict(), **changes})


@pytest.mark.parametrize("missing", ["model_type", "tensors", "fields", "norms"])
def test_missing_data_is_named(missing: str) -> None:
    data = small_map().to_dict()
    del data[missing]
    with pytest.raises(AxisMapError, match=missing):
        AxisMap.from_dict(data)


def test_replace_leaves_no_stale_cache() -> None:
    """`axes` and the compiled patterns are cached on first use; a changed map has its own."""
    axis_map = small_map()
    assert axis_map.axes == ("layers", "hidden", "vocab", "ffn")
    assert axis_map.match("h.0.up") == ("h.*.up", 0)
    other = replace(axis_map, tensors={"block.*.up": "width"}, norms={})
    assert other.axes == ("layers", "width")
    assert other.match("block.0.up") == ("block.*.up", 0)
    with pytest.raises(AxisMapError):
        other.match("h.0.up")
