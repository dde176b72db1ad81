"""What the axis maps say of real models. Shapes alone do not prove a map, so every map stands three tests of the
maths on random float64 models (see docs/how-to/add-an-architecture.md):

* *permutation*: permuting the units of an axis in every tensor leaves the logits as they are;
* *subset equals mask*: a model without some units gives the logits of the full model with those units silenced;
* *depth*: a model without a layer gives the logits of the full model with that layer bypassed.

Each check is a function that returns the largest difference of the logits, and maps that are wrong on purpose
(with all shapes right) must be told apart by the same functions.
"""

import copy
import functools
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tiny_models import FAMILIES, VARIANTS, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from cbd_hub.axes.architectures import AXIS_MAPS, axis_map_for, register_axis_map
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import UnknownArchitectureError

TOKENS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
PERMUTED, SUBSET = 1e-6, 1e-10
MADE_UP = {f"{family}-{seed}": (family, seed) for family in FAMILIES for seed in range(3)}

each_family = pytest.mark.parametrize("family", FAMILIES)
each_variant = pytest.mark.parametrize("variant", [*VARIANTS, *(name for name in MADE_UP if name.endswith("0"))])


# -- models -----------------------------------------------------------------------------------------------------------


def made_up_config(family: str, seed: int) -> PreTrainedConfig:
    """A small config with sizes drawn at random."""
    draw = random.Random(f"{family} {seed}")
    groups, per_group, head_dim = draw.randint(2, 4), draw.randint(1, 3), draw.choice((4, 6, 8, 12))
    heads = groups * per_group if "num_key_value_heads" in FAMILIES[family] else groups
    fields: dict[str, Any] = {
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": draw.randint(2, 4),
        {"gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size"): draw.randint(9, 90),
        "vocab_size": draw.randint(97, 130),
        "max_position_embeddings": draw.randint(12, 40),
        "tie_word_embeddings": draw.random() < 0.5,
    }
    if "num_key_value_heads" in FAMILIES[family]:
        fields["num_key_value_heads"] = groups
    if "head_dim" in FAMILIES[family]:
        fields["head_dim"] = 2 * draw.randint(2, 8)
    if family == "opt":
        fields["word_embed_proj_dim"] = fields["hidden_size"]
    if family == "phi3":
        fields["original_max_position_embeddings"] = fields["max_position_embeddings"]
    if family == "gemma3_text":
        kinds = ("full_attention", "sliding_attention")
        fields["layer_types"] = [draw.choice(kinds) for _ in range(fields["num_hidden_layers"])]
    return tiny_config(family, **fields)


def config_of(variant: str) -> PreTrainedConfig:
    if variant in MADE_UP:
        return made_up_config(*MADE_UP[variant])
    family, overrides = VARIANTS[variant]
    return tiny_config(family, **overrides)


@functools.cache
def model_of(variant: str) -> PreTrainedModel:
    """The random float64 model of a variant; shared, so tests change copies only."""
    return tiny_model(config_of(variant), torch.float64)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    """Returns the logits for TOKENS, float64 (2, 12, vocab)."""
    return model(input_ids=TOKENS, use_cache=False).logits


def with_float64_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a copy whose RMSNorms compute in float64. The families' own ones sum in float32 whatever the model's
    dtype, so that a mere change of the order of the sum would move the logits by 2e-6."""
    other = copy.deepcopy(model)
    for name, module in list(other.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
            norm = nn.RMSNorm(module.weight.shape, eps=eps, dtype=torch.float64)
            gain = 1 + module.weight if AXIS_MAPS[model.config.model_type].norm == "rms+1" else module.weight
            norm.load_state_dict({"weight": gain})
            other.set_submodule(name, norm)
    return other


def gap(first: PreTrainedModel, second: PreTrainedModel) -> float:
    """Returns the largest difference of the logits of two models."""
    return (logits(with_float64_norms(first)) - logits(with_float64_norms(second))).abs().max().item()


def take(tensor: Tensor, axis_map: AxisMap, pattern: str, sizes: dict[str, int], units: dict[str, Any]) -> Tensor:
    """Returns the rows and columns of a stored tensor that belong to some units of some axes."""
    layout = axis_map.layout(pattern)
    for dim in range(len(layout.dims)):
        rows = layout.rows(dim, sizes, units)
        if rows is not None:
            tensor = tensor.index_select(dim, torch.from_numpy(rows))
    return tensor


def silence(tensor: Tensor, axis_map: AxisMap, pattern: str, sizes: dict[str, int], units: dict[str, Any]) -> None:
    """Sets to zero, in place, the rows and columns that belong to some units of some axes."""
    layout = axis_map.layout(pattern)
    for dim in range(len(layout.dims)):
        rows = layout.rows(dim, sizes, units)
        if rows is not None:
            tensor.index_fill_(dim, torch.from_numpy(rows), 0.0)


def load(model: PreTrainedModel, state: dict[str, Tensor], axis_map: AxisMap) -> PreTrainedModel:
    """Fills a model with exactly the stored tensors."""
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == set(axis_map.tied)
    return model.eval()


def head_axes(axis_map: AxisMap) -> list[str]:
    return axis_map.heads.split()


def fewer_heads(sizes: dict[str, int], axis: str) -> int:
    """Returns the largest smaller number of units that transformers accepts: heads must divide hidden."""
    others = prod(sizes.get(other, 1) for other in ("kv_heads", "q_per_kv") if other != axis)
    return next(n for n in range(sizes[axis] - 1, 0, -1) if axis == "heads" or sizes["hidden"] % (n * others) == 0)


# -- the checks -------------------------------------------------------------------------------------------------------


def permutation_gap(model: PreTrainedModel, axis_map: AxisMap, axis: str, seed: int = 0) -> float:
    """Permutes the units of one axis in every tensor, in each layer differently (the residual stream is one axis for
    all layers), and returns the largest difference of the logits."""
    sizes = axis_map.sizes(model.config)
    rng = np.random.default_rng(seed)

    def permutation() -> np.ndarray:
        return np.roll(rng.permutation(sizes[axis]), 1) if sizes[axis] > 2 else np.array([1, 0])

    per_layer: dict[int | None, np.ndarray] = defaultdict(permutation)
    stored = model.state_dict()
    state = {
        name: take(stored[name], axis_map, pattern, sizes, {axis: per_layer[None if axis == "hidden" else layer]})
        for name, pattern, layer in axis_map.names(sizes)
    }
    assert any(not torch.equal(state[name], stored[name]) for name in state)
    return gap(model, load(copy.deepcopy(model), state, axis_map))


def smaller_model(
    model: PreTrainedModel, axis_map: AxisMap, small: dict[str, int], state: dict[str, Tensor], layers: Sequence[int]
) -> PreTrainedModel:
    """Builds the model that a config of smaller sizes describes, and fills it."""
    config = model.config
    lists = {name: getattr(config, name, None) for name in axis_map.layer_lists}
    sliced = {name: [values[i] for i in layers] for name, values in lists.items() if values is not None}
    config = type(config).from_dict({**config.to_dict(), **axis_map.config_fields(small), **sliced})
    assert axis_map_for(config).shapes(small) == {name: tuple(tensor.shape) for name, tensor in state.items()}
    with torch.random.fork_rng(devices=[]):
        other = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    return load(other, state, axis_map)


def operated_model(
    model: PreTrainedModel, axis_map: AxisMap, small: dict[str, int], state: dict[str, Tensor]
) -> PreTrainedModel:
    """Gives a copy's attention modules fewer heads. GPT-2, GPT-NeoX and OPT tie hidden to heads x head_dim in their
    configs, so no config describes such a model, but the code of their attention runs it."""
    other = copy.deepcopy(model)
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        module = other.get_submodule(path)
        if getattr(module, leaf).shape != tensor.shape:
            setattr(module, leaf, nn.Parameter(tensor))
    for module in other.modules():
        if hasattr(module, "num_heads"):  # OPT
            module.num_heads = small["heads"]
        if hasattr(module, "split_size"):  # GPT-2: the width of q, of k and of v
            module.split_size = small["heads"] * small["head_dim"]
            module.c_attn.nf = 3 * module.split_size
    return other.eval()


def subset_gap(
    model: PreTrainedModel, axis_map: AxisMap, axis: str, count: int, seed: int = 0, everywhere: bool = False
) -> float:
    """Keeps ``count`` units of one axis, in each layer others, and returns the largest difference of the logits to
    the full model in which nothing reads the other units.

    With ``everywhere`` the full model's units are also not written (their rows of q, k and v are zero).
    """
    sizes = axis_map.sizes(model.config)
    rng = np.random.default_rng(seed)
    kept = [np.sort(rng.permutation(sizes[axis])[:count]) for _ in range(sizes["layers"])]
    masked = copy.deepcopy(model)
    stored, consumers = masked.state_dict(), axis_map.consumers(axis)
    small, state = {**sizes, axis: count}, {}
    for name, pattern, layer in axis_map.names(sizes):
        state[name] = stored[name]
        if layer is not None:
            state[name] = take(stored[name], axis_map, pattern, sizes, {axis: kept[layer]}).clone()
            if pattern in consumers or everywhere:
                dropped = np.setdiff1d(np.arange(sizes[axis]), kept[layer])
                silence(stored[name], axis_map, pattern, sizes, {axis: dropped})
    if everywhere:  # OLMo-2: see test_a_subset_of_heads_in_olmo2
        for name, pattern, _ in axis_map.names(sizes):
            if pattern in axis_map.norms and axis in axis_map.layout(pattern).axes:
                state[name] *= (sizes[axis] / count) ** 0.5
    if axis in head_axes(axis_map) and "hidden" in axis_map.equal:
        return gap(masked, operated_model(model, axis_map, small, state))
    return gap(masked, smaller_model(model, axis_map, small, state, range(sizes["layers"])))


def depth_gap(model: PreTrainedModel, axis_map: AxisMap, dropped: int, entries: Sequence[int] | None = None) -> float:
    """Drops a layer and returns the largest difference of the logits to the full model in which it writes nothing.

    ``entries`` are those of the config's per-layer lists that go along; by default the remaining layers' own."""
    sizes = axis_map.sizes(model.config)
    layers = [layer for layer in range(sizes["layers"]) if layer != dropped]
    bypassed = copy.deepcopy(model)
    stored, state = bypassed.state_dict(), {}
    for name, pattern, layer in axis_map.names(sizes):
        if layer is None:
            state[name] = stored[name]
        elif layer != dropped:
            state[pattern.replace("*", str(layers.index(layer)))] = stored[name]
    for pattern in [*axis_map.consumers("ffn"), *axis_map.consumers(head_axes(axis_map)[0])]:
        for writer in (pattern, pattern.removesuffix(".weight") + ".bias"):
            if writer in axis_map.tensors:
                stored[writer.replace("*", str(dropped))].zero_()
    small = {**sizes, "layers": len(layers)}
    return gap(bypassed, smaller_model(model, axis_map, small, state, entries or layers))


# -- names, shapes, counts --------------------------------------------------------------------------------------------


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of any size without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("variant", [*VARIANTS, *MADE_UP])
def test_names_shapes_and_counts_are_exact(variant: str) -> None:
    config = config_of(variant)
    axis_map = axis_map_for(config)
    shapes = axis_map.shapes(axis_map.sizes(config))
    model = meta_model(config)
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: shape for name, shape in state.items() if name not in axis_map.tied} == shapes
    assert set(axis_map.tied) <= set(state)
    assert sum(map(prod, shapes.values())) == model.num_parameters()


@each_family
def test_names_shapes_and_counts_of_the_default_config(family: str) -> None:
    """The family's default is a real model's config: billions of parameters, on the meta device."""
    config = AutoConfig.for_model(family)
    axis_map = axis_map_for(config)
    shapes = axis_map.shapes(axis_map.sizes(config))
    model = meta_model(config)
    state = {name: tuple(p.shape) for name, p in model.named_parameters()}  # a tied tensor once
    assert state == shapes
    assert sum(map(prod, shapes.values())) == model.num_parameters()


# Parameter counts of published models (a tied head once).
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "SmolLM2-135M": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        134_515_008,
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        596_049_920,
    ),
    "gemma-3-270m": (
        "gemma3_text",
        {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
        },
        268_098_176,
    ),
    "Mistral-7B-v0.1": ("mistral", {}, 7_241_732_096),
    "Phi-3-mini": ("phi3", {}, 3_821_079_552),
    "gpt2": ("gpt2", {}, 124_439_808),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}, 1_557_611_200),
    "pythia-70m": (
        "gpt_neox",
        {
            "vocab_size": 50304,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
        },
        70_426_624,
    ),
    "opt-125m": ("opt", {}, 125_239_296),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_published_models(name: str) -> None:
    family, fields, count = PUBLISHED[name]
    config = AutoConfig.for_model(family, **fields)
    axis_map = axis_map_for(config)
    assert sum(map(prod, axis_map.shapes(axis_map.sizes(config)).values())) == count
    assert meta_model(config).num_parameters() == count


@each_variant
def test_saved_checkpoints_are_covered(variant: str, tmp_path: Path) -> None:
    """Every key of a saved model is one parameter, and every parameter is one key (GPT-NeoX saves another name)."""
    model = model_of(variant)
    axis_map = axis_map_for(model.config)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="numpy") as file:
        keys = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    names = [axis_map.parameter_name(key) for key in keys]
    assert None not in names
    assert len(set(names)) == len(names)
    assert dict(zip(names, keys.values(), strict=True)) == axis_map.shapes(axis_map.sizes(model.config))
    for name in names:
        axis_map.match(str(name))
    if axis_map.model_type == "gpt_neox" and not axis_map.tied:
        assert "embed_out.weight" in keys


# -- roles ------------------------------------------------------------------------------------------------------------

# The matrices that write the residual stream.
OUTPUTS = {
    "gpt2": ("transformer.h.*.attn.c_proj.weight", "transformer.h.*.mlp.c_proj.weight"),
    "gpt_neox": ("gpt_neox.layers.*.attention.dense.weight", "gpt_neox.layers.*.mlp.dense_4h_to_h.weight"),
    "opt": ("model.decoder.layers.*.self_attn.out_proj.weight", "model.decoder.layers.*.fc2.weight"),
}


@each_variant
def test_consumers(variant: str) -> None:
    axis_map = axis_map_for(config_of(variant))
    default = ("model.layers.*.self_attn.o_proj.weight", "model.layers.*.mlp.down_proj.weight")
    attention, mlp = OUTPUTS.get(axis_map.model_type, default)
    assert axis_map.consumers("ffn") == [mlp]
    for axis in (*head_axes(axis_map), "head_dim"):
        assert axis_map.consumers(axis) == [attention]
    assert axis_map.consumers("layers") == []


@each_variant
def test_rotatable_families(variant: str) -> None:
    axis_map = axis_map_for(config_of(variant))
    rotatable = {"llama", "mistral", "smollm3", "qwen2", "qwen3", "phi3"}
    assert axis_map.rotatable == (axis_map.model_type in rotatable)


@each_variant
def test_norms_are_the_models_norms(variant: str) -> None:
    """Every norm module has its gain in the map, with the right kind, and no gain is anything else."""
    model = model_of(variant)
    axis_map = axis_map_for(model.config)
    kinds = {name: type(m).__name__ for name, m in model.named_modules() if type(m).__name__.endswith("Norm")}
    gains = {
        name.removesuffix(".weight")
        for name, pattern, _ in axis_map.names(axis_map.sizes(model.config))
        if pattern in axis_map.norms
    }
    assert set(kinds) == gains
    assert {kind == "LayerNorm" for kind in kinds.values()} == {axis_map.norm == "layer"}


@each_variant
def test_readers_read_the_norm(variant: str) -> None:
    """Doubling an RMS gain and halving the columns of its readers changes nothing: the readers are all there are.

    A tied head is the embedding as well, so its norm is left out; so are LayerNorms, whose bias would go along."""
    model = model_of(variant)
    axis_map = axis_map_for(model.config)
    if axis_map.norm == "layer":
        return
    other = copy.deepcopy(model)
    state = other.state_dict()
    for name, pattern, layer in axis_map.names(axis_map.sizes(model.config)):
        readers = axis_map.readers(pattern) if pattern in axis_map.norms else ()
        if not readers or "model.embed_tokens.weight" in readers:
            continue
        gain = state[name]
        gain.copy_(2 * gain + 1 if axis_map.norm == "rms+1" else 2 * gain)
        for reader in readers:
            state[reader.replace("*", str(layer))].mul_(0.5)
    assert gap(model, other) < SUBSET


def test_unknown_architectures_say_what_is_known() -> None:
    config = AutoConfig.for_model("bloom")
    with pytest.raises(
        UnknownArchitectureError, match="no axis map for architecture 'bloom'; known: gemma3_text, gpt2"
    ):
        axis_map_for(config)
    config.model_type = "lama"
    with pytest.raises(KeyError, match="Did you mean 'llama'"):
        axis_map_for(config)


def test_a_users_own_map_is_used() -> None:
    """A family that nobody here has heard of: a map under its model_type, and it is read."""

    class OwnConfig(LlamaConfig):
        model_type = "own_llama"

    config = OwnConfig(num_hidden_layers=2)
    with pytest.raises(UnknownArchitectureError):
        axis_map_for(config)
    register_axis_map(replace(AXIS_MAPS["llama"], model_type="own_llama"))
    try:
        assert axis_map_for(config).sizes(config)["layers"] == 2
    finally:
        del AXIS_MAPS["own_llama"]


@each_family
def test_maps_are_keyed_by_their_model_type(family: str) -> None:
    assert AXIS_MAPS[family].model_type == family
    assert set(AXIS_MAPS) == set(FAMILIES)


# -- every map passes -------------------------------------------------------------------------------------------------


@each_variant
def test_float64_norms_are_the_families_norms(variant: str) -> None:
    model = model_of(variant)
    assert (logits(model) - logits(with_float64_norms(model))).abs().max() < 1e-5


@each_variant
def test_permutations_change_nothing(variant: str) -> None:
    model = model_of(variant)
    axis_map = axis_map_for(model.config)
    sizes = axis_map.sizes(model.config)
    axes = [axis for axis in axis_map.axes if axis not in (*axis_map.frozen, "layers") and sizes[axis] > 1]
    assert {"hidden", "ffn"} < set(axes)
    gaps = {axis: permutation_gap(model, axis_map, axis) for axis in axes}
    assert max(gaps.values()) < PERMUTED, gaps


@each_variant
def test_a_subset_of_ffn_units_equals_the_masked_model(variant: str) -> None:
    model = model_of(variant)
    axis_map = axis_map_for(model.config)
    count = axis_map.sizes(model.config)["ffn"] * 2 // 3
    assert subset_gap(model, axis_map, "ffn", count) < SUBSET


@each_variant
def test_a_subset_of_heads_equals_the_masked_model(variant: str) -> None:
    model = model_of(variant)
    axis_map = axis_map_for(model.config)
    if axis_map.model_type == "olmo2":
        return  # below
    sizes = axis_map.sizes(model.config)
    axes = [axis for axis in head_axes(axis_map) if sizes[axis] > 1]
    gaps = {axis: subset_gap(model, axis_map, axis, fewer_heads(sizes, axis)) for axis in axes}
    assert gaps
    assert max(gaps.values()) < SUBSET, gaps


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("olmo2")])
def test_a_subset_of_heads_in_olmo2(variant: str) -> None:
    """OLMo-2's q and k norms run over all heads together, so the other heads must be zero before the norm as well.

    Then only the number of coordinates differs: with S the sum of squares, the full model (D coordinates) has
    ``gain * x / sqrt(S / D)`` and the subset (d coordinates) ``gain' * x / sqrt(S / d)``, equal for
    ``gain' = gain * sqrt(D / d)``; D / d is the ratio of the numbers of units. Exact only where ``rms_norm_eps`` is
    negligible. Dropping query heads of every group leaves k, and so the gain of its norm, alone.
    """
    family, overrides = VARIANTS[variant]
    model = tiny_model(tiny_config(family, **overrides, rms_norm_eps=1e-30), torch.float64)
    axis_map = axis_map_for(model.config)
    sizes = axis_map.sizes(model.config)
    for axis in head_axes(axis_map):
        if sizes[axis] > 1:
            count = fewer_heads(sizes, axis)
            assert subset_gap(model, axis_map, axis, count, everywhere=True) < SUBSET, axis
            assert subset_gap(model, axis_map, axis, count) > 1e-3  # what an unscaled gain would do


@each_variant
def test_dropping_a_layer_equals_bypassing_it(variant: str) -> None:
    model = model_of(variant)
    axis_map = axis_map_for(model.config)
    gaps = [depth_gap(model, axis_map, dropped) for dropped in range(axis_map.sizes(model.config)["layers"])]
    assert max(gaps) < SUBSET, gaps


@pytest.mark.parametrize("variant", ["smollm3-nope", "smollm3-nope-sliding", "qwen3-sliding", "gemma3_text"])
def test_per_layer_lists_go_along_with_their_layers(variant: str) -> None:
    """Keeping the first entries, whichever layer was dropped, must show."""
    model = model_of(variant)
    axis_map = axis_map_for(model.config)
    first = range(axis_map.sizes(model.config)["layers"] - 1)
    assert depth_gap(model, axis_map, 1 if variant == "smollm3-nope" else 0, entries=first) > 1e-3


def test_permuting_a_frozen_axis_breaks_rotary_pairs() -> None:
    model = model_of("llama")
    assert permutation_gap(model, axis_map_for(model.config), "head_dim") > 0.1


def test_the_checks_can_see_every_axis() -> None:
    """A model that lost the units it is compared by would pass anything: silencing any unit must show."""
    for family in FAMILIES:
        model = model_of(family)
        axis_map = axis_map_for(model.config)
        sizes = axis_map.sizes(model.config)
        for axis in ("ffn", *head_axes(axis_map)):
            masked = copy.deepcopy(model)
            for pattern in axis_map.consumers(axis):
                tensor = masked.state_dict()[pattern.replace("*", "1")]
                silence(tensor, axis_map, pattern, sizes, {axis: np.array([1])})
            assert gap(model, masked) > 1e-4, (family, axis)


# -- wrong maps fail --------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, str, dict[str, str]]] = {
    "gpt_neox: q, k and v apart": (
        "gpt_neox",
        "heads",
        {
            "gpt_neox.layers.*.attention.query_key_value.weight": "(3 heads head_dim) hidden",
            "gpt_neox.layers.*.attention.query_key_value.bias": "(3 heads head_dim)",
        },
    ),
    "gpt2: q, k and v of a head together": (
        "gpt2",
        "heads",
        {
            "transformer.h.*.attn.c_attn.weight": "hidden (heads 3 head_dim)",
            "transformer.h.*.attn.c_attn.bias": "(heads 3 head_dim)",
        },
    ),
    "phi3: gate and up interleaved": ("phi3", "ffn", {"model.layers.*.mlp.gate_up_proj.weight": "(ffn 2) hidden"}),
    "phi3: k before q": (
        "phi3",
        "kv_heads",
        {
            "model.layers.*.self_attn.qkv_proj.weight": (
                "(kv_heads head_dim + kv_heads q_per_kv head_dim + kv_heads head_dim) hidden"
            )
        },
    ),
    "llama: groups inside": (
        "llama",
        "kv_heads",
        {
            "model.layers.*.self_attn.q_proj.weight": "(q_per_kv kv_heads head_dim) hidden",
            "model.layers.*.self_attn.o_proj.weight": "hidden (q_per_kv kv_heads head_dim)",
        },
    ),
    "opt: coordinates first": (
        "opt",
        "heads",
        {"model.decoder.layers.*.self_attn.out_proj.weight": "hidden (head_dim heads)"},
    ),
    "llama: the last norm is not along hidden": ("llama", "hidden", {"model.norm.weight": "(6 head_dim)"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_map_is_seen(name: str) -> None:
    family, axis, lines = WRONG[name]
    model = model_of(family)
    right = axis_map_for(model.config)
    sizes = right.sizes(model.config)
    wrong = replace(right, tensors={**right.tensors, **lines})
    assert wrong.shapes(sizes) == right.shapes(sizes)  # shapes tell nothing
    assert permutation_gap(model, wrong, axis) > 0.1
    assert permutation_gap(model, right, axis) < PERMUTED
    if axis != "hidden":
        count = sizes[axis] // 2
        assert subset_gap(model, right, axis, count) < SUBSET
        assert subset_gap(model, wrong, axis, count) > 0.1
