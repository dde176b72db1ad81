"""Which units matter: planted facts must be found, and a bypassed layer must be a layer that is not there."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, VARIANTS, tiny_config, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_hub.alignment.importance import Statistics, bypass_layers, collect, from_weights, rank, token_energy
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import AxisMapError, RecipeError, SizeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.manifest.index_maps import IndexMap

BLOCKS = torch.randint(3, 97, (6, 16), generator=torch.Generator().manual_seed(0))
SILENT = {"ffn": 7, "kv_heads": 1, "q_per_kv": 0, "heads": 2}

each_family = pytest.mark.parametrize("family", FAMILIES)


def made(variant: str, **overrides: object) -> tuple[PreTrainedModel, AxisMap, dict[str, int]]:
    """A random tiny model with its map and sizes."""
    family, fields = VARIANTS[variant]
    model = tiny_model(tiny_config(family, **{**fields, **overrides}), torch.float64)
    axis_map = axis_map_for(model.config)
    return model, axis_map, axis_map.sizes(model.config)


def silence(model: PreTrainedModel, axis_map: AxisMap, sizes: dict[str, int], axis: str, unit: int) -> None:
    """Zeroes what one unit of an axis writes to the residual stream, in every layer."""
    for pattern in axis_map.consumers(axis):
        dim = 0 if axis_map.in_out else 1
        rows = axis_map.layout(pattern).rows(dim, sizes, {axis: np.array([unit])})
        for layer in range(sizes["layers"]):
            with torch.no_grad():
                model.get_parameter(pattern.replace("*", str(layer))).index_fill_(dim, torch.from_numpy(rows), 0.0)


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


def same(first: Statistics | IndexMap, second: Statistics | IndexMap) -> bool:
    """Whether two results are equal bit for bit."""
    pairs = [(vars(first)[name], vars(second)[name]) for name in vars(first)]
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        if hasattr(a, "keys")
        else np.array_equal(a, b)
        for a, b in pairs
    )


# -- statistics -------------------------------------------------------------------------------------------------------


@each_family
def test_silenced_units_rank_last(family: str) -> None:
    model, axis_map, sizes = made(family)
    axes = [axis for axis in SILENT if axis in sizes]
    for axis in axes:
        silence(model, axis_map, sizes, axis, SILENT[axis])
    for statistics in (
        collect(model, axis_map, sizes, BLOCKS),
        from_weights(model.state_dict(), axis_map, sizes),
    ):
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


def test_an_important_hidden_unit_is_found_without_data() -> None:
    model, axis_map, sizes = made("qwen2")
    with torch.no_grad():
        for name, pattern, _ in axis_map.names(sizes):
            for dim, parts in enumerate(axis_map.layout(pattern).dims):
                if parts == (("hidden",),):
                    model.get_parameter(name).select(dim, 5).mul_(10)
                    model.get_parameter(name).select(dim, 6).mul_(0.1)
    statistics = from_weights(model.state_dict(), axis_map, sizes)
    assert (statistics.hidden.argmax(), statistics.hidden.argmin()) == (5, 6)
    assert statistics.energy == {} and statistics.num_tokens == 0


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


# -- layers -----------------------------------------------------------------------------------------------------------


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


def mute(model: PreTrainedModel, layer: int) -> None:
    """Makes a llama layer write nothing, so that it can be left out for free."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight.zero_()
        model.model.layers[layer].mlp.down_proj.weight.zero_()


@torch.no_grad()
def own_text(model: PreTrainedModel) -> Tensor:
    """Tokens that the model itself finds likely, so that leaving out a layer that does something costs loss."""
    text = BLOCKS[:, :1]
    while text.shape[1] < BLOCKS.shape[1]:
        text = torch.cat([text, model(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    return text


def test_layers_that_do_nothing_are_dropped_and_come_back_by_cost() -> None:
    model, axis_map, sizes = made("llama", num_hidden_layers=9)
    for layer in (3, 6):
        mute(model, layer)
    text = own_text(model)
    index_map = rank(model, axis_map, sizes, {**sizes, "layers": 7}, text)
    assert index_map.layers.tolist()[:7] == [0, 1, 2, 4, 5, 7, 8]
    assert set(index_map.layers[7:]) == {3, 6}  # which of them first is rounding: both do nothing
    assert index_map.layers.dtype == np.int64
    assert index_map.orders == {} and index_map.energy == {}

    order = rank(model, axis_map, sizes, {**sizes, "layers": 6}, text).layers
    assert {3, 6} < set(order[6:]) and order[6] not in (3, 6)  # the costly one comes back first
    assert order[:6].tolist() == sorted(order[:6])


def test_whole_sets_are_compared_by_loss() -> None:
    """Two layers that undo each other: either alone is vital, both together are nothing."""
    model, axis_map, sizes = made("llama", num_hidden_layers=8)
    push = 5 * torch.randn(sizes["hidden"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for layer, sign in ((3, 1), (4, -1)):
        mute(model, layer)
        model.model.layers[layer].mlp.down_proj.bias = nn.Parameter(sign * push)
    text = own_text(model)
    full = evaluate_loss(model, text).loss
    for dropped in (3, 4):
        with bypass_layers(model, axis_map, [dropped]):
            assert evaluate_loss(model, text).loss > full + 0.1
    assert rank(model, axis_map, sizes, {**sizes, "layers": 6}, text).layers.tolist()[:6] == [0, 1, 2, 5, 6, 7]


def test_vital_layers_are_protected_as_long_as_possible() -> None:
    model, axis_map, sizes = made("llama", num_hidden_layers=8)
    for layer in (0, 1, 6, 7):  # free to drop, and yet kept
        mute(model, layer)
    for blocks in (BLOCKS, None):
        order = rank(model, axis_map, sizes, {**sizes, "layers": 4}, blocks).layers
        assert order[:4].tolist() == [0, 1, 6, 7] and sorted(order[4:]) == [2, 3, 4, 5]
        assert rank(model, axis_map, sizes, {**sizes, "layers": 2}, blocks).layers[:2].tolist() == [0, 7]
        assert rank(model, axis_map, sizes, {**sizes, "layers": 1}, blocks).layers[:1].tolist() == [0]
    shallow, axis_map, sizes = made("llama", num_hidden_layers=4)
    order = rank(shallow, axis_map, sizes, {**sizes, "layers": 2}, BLOCKS).layers
    assert order[:2].tolist() == [0, 3]


def test_without_data_the_deep_middle_goes_first() -> None:
    model, axis_map, sizes = made("llama", num_hidden_layers=10, hidden_size=16, vocab_size=97)
    layers = from_weights(model.state_dict(), axis_map, sizes).layers
    assert np.argsort(layers, kind="stable")[:3].tolist() == [6, 7, 5]
    assert layers[[0, 1, 8, 9]].min() > layers[2:8].max()
    order = rank(model, axis_map, sizes, {**sizes, "layers": 8}, None).layers
    assert order.tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 7, 6]


# -- the index map ----------------------------------------------------------------------------------------------------


@each_family
def test_the_index_map_orders_what_differs_and_nothing_else(family: str) -> None:
    model, axis_map, sizes = made(family)
    small = {**sizes, "ffn": 40}
    head_axis = "kv_heads" if "kv_heads" in sizes else "heads"
    small[head_axis] -= 1
    small["hidden"] = 36
    index_map = rank(model, axis_map, sizes, small, BLOCKS)
    assert set(index_map.orders) == {"ffn", head_axis, "hidden"}
    assert index_map.layers.tolist() == list(range(sizes["layers"]))
    for axis, order in index_map.orders.items():
        assert order.dtype == np.int32
        assert order.shape == ((sizes["hidden"],) if axis == "hidden" else (sizes["layers"], sizes[axis]))
        assert (np.sort(order) == np.arange(sizes[axis])).all()
    statistics = collect(model, axis_map, sizes, BLOCKS)
    ranked = np.take_along_axis(statistics.units["ffn"], index_map.orders["ffn"].astype(int), -1)
    assert (np.diff(ranked) <= 0).all()
    assert (np.diff(statistics.hidden[index_map.orders["hidden"]]) <= 0).all()
    assert set(index_map.energy) == set(statistics.energy)
    assert all(energy.dtype == np.float32 for energy in index_map.energy.values())

    prefix = rank(model, axis_map, sizes, small, BLOCKS, prefix_hidden=True)
    assert "hidden" not in prefix.orders and prefix.energy.keys() == index_map.energy.keys()
    weights_only = rank(model, axis_map, sizes, small, None)
    assert set(weights_only.orders) == set(index_map.orders) and weights_only.energy == {}


@pytest.mark.parametrize("blocks", [BLOCKS, None], ids=["data", "weights"])
def test_the_same_input_gives_the_same_result(blocks: Tensor | None) -> None:
    model, axis_map, sizes = made("qwen3", num_hidden_layers=5)
    small = {**sizes, "layers": 3, "ffn": 40, "hidden": 32, "q_per_kv": 1}
    assert same(rank(model, axis_map, sizes, small, blocks), rank(model, axis_map, sizes, small, blocks))


def test_ties_are_settled_by_index() -> None:
    model, axis_map, sizes = made("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    order = rank(model, axis_map, sizes, {**sizes, "ffn": 8}, BLOCKS).orders["ffn"]
    assert (order == np.arange(sizes["ffn"])).all()


def test_half_precision_is_measured_in_single_precision() -> None:
    model, axis_map, sizes = made("llama")
    exact = collect(model, axis_map, sizes, BLOCKS).units["ffn"]
    half = collect(model.to(torch.bfloat16), axis_map, sizes, BLOCKS).units["ffn"]
    assert half.dtype == np.float64
    np.testing.assert_allclose(half.sum(-1), 1, rtol=1e-5)
    assert np.corrcoef(exact.ravel(), half.ravel())[0, 1] > 0.99


def test_impossible_neighbors_are_refused() -> None:
    model, axis_map, sizes = made("llama")
    with pytest.raises(SizeError, match=r"'vocab' is 97 and cannot become 90"):
        rank(model, axis_map, sizes, {**sizes, "vocab": 90}, None)
    with pytest.raises(SizeError, match=r"'ffn' is 80 and cannot become 81"):
        rank(model, axis_map, sizes, {**sizes, "ffn": 81}, None)
    with pytest.raises(SizeError, match=r"'layers' is 3 and cannot become 0"):
        rank(model, axis_map, sizes, {**sizes, "layers": 0}, None)
    with pytest.raises(SizeError, match="the model has sizes"):
        rank(model, axis_map, {**sizes, "ffn": 81}, sizes, None)
    blind = replace(
        axis_map,
        tensors={p: t.replace("hidden ffn", "hidden 80") for p, t in axis_map.tensors.items()},
    )
    with pytest.raises(AxisMapError, match="no matrix of 'llama' reads it"):
        rank(model, blind, sizes, {**sizes, "ffn": 40}, None)
