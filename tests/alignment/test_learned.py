"""Learned alignment: the function stays, the loss between the two models falls."""

import pytest
import torch
from make_chain import variant_model
from test_align import BLOCKS, logits, run_align, text, trained
from tiny_models import VARIANTS, tiny_config, tiny_model
from torch import nn
from transformers import PreTrainedModel

from cbd_hub.alignment import learned
from cbd_hub.alignment.learned import learn_maps
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation.materialize import blend_models
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.pair import Pair


def matched(large: PreTrainedModel, small: PreTrainedModel, blocks: torch.Tensor) -> tuple[PreTrainedModel, Pair]:
    axis_map = axis_map_for(large.config)
    aligned, index_map = run_align(large, small, blocks)
    return aligned, Pair(axis_map, axis_map.sizes(small.config), axis_map.sizes(large.config), index_map)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_function_stays(variant: str) -> None:
    family, changes = VARIANTS[variant]
    small, pair = matched(variant_model(variant), tiny_model(tiny_config(family, **changes), seed=3), BLOCKS)
    before = {name: p.clone() for name, p in small.named_parameters()}
    after = learn_maps(variant_model(variant), small, pair, BLOCKS, BLOCKS, steps=8)
    assert (logits(after) - logits(small)).abs().max() < 1e-3
    assert all(torch.equal(before[name], p) for name, p in small.named_parameters())
    moved = [name for name, p in after.named_parameters() if (p - before[name]).abs().max() > 1e-3]
    assert any("o_proj" in name or "c_proj" in name or "dense" in name or "out_proj" in name for name in moved), moved
    untied = pair.axis_map.tied.keys() <= pair.axis_map.tensors.keys()
    post_norms = any("hidden" in pair.axis_map.layout(g).axes for g, r in pair.axis_map.norms.items() if not r)
    assert any("embed" in name or "wte" in name for name in moved) == (untied and not post_norms)


@pytest.mark.parametrize(("family", "least"), [("llama", 0.02), ("gpt2", 0.0)])
def test_the_loss_between_independent_models_falls(family: str, least: float) -> None:
    large, held_out = trained(family, 1, 4, 96), text()[1]
    small, pair = matched(large, trained(family, 2, 3, 64), text()[0][:64])
    target = {**pair.small, "ffn": 80}
    first, second = (learn_maps(large, small, pair, text()[0], held_out, steps=60) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    losses = [
        evaluate_loss(
            blend_models(list_operations(pair, target, "interpolate", 0.5), pair, target, large, m), held_out
        )
        for m in (small, first)
    ]
    print(f"{family}: alpha 0.5: matched {losses[0].loss:.3f}, learned {losses[1].loss:.3f}")
    assert losses[1].loss < losses[0].loss - least


def test_maps_that_lower_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The matching is then returned as it was, in its dtype."""

    def learn_noise(maps: nn.Module, *_: object) -> None:
        for free in maps.parameters():
            nn.init.normal_(free, std=0.3, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(learned, "_learn", learn_noise)
    large = trained("llama", 1, 4, 96)
    small, pair = matched(large, trained("llama", 2, 3, 64), text()[0][:64])
    small = small.to(torch.bfloat16)  # type: ignore[call-arg]
    after = learn_maps(large, small, pair, text()[0], text()[1])
    assert after.dtype == torch.bfloat16 and not after.training
    assert all(torch.equal(p, q) for p, q in zip(after.parameters(), small.parameters(), strict=True))
