"""Similarities and matched layers, against brute force."""

import itertools

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model

from cbd_hub.alignment.matching import Moments, layer_similarity, match_layers
from cbd_hub.axes.architectures import axis_map_for


@pytest.mark.parametrize("few, many", [(2, 2), (2, 6), (3, 6), (5, 6), (6, 6)])
def test_layers_are_matched_in_order_and_best(few: int, many: int) -> None:
    rng = np.random.default_rng(few)
    for _ in range(20):
        similarity = rng.normal(size=(few, many))
        inner = itertools.combinations(range(1, many - 1), few - 2)
        best = max(similarity[range(few), [0, *some, many - 1]].sum() for some in inner)
        found = match_layers(similarity)
        assert found[0] == 0 and found[-1] == many - 1 and found == sorted(set(found))
        assert similarity[range(few), found].sum() == pytest.approx(best)


def test_a_single_layer_gets_the_one_most_like_it() -> None:
    assert match_layers(np.array([[0.1, 0.9, 0.3]])) == [1]


def test_moments_are_those_of_all_tokens_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(50, n, generator=generator) for n in (4, 6))
    moments = Moments((2, 3), center=False)
    for start in (0, 20):
        stop = start + 20 if start == 0 else 50
        moments.add(100 * a[start:stop], b[start:stop])  # the scale of a token does not matter
    a, b = (x / x.square().mean(-1, keepdim=True).sqrt() for x in (a, b))
    expected = torch.corrcoef(torch.cat([a, b], 1).double().T)[:4, 4:]
    torch.testing.assert_close(moments.correlation(), expected, atol=1e-5, rtol=1e-4)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
    same = Moments((2, 2), center=False)
    same.add(a, torch.cat([a[:, 2:], a[:, :2] @ turn], 1))
    assert same.group_similarity()[0, 1] == pytest.approx(1, abs=1e-5)
    assert same.group_similarity()[1, 0] == pytest.approx(1, abs=1e-5)
    assert same.group_similarity()[0, 0] < 0.9


def test_a_unit_that_never_changes_correlates_with_nothing() -> None:
    moments = Moments((0, 0), center=False)
    moments.add(torch.eye(2).repeat(3, 1), torch.ones(6, 3))
    assert (moments.correlation() == 0).all()


def test_layers_of_another_kind_are_the_last_resort() -> None:
    blocks = torch.randint(3, 97, (4, 16), generator=torch.Generator().manual_seed(0))
    model = tiny_model(tiny_config("gemma3_text"))  # the third of four layers has full attention
    axis_map = axis_map_for(model.config)
    similarity = layer_similarity(model, model, axis_map, blocks)
    assert similarity.diagonal() == pytest.approx(1, abs=1e-4)
    assert (similarity[2, [0, 1, 3]] < 0).all() and (similarity[[0, 1, 3], 2] < 0).all()
    assert (similarity[0, [1, 3]] > 0).all()
