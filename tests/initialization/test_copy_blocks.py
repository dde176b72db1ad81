"""Blocks in another family: the same function wherever it can be, and a named field wherever it can not."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.errors import RecipeError
from cbd_hub.initialization.copy_blocks import copy_blocks

IDS = torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(0))
HEAD_12 = {"head_dim": 12}  # qwen2 and smollm3 have no field for another than hidden / heads
SAME: dict[str, dict[str, Any]] = {
    "llama": {**HEAD_12},
    "mistral": {**HEAD_12, "sliding_window": None},
    "qwen2": {"rms_norm_eps": 1e-6},
    "qwen3": {**HEAD_12},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 1, 1], "tie_word_embeddings": False},
}
ROPE = {"rope_theta": 500.0, "rope_type": "default"}


def source_and_config(family: str, other: str, **fields: Any) -> tuple[PreTrainedModel, Any]:
    common = {"rope_parameters": ROPE, **fields}
    source = tiny_model(tiny_config(family, **{**SAME[family], **common}))
    return source, tiny_config(other, **{**SAME[other], **common})


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("other", ["llama", "mistral", "qwen2", "smollm3"])
@pytest.mark.parametrize("family", ["llama", "mistral", "smollm3"])
def test_families_of_one_form_compute_the_same(family: str, other: str, tied: bool) -> None:
    source, config = source_and_config(family, other, tie_word_embeddings=tied)
    model, report = copy_blocks(source, config)
    assert model.config.model_type == other
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=0)
    assert report.dropped == report.fresh == ()
    assert len(report.started) == (9 if other == "qwen2" else 0)
    assert set(report.copied) | set(report.started) == {name for name, _ in model.named_parameters()}


def test_biases_are_carried_where_there_is_a_place() -> None:
    source, config = source_and_config("qwen2", "llama")
    config.attention_bias = True
    model, report = copy_blocks(source, config)
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=0)
    assert report.started == tuple(f"model.layers.{layer}.self_attn.o_proj.bias" for layer in range(3))
    _, report = copy_blocks(source, source_and_config("qwen2", "mistral")[1])
    assert len(report.dropped) == 9 and all(name.endswith("_proj.bias") for name in report.dropped)


def test_a_sliding_window_is_carried_layer_by_layer() -> None:
    source, config = source_and_config("mistral", "qwen2")
    source = tiny_model(tiny_config("mistral", **HEAD_12, rope_parameters=ROPE, sliding_window=5))
    with pytest.raises(
        RecipeError, match=r"sliding_window is \[None, None, None\] in the qwen2 config and \[5, 5, 5\]"
    ):
        copy_blocks(source, config)
    config = tiny_config(
        "qwen2", rope_parameters=ROPE, use_sliding_window=True, sliding_window=5, layer_types=["sliding_attention"] * 3
    )
    torch.testing.assert_close(logits(copy_blocks(source, config)[0]), logits(source), atol=1e-5, rtol=0)


def test_an_untied_head_starts_as_the_tied_one() -> None:
    source, _ = source_and_config("llama", "llama", tie_word_embeddings=True)
    _, config = source_and_config("llama", "qwen2", tie_word_embeddings=False)
    model, _ = copy_blocks(source, config)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model), logits(source), atol=1e-5, rtol=0)
    config.tie_word_embeddings = True
    with pytest.raises(RecipeError, match="tie_word_embeddings must be false"):
        copy_blocks(tiny_model(tiny_config("llama", **HEAD_12)), config)


def set_norms(model: PreTrainedModel, value: float) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(value)
    return model


def distance(model: PreTrainedModel, source: PreTrainedModel) -> float:
    return float((logits(model) - logits(source)).square().mean() / logits(source).var())


def test_norms_of_queries_and_keys_start_at_the_size_that_these_have() -> None:
    source, config = source_and_config("llama", "qwen3")
    with torch.no_grad():
        for layer in source.model.layers:
            layer.self_attn.q_proj.weight.mul_(0.3)
            layer.self_attn.k_proj.weight.mul_(0.4)
    model, report = copy_blocks(source, config, IDS)
    assert len(report.started) == 6 and not report.dropped
    seen: list[Tensor] = []
    first = source.model.layers[0]
    handle = first.self_attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits(source)
    handle.remove()
    gain = model.get_parameter("model.layers.0.self_attn.q_norm.weight")
    torch.testing.assert_close(gain, seen[0].square().mean().sqrt().expand(12))
    started = distance(model, source)
    assert started < 0.05 and started < 0.5 * distance(set_norms(model, 1.0), source)


def test_norms_that_a_family_does_not_have_are_folded() -> None:
    source, config = source_and_config("qwen3", "llama")
    with torch.no_grad():  # a norm undoes this, so a fold has to undo it too
        for layer in source.model.layers:
            layer.self_attn.q_proj.weight.mul_(3.0)
    model, report = copy_blocks(source, config, IDS)
    assert len(report.dropped) == 6 and not report.started
    plain = tiny_model(config)
    plain.load_state_dict({name: source.state_dict()[name] for name in plain.state_dict()})
    folded = distance(model, source)
    assert folded < 0.2 and folded < 0.7 * distance(plain, source)


@pytest.mark.parametrize(("family", "other"), [("llama", "qwen3"), ("qwen3", "mistral")])
def test_norms_need_blocks(family: str, other: str) -> None:
    with pytest.raises(RecipeError, match="pass `blocks`"):
        copy_blocks(*source_and_config(family, other))


@pytest.mark.parametrize("other", ["gpt2", "gpt_neox", "opt", "gemma3_text", "olmo2", "phi3"])
def test_a_family_of_another_form_is_fresh_and_says_so(other: str) -> None:
    source, _ = source_and_config("llama", "llama")
    model, report = copy_blocks(source, tiny_config(other))
    assert report.copied == report.started == report.dropped == ()
    assert set(report.fresh) == {name for name, _ in model.named_parameters()}
    assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "gemma3_text", "olmo2", "phi3", "qwen3"])
def test_the_same_family_is_a_copy(family: str) -> None:
    source = tiny_model(tiny_config(family))
    model, report = copy_blocks(source, tiny_config(family))
    assert report.fresh == report.started == report.dropped == ()
    torch.testing.assert_close(logits(model), logits(source), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_parameters", {"rope_theta": 10000.0, "rope_type": "default"}),
        ("rms_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
        ("intermediate_size", 96),
        ("hidden_size", 64),
        ("num_key_value_heads", 4),
        ("head_dim", 16),
        ("num_hidden_layers", 2),
        ("vocab_size", 90),
        ("sliding_window", 5),
    ],
)
def test_a_field_that_enters_the_maths_is_named(field: str, value: Any) -> None:
    source, _ = source_and_config("llama", "mistral")
    config = tiny_config("mistral", **{**SAME["mistral"], "rope_parameters": ROPE, field: value})
    with pytest.raises(RecipeError, match=f"^{field} is .* in the mistral config and .* in the llama source; set it"):
        copy_blocks(source, config)


def test_layers_without_positions_are_refused() -> None:
    source, config = source_and_config("llama", "smollm3")
    config.no_rope_layers = [1, 0, 1]
    with pytest.raises(RecipeError, match="no_rope_layers"):
        copy_blocks(source, config)


def test_a_field_of_the_same_family_is_named() -> None:
    with pytest.raises(RecipeError, match="activation_function is 'relu'"):
        copy_blocks(tiny_model(tiny_config("gpt2")), tiny_config("gpt2", activation_function="relu"))
