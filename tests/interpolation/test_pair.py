"""Two anchors as one thing: positions, layers and units of the pair, and a subset that reads the large one alone."""

import numpy as np
import pytest
from make_chain import random_index_map, steps_for, variant_model

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.errors import AxisMapError
from cbd_hub.interpolation.materialize import cut
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest.index_maps import IndexMap

MODEL = variant_model("llama")
AXIS_MAP = axis_map_for(MODEL.config)
LARGE = AXIS_MAP.sizes(MODEL.config)
SMALL = steps_for(AXIS_MAP, LARGE)[1]


def test_position_is_linear_in_parameters() -> None:
    pair = Pair(AXIS_MAP, SMALL, LARGE, IndexMap(np.arange(LARGE["layers"])))
    low, high = count_parameters(AXIS_MAP, SMALL), count_parameters(AXIS_MAP, LARGE)
    assert (pair.position(low), pair.position(high)) == (0.0, 1.0)
    assert pair.position((low + high) // 2) == pytest.approx(0.5, abs=1 / (high - low))
    assert Pair.same(AXIS_MAP, LARGE).position(high) == 0.0


def test_layers_and_units_follow_the_order_of_the_pair() -> None:
    orders = random_index_map(AXIS_MAP, LARGE, SMALL, np.random.default_rng(0))
    pair = Pair(AXIS_MAP, SMALL, LARGE, orders)
    assert pair.layers(SMALL["layers"]) == sorted(orders.layers[: SMALL["layers"]].tolist())
    op = next(op for op in list_operations(pair, SMALL, "prune", 0.0) if op.pattern.endswith("down_proj.weight"))
    assert op.layer is not None
    assert pair.taken(op, SMALL)["ffn"].tolist() == orders.orders["ffn"][op.layer][: SMALL["ffn"]].tolist()


def test_a_pair_of_one_anchor_takes_everything_whole() -> None:
    pair = Pair.same(AXIS_MAP, LARGE)
    assert all(pair.taken(op, LARGE) == {} for op in list_operations(pair, LARGE, "prune", 0.0))
    assert pair.layers(LARGE["layers"]) == list(range(LARGE["layers"]))


def test_a_subset_reads_its_neighbor_only() -> None:
    target = {**SMALL, "layers": 1}
    pair = Pair(AXIS_MAP, target, LARGE, IndexMap(np.array([2, *(i for i in range(LARGE["layers"]) if i != 2)])))
    operations = list_operations(pair, target, "prune", 0.0)
    assert {op.small_name for op in operations} == {None}
    assert {op.layer for op in operations} == {None, 2}
    with pytest.raises(AxisMapError, match="must be a multiple"):
        cut(MODEL, AXIS_MAP, LARGE, {**target, "hidden": 31}, pair.index_map)
