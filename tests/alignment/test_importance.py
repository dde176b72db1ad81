"""Which units matter: planted facts must be found."""

import numpy as np
import pytest
import torch
from planted import BLOCKS, each_family, made, silence
from torch import Tensor

from cbd_hub.alignment.importance import collect, token_energy
from cbd_hub.errors import RecipeError

SILENT = {"ffn": 7, "kv_heads": 1, "q_per_kv": 0, "heads": 2}


@each_family
def test_silenced_units_rank_last(family: str) -> None:
    model, axis_map, sizes = made(family)
    axes = [axis for axis in SILENT if axis in sizes]
    for axis in axes:
        silence(model, axis_map, sizes, axis, SILENT[axis])
    statistics = collect(model, axis_map, sizes, BLOCKS)
    assert set(statistics.units) == set(axes)
    for axis, importance in statistics.units.items():
        assert importance.shape == (sizes["layers"], sizes[axis])
        assert (importance.argmin(-1) == SILENT[axis]).all()
        assert (importance[:, SILENT[axis]] == 0).all()
        assert ((importance > 0).sum(-1) == sizes[axis] - 1).all()


@each_family
def test_energy_averages_one_at_every_norm_over_the_hidden_units(family: str) -> None:
    model, axis_map, sizes = made(family)
    statistics = collect(model, axis_map, sizes, BLOCKS)
    assert statistics.num_tokens == BLOCKS.numel()
    assert set(statistics.energy) == {g for g in axis_map.norms if axis_map.tensors[g] == "hidden"}
    for gain, energy in statistics.energy.items():
        assert energy.shape == ((sizes["layers"], sizes["hidden"]) if "*" in gain else (sizes["hidden"],))
        np.testing.assert_allclose(energy.mean(-1), 1, rtol=1e-9)
    assert statistics.hidden.shape == (sizes["hidden"],)
    assert statistics.layers.shape == (sizes["layers"],)
    assert ((statistics.layers > 0) & (statistics.layers < 2)).all()


@each_family
def test_statistics_are_those_of_the_hidden_states(family: str) -> None:
    """Against transformers' own ``output_hidden_states``: the inputs of the blocks."""
    model, axis_map, sizes = made(family)
    statistics = collect(model, axis_map, sizes, BLOCKS, batch_size=4)
    with torch.no_grad():
        states = model(input_ids=BLOCKS, output_hidden_states=True, use_cache=False).hidden_states
    for layer in range(sizes["layers"] - 1):  # the last state has passed the final norm
        cosine = torch.cosine_similarity(states[layer], states[layer + 1], dim=-1)
        assert statistics.layers[layer] == pytest.approx(1 - cosine.mean().item(), rel=1e-9)
    first = next(iter(axis_map.norms))
    if axis_map.norms[first]:  # the norm at a block's entrance
        for layer in range(sizes["layers"]):
            expected = token_energy(states[layer], axis_map.norm == "layer").mean((0, 1))
            np.testing.assert_allclose(statistics.energy[first][layer], expected, rtol=1e-9)


def test_ffn_importance_is_the_share_of_the_squared_contribution() -> None:
    model, axis_map, sizes = made("llama")
    down = model.model.layers[1].mlp.down_proj
    seen: list[Tensor] = []
    handle = down.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=BLOCKS)
    handle.remove()
    contribution = (seen[0].reshape(-1, 1, sizes["ffn"]) * down.weight).square().sum(1)  # (tokens, ffn)
    expected = (contribution / contribution.sum(-1, keepdim=True)).mean(0).detach()
    found = collect(model, axis_map, sizes, BLOCKS).units["ffn"][1]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_huge_first_token_has_one_vote() -> None:
    x = torch.ones(3, 4)
    x[0, 0] = 1e6
    np.testing.assert_allclose(token_energy(x)[1:], 1)
    np.testing.assert_allclose(token_energy(x)[0], [4, 0, 0, 0], atol=1e-6)
    assert (token_energy(torch.zeros(1, 4)) == 0).all()


def test_bad_blocks_and_activations_are_refused() -> None:
    model, axis_map, sizes = made("llama")
    with pytest.raises(RecipeError, match=r"shape \(0, 16\)"):
        collect(model, axis_map, sizes, BLOCKS[:0])
    with pytest.raises(RecipeError, match="shape"):
        collect(model, axis_map, sizes, BLOCKS[0])
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(torch.nan)
    with pytest.raises(RecipeError, match="not finite"):
        collect(model, axis_map, sizes, BLOCKS)


def test_half_precision_is_measured_in_single_precision() -> None:
    model, axis_map, sizes = made("llama")
    exact = collect(model, axis_map, sizes, BLOCKS).units["ffn"]
    half = collect(model.to(torch.bfloat16), axis_map, sizes, BLOCKS).units["ffn"]
    assert half.dtype == np.float64
    np.testing.assert_allclose(half.sum(-1), 1, rtol=1e-5)
    assert np.corrcoef(exact.ravel(), half.ravel())[0, 1] > 0.99
