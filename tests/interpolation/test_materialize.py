"""From a plan's operations to tensors and a model: the parts that assembly and building share."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from make_chain import make_chain, variant_model
from tiny_models import tiny_config, tiny_model

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.chain.chain import Chain, from_chain
from cbd_hub.chain.export import write_model
from cbd_hub.errors import AxisMapError, OutputExistsError, PrecisionError, SizeError
from cbd_hub.files import whole_folder
from cbd_hub.interpolation.materialize import blend, build_model, parse_dtype, target_config
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest.index_maps import IndexMap


def test_parse_dtype() -> None:
    assert parse_dtype("bfloat16") is parse_dtype(torch.bfloat16) is torch.bfloat16
    assert parse_dtype("bf16") is torch.bfloat16 and parse_dtype("fp16") is torch.float16
    for wrong in ("int8", "bf61", torch.int8, "auto"):
        with pytest.raises(SizeError, match=r"allowed: 'auto', .*bfloat16"):
            parse_dtype(wrong)


def test_whole_folder(tmp_path: Path) -> None:
    """A folder appears whole or not at all, and nothing else beside it is touched."""
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "mine").write_text("kept")
    with whole_folder(tmp_path / "model") as temporary:
        (temporary / "weights").write_text("w")
        assert not (tmp_path / "model").exists()
    assert (tmp_path / "model" / "weights").read_text() == "w"
    with pytest.raises(RuntimeError, match="half-way"), whole_folder(tmp_path / "other") as temporary:
        (temporary / "weights").write_text("w")
        raise RuntimeError("half-way")
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as temporary:
        (temporary / "weights").write_text("w")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "model", "model.partial"]
    assert (tmp_path / "model.partial" / "mine").read_text() == "kept"
    for place in (tmp_path / "model", tmp_path / "model" / "weights"):
        with pytest.raises(OutputExistsError, match="is not empty"), whole_folder(place):
            pass
    assert (tmp_path / "model" / "weights").read_text() == "w"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "phi3"])
def test_all_units_of_a_model_are_the_model_itself(family: str) -> None:
    model = tiny_model(tiny_config(family))
    axis_map = axis_map_for(model.config)
    sizes = axis_map.sizes(model.config)
    state = model.state_dict()
    pair = Pair.same(axis_map, sizes)
    operations = list_operations(pair, sizes, "prune", 0.0)
    made = dict(blend(operations, pair, sizes, state.__getitem__, state.__getitem__, torch.float32))
    for name, tensor in made.items():
        assert torch.equal(tensor, state[name])
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    again = build_model(target_config(model.config, pair, sizes), made, torch.float32)
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)  # another attention kernel
    assert not again.training


def test_per_layer_lists_follow_the_kept_layers() -> None:
    model = tiny_model(tiny_config("gemma3_text"))
    axis_map = axis_map_for(model.config)
    sizes = axis_map.sizes(model.config)
    small = {**sizes, "layers": 2}
    index_map = IndexMap(np.array([0, 2, 1, 3]))
    config = target_config(model.config, Pair(axis_map, small, sizes, index_map), small)
    assert config.num_hidden_layers == 2
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert model.config.num_hidden_layers == 4


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_a_parameter_too_few_or_too_many_is_refused(change: str) -> None:
    model = tiny_model(tiny_config("llama"))
    state = dict(model.state_dict())
    if change == "missing":
        del state["model.norm.weight"]
    else:
        state["model.norm.shift"] = torch.zeros(48)
    with pytest.raises(AxisMapError, match=r"model\.norm\."):
        build_model(model.config, state, torch.float32)


# -- casts that overflow, and defaults of the caller ------------------------------------------------------------------


def chain_with(folder: Path, value: float) -> Path:
    model = variant_model("llama")
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0] = value
    return make_chain(folder, model, noise=0.0)


@pytest.mark.parametrize("value", [1e5, -7e4, 65520.0])
def test_a_cast_to_float16_that_overflows_is_refused(tmp_path: Path, value: float) -> None:
    chain = Chain.from_pretrained(chain_with(tmp_path / "c", value))
    top = chain.plan(chain.anchors[0].num_parameters)
    with pytest.raises(PrecisionError, match=r"down_proj.weight reaches .*float16 holds no more than 65504"):
        chain.initialize(top, dtype="float16", progress=False)
    assert chain.initialize(top, dtype="bfloat16", progress=False).dtype == torch.bfloat16
    with pytest.raises(PrecisionError, match="down_proj"):
        write_model(chain, top, tmp_path / "out", dtype="float16", progress=False)
    assert not (tmp_path / "out").exists()


def test_what_fits_is_cast(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(chain_with(tmp_path / "c", 65504.0))
    made = chain.initialize(chain.plan(chain.anchors[0].num_parameters), dtype="float16", progress=False)
    assert float(made.get_parameter("model.layers.0.mlp.down_proj.weight")[0, 0]) == 65504.0


@pytest.mark.parametrize("default", ["meta device", "half precision", "double precision", "default device"])
def test_a_default_of_the_caller_changes_nothing(tmp_path: Path, default: str) -> None:
    folder = make_chain(tmp_path / "c", variant_model("llama"))
    chain = Chain.from_pretrained(folder)
    size = (chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2
    expected = from_chain(folder, num_parameters=size).state_dict()
    try:
        if default == "default device":
            torch.set_default_device("meta")
        if "precision" in default:
            torch.set_default_dtype(torch.float16 if "half" in default else torch.float64)
        with torch.device("meta") if default == "meta device" else nullcontext():
            made = from_chain(folder, num_parameters=size).state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for name, value in expected.items():
        assert made[name].device.type == "cpu" and made[name].dtype == value.dtype
        assert torch.equal(made[name], value)
