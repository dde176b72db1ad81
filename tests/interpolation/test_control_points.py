"""The curve between two anchors: exact at its ends, equal to its formula in between, in every family."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from make_chain import add_control_points, edit_manifest, make_chain, refresh, variant_model
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS
from torch import Tensor

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.chain.chain import Chain, from_chain
from cbd_hub.errors import CbdError, IntegrityError, ManifestError, RecipeError, SizeError
from cbd_hub.interpolation.control_points import choose_rank, factor_shapes
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.manifest import MANIFEST_NAME, read_manifest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_control_points(make_chain(tmp_path_factory.mktemp("chains") / "llama", variant_model("llama")))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def middle(chain: Chain, pair: int = 1) -> int:
    return (chain.anchors[pair].num_parameters + chain.anchors[pair + 1].num_parameters) // 2


def in_natural_units(chain: Chain, plan: Plan, factors: dict[str, Tensor], name: str, axis_map: AxisMap) -> np.ndarray:
    """The control point of one tensor of the large anchor, whole, in that anchor's own numbering, in float64."""
    pattern, layer = axis_map.match(name)
    layout = axis_map.layout(pattern)
    if len(layout.dims) == 1:
        ordered = factors[name].double().numpy()
    else:
        ordered = factors[f"{name}.rows"].double().numpy() @ factors[f"{name}.columns"].double().numpy().T
    index_map = plan.pair.index_map
    orders = {a: index_map.order(a, layer, plan.pair.large[a]) for a in layout.axes if a in index_map.orders}
    places = [layout.rows(dim, plan.pair.large, orders) for dim in range(len(layout.dims))]
    natural = ordered
    for dim, rows in enumerate(places):
        if rows is not None:
            moved = np.empty_like(natural)
            index: list[Any] = [slice(None)] * natural.ndim
            index[dim] = rows
            moved[tuple(index)] = natural
            natural = moved
    return natural


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_formula(tmp_path: Path, variant: str) -> None:
    """theta = average + 4 r (1 - r) C, with C written out whole in the large anchor's units, in float64."""
    chain = Chain.from_pretrained(add_control_points(make_chain(tmp_path / "c", variant_model(variant))))
    axis_map = chain.manifest.resolved_axis_map
    for pair in (0, 1):
        plan = chain.plan(middle(chain, pair))
        assert plan.method == "bezier" and plan.needed_control
        bent = chain.initialize(plan, progress=False).state_dict()
        straight_plan = chain.plan(middle(chain, pair), method="interpolate")
        straight = chain.initialize(straight_plan, progress=False).state_dict()
        factors = load_file(tmp_path / "c" / "control_points" / f"a{pair + 1}.safetensors")
        r = plan.position
        assert [op.name for op in plan.operations] == [op.name for op in straight_plan.operations]
        for op in plan.operations:
            expected = straight[op.name].double().numpy()
            if axis_map.is_bent(op.pattern):
                assert op.large_name is not None
                whole = in_natural_units(chain, plan, factors, op.large_name, axis_map)
                layout, taken = axis_map.layout(op.pattern), plan.pair.taken(op, plan.sizes)
                for dim in range(whole.ndim):
                    rows = layout.rows(dim, plan.pair.large, taken)
                    whole = whole if rows is None else whole.take(rows, dim)
                expected = expected + 4 * r * (1 - r) * whole
            np.testing.assert_allclose(bent[op.name].double().numpy(), expected, rtol=0, atol=2e-6, err_msg=op.name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ends_are_the_anchors_bit_for_bit(tmp_path: Path, variant: str) -> None:
    made = make_chain(tmp_path / "c", variant_model(variant))
    before = [a.load().state_dict() for a in Chain.from_pretrained(made).anchors]
    chain = Chain.from_pretrained(add_control_points(made, scale=5.0))
    shutil.rmtree(made / "control_points")  # nothing of it is read at an anchor's own size
    for anchor, state in zip(chain.anchors, before, strict=True):
        for method in ("auto", "bezier"):
            plan = chain.plan(anchor.num_parameters, method=method)
            assert (plan.method, plan.needed_control) == ("anchor", {})
        after = from_chain(made, num_parameters=anchor.num_parameters).state_dict()
        assert all(torch.equal(after[name], value) for name, value in state.items())


def test_a_size_next_to_an_anchor_is_hardly_bent(folder: Path) -> None:
    chain = Chain.from_pretrained(folder)
    for alpha, weight in ((0.0, 0.0), (1.0, 0.0), (0.5, 1.0), (0.25, 0.75)):
        plan = chain.plan(middle(chain), alpha=alpha, method="bezier")
        assert {op.bend for op in plan.operations if "layers" in op.name} == {weight}
        assert bool(plan.needed_control) == (weight > 0)


@pytest.mark.parametrize("pair", [0, 1])
def test_permuted_units_change_nothing(copy: Path, pair: int) -> None:
    """Where an anchor stores its units is arbitrary: the control point keeps to the order of the index map."""
    chain = Chain.from_pretrained(copy)
    size = middle(chain, pair)
    before = from_chain(copy, num_parameters=size).state_dict()
    path = copy / "anchors" / f"a{pair}" / "model.safetensors"
    weights, maps = load_file(path), load_numpy(copy / "index_maps.safetensors")
    rng, key = np.random.default_rng(0), f"a{pair + 1}/order/ffn"
    for layer in range(maps[key].shape[0]):
        moved = rng.permutation(maps[key].shape[1])  # unit moved[i] now stands at place i
        for name, dim in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            full = f"model.layers.{layer}.mlp.{name}.weight"
            weights[full] = weights[full].index_select(dim, torch.from_numpy(moved)).contiguous()
        maps[key][layer] = np.argsort(moved)[maps[key][layer]]
    save_file(weights, path, metadata={"format": "pt"})
    save_numpy(maps, copy / "index_maps.safetensors")
    refresh(copy)
    after = from_chain(copy, num_parameters=size).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_added_in_float32_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    chain = Chain.from_pretrained(add_control_points(make_chain(tmp_path / "c", variant_model("llama", dtype))))
    plan = chain.plan(middle(chain))
    exact = chain.initialize(plan, dtype="float64", progress=False).state_dict()
    rounded = chain.initialize(plan, progress=False).state_dict()
    for name, value in exact.items():
        assert rounded[name].dtype == dtype
        torch.testing.assert_close(rounded[name].double(), value, rtol=0.01, atol=1e-6)


def test_a_plan_shows_it_and_counts_its_bytes(folder: Path) -> None:
    chain = Chain.from_pretrained(folder)
    bent, straight = (chain.plan(middle(chain), method=method) for method in ("auto", "interpolate"))
    assert bent.bytes_to_read > straight.bytes_to_read
    assert bent.bytes_to_fetch > straight.bytes_to_fetch
    assert "bezier between" in str(bent) and "control point" in str(bent)
    assert bent.as_dict()["method"] == "bezier"
    whole = sum(4 * int(np.prod(shape)) for shape in factor_shapes(bent.pair, 3).values())
    assert 0 < bent.bytes_to_read - straight.bytes_to_read <= whole


# -- rank -------------------------------------------------------------------------------------------------------------


def test_the_default_rank_keeps_to_its_share() -> None:
    from transformers import AutoConfig

    from cbd_hub.axes.architectures import axis_map_for
    from cbd_hub.axes.sizing import count_parameters
    from cbd_hub.interpolation.pair import Pair

    for fields, rank in (
        (
            {
                "hidden_size": 576,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "num_hidden_layers": 30,
                "intermediate_size": 1536,
                "vocab_size": 49152,
                "tie_word_embeddings": True,
            },
            32,
        ),
        (
            {
                "hidden_size": 96,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "num_hidden_layers": 6,
                "intermediate_size": 288,
                "vocab_size": 1024,
                "tie_word_embeddings": True,
            },
            None,
        ),
    ):
        config = AutoConfig.for_model("llama", **fields)
        axis_map = axis_map_for(config)
        pair = Pair.same(axis_map, axis_map.sizes(config))
        chosen = choose_rank(pair)
        numbers = sum(int(np.prod(shape)) for shape in factor_shapes(pair, chosen).values())
        assert numbers <= 0.08 * count_parameters(axis_map, pair.large)
        assert rank is None or chosen == rank
        most = axis_map.largest_rank(pair.large)
        assert choose_rank(pair, most) == most
        for wrong in (0, -1, most + 1):
            with pytest.raises(RecipeError, match=rf"rank is {wrong}; allowed: 1 to {most}"):
                choose_rank(pair, wrong)


# -- bad input --------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Any, digests: bool = True) -> None:
    path = folder / "control_points" / "a2.safetensors"
    factors = load_file(path)
    change(factors)
    save_file(factors, path)
    if digests:
        refresh(folder)


def first(factors: dict[str, Tensor]) -> str:
    return next(name for name in sorted(factors) if name.endswith(".rows"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop(first(f)), "lacks"),
        (lambda f: f.update(extra=torch.zeros(2)), "'extra' .* nothing of that name"),
        (lambda f: f.update({first(f): f[first(f)][:, :2].contiguous()}), r"has shape .*the manifest says"),
        (lambda f: f.update({first(f): f[first(f)].double()}), "stored as F64"),
        (lambda f: f[first(f)].fill_(float("nan")), "holds NaN or infinity"),
        (lambda f: f[first(f)].fill_(float("inf")), "holds NaN or infinity"),
    ],
    ids=["missing", "extra", "rank", "dtype", "nan", "inf"],
)
def test_a_wrong_control_point_is_one_clear_error(copy: Path, change: Any, message: str) -> None:
    rewrite(copy, change)
    chain = Chain.from_pretrained(copy)
    with pytest.raises(IntegrityError, match=f"control point of anchor 'a2'.*{message}"):
        from_chain(copy, num_parameters=middle(chain))
    from_chain(copy, num_parameters=middle(chain), method="interpolate")  # the straight line needs none of it


def test_one_of_another_pair(copy: Path) -> None:
    shutil.copyfile(copy / "control_points" / "a1.safetensors", copy / "control_points" / "a2.safetensors")
    chain = Chain.from_pretrained(copy)
    with pytest.raises(IntegrityError, match="control point of anchor 'a2'"):
        from_chain(copy, num_parameters=middle(chain))
    refresh(copy)
    with pytest.raises(IntegrityError, match=r"control point of anchor 'a2'.*shape"):
        from_chain(copy, num_parameters=middle(chain))


@pytest.mark.parametrize("checksums", [True, False])
def test_damage_is_found(copy: Path, checksums: bool) -> None:
    if not checksums:
        (copy / "checksums.json").unlink()
        edit_manifest(copy, "checksums", value=None)
    path = copy / "control_points" / "a2.safetensors"
    data = bytearray(path.read_bytes())
    size = middle(Chain.from_pretrained(copy))
    for broken in (
        bytes(data[:-8]),
        bytes(data[: len(data) - 100]) + bytes([data[-100] ^ 1]) + bytes(data[-99:]),
        b"",
    ):
        path.write_bytes(broken)
        with pytest.raises(IntegrityError, match="a2"):
            from_chain(copy, num_parameters=size)
    path.unlink()
    with pytest.raises(IntegrityError, match="a2"):
        from_chain(copy, num_parameters=size)


@pytest.mark.parametrize(("rank", "message"), [(0, "greater than 0"), (10**6, "at most"), (True, "valid integer")])
def test_an_impossible_rank_in_a_manifest(copy: Path, rank: Any, message: str) -> None:
    edit_manifest(copy, "anchors", 2, "control_point", "rank", value=rank)
    with pytest.raises(ManifestError, match=message):
        Chain.from_pretrained(copy)


def test_formats(copy: Path, tmp_path: Path) -> None:
    edit_manifest(copy, "format", value=1)
    with pytest.raises(ManifestError, match="has format 2"):
        Chain.from_pretrained(copy)
    plain = make_chain(tmp_path / "plain", variant_model("llama"))
    assert read_manifest(plain / MANIFEST_NAME).format == 1
    edit_manifest(plain, "format", value=2)
    with pytest.raises(ManifestError, match="has format 1"):
        Chain.from_pretrained(plain)


def test_a_chain_without_one_says_so(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(make_chain(tmp_path / "c", variant_model("llama")))
    with pytest.raises(SizeError, match=r"have no control point; allowed: auto, interpolate.*fit-curve"):
        chain.plan(middle(chain), method="bezier")
    assert issubclass(SizeError, CbdError)
