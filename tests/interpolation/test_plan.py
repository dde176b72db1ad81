"""The plan: decided from the manifest alone, exact, printable, and refused where it cannot be carried out."""

import json
from dataclasses import FrozenInstanceError, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
from make_chain import add_control_points, edit_manifest, make_chain, variant_model
from tiny_models import VARIANTS

from cbd_hub.axes.sizing import count_parameters
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import SizeError
from cbd_hub.interpolation.plan import METHODS, Plan, make_plan
from cbd_hub.manifest.index_maps import load_index_maps
from cbd_hub.manifest.manifest import INDEX_MAPS_NAME, MANIFEST_NAME, read_manifest
from cbd_hub.manifest.records import CurvePoint, Evaluation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama chain without a single weight file: 141k, 60k and 15k parameters or so."""
    folder = make_chain(tmp_path_factory.mktemp("chains") / "llama", variant_model("llama"), energy=True)
    for file in folder.rglob("model*.safetensors"):
        file.unlink()
    return folder


@pytest.fixture
def plan(folder: Path) -> Any:
    """``plan(num_parameters, ...)`` of that chain."""
    manifest = read_manifest(folder / MANIFEST_NAME)
    maps = load_index_maps(manifest, folder / INDEX_MAPS_NAME)
    return lambda *args, **kwargs: make_plan(manifest, maps, *args, **kwargs)


def between(folder: Path, pair: int, share: float) -> int:
    """A size between the pair's anchors: 0 is the small one's, 1 the large one's."""
    counts = [a.num_parameters for a in read_manifest(folder / MANIFEST_NAME).anchors]
    return round(counts[pair + 1] + share * (counts[pair] - counts[pair + 1]))


# -- what is decided --------------------------------------------------------------------------------------------------


def test_it_needs_no_weights(folder: Path) -> None:
    assert not list(folder.rglob("model*.safetensors"))
    chain = Chain.from_pretrained(folder)
    target = between(folder, 0, 0.5)
    plan = chain.plan(target)
    assert (plan.small, plan.large) == ("a1", "a0")
    assert abs(plan.num_parameters - target) <= 0.01 * target
    assert plan.num_parameters == count_parameters(chain.manifest.resolved_axis_map, plan.sizes)


@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_position_and_alpha(folder: Path, plan: Any, pair: int, share: float) -> None:
    made: Plan = plan(between(folder, pair, share), method="interpolate")
    assert (made.small, made.large) == (f"a{pair + 1}", f"a{pair}")
    assert made.position == pytest.approx(share, abs=0.02)
    assert made.alpha == pytest.approx(1 - made.position)
    assert plan(between(folder, pair, share), method="interpolate", alpha=0.25).alpha == 0.25
    assert plan(between(folder, pair, share), method="expand", alpha=0.25).alpha == 1.0
    assert plan(between(folder, pair, share), method="prune", alpha=0.25).alpha == 0.0


def test_auto_expands_where_the_width_differs_and_the_small_anchor_is_near(folder: Path, plan: Any) -> None:
    assert plan(between(folder, 1, 0.3)).method == "expand"
    assert plan(between(folder, 1, 0.6)).method == "interpolate"
    assert plan(between(folder, 0, 0.3)).method == "interpolate"  # same width
    assert plan(between(folder, 1, 0.3), alpha=0.7).method == "interpolate"  # alpha was asked for


def test_anchors_that_are_not_aligned_are_never_averaged(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(make_chain(tmp_path / "c", variant_model("llama"), width=False, aligned=False))
    low, high = chain.anchors[1].num_parameters, chain.anchors[0].num_parameters
    for share, method in ((0.3, "expand"), (0.7, "prune")):
        made = chain.plan(round(low + share * (high - low)))
        assert made.method == method
        assert "are not aligned" in made.notes[0]
        assert "are not aligned" in str(made)


def test_a_size_far_from_all_that_were_measured_is_named(folder: Path) -> None:
    manifest = read_manifest(folder / MANIFEST_NAME)
    maps = load_index_maps(manifest, folder / INDEX_MAPS_NAME)
    evaluation = Evaluation(loss=3.0, perplexity=20.0, num_tokens=9)
    told = [anchor.model_copy(update={"evaluation": evaluation}) for anchor in manifest.anchors]
    measured = manifest.model_copy(update={"anchors": told})
    large, small = manifest.anchors[0].num_parameters, manifest.anchors[1].num_parameters
    middle, near = (large + small) // 2, round(large - 0.1 * (large - small))
    assert make_plan(manifest, maps, middle).notes == ()  # nothing was measured, and nothing is expected
    (note,) = make_plan(measured, maps, middle).notes
    assert "measured at no size nearer than" in note
    assert make_plan(measured, maps, near).notes == ()
    assert make_plan(measured, maps, large).notes == ()
    point = CurvePoint(num_parameters=middle, loss=3.1, method="interpolate")
    assert make_plan(measured.model_copy(update={"curve": [point]}), maps, middle).notes == ()
    with_prune = measured.model_copy(update={"curve": [point.model_copy(update={"method": "prune"})]})
    assert make_plan(with_prune, maps, middle).notes == (note,)


@pytest.mark.parametrize("method", ["interpolate", "prune", "expand", "paper"])
def test_a_plan_fits_80_columns_and_counts_every_tensor(folder: Path, plan: Any, method: str) -> None:
    made = plan(shape={"num_hidden_layers": 3, "intermediate_size": 200}, method=method)
    lines = str(replace(made, notes=("a note of many words " * 9,), small="s" * 60, large="l" * 60)).splitlines()
    assert max(map(len, lines)) <= 80
    tensors = [line.split() for line in lines if line.startswith("  ")]
    counts = [int(words[-1]) for words in tensors if "weight" in words[0]]
    assert sum(counts) == len(made.operations)
    assert {line.removeprefix("tensors = ") for line in lines if line.startswith("tensors = ")} == {
        op.kind for op in made.operations
    }


@pytest.mark.parametrize("name", ["a0", "a1", "a2"])
def test_an_anchor_s_own_size_is_the_anchor(folder: Path, plan: Any, name: str) -> None:
    anchor = next(a for a in read_manifest(folder / MANIFEST_NAME).anchors if a.name == name)
    for made in (plan(anchor.num_parameters), plan(shape=anchor.shape), plan(anchor.num_parameters + 1)):
        assert (made.method, made.small, made.large, made.alpha) == ("anchor", name, name, 1.0)
        assert made.num_parameters == anchor.num_parameters
        assert made.shape == anchor.shape
        assert made.bytes_to_read == 4 * anchor.num_parameters
        assert {op.kind for op in made.operations} == {"large"}


@pytest.mark.parametrize("method", ["auto", "interpolate", "paper"])
def test_alpha_at_an_end_is_the_anchor(folder: Path, plan: Any, method: str) -> None:
    first, second, last = read_manifest(folder / MANIFEST_NAME).anchors
    assert plan(shape=first.shape, alpha=0, method=method).method == "anchor"
    assert plan(shape=last.shape, alpha=1, method=method).method == "anchor"
    assert plan(shape=first.shape, alpha=0.5, method=method).method != "anchor"
    assert plan(shape=first.shape, method="prune").method == "anchor"
    assert plan(shape=last.shape, method="expand").method == "anchor"
    assert plan(shape=first.shape, method="expand").method == "expand"
    assert plan(shape=last.shape, method="prune").method == "prune"
    assert plan(shape=second.shape, alpha=1, method=method).large == "a1"


def test_shapes(folder: Path, plan: Any) -> None:
    made = plan(shape={"num_hidden_layers": 3, "intermediate_size": 200})
    assert made.shape["num_hidden_layers"] == 3
    assert made.shape["intermediate_size"] == 200
    assert made.shape["hidden_size"] == 48
    assert (made.small, made.large) == ("a1", "a0")


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_family(tmp_path: Path, variant: str) -> None:
    chain = Chain.from_pretrained(add_control_points(make_chain(tmp_path / "c", variant_model(variant))))
    for method in METHODS:
        made = chain.plan((chain.anchors[1].num_parameters + chain.anchors[2].num_parameters) // 2, method=method)
        assert made.num_parameters == sum(prod(op.shape) for op in made.operations)
        assert len({op.name for op in made.operations}) == len(made.operations)
        assert f"{made.num_parameters:,}" in str(made)


# -- how it looks -----------------------------------------------------------------------------------------------------


def test_it_prints(folder: Path, plan: Any) -> None:
    made = plan(between(folder, 0, 0.4))
    text = str(made)
    for part in (
        f"({made.num_parameters:,})",
        "interpolate between 'a1' and 'a0', at position 0.",
        "intermediate_size ",
        f"alpha      {made.alpha:.3f} (weight of the small anchor)",
        "MB of weights",
        "loss       not measured",
        "model.layers.*.mlp.down_proj.weight",
        f"\ntensors = {made.alpha:.3g} small + {1 - made.alpha:.3g} large\n",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) < 160
    assert "anchor 'a0' as it is" in str(plan(shape=read_manifest(folder / MANIFEST_NAME).anchors[0].shape))
    assert "tensors = zeros" in str(plan(shape={"num_hidden_layers": 3, "intermediate_size": 200}, method="expand"))


def test_it_is_plain_data(folder: Path, plan: Any) -> None:
    made = plan(between(folder, 0, 0.4))
    data = json.loads(json.dumps(made.as_dict()))
    assert data["num_parameters"] == made.num_parameters
    assert len(data["operations"]) == len(made.operations)
    with pytest.raises(FrozenInstanceError):
        made.alpha = 1.0
    assert plan(between(folder, 0, 0.4)).as_dict() == made.as_dict()


def test_expected_loss_follows_the_measured_curve(folder: Path, tmp_path: Path) -> None:
    for name in (MANIFEST_NAME, INDEX_MAPS_NAME):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    for i, loss in enumerate((2.0, 3.0, 4.0)):
        score = {"loss": loss, "perplexity": 1.0, "num_tokens": 10}
        edit_manifest(tmp_path, "anchors", i, "evaluation", value=score)
    (tmp_path / "checksums.json").write_bytes((folder / "checksums.json").read_bytes())
    made = Chain.from_pretrained(tmp_path).plan(between(folder, 0, 0.4))
    assert made.expected_loss == pytest.approx(3 - made.position)
    assert "nats a token expected" in str(made)
    point = {"num_parameters": made.num_parameters, "loss": 2.5, "method": "interpolate"}
    edit_manifest(tmp_path, "curve", value=[point, {**point, "loss": 9.0, "method": "prune"}])
    assert Chain.from_pretrained(tmp_path).plan(between(folder, 0, 0.4)).expected_loss == pytest.approx(2.5)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "give exactly one of num_parameters, shape and memory"),
        (
            {"num_parameters": "20k", "shape": {"hidden_size": 48}},
            "give exactly one of num_parameters, shape and memory",
        ),
        ({"num_parameters": "138X"}, "'138X' is not a parameter count"),
        ({"num_parameters": 0}, "between 1 and 10^15 parameters; got '0'"),
        ({"num_parameters": True}, "True is not a parameter count"),
        ({"num_parameters": "1T"}, "is outside this chain, which covers"),
        ({"num_parameters": 5}, "the nearest size is"),
        (
            {"num_parameters": "20k", "method": "expnad"},
            "allowed: auto, bezier, interpolate, paper, expand, prune. Did you mean",
        ),
        ({"num_parameters": "20k", "alpha": 1.5}, "alpha is 1.5; allowed: a number from 0"),
        ({"num_parameters": "20k", "alpha": float("nan")}, "alpha is nan"),
        ({"num_parameters": "20k", "alpha": "half"}, "alpha is 'half'"),
        ({"num_parameters": "20k", "alpha": True}, "alpha is True"),
        ({"num_parameters": "20k", "tolerance": -1}, "tolerance is -1"),
        ({"num_parameters": "20k", "tolerance": 1}, "tolerance is 1"),
        ({"num_parameters": "20k", "tolerance": "1%"}, "tolerance is '1%'"),
        ({"shape": {"hiden_size": 48}}, "shape has no field 'hiden_size'; allowed: hidden_size,"),
        ({"shape": {"hiden_size": 48}}, "Did you mean 'hidden_size'?"),
        ({"shape": {5: 48}}, "shape has no field 5"),
        ({"shape": {"hidden_size": "48"}}, "'hidden_size' is '48'; expected a positive integer"),
        ({"shape": {"hidden_size": True}}, "'hidden_size' is True"),
        ({"shape": {"hidden_size": -48}}, "'hidden_size' is -48"),
        ({"shape": {}}, "shape lacks intermediate_size, num_hidden_layers, in which 'a1' and 'a0' differ"),
        ({"shape": {"num_hidden_layers": 3, "intermediate_size": 301}}, "lies between no two adjacent anchors"),
        ({"shape": {"num_hidden_layers": 3, "intermediate_size": 301}}, "intermediate_size 20 to 300"),
        ({"shape": {"num_hidden_layers": 3, "intermediate_size": 200, "vocab_size": 96}}, "between no two adjacent"),
        ({"shape": {"num_hidden_layers": 3, "intermediate_size": 200, "num_attention_heads": 3}}, "is impossible: "),
    ],
)
def test_bad_requests(plan: Any, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(SizeError) as caught:
        plan(**arguments)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_outside_names_range_and_nearest(folder: Path, plan: Any) -> None:
    counts = [a.num_parameters for a in read_manifest(folder / MANIFEST_NAME).anchors]
    with pytest.raises(SizeError, match=rf"\({counts[2]} to {counts[0]}\); the nearest size is .* \({counts[0]}\)"):
        plan(counts[0] * 2)
    with pytest.raises(SizeError, match=rf"\({counts[2]} to {counts[0]}\); the nearest size is .* \({counts[2]}\)"):
        plan(counts[2] // 2)
    assert plan(round(counts[0] * 1.005)).method == "anchor"  # within the tolerance
    with pytest.raises(SizeError):
        plan(round(counts[0] * 1.005), tolerance=0.001)
