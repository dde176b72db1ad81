"""Index maps: orders and energies of every pair, checked when they are read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_chain import edit_manifest, make_chain, variant_model
from safetensors.numpy import load_file, save_file

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.errors import IntegrityError
from cbd_hub.manifest.index_maps import IndexMap, load_index_maps, read_index_map, save_index_maps
from cbd_hub.manifest.manifest import INDEX_MAPS_NAME, MANIFEST_NAME, read_manifest


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama chain of three anchors."""
    return make_chain(tmp_path_factory.mktemp("chains") / "llama", variant_model("llama"), energy=True)


def test_index_maps_round_trip(chain: Path, tmp_path: Path) -> None:
    manifest = read_manifest(chain / MANIFEST_NAME)
    maps = load_index_maps(manifest, chain / INDEX_MAPS_NAME)
    assert set(maps) == {"a1", "a2"}
    assert maps["a1"].layers.tolist() == manifest.anchors[1].layer_order
    assert set(maps["a1"].orders) == {"ffn"}
    assert set(maps["a2"].orders) == {"ffn", "hidden", "kv_heads"}
    assert maps["a2"].orders["hidden"].shape == (48,)
    assert maps["a2"].orders["kv_heads"].shape == (2, 2)
    save_index_maps(maps, tmp_path / INDEX_MAPS_NAME)
    assert (tmp_path / INDEX_MAPS_NAME).read_bytes() == (chain / INDEX_MAPS_NAME).read_bytes()


def test_orders() -> None:
    index_map = IndexMap(np.arange(2), {"hidden": np.array([1, 0]), "ffn": np.array([[0, 1], [1, 0]])})
    assert index_map.order("hidden", None, 2).tolist() == [1, 0]
    assert index_map.order("ffn", 1, 2).tolist() == [1, 0]
    assert index_map.order("heads", 1, 3).tolist() == [0, 1, 2]
    assert index_map.order("ffn", 0, 2).dtype == np.int64


def test_missing_index_maps_are_refused(chain: Path) -> None:
    """A guess at which units correspond would give a model, and a wrong one."""
    manifest = read_manifest(chain / MANIFEST_NAME)
    with pytest.raises(IntegrityError, match="do not say which ffn units anchor 'a1' keeps"):
        load_index_maps(manifest, None)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("a1/order/ffn", None, "do not say which ffn units anchor 'a1' keeps"),
        ("a1/order/ffn", np.zeros((3, 300), np.int32), "each row a permutation of its 300 ffn units"),
        ("a1/order/ffn", np.arange(300, dtype=np.int32), "must be int32 (3, 300)"),
        ("a1/order/ffn", np.tile(np.arange(300), (3, 1)), "must be int32"),
        ("a1/order/ffn", np.tile(np.arange(1, 301, dtype=np.int32), (3, 1)), "a permutation"),
        ("a1/order/layers", np.zeros((3, 3), np.int32), "which the axis map does not know"),
        ("a1/order/head_dim", np.zeros((3, 8), np.int32), "which the axis map does not know"),
        ("a1/order/color", np.zeros(3, np.int32), "which the axis map does not know"),
        ("a1/color", np.zeros(3, np.int32), "which the axis map does not know"),
        ("a9/order/ffn", np.zeros(3, np.int32), "which belongs to no anchor"),
        ("color", np.zeros(3, np.int32), "which belongs to no anchor"),
        ("a2/energy/model.norm.weight", np.full(48, np.nan, np.float32), "finite and not negative"),
        ("a2/energy/model.norm.weight", np.full(48, -1, np.float32), "finite and not negative"),
        ("a2/energy/model.norm.weight", np.ones(47, np.float32), "must be float32 (48,)"),
        ("a2/energy/model.embed_tokens.weight", np.ones(48, np.float32), "which the axis map does not know"),
    ],
)
def test_bad_index_maps_are_refused(chain: Path, tmp_path: Path, key: str, value: Any, says: str) -> None:
    tensors = load_file(chain / INDEX_MAPS_NAME)
    tensors.pop(key, None)
    path = tmp_path / INDEX_MAPS_NAME
    save_file(tensors if value is None else {**tensors, key: value}, path)
    manifest = read_manifest(chain / MANIFEST_NAME)
    with pytest.raises(IntegrityError) as caught:
        load_index_maps(manifest, path)
    assert says in str(caught.value)


def test_damaged_index_maps_are_refused(chain: Path, tmp_path: Path) -> None:
    manifest, path = read_manifest(chain / MANIFEST_NAME), tmp_path / INDEX_MAPS_NAME
    whole = (chain / INDEX_MAPS_NAME).read_bytes()
    half, eighth = (
        b'{"a1/order/ffn":{"dtype":"%s","shape":[1],"data_offsets":[0,%d]}}' % (dtype, size)
        for dtype, size in ((b"BF16", 2), (b"F8_E4M3", 1))
    )
    odd = [len(h).to_bytes(8, "little") + h + bytes(n) for h, n in ((half, 2), (eighth, 1))]
    for content in (b"", whole[:-1], whole[:100], *odd):
        path.write_bytes(content)
        with pytest.raises(IntegrityError, match=r"cannot be read|must be int32"):
            load_index_maps(manifest, path)


def test_the_map_of_one_pair_comes_back(chain: Path, tmp_path: Path) -> None:
    """As a build writes it down, with the layers elsewhere."""
    whole = load_index_maps(read_manifest(chain / MANIFEST_NAME), chain / INDEX_MAPS_NAME)["a2"]
    save_index_maps({"": whole}, tmp_path / "step.safetensors")
    back = read_index_map(whole.layers.tolist(), tmp_path / "step.safetensors")
    assert back.layers.tolist() == whole.layers.tolist()
    for mine, theirs in ((back.orders, whole.orders), (back.energy, whole.energy)):
        assert set(mine) == set(theirs) and theirs
        assert all(mine[k].dtype == theirs[k].dtype and np.array_equal(mine[k], theirs[k]) for k in mine)
    save_index_maps({"": IndexMap(np.arange(3))}, tmp_path / "layers.safetensors")
    assert not read_index_map([0, 2, 1], tmp_path / "layers.safetensors").orders


def test_neighbors_that_differ_in_layers_alone_need_no_file(tmp_path: Path) -> None:
    model = variant_model("llama")
    sizes = {**axis_map_for(model.config).sizes(model.config), "layers": 2}
    folder = make_chain(tmp_path / "c", model, [sizes])
    assert not (folder / INDEX_MAPS_NAME).exists()
    maps = load_index_maps(read_manifest(folder / MANIFEST_NAME), None)
    assert (len(maps["a1"].layers), maps["a1"].orders) == (3, {})


def test_the_pca_basis_needs_no_order_of_hidden_units(chain: Path, tmp_path: Path) -> None:
    tensors = load_file(chain / INDEX_MAPS_NAME)
    del tensors["a2/order/hidden"]
    save_file(tensors, tmp_path / INDEX_MAPS_NAME)
    (tmp_path / MANIFEST_NAME).write_bytes((chain / MANIFEST_NAME).read_bytes())
    with pytest.raises(IntegrityError, match="do not say which hidden units anchor 'a2' keeps"):
        load_index_maps(read_manifest(tmp_path / MANIFEST_NAME), tmp_path / INDEX_MAPS_NAME)
    edit_manifest(tmp_path, "basis", value="pca")
    maps = load_index_maps(read_manifest(tmp_path / MANIFEST_NAME), tmp_path / INDEX_MAPS_NAME)
    assert maps["a2"].order("hidden", None, 48).tolist() == list(range(48))
