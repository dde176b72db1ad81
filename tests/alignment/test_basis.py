"""Rotating the residual stream: exact with an untied head, close with a tied one, and every width a prefix."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VARIANTS, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_hub.alignment.basis import KEPT_AXES, rotate
from cbd_hub.alignment.importance import collect
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import AxisMapError, RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss

BLOCKS = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0))

ROTATABLE = ("llama", "mistral", "smollm3", "qwen2", "qwen3", "phi3")
_OF_THESE = [v for v, (family, _) in VARIANTS.items() if family in ROTATABLE]
TIED = [v for v in _OF_THESE if tiny_config(VARIANTS[v][0], **VARIANTS[v][1]).tie_word_embeddings]
UNTIED = [v for v in _OF_THESE if v not in TIED]


def made(variant: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, AxisMap, dict[str, int]]:
    """A random tiny model with its map and sizes."""
    family, fields = VARIANTS[variant]
    model = tiny_model(tiny_config(family, **fields), dtype)
    axis_map = axis_map_for(model.config)
    return model, axis_map, axis_map.sizes(model.config)


def float64_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The families' RMSNorms sum in float32 whatever the model's dtype; torch's own does not."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=BLOCKS, use_cache=False).logits


def test_every_family_is_accounted_for() -> None:
    assert {VARIANTS[v][0] for v in UNTIED} == set(ROTATABLE)
    assert {f for f in FAMILIES if axis_map_for(tiny_config(f)).rotatable} == set(ROTATABLE)


@pytest.mark.parametrize("variant", UNTIED)
def test_untied_rotation_is_exact(variant: str) -> None:
    model, axis_map, sizes = made(variant, torch.float64)
    model = float64_norms(model)
    before, weight = logits(model), model.get_input_embeddings().weight.clone()
    assert rotate(model, axis_map, sizes, BLOCKS) < 1e-9
    assert (logits(model) - before).abs().max() < 1e-9
    assert (model.get_input_embeddings().weight - weight).abs().max() > 0.1  # something was done

    model, axis_map, sizes = made(variant)
    before = logits(model)
    claimed = rotate(model, axis_map, sizes, BLOCKS)
    assert claimed < 1e-3 and (logits(model) - before).abs().max() < 1e-3
    assert claimed == (logits(model) - before)[:1].abs().max().item()


@pytest.mark.parametrize("variant", UNTIED)
def test_untied_gains_become_one_and_energy_falls(variant: str) -> None:
    model, axis_map, sizes = made(variant)
    start = collect(model, axis_map, sizes, BLOCKS).hidden
    rotate(model, axis_map, sizes, BLOCKS)
    for name, pattern, _ in axis_map.names(sizes):
        if axis_map.tensors[pattern] == "hidden" and pattern in axis_map.norms:
            assert (model.get_parameter(name) == 1).all()
    energy = collect(model, axis_map, sizes, BLOCKS).hidden
    assert (energy[1:] <= energy[:-1] + 1e-4).all()
    best_subset = sorted(start, reverse=True)
    assert energy[:24].sum() > sum(best_subset[:24]) + 1  # a prefix beats the best subset of the old units


@pytest.mark.parametrize("variant", TIED)
def test_tied_rotation_stays_close_and_tied(variant: str) -> None:
    model, axis_map, sizes = made(variant)
    before, names = logits(model), set(model.state_dict())
    loss = evaluate_loss(model, BLOCKS).loss
    rotate(model, axis_map, sizes, BLOCKS)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert set(model.state_dict()) == names
    after = logits(model)
    relative = ((after - before).square().mean() / before.square().mean()).sqrt().item()
    assert relative < 0.05
    assert evaluate_loss(model, BLOCKS).loss == pytest.approx(loss, abs=0.02)
    energy = collect(model, axis_map, sizes, BLOCKS).hidden
    for part in (energy[:KEPT_AXES], energy[KEPT_AXES:]):
        assert (part[1:] <= part[:-1] + 0.1).all()


def test_tied_rotation_is_exact_where_the_final_gain_is_constant() -> None:
    model, axis_map, sizes = made("llama-tied", torch.float64)
    model = float64_norms(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(1.7)
    assert rotate(model, axis_map, sizes, BLOCKS) < 1e-9


def test_tied_outliers_and_negative_gains_are_kept_and_come_first() -> None:
    model, axis_map, sizes = made("qwen2-tied", torch.float64)
    with torch.no_grad():
        model.model.norm.weight[30] = -0.8
        model.model.norm.weight[31] = 0.001
        model.model.embed_tokens.weight[:, 17] += 6.0
    model = float64_norms(model)
    old = copy.deepcopy(model)
    difference = rotate(model, axis_map, sizes, BLOCKS)
    assert difference < 0.05 * logits(old).abs().max()
    gains = model.model.norm.weight.detach()
    kept = KEPT_AXES + 2
    assert sum(gains[:kept] < 0) == 1 and (gains[kept:] - gains[-1]).abs().max() < 1e-9
    embedding, before = model.model.embed_tokens.weight, old.model.embed_tokens.weight
    torch.testing.assert_close(embedding[:, 0], before[:, 17])  # the loudest unit, as it was
    assert any(torch.allclose(embedding[:, i], before[:, 30]) for i in range(kept))


def test_the_same_input_gives_the_same_bytes_whatever_the_mode() -> None:
    models = []
    for _ in range(2):
        model, axis_map, sizes = made("llama")
        model.train(bool(models))
        rotate(model, axis_map, sizes, BLOCKS)
        assert model.training == bool(models)
        assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())
        models.append(model)
    for (name, first), second in zip(models[0].state_dict().items(), models[1].state_dict().values(), strict=True):
        assert torch.equal(first, second), name


def test_a_rotated_tied_model_is_a_plain_model(tmp_path: Path) -> None:
    model, axis_map, sizes = made("llama-tied")
    rotate(model, axis_map, sizes, BLOCKS)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(again), logits(model))


def test_half_precision_is_cast_once() -> None:
    model, axis_map, sizes = made("llama")
    exact = copy.deepcopy(model)
    rotate(exact, axis_map, sizes, BLOCKS)
    model = model.to(torch.bfloat16)
    before = logits(model)
    assert rotate(model, axis_map, sizes, BLOCKS) < 0.1 * before.abs().max()
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ROTATABLE])
def test_other_families_are_refused_and_left_alone(family: str) -> None:
    model, axis_map, sizes = made(family)
    before = logits(model)
    with pytest.raises(AxisMapError, match=f"{family}.*cannot be rotated.*ranked by importance"):
        rotate(model, axis_map, sizes, BLOCKS)
    assert torch.equal(logits(model), before)


def test_no_tokens_are_refused() -> None:
    model, axis_map, sizes = made("llama")
    with pytest.raises(RecipeError, match="not empty"):
        rotate(model, axis_map, sizes, BLOCKS[:0])
