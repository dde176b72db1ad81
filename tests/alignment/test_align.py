"""Alignment: planted correspondences are found again, the function stays, independent models gain."""

import copy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from make_chain import random_index_map, variant_model
from tiny_models import FAMILIES, VARIANTS, tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_hub.alignment.align import align
from cbd_hub.alignment.basis import rotate
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import AxisMapError, RecipeError, SizeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation.materialize import blend_models, cut
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.interpolation.tensors import take
from cbd_hub.manifest.index_maps import IndexMap

BLOCKS = torch.randint(3, 97, (32, 32), generator=torch.Generator().manual_seed(0))
TEXT = sorted((Path(__file__).resolve().parents[2] / "examples" / "data" / "sotu").glob("18*.txt"))


def untied_rms(axis_map: AxisMap) -> bool:
    """Whether the stream is rotated."""
    return axis_map.rotatable and "lm_head.weight" in axis_map.tensors


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=BLOCKS, use_cache=False).logits


@torch.no_grad()
def scramble(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The same function in other units: permuted ffn units, heads and hidden units, or a rotated stream."""
    model, rng = copy.deepcopy(model), np.random.default_rng(seed)
    axis_map = axis_map_for(model.config)
    sizes = axis_map.sizes(model.config)
    turn = torch.diag(torch.from_numpy(rng.choice([-1.0, 1.0], sizes["hidden"])))
    hidden = {"hidden": rng.permutation(sizes["hidden"])}
    if axis_map.norm == "layer":
        turn = torch.eye(sizes["hidden"]).double()
    elif untied_rms(axis_map):
        rotate(model, axis_map, sizes, BLOCKS)  # folds the gains
        turn, hidden = torch.linalg.qr(torch.from_numpy(rng.normal(size=turn.shape)))[0], {}
    inside = [axis for axis in sizes if axis not in ("hidden", "layers", *axis_map.frozen)]
    orders = [{axis: rng.permutation(sizes[axis]) for axis in inside} for _ in range(sizes["layers"])]
    for name, pattern, layer in axis_map.names(sizes):
        parameter, layout = model.get_parameter(name), axis_map.layout(pattern)
        taken = hidden | ({} if layer is None else orders[layer])
        value = take(parameter.data, layout, sizes, {a: u for a, u in taken.items() if a in layout.axes}).clone()
        for dim, parts in enumerate(layout.dims):
            if parts == (("hidden",),) and axis_map.gain_of(pattern) is None:
                value = (value.double().movedim(dim, -1) @ turn).movedim(-1, dim).float()
        parameter.copy_(value)
    return model


def average(
    large: PreTrainedModel,
    small: PreTrainedModel,
    index_map: IndexMap,
    alpha: float = 0.5,
    target: Sizes | None = None,
) -> PreTrainedModel:
    """The masked average of two models, of the large one's sizes unless said."""
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config), axis_map.sizes(small.config)
    target = sizes[0] if target is None else target
    pair = Pair(axis_map, sizes[1], sizes[0], index_map)
    return blend_models(list_operations(pair, target, "interpolate", alpha), pair, target, large, small)


def distance(a: PreTrainedModel, b: PreTrainedModel) -> float:
    """Root mean square difference of the logits, as a share of their spread."""
    return ((logits(a) - logits(b)).square().mean().sqrt() / logits(b).std()).item()


def run_align(large: PreTrainedModel, small: PreTrainedModel, blocks: Tensor = BLOCKS):
    axis_map = axis_map_for(large.config)
    return align(large, small, axis_map, axis_map.sizes(large.config), axis_map.sizes(small.config), blocks)


def check_map(index_map: IndexMap, sizes: Sizes) -> None:
    """What index_maps.py demands of a map that is read from a file."""
    assert sorted(index_map.layers) == list(range(sizes["layers"])) and index_map.layers.dtype == np.int64
    for axis, order in index_map.orders.items():
        shape = (sizes["hidden"],) if axis == "hidden" else (sizes["layers"], sizes[axis])
        assert order.dtype == np.int32 and order.shape == shape, axis
        assert (np.sort(order, -1) == np.arange(shape[-1])).all(), axis


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_scrambled_copy_is_written_as_the_original_again(variant: str) -> None:
    large = variant_model(variant)
    small = scramble(large)
    assert distance(small, large) < 1e-4
    before, weights = logits(small), {n: p.clone() for n, p in small.named_parameters()}
    aligned, index_map = run_align(large, small)
    check_map(index_map, axis_map_for(large.config).sizes(large.config))
    assert (logits(aligned) - before).abs().max() < 1e-3
    assert all(torch.equal(weights[n], p) for n, p in small.named_parameters())  # its argument is left alone
    assert distance(average(large, aligned, index_map), large) < 1e-3
    assert distance(average(large, small, IndexMap(index_map.layers)), large) > 0.5


@pytest.mark.parametrize("variant", FAMILIES)
def test_the_kept_units_of_a_scrambled_subset_are_found(variant: str) -> None:
    large = variant_model(variant)
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config)
    target = {**sizes, "ffn": sizes["ffn"] * 3 // 4}
    true = random_index_map(axis_map, sizes, target, np.random.default_rng(1))
    small = cut(large, axis_map, sizes, target, true)
    scrambled = scramble(small)
    aligned, index_map = run_align(large, scrambled)
    check_map(index_map, sizes)
    assert (logits(aligned) - logits(scrambled)).abs().max() < 1e-3
    for found, kept in zip(index_map.orders["ffn"], true.orders["ffn"], strict=True):
        missed = set(found[: target["ffn"]]) - set(kept[: target["ffn"]])
        assert len(missed) <= 0.03 * target["ffn"]  # OPT: units that ReLU leaves at zero on these tokens
    exact = average(large, small, true)
    assert distance(average(large, aligned, index_map), exact) < 0.1
    assert distance(average(large, scrambled, true), exact) > 0.5


# -- trained models -------------------------------------------------------------------------------------------------


@cache
def text() -> tuple[Tensor, Tensor]:
    """Blocks of 64 bytes (below 97 after folding) to train on and to measure on: (N, 64) and (M, 64)."""
    data = np.frombuffer(b"".join(path.read_bytes() for path in TEXT[:8]), dtype=np.uint8) % 97
    blocks = torch.from_numpy(data[: len(data) // 64 * 64].astype(np.int64)).reshape(-1, 64)
    return blocks[:-96], blocks[-96:]


def train(model: PreTrainedModel, steps: int, seed: int, learning_rate: float = 4e-3) -> PreTrainedModel:
    """Plain training on the text, a few seconds."""
    blocks, generator = text()[0], torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        batch = blocks[torch.randint(len(blocks), (8,), generator=generator)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@cache
def trained(family: str, seed: int, layers: int, ffn: int) -> PreTrainedModel:
    """A tiny model trained from scratch; read it, never write to it."""
    name = {"gpt2": "n_inner"}.get(family, "intermediate_size")
    config = tiny_config(family, num_hidden_layers=layers, **{name: ffn})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return train(model, 120, seed)


def loss(model: PreTrainedModel) -> float:
    return evaluate_loss(model, text()[1]).loss


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_trained_anchor_that_was_scrambled_interpolates_as_before(family: str) -> None:
    large = trained(family, 1, 4, 96)
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config)
    target = {**sizes, "ffn": 64, "layers": 3}
    rng = np.random.default_rng(0)
    true = random_index_map(axis_map, sizes, target, rng)
    true = IndexMap(np.array([0, 2, 3, 1]), true.orders)
    small = train(cut(large, axis_map, sizes, target, true), 60, 3, learning_rate=1e-3)
    scrambled = scramble(small)
    aligned, index_map = run_align(large, scrambled, text()[0][:64])
    assert index_map.layers.tolist() == [0, 2, 3, 1]
    losses = [loss(average(large, *pair)) for pair in ((small, true), (aligned, index_map), (scrambled, true))]
    print(f"{family}: alpha 0.5: as built {losses[0]:.3f}, scrambled and aligned {losses[1]:.3f}, not {losses[2]:.3f}")
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[2] > losses[0] + 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_independent_models_average_better_when_aligned(family: str) -> None:
    large, small = trained(family, 1, 4, 96), trained(family, 2, 3, 64)
    axis_map = axis_map_for(large.config)
    target = {**axis_map.sizes(small.config), "ffn": 80}
    aligned, index_map = run_align(large, small, text()[0][:64])
    in_order = IndexMap(index_map.layers)
    ends = loss(large), loss(small)
    plain = loss(average(large, small, in_order, target=target))
    ours = loss(average(large, aligned, index_map, target=target))
    print(
        f"{family}: large {ends[0]:.3f}, small {ends[1]:.3f}; "
        f"alpha 0.5: in index order {plain:.3f}, aligned {ours:.3f}"
    )
    assert loss(aligned) == pytest.approx(ends[1], abs=1e-4)
    assert ours < plain


# -- widths, heads, dtypes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "gpt2", "gpt_neox", "olmo2", "phi3"])
def test_models_narrower_on_every_axis_are_aligned(variant: str) -> None:
    family, fields = VARIANTS[variant]
    large = variant_model(variant)
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config)
    few = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": sizes["head_dim"]}
    width = 2 * sizes["head_dim"] if "hidden" in axis_map.equal or family in ("olmo2", "phi3") else 32
    names = {"gpt2": {"n_inner": 50}}.get(family, {"intermediate_size": 50})
    if family in ("gpt2", "gpt_neox"):
        few = {k: v for k, v in few.items() if k not in ("num_key_value_heads", "head_dim")}
    small = tiny_model(tiny_config(family, **{**fields, **few, **names, "hidden_size": width}), seed=5)
    assert axis_map.sizes(small.config)["hidden"] < sizes["hidden"]
    aligned, index_map = run_align(large, small)
    check_map(index_map, sizes)
    assert (logits(aligned) - logits(small)).abs().max() < 1e-3
    assert ("hidden" in index_map.orders) == (not untied_rms(axis_map))
    assert set(index_map.energy) == {g for g in axis_map.norms if axis_map.layout(g).axes == {"hidden"}}
    between = average(large, aligned, index_map, target=axis_map.sizes(small.config))
    assert torch.isfinite(logits(between)).all()


def test_query_heads_are_chosen_for_a_layer_and_ordered_in_each_group() -> None:
    large = variant_model("llama", num_attention_heads=6, num_key_value_heads=2)
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config)
    target = {**sizes, "q_per_kv": 2}
    true = random_index_map(axis_map, sizes, target, np.random.default_rng(0))
    small = scramble(cut(large, axis_map, sizes, target, true))
    with torch.no_grad():  # and in the first group alone, which no order of a layer's heads undoes
        attention, rows = small.model.layers[0].self_attn, torch.arange(32)
        rows[:16] = rows[:16].roll(8)
        attention.q_proj.weight.copy_(attention.q_proj.weight[rows])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, rows])
    aligned, index_map = run_align(large, small)
    assert (logits(aligned) - logits(small)).abs().max() < 1e-3
    assert set(index_map.orders["q_per_kv"][0][:2]) == set(true.orders["q_per_kv"][0][:2])
    q_proj = "model.layers.*.self_attn.q_proj.weight"
    taken = {a: index_map.order(a, 0, sizes[a])[: target[a]] for a in ("kv_heads", "q_per_kv")}
    partner = take(large.get_parameter(q_proj.replace("*", "0")).data, axis_map.layout(q_proj), sizes, taken)
    mine = aligned.get_parameter(q_proj.replace("*", "0")) * aligned.model.layers[0].input_layernorm.weight
    partner = partner * large.model.layers[0].input_layernorm.weight
    assert torch.cosine_similarity(mine, partner, dim=1).min() > 0.9


def test_gains_are_the_large_models_unless_they_are_nearly_zero() -> None:
    large, small = variant_model("llama"), scramble(variant_model("llama"))
    with torch.no_grad():
        large.model.layers[1].input_layernorm.weight[5] = 1e-4
    aligned, _ = run_align(large, small)
    gains = [model.model.layers[1].input_layernorm.weight.detach() for model in (large, aligned)]
    others = torch.arange(48) != 5
    torch.testing.assert_close(gains[1][others], gains[0][others])
    assert gains[1][5] == pytest.approx(1, abs=1e-3)  # folded, not divided by 1e-4


def test_the_dtype_stays() -> None:
    large, small = variant_model("qwen2", torch.bfloat16), scramble(variant_model("qwen2")).to(torch.bfloat16)
    aligned, _ = run_align(large, small)
    assert aligned.dtype == torch.bfloat16 and not aligned.training
    assert distance(aligned.float(), small.float()) < 0.1


def test_the_same_input_gives_the_same_bytes() -> None:
    large, small = variant_model("llama"), scramble(variant_model("llama"))
    first, second = run_align(large, small), run_align(large, small)
    for (name, a), b in zip(first[0].state_dict().items(), second[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert all((order == second[1].orders[axis]).all() for axis, order in first[1].orders.items())


# -- errors ---------------------------------------------------------------------------------------------------------


def test_vocabularies_must_be_equal() -> None:
    with pytest.raises(SizeError, match=r"'vocab' is 90 in the small and 97 in the large.*share a tokenizer"):
        run_align(tiny_model(tiny_config("llama")), tiny_model(tiny_config("llama", vocab_size=90)))


def test_head_dims_must_be_equal() -> None:
    with pytest.raises(SizeError, match="'head_dim' is 16 in the small and 8 in the large"):
        run_align(tiny_model(tiny_config("llama")), tiny_model(tiny_config("llama", head_dim=16)))


def test_the_small_model_must_be_the_smaller_one_on_every_axis() -> None:
    with pytest.raises(SizeError, match=r"'ffn' is 96 in the small and 80 in the large.*choose another pair"):
        run_align(tiny_model(tiny_config("llama")), tiny_model(tiny_config("llama", intermediate_size=96)))


def test_sizes_must_be_the_models() -> None:
    model = tiny_model(tiny_config("llama"))
    axis_map = axis_map_for(model.config)
    sizes = axis_map.sizes(model.config)
    with pytest.raises(SizeError, match="the small model has sizes"):
        align(model, model, axis_map, sizes, {**sizes, "ffn": 8}, BLOCKS)


def test_families_and_tensors_must_be_the_same() -> None:
    llama = tiny_model(tiny_config("llama"))
    axis_map = axis_map_for(llama.config)
    sizes = axis_map.sizes(llama.config)
    with pytest.raises(RecipeError, match=r"small model is a 'mistral'.*one family"):
        align(llama, tiny_model(tiny_config("mistral")), axis_map, sizes, sizes, BLOCKS)
    with pytest.raises(RecipeError, match=r"small model and the axis map differ in 'lm_head.weight'"):
        align(llama, tiny_model(tiny_config("llama", tie_word_embeddings=True)), axis_map, sizes, sizes, BLOCKS)
    with pytest.raises(RecipeError, match="'hidden_act' is gelu in the small and silu in the large"):
        align(llama, tiny_model(tiny_config("llama", hidden_act="gelu")), axis_map, sizes, sizes, BLOCKS)


def test_no_tokens_are_refused() -> None:
    model = tiny_model(tiny_config("llama"))
    with pytest.raises(RecipeError, match="not empty"):
        run_align(model, model, BLOCKS[:0])


def test_weights_that_are_not_finite_are_refused() -> None:
    large, small = tiny_model(tiny_config("llama")), tiny_model(tiny_config("llama"))
    with torch.no_grad():
        small.model.norm.weight[0] = torch.nan
    with pytest.raises(RecipeError, match="not finite"):
        run_align(large, small)


def test_a_map_that_misdescribes_the_model_is_found_out() -> None:
    model = tiny_model(tiny_config("gpt2"))
    axis_map = axis_map_for(model.config)
    tensors = {p: t.replace("(3 heads head_dim)", "(heads 3 head_dim)") for p, t in axis_map.tensors.items()}
    wrong = AxisMap.from_dict({**axis_map.to_dict(), "tensors": tensors})
    sizes = axis_map.sizes(model.config)
    with pytest.raises(AxisMapError, match="changed the small model's logits"):
        align(model, tiny_model(tiny_config("gpt2"), seed=5), wrong, sizes, sizes, BLOCKS)


def test_every_family_is_covered() -> None:
    assert {family for family, _ in VARIANTS.values()} == set(FAMILIES)
