"""A model that is watched: hooks that go away, and a bypassed layer that is a layer that is not there."""

from typing import Any

import pytest
import torch
from planted import BLOCKS, hooks, made
from tiny_models import FAMILIES, tiny_model

from cbd_hub.alignment.importance import collect
from cbd_hub.alignment.observe import LayerDrops, bypass_layers
from cbd_hub.alignment.ranking import rank
from cbd_hub.evaluation.held_out import evaluate_loss


def test_mode_and_hooks_are_restored_even_after_an_error() -> None:
    model, axis_map, sizes = made("gpt2")
    model.train()
    collect(model, axis_map, sizes, BLOCKS)
    assert model.training and hooks(model) == 0
    model.eval()
    rank(model, axis_map, sizes, {**sizes, "layers": 2}, BLOCKS)
    assert not model.training and hooks(model) == 0
    with pytest.raises(IndexError):
        collect(model, axis_map, sizes, BLOCKS + 1000)
    with pytest.raises(ZeroDivisionError), bypass_layers(model, axis_map, [0]):
        _ = 1 / 0
    assert not model.training and hooks(model) == 0


@pytest.mark.parametrize("variant", [*FAMILIES, "smollm3-nope", "qwen2-sliding", "gpt_neox-sequential"])
def test_a_bypassed_layer_is_a_layer_that_is_not_there(variant: str) -> None:
    model, axis_map, sizes = made(variant)
    for dropped in ({1}, {0, sizes["layers"] - 1}):
        kept = [i for i in range(sizes["layers"]) if i not in dropped]
        config = type(model.config)(**model.config.to_dict())
        config._attn_implementation = "eager"
        for name in axis_map.layer_lists:
            setattr(config, name, [getattr(model.config, name)[i] for i in kept])
        for name, axis in axis_map.fields.items():
            if axis == "layers":
                setattr(config, name, len(kept))
        smaller = tiny_model(config, torch.float64)
        with torch.no_grad():
            for name, pattern, layer in axis_map.names({**sizes, "layers": len(kept)}):
                source = name if layer is None else pattern.replace("*", str(kept[layer]))
                smaller.get_parameter(name).copy_(model.get_parameter(source))
        full = evaluate_loss(model, BLOCKS).loss
        with bypass_layers(model, axis_map, dropped):
            bypassed = evaluate_loss(model, BLOCKS).loss
        assert bypassed == pytest.approx(evaluate_loss(smaller, BLOCKS).loss, abs=1e-9)
        assert abs(bypassed - full) > 1e-4
        assert evaluate_loss(model, BLOCKS).loss == full


@pytest.mark.parametrize("variant", [*FAMILIES, "smollm3-nope", "qwen2-sliding", "gpt_neox-sequential"])
def test_losses_without_layers_are_those_of_bypassed_layers_in_any_order(variant: str) -> None:
    model, axis_map, sizes = made(variant)
    model.train()
    drops = LayerDrops(model, axis_map, BLOCKS, batch_size=2)
    last = sizes["layers"] - 1
    for dropped in ({0}, {1}, {1, last}, {last}, {0, last}, {last}, {1}):
        with bypass_layers(model, axis_map, dropped):
            expected = evaluate_loss(model, BLOCKS).loss
        assert drops.loss(dropped) == pytest.approx(expected, abs=1e-9)
    assert model.training and hooks(model) == 0


def test_layers_before_the_first_dropped_one_run_once() -> None:
    model, axis_map, sizes = made("llama", num_hidden_layers=6)
    runs = [0] * sizes["layers"]
    for layer, module in enumerate(model.model.layers):
        forward = module.forward

        def counted(*args: Any, layer: int = layer, forward: Any = forward, **kwargs: Any) -> Any:
            runs[layer] += 1
            return forward(*args, **kwargs)

        module.forward = counted
    drops = LayerDrops(model, axis_map, BLOCKS, batch_size=len(BLOCKS))
    for layer in range(1, 5):
        drops.loss({layer})
    assert runs == [1, 1, 2, 3, 3, 4]  # behind each layer dropped before, and once to get past; the last dropped never
