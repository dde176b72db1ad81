"""Tiny models with planted facts, for the tests of importance and ranking."""

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, VARIANTS, tiny_config, tiny_model
from transformers import PreTrainedModel

from cbd_hub.alignment.importance import Statistics
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.manifest.index_maps import IndexMap

BLOCKS = torch.randint(3, 97, (6, 16), generator=torch.Generator().manual_seed(0))

each_family = pytest.mark.parametrize("family", FAMILIES)


def made(variant: str, **overrides: object) -> tuple[PreTrainedModel, AxisMap, dict[str, int]]:
    """A random tiny model with its map and sizes."""
    family, fields = VARIANTS[variant]
    model = tiny_model(tiny_config(family, **{**fields, **overrides}), torch.float64)
    axis_map = axis_map_for(model.config)
    return model, axis_map, axis_map.sizes(model.config)


def silence(model: PreTrainedModel, axis_map: AxisMap, sizes: dict[str, int], axis: str, unit: int) -> None:
    """Zeroes what one unit of an axis writes to the residual stream, in every layer."""
    for pattern in axis_map.consumers(axis):
        dim = 0 if axis_map.in_out else 1
        rows = axis_map.layout(pattern).rows(dim, sizes, {axis: np.array([unit])})
        for layer in range(sizes["layers"]):
            with torch.no_grad():
                model.get_parameter(pattern.replace("*", str(layer))).index_fill_(dim, torch.from_numpy(rows), 0.0)


def hooks(model: PreTrainedModel) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + ("forward" in vars(m)) for m in model.modules())


def same(first: Statistics | IndexMap, second: Statistics | IndexMap) -> bool:
    """Whether two results are equal bit for bit."""
    pairs = [(vars(first)[name], vars(second)[name]) for name in vars(first)]
    return all(
        a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        if hasattr(a, "keys")
        else np.array_equal(a, b)
        for a, b in pairs
    )
