"""Barriers and curves of real chains: of one whose anchors belong together, and of one whose anchors do not."""

import json
import math
from pathlib import Path

import pytest
from make_chain import edit_manifest, make_chain, variant_model
from tiny_recipe import built_chain
from trained import text, trained_chain

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.chain.chain import Chain
from cbd_hub.chain.measure import BARRIER_LIMIT, barrier_height, measure_barriers, measure_curve, plot_chain
from cbd_hub.errors import ManifestError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.manifest.manifest import MANIFEST_NAME, Anchor, Manifest, read_manifest, write_manifest

BLOCKS = text(48, seed=7)


def measured(folder: Path) -> list[Anchor]:
    return measure_barriers(Chain.from_pretrained(folder), BLOCKS, None, progress=False)


def with_anchors(folder: Path, anchors: list[Anchor]) -> Chain:
    chain = Chain.from_pretrained(folder)
    return Chain(chain.location, chain.manifest.model_copy(update={"anchors": anchors}))


# -- barriers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alphas", "losses", "height"),
    [
        ((0, 0.5, 1), (2.0, 2.0, 2.0), 0.0),
        ((0, 0.5, 1), (2.0, 3.5, 3.0), 1.0),
        ((0, 0.5, 1), (3.0, 2.0, 2.0), -0.5),
        ((0, 0.25, 0.5, 0.75, 1), (1.0, 1.0, 1.0, 3.0, 2.0), 1.25),
        ((0, 0.25, 0.5, 0.75, 1), (4.0, 3.0, 2.0, 1.0, 0.0), 0.0),
        ((0, 0.25, 0.5, 0.75, 1), (4.0, 1.0, 1.0, 0.9, 0.0), -0.1),
        ((0, 0.1, 1), (0.0, 1.0, 1.0), 0.9),
    ],
)
def test_height_is_the_excess_over_the_straight_line(
    alphas: tuple[float, ...], losses: tuple[float, ...], height: float
) -> None:
    assert barrier_height(alphas, losses) == pytest.approx(height)


def test_between_anchors_that_belong_together_the_loss_sags() -> None:
    large, small = measured(trained_chain())
    assert large == Chain.from_pretrained(trained_chain()).manifest.anchors[0]  # the first has no larger neighbor
    assert small.barrier is not None and small.aligned
    assert small.barrier.height < 0.01
    assert small.barrier.height == barrier_height(small.barrier.alphas, small.barrier.losses)
    assert small.barrier.alphas == [0.0, 0.25, 0.5, 0.75, 1.0]
    middle = (large.num_parameters + small.num_parameters) / 2
    assert small.barrier.num_parameters == pytest.approx(middle, rel=0.01)


def test_the_ends_of_the_line_are_the_large_anchor_pruned_and_the_small_one_expanded() -> None:
    chain = Chain.from_pretrained(trained_chain())
    barrier = measured(trained_chain())[1].barrier
    assert barrier is not None
    for method, end in (("prune", 0), ("expand", -1)):
        model = chain.initialize(chain.plan(barrier.num_parameters, method=method), progress=False)
        assert evaluate_loss(model, BLOCKS).loss == pytest.approx(barrier.losses[end], abs=1e-4)


def test_between_anchors_of_independent_trainings_there_is_a_barrier() -> None:
    folder = trained_chain(aligned=False)
    assert Chain.from_pretrained(folder).manifest.anchors[1].aligned  # so it is claimed
    small = measured(folder)[1]
    assert small.barrier is not None
    assert small.barrier.height > 0.3 > BARRIER_LIMIT
    assert not small.aligned


def test_anchors_with_a_barrier_between_them_are_not_averaged_and_the_plan_says_so() -> None:
    folder = trained_chain(aligned=False)
    chain = with_anchors(folder, measured(folder))
    low, high = chain.anchors[1].num_parameters, chain.anchors[0].num_parameters
    for share, method in ((0.3, "expand"), (0.7, "prune")):
        target = round(low + share * (high - low))
        assert Chain.from_pretrained(folder).plan(target).method == "interpolate"
        plan = chain.plan(target)
        assert plan.method == method
        assert "'a1' and 'a0' are not aligned" in plan.notes[0] and f"({method})" in plan.notes[0]
        assert plan.notes[0] in " ".join(str(plan).split())
        better = evaluate_loss(chain.initialize(plan, progress=False), BLOCKS).loss
        averaged = chain.initialize(chain.plan(target, method="interpolate"), progress=False)
        assert better < evaluate_loss(averaged, BLOCKS).loss


def test_a_pair_that_was_doubted_is_aligned_once_no_barrier_is_met(tmp_path: Path) -> None:
    folder = Chain.from_pretrained(trained_chain())
    folder.save_pretrained(tmp_path / "c")
    edit_manifest(tmp_path / "c", "anchors", 1, "aligned", value=False)
    assert not Chain.from_pretrained(tmp_path / "c").manifest.anchors[1].aligned
    assert measured(tmp_path / "c")[1].aligned


def test_a_pair_with_no_size_in_between_says_nothing(tmp_path: Path) -> None:
    """One layer, and nothing that a hundredth more or less of the parameters could be had by."""
    model = variant_model("llama", intermediate_size=80)
    sizes = axis_map_for(model.config).sizes(model.config)
    folder = make_chain(tmp_path / "c", model, [{**sizes, "layers": sizes["layers"] - 1}])
    before = Chain.from_pretrained(folder).manifest.anchors
    assert measured(folder) == before
    assert before[1].barrier is None
    assert measure_curve(Chain.from_pretrained(folder), BLOCKS, 1, None, progress=False) == []


def test_barriers_stand_in_the_manifest_and_come_back(tmp_path: Path) -> None:
    folder = trained_chain()
    manifest = with_anchors(folder, measured(folder)).manifest
    write_manifest(manifest, tmp_path)
    back = read_manifest(tmp_path / MANIFEST_NAME)
    assert back == manifest
    assert back.anchors[1].barrier == manifest.anchors[1].barrier
    assert isinstance(Anchor.model_validate_json(manifest.anchors[1].model_dump_json()), Anchor)
    data = json.loads((tmp_path / MANIFEST_NAME).read_text())
    assert set(data["anchors"][1]["barrier"]) == {"num_parameters", "alphas", "losses", "height"}
    for key, wrong in (("alphas", [0.0, 1.5]), ("num_parameters", 0), ("losses", ["low"]), ("color", 1)):
        changed = json.loads(json.dumps(data))
        changed["anchors"][1]["barrier"][key] = wrong
        (tmp_path / MANIFEST_NAME).write_text(json.dumps(changed))
        with pytest.raises(ManifestError, match=rf"anchors\.1\.barrier\.{key}"):
            read_manifest(tmp_path / MANIFEST_NAME)


# -- curves -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_pair", [1, 3])
def test_a_curve_has_the_sizes_that_were_asked_for(per_pair: int) -> None:
    chain = Chain.from_pretrained(trained_chain())
    large, small = (a.num_parameters for a in chain.anchors)
    curve = measure_curve(chain, BLOCKS, per_pair, None, progress=False)
    assert len(curve) == per_pair
    for k, point in enumerate(curve, 1):
        assert point.num_parameters == pytest.approx(small + (large - small) * k / (per_pair + 1), rel=0.01)
        model = chain.initialize(chain.plan(point.num_parameters), progress=False)
        assert model.num_parameters() == point.num_parameters
        assert evaluate_loss(model, BLOCKS).loss == pytest.approx(point.loss, abs=0.02)  # alpha of a nearby size
        assert point.method == "interpolate"


def test_a_curve_knows_the_methods_that_were_used_and_obeys_the_limit_of_tokens() -> None:
    folder = trained_chain(aligned=False)
    chain = with_anchors(folder, measured(folder))
    curve = measure_curve(chain, BLOCKS, 2, 62, progress=False)
    assert [p.method for p in curve] == ["expand", "prune"]
    model = chain.initialize(chain.plan(curve[0].num_parameters), progress=False)
    assert evaluate_loss(model, BLOCKS[:2]).loss == pytest.approx(curve[0].loss, abs=1e-4)
    assert abs(evaluate_loss(model, BLOCKS).loss - curve[0].loss) > 1e-3


def test_a_built_chain_says_what_was_measured(tmp_path: Path) -> None:
    manifest: Manifest = read_manifest(built_chain() / MANIFEST_NAME)
    assert manifest.anchors[0].barrier is None
    for anchor in manifest.anchors[1:]:
        assert anchor.barrier is not None and anchor.aligned
        assert anchor.barrier.height < 0.01
        assert all(0 < loss < math.log(300) for loss in anchor.barrier.losses)
    assert len(manifest.curve) == sum(2 * (2 if anchor.bent else 1) for anchor in manifest.anchors[1:])
    plot_chain(manifest, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes() == (built_chain() / "size_loss.png").read_bytes()
