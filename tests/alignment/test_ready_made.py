"""Public checkpoints as anchors: what is refused, how units are paired, and what a build says of the barrier."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_recipe import built_chain, tiny_recipe
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cbd_hub import build_chain, from_chain
from cbd_hub.alignment.ready_made import check_neighbors, load_ready_made, positional_map
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import RecipeError


def anchor(index: int) -> Path:
    chain = Chain.from_pretrained(built_chain())
    return built_chain() / "anchors" / chain.anchors[index].name


def load(index: int) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(anchor(index)).eval()


def stranger(folder: Path, **changes: int) -> Path:
    """A model of an anchor's shape with weights of its own, and some fields changed."""
    config = AutoConfig.from_pretrained(anchor(1))
    config.update(changes)
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_positional_map_pairs_ends_and_spreads_layers() -> None:
    large = axis_map_for(load(0).config)
    sizes = large.sizes(load(0).config)
    pairs = positional_map(large, sizes | {"layers": 7}, sizes | {"layers": 3, "ffn": 8})
    assert pairs.layers.tolist() == [0, 3, 6, 1, 2, 4, 5]
    assert set(pairs.orders) == {"ffn"}
    assert pairs.orders["ffn"].shape == (7, sizes["ffn"])
    assert (pairs.orders["ffn"] == np.arange(sizes["ffn"])).all()


def test_as_it_is_the_checkpoint_is_not_touched() -> None:
    large, small = load(0), load(1)
    before = {name: p.clone() for name, p in small.state_dict().items()}
    adopted, _ = load_ready_made(small, large, axis_map_for(large.config), None)
    assert adopted is small
    assert all(torch.equal(before[name], p) for name, p in small.state_dict().items())


def test_aligned_it_computes_the_same() -> None:
    large, small = load(0), load(1)
    blocks = torch.randint(0, small.config.vocab_size, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = small(blocks[:2]).logits
        adopted, _ = load_ready_made(small, large, axis_map_for(large.config), blocks, progress=False)
        torch.testing.assert_close(adopted(blocks[:2]).logits, before, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 299}, "one vocab"),
        ({"num_hidden_layers": 5}, "more than its larger neighbor"),
        ({"head_dim": 16}, "one head_dim"),
    ],
)
def test_what_cannot_be_a_neighbor_is_refused(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(stranger(tmp_path, **changes))
    with pytest.raises(RecipeError, match=words):
        check_neighbors(model, load(0), "org/stranger")


def test_another_architecture_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=300)
    with pytest.raises(RecipeError, match="one architecture"):
        check_neighbors(AutoModelForCausalLM.from_config(config), load(0), "org/gpt2")


def test_a_checkpoint_that_is_not_there_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(source={"model": str(anchor(0))}, tokenizer=None, anchors=[{"init": str(tmp_path / "no")}])
    with pytest.raises(RecipeError, match="cannot be loaded"):
        build_chain(recipe, tmp_path / "chain", progress=False)


@pytest.mark.parametrize("align", [True, False])
def test_a_chain_of_public_checkpoints(tmp_path: Path, align: bool) -> None:
    """The build measures the barrier and acts on it; the anchor's own function stays what it was."""
    public = stranger(tmp_path / "public")
    recipe = tiny_recipe(
        source={"model": str(anchor(0))},
        tokenizer=None,
        anchors=[{"init": str(public), "align": align, "tokens": 0}],
    )
    chain = build_chain(recipe, tmp_path / "chain", progress=False)
    entry = chain.manifest.anchors[1]
    assert entry.init == str(public)
    assert entry.barrier is not None
    assert entry.aligned == (entry.barrier.height <= 0.1)
    blocks = torch.arange(64).reshape(2, 32)
    with torch.no_grad():
        own = AutoModelForCausalLM.from_pretrained(public).eval()(blocks).logits
        torch.testing.assert_close(chain.anchors[1].load()(blocks).logits, own, atol=1e-3, rtol=1e-3)
    middle = (chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2
    assert from_chain(tmp_path / "chain", middle, method="paper", tolerance=0.05).config.cbd_hub["method"] == "paper"
    again = build_chain(recipe, tmp_path / "chain", progress=False)
    assert again.manifest == chain.manifest
