"""A model run up to its head, for every family and for those that alter the logits behind it."""

import pytest
import torch
from tiny_models import VARIANTS, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoConfig

from cbd_hub.errors import RecipeError
from cbd_hub.losses.heads import hidden_and_head, with_weights


def relative(got: Tensor, expected: Tensor) -> float:
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_and_head_equals_logits(variant: str) -> None:
    family, overrides = VARIANTS[variant]
    model = tiny_model(tiny_config(family, **overrides), torch.float64)
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    for attention_mask in (None, mask):
        with torch.inference_mode():
            hidden, head = hidden_and_head(model, ids, attention_mask)
            assert relative(head(hidden), model(ids, attention_mask=attention_mask).logits) < 1e-12


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gemma2", "final_logit_softcapping", 3.0),
        ("cohere", "logit_scale", 0.25),
        ("granite", "logits_scaling", 4.0),
    ],
)
def test_logits_altered_behind_the_head_are_honored(family: str, field: str, value: float) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        **{field: value},
    )
    model = tiny_model(config, torch.float64)
    ids = torch.arange(3, 15).reshape(2, 6)
    with torch.inference_mode():
        hidden, head = hidden_and_head(model, ids)
        assert relative(head(hidden), model(ids).logits) < 1e-12
        assert relative(model.lm_head(model.base_model(ids).last_hidden_state), model(ids).logits) > 0.01


def test_a_model_without_a_head_is_refused() -> None:
    model = tiny_model(tiny_config("llama")).base_model
    with pytest.raises(RecipeError, match="LlamaModel has no head"):
        hidden_and_head(model, torch.ones(1, 3, dtype=torch.long))


def test_a_model_has_other_weights_for_one_call_and_they_get_the_gradient() -> None:
    model, other = (tiny_model(tiny_config("llama"), torch.float64, seed=seed) for seed in (0, 1))
    ids = torch.arange(12).view(2, 6)
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    before = model(ids).logits
    made = with_weights(model, weights, lambda inside: inside(ids).logits.square().mean())
    made.backward()
    expected = other(ids).logits.square().mean()
    expected.backward()
    assert torch.equal(made, expected)
    for name, parameter in other.named_parameters():
        assert torch.allclose(weights[name].grad, parameter.grad)
    assert torch.equal(model(ids).logits, before) and all(p.grad is None for p in model.parameters())
