"""Public checkpoints as anchors: what is refused, how units are paired, and what a build says of the barrier."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_config
from tiny_recipe import built_chain, tiny_recipe
from tokenizers import Regex
from tokenizers.pre_tokenizers import Split
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from cbd_hub import build_chain, from_chain
from cbd_hub.alignment.ready_made import check_neighbors, check_tokenizers, load_ready_made, positional_map
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import AxisMapError, RecipeError
from cbd_hub.text.packing import train_tokenizer


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
        ({"vocab_size": 299}, "vocab 299 .*a chain keeps one"),
        ({"num_hidden_layers": 5}, "more than its larger neighbor"),
        ({"head_dim": 16}, "head_dim 16 .*a chain keeps one"),
    ],
)
def test_what_cannot_be_a_neighbor_is_refused(tmp_path: Path, changes: dict[str, int], words: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(stranger(tmp_path, **changes))
    with pytest.raises(RecipeError, match=words):
        check_neighbors(model.config, load(0).config, "org/stranger")


def test_another_architecture_is_refused() -> None:
    config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=300)
    with pytest.raises(RecipeError, match="one architecture"):
        check_neighbors(config, load(0).config, "org/gpt2")


def test_a_checkpoint_that_is_not_there_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(source={"model": str(anchor(0))}, tokenizer=None, anchors=[{"init": str(tmp_path / "no")}])
    with pytest.raises(RecipeError, match="cannot be loaded"):
        build_chain(recipe, tmp_path / "chain", progress=False)


@pytest.mark.parametrize("align", [True, "learned", False])
def test_a_chain_of_public_checkpoints(tmp_path: Path, align: bool | str) -> None:
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


def configs(**changes: Any) -> tuple[Any, Any]:
    small, large = (AutoConfig.from_pretrained(anchor(i)) for i in (1, 0))
    for name, value in changes.items():
        setattr(small, name, value)
    return small, large


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rms_norm_eps", 1e-2),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 77.0}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
    ],
)
def test_a_field_that_changes_the_function_is_refused_by_name(field: str, value: object) -> None:
    small, large = configs(**{field: value})
    with pytest.raises(RecipeError, match=rf"{field} .*changes the function"):
        check_neighbors(small, large, "other")


def test_all_that_differs_is_listed_at_once() -> None:
    small, large = configs(rms_norm_eps=1e-2, hidden_act="gelu", head_dim=4, intermediate_size=4096)
    with pytest.raises(RecipeError) as error:
        check_neighbors(small, large, "other")
    assert all(word in str(error.value) for word in ("rms_norm_eps", "hidden_act", "ffn 4096", "instead of init"))


def test_fields_without_effect_and_notes_of_tools_are_no_reason() -> None:
    small, large = configs(
        hidden_act="swish", use_cache=False, attention_dropout=0.1, max_position_embeddings=999, bos_token_id=3,
        unsloth_version="2026.1", my_note={"a": [1]}, initializer_range=0.5, transformers_version="4.0",
    )  # fmt: skip
    check_neighbors(small, large, "other")


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"sliding_window": 3}, "sliding_window"),
        ("gemma3_text", {"query_pre_attn_scalar": 7}, "query_pre_attn_scalar"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4}, "layer_types"),
        ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("smollm3", {"no_rope_layers": [0, 0, 0, 0]}, "no_rope_layers"),
    ],
)
def test_other_families(family: str, fields: dict[str, Any], named: str) -> None:
    with pytest.raises((RecipeError, AxisMapError), match=named):
        check_neighbors(tiny_config(family, **fields), tiny_config(family), "other")


def byte_level(words: str, size: int = 300) -> PreTrainedTokenizerFast:
    return train_tokenizer(Dataset.from_list([{"text": words * 30}]), size)


def test_a_tokenizer_with_other_tokens_is_refused() -> None:
    own, other = byte_level("the quick brown fox "), byte_level("vier junge katzen ")
    check_tokenizers(own, byte_level("the quick brown fox "), "same")
    with pytest.raises(RecipeError, match=r"\d+ of \d+ ids stand for other tokens .*instead of.*same tokenizer"):
        check_tokenizers(own, other, "other")


def test_a_tokenizer_that_splits_otherwise_is_refused() -> None:
    own, other = byte_level("the quick brown fox "), byte_level("the quick brown fox ")
    other.backend_tokenizer.pre_tokenizer = Split(Regex("."), "isolated")
    with pytest.raises(RecipeError, match="it splits text otherwise"):
        check_tokenizers(own, other, "other")


def test_learning_an_alignment_needs_text(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        source={"model": str(anchor(0))},
        tokenizer=None,
        anchors=[{"init": str(anchor(1)), "align": "learned", "tokens": 0}],
        calibration_tokens=0,
    )
    with pytest.raises(RecipeError, match=r"`align: learned` reads text: .*calibration_tokens above 0"):
        build_chain(recipe, tmp_path / "chain", progress=False)


def test_it_is_refused_before_a_weight_is_read(tmp_path: Path) -> None:
    place = stranger(tmp_path / "other", rms_norm_eps=0.5)
    (place / "model.safetensors").unlink()
    recipe = tiny_recipe(source={"model": str(anchor(0))}, tokenizer=None, anchors=[{"init": str(place), "tokens": 0}])
    with pytest.raises(RecipeError, match="rms_norm_eps"):
        build_chain(recipe, tmp_path / "chain", progress=False)
    assert not (tmp_path / "chain" / "anchors").exists()
