"""What a smaller neighbor keeps: layers chosen by loss, orders of the other axes, ties, impossible neighbors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted import BLOCKS, each_family, made, same
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_hub.alignment.importance import collect
from cbd_hub.alignment.observe import bypass_layers
from cbd_hub.alignment.ranking import rank
from cbd_hub.errors import AxisMapError, SizeError
from cbd_hub.evaluation.held_out import evaluate_loss


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
    for blocks in (BLOCKS, BLOCKS):
        order = rank(model, axis_map, sizes, {**sizes, "layers": 4}, blocks).layers
        assert order[:4].tolist() == [0, 1, 6, 7] and sorted(order[4:]) == [2, 3, 4, 5]
        assert rank(model, axis_map, sizes, {**sizes, "layers": 2}, blocks).layers[:2].tolist() == [0, 7]
        assert rank(model, axis_map, sizes, {**sizes, "layers": 1}, blocks).layers[:1].tolist() == [0]
    shallow, axis_map, sizes = made("llama", num_hidden_layers=4)
    order = rank(shallow, axis_map, sizes, {**sizes, "layers": 2}, BLOCKS).layers
    assert order[:2].tolist() == [0, 3]


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


def test_the_same_input_gives_the_same_result() -> None:
    model, axis_map, sizes = made("qwen3", num_hidden_layers=5)
    small = {**sizes, "layers": 3, "ffn": 40, "hidden": 32, "q_per_kv": 1}
    assert same(rank(model, axis_map, sizes, small, BLOCKS), rank(model, axis_map, sizes, small, BLOCKS))


def test_ties_are_settled_by_index() -> None:
    model, axis_map, sizes = made("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
    order = rank(model, axis_map, sizes, {**sizes, "ffn": 8}, BLOCKS).orders["ffn"]
    assert (order == np.arange(sizes["ffn"])).all()


def test_impossible_neighbors_are_refused() -> None:
    model, axis_map, sizes = made("llama")
    with pytest.raises(SizeError, match=r"'vocab' is 97 and cannot become 90"):
        rank(model, axis_map, sizes, {**sizes, "vocab": 90}, BLOCKS)
    with pytest.raises(SizeError, match=r"'ffn' is 80 and cannot become 81"):
        rank(model, axis_map, sizes, {**sizes, "ffn": 81}, BLOCKS)
    with pytest.raises(SizeError, match=r"'layers' is 3 and cannot become 0"):
        rank(model, axis_map, sizes, {**sizes, "layers": 0}, BLOCKS)
    with pytest.raises(SizeError, match="the model has sizes"):
        rank(model, axis_map, {**sizes, "ffn": 81}, sizes, BLOCKS)
    blind = replace(
        axis_map,
        tensors={p: t.replace("hidden ffn", "hidden 80") for p, t in axis_map.tensors.items()},
    )
    with pytest.raises(AxisMapError, match="no matrix of 'llama' reads it"):
        rank(model, blind, sizes, {**sizes, "ffn": 40}, BLOCKS)
