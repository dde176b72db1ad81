"""Byte ranges: arithmetic against sets of bytes, and that what is not asked for is never needed."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from make_chain import make_chain, variant_model

from cbd_hub.chain.assemble import open_weights
from cbd_hub.chain.chain import Chain
from cbd_hub.interpolation import ranges
from cbd_hub.interpolation.checkpoints import read_header
from cbd_hub.interpolation.materialize import make_tensor
from cbd_hub.interpolation.ranges import Run, count_bytes, merge, subtract

runs = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def members(some: list[Run]) -> set[int]:
    return {byte for start, stop in some for byte in range(start, stop)}


@given(runs)
def test_merge(some: list[Run]) -> None:
    merged = merge(some)
    assert all(a[1] < b[0] for a, b in itertools.pairwise(merged))
    assert members(merged) == members(some)
    assert count_bytes(some) == len(members(some))


@given(runs, runs)
def test_subtract(wanted: list[Run], have: list[Run]) -> None:
    left = subtract(wanted, have)
    assert members(left) == members(wanted) - members(have)
    assert left == merge(left)


# -- what a plan needs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox", "gemma3_text", "phi3"])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain.from_pretrained(make_chain(tmp_path_factory.mktemp("chains") / "c", variant_model(request.param)))


PLANS: list[dict[str, Any]] = [
    {"method": "prune"},
    {"method": "expand"},
    {"method": "interpolate"},
    {"method": "paper"},
    {"method": "interpolate", "alpha": 0.0},
    {"method": "interpolate", "alpha": 1.0},
    {"method": "paper", "alpha": 1.0},
]


@pytest.mark.parametrize("how", PLANS, ids=lambda how: "-".join(map(str, how.values())))
def test_bytes_that_are_not_asked_for_are_not_needed(
    chain: Chain, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything outside the runs is made NaN, and the model is the same."""
    monkeypatch.setattr(ranges, "BLOCK", 4)  # to the element, where tensors are far smaller than a block
    manifest = chain.manifest
    large, small = manifest.anchors[:2]
    plan = chain.plan((large.num_parameters + small.num_parameters) // 2, tolerance=0.1, **how)
    needed, pair = plan.needed, plan.pair
    opened = {anchor.name: open_weights(chain, anchor) for anchor in (large, small)}

    def read(anchor: str, name: str, poisoned: bool) -> torch.Tensor:
        tensor = opened[anchor].read(name).clone()
        if poisoned:
            flat = tensor.view(-1)
            keep = torch.zeros(flat.numel(), dtype=torch.bool)
            for start, stop in needed[anchor].get(name, ()):
                assert start % flat.element_size() == stop % flat.element_size() == 0
                keep[start // flat.element_size() : stop // flat.element_size()] = True
            flat[~keep] = torch.nan
        return tensor

    for op in plan.operations:
        made = []
        for poisoned in (False, True):
            sources = [lambda name, a=a, p=poisoned: read(a.name, name, p) for a in (large, small)]
            made.append(make_tensor(op, pair, plan.sizes, *sources, torch.float32))
        assert torch.equal(*made), op.name
        assert not made[0].isnan().any()
    total = {a.name: sum(i.num_bytes for i in opened[a.name].tensors.values()) for a in (large, small)}
    asked = {name: sum(map(count_bytes, runs.values())) for name, runs in needed.items()}
    if how["method"] == "prune" or how.get("alpha") == 0:
        assert asked[small.name] == 0
        assert asked[large.name] < 0.9 * total[large.name]  # there is something to save
    if how["method"] == "expand":
        assert asked[large.name] == 0


def test_whole_blocks_of_layers_are_left_out(tmp_path: Path) -> None:
    """Tensors below the size of a block are needed whole or not at all."""
    chain = Chain.from_pretrained(make_chain(tmp_path / "c", variant_model("llama")))
    large, small = chain.manifest.anchors[:2]
    shape = {**large.shape, "num_hidden_layers": small.shape["num_hidden_layers"], "intermediate_size": 280}
    plan = chain.plan(shape=shape, method="prune")
    needed = plan.needed[large.name]
    assert all(len(runs) == 1 for runs in needed.values())
    left_out = set(open_weights(chain, large).tensors) - set(needed)
    layers = chain.manifest.sizes(large)["layers"] - plan.sizes["layers"]
    assert len({name.split(".")[2] for name in left_out}) == layers > 0


def test_a_plan_says_how_many_bytes_a_pull_takes(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(make_chain(tmp_path / "c", variant_model("llama")))
    large, small = chain.manifest.anchors[:2]
    files = {a.name: tmp_path / "c" / "anchors" / a.name / "model.safetensors" for a in (large, small)}
    size = {n: sum(i.num_bytes for i in read_header(f).values()) for n, f in files.items()}
    assert chain.plan(shape=large.shape).bytes_to_fetch == size[large.name]
    assert chain.plan(shape=small.shape).bytes_to_fetch == size[small.name]
    shape = {**large.shape, "num_hidden_layers": small.shape["num_hidden_layers"], "intermediate_size": 280}
    pruned = chain.plan(shape=shape, method="prune")
    assert 0 < pruned.bytes_to_fetch < size[large.name]
    both = chain.plan(shape=shape, method="interpolate")
    assert both.bytes_to_fetch == pruned.bytes_to_fetch + size[small.name]
    assert f"{both.bytes_to_fetch / 1e6:,.1f} MB to fetch where nothing is cached" in str(both)
    assert both.as_dict()["bytes_to_fetch"] == both.bytes_to_fetch
