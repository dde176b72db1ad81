"""Tensor arithmetic against brute force: every element found by the labels of its units, one at a time."""

import itertools
import random
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from make_chain import labels

from cbd_hub.axes.grammar import Layout, parse
from cbd_hub.errors import AxisMapError
from cbd_hub.interpolation import tensors
from cbd_hub.interpolation.tensors import combine, expand, rescale, take

LAYOUTS = [
    "hidden",
    "vocab hidden",
    "(kv_heads q_per_kv head_dim) hidden",
    "(kv_heads head_dim) hidden",
    "hidden (kv_heads q_per_kv head_dim)",
    "(kv_heads q_per_kv head_dim + kv_heads head_dim + kv_heads head_dim) hidden",
    "(2 ffn) hidden",
    "hidden ffn",
    "hidden (3 heads head_dim)",
    "(heads 3 head_dim) hidden",
    "(heads 3 head_dim)",
    "(positions + 2) hidden",
    "(ffn + heads 2) (hidden + ffn)",
    "heads hidden ffn",
]
AXES = ("hidden", "vocab", "kv_heads", "q_per_kv", "head_dim", "ffn", "heads", "positions")
FROZEN = ("vocab", "head_dim", "positions")

each_layout = pytest.mark.parametrize("spec", LAYOUTS)
each_seed = pytest.mark.parametrize("seed", range(4))


def draw_sizes(seed: str) -> tuple[dict[str, int], dict[str, int], dict[str, int], dict[str, np.ndarray]]:
    """Sizes of a small anchor, a target and a large anchor, none smaller than the one before, and orders."""
    draw = random.Random(seed)
    large = {axis: draw.randint(1, 6) for axis in AXES}
    target = {a: n if a in FROZEN else draw.randint(1, n) for a, n in large.items()}
    small = {a: n if a in FROZEN else draw.randint(1, n) for a, n in target.items()}
    rng = np.random.default_rng(draw.randint(0, 10**9))
    return small, target, large, {a: rng.permutation(large[a]) for a in AXES if a not in FROZEN}


def random_tensor(spec: str, sizes: Mapping[str, int], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(parse(spec).shape(sizes), generator=generator, dtype=torch.float64).to(dtype)


def blend(
    large: torch.Tensor,
    small: torch.Tensor,
    alpha: float,
    layout: Layout,
    small_sizes: Mapping[str, int],
    target: Mapping[str, int],
) -> torch.Tensor:
    """Averages with a large tensor that has the target's shape already."""
    out, before = torch.empty_like(large), large.clone()
    made = combine(out, large, layout, target, {}, target, (), small, small_sizes, alpha)
    assert made is out and torch.equal(large, before)
    return made


@each_layout
@each_seed
def test_take(spec: str, seed: int) -> None:
    _, target, large, orders = draw_sizes(f"{spec} {seed}")
    tensor = random_tensor(spec, large, seed)
    got = take(tensor, parse(spec), large, {a: o[: target[a]] for a, o in orders.items()})
    found = [{label: i for i, label in enumerate(dim)} for dim in labels(spec, large)]
    expected = np.empty(parse(spec).shape(target), dtype=np.float32)
    wanted = [[tuple(_in_large(part, orders)) for part in dim] for dim in labels(spec, target)]
    for place in np.ndindex(expected.shape):
        source = tuple(found[d][wanted[d][i]] for d, i in enumerate(place))
        expected[place] = tensor.numpy()[source]
    assert np.array_equal(got.numpy(), expected)


def _in_large(label: tuple[tuple[str, int], ...], orders: Mapping[str, np.ndarray]) -> list[tuple[str, int]]:
    return [(axis, int(orders[axis][unit]) if axis in orders else unit) for axis, unit in label]


@each_layout
@each_seed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_blend(spec: str, seed: int, dtype: torch.dtype, alpha: float) -> None:
    small_sizes, target, _, _ = draw_sizes(f"{spec} {seed}")
    small, large = random_tensor(spec, small_sizes, seed, dtype), random_tensor(spec, target, seed + 100, dtype)
    got = blend(large, small, alpha, parse(spec), small_sizes, target)
    assert got.dtype == dtype
    found = [{label: i for i, label in enumerate(dim)} for dim in labels(spec, small_sizes)]
    expected = large.float().numpy().copy()
    wanted = labels(spec, target)
    for place in np.ndindex(expected.shape):
        source = tuple(found[d].get(wanted[d][i]) for d, i in enumerate(place))
        if None not in source:
            one = small.float().numpy()[source]
            expected[place] = np.float32(alpha) * one + np.float32(1 - alpha) * expected[place]
    reference = torch.from_numpy(expected).to(dtype)
    if 0 < alpha < 1:  # in one pass (lerp), which rounds once where the formula does twice
        ends = 4e-7 * float(reference.abs().max())
        step = 2**-8 if dtype == torch.bfloat16 else 0.0  # half of the distance between neighbors, at most
        torch.testing.assert_close(got.float(), torch.from_numpy(expected), rtol=step, atol=ends)
    else:
        assert torch.equal(got, reference)  # in float32, cast once


@each_layout
@each_seed
@pytest.mark.parametrize("mean", [False, True])
def test_expand(spec: str, seed: int, mean: bool) -> None:
    small_sizes, target, _, _ = draw_sizes(f"{spec} {seed}")
    small = random_tensor(spec, small_sizes, seed)
    got = expand(small.clone(), parse(spec), small_sizes, target, "hidden" if mean else None)
    found = [{label: i for i, label in enumerate(dim)} for dim in labels(spec, small_sizes)]
    expected = np.zeros(parse(spec).shape(target), dtype=np.float32)
    wanted = labels(spec, target)
    for place in np.ndindex(expected.shape):
        source = tuple(found[d].get(wanted[d][i]) for d, i in enumerate(place))
        if None not in source:
            expected[place] = small.numpy()[source]
    for d, parts in enumerate(parse(spec).dims if mean else ()):
        if parts == (("hidden",),):
            old, new = np.split(expected, [small_sizes["hidden"]], axis=d)
            new[...] = old.mean(axis=d, keepdims=True)  # a view: `expected` is written
    assert np.allclose(got.numpy(), expected, atol=1e-6)
    assert mean or np.array_equal(got.numpy(), expected)


@each_layout
def test_what_is_expanded_is_taken_back(spec: str) -> None:
    small_sizes, target, _, _ = draw_sizes(f"{spec} round trip")
    small = random_tensor(spec, small_sizes, 0)
    units = {a: np.arange(small_sizes[a]) for a in parse(spec).axes}
    assert torch.equal(take(expand(small, parse(spec), small_sizes, target), parse(spec), target, units), small)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_ends_are_exact(dtype: torch.dtype) -> None:
    layout, sizes = parse("vocab hidden"), {"vocab": 50, "hidden": 30}
    large, small = random_tensor("vocab hidden", sizes, 0, dtype), random_tensor("vocab hidden", sizes, 1, dtype)
    assert torch.equal(blend(large, small, 0.0, layout, sizes, sizes), large)
    assert torch.equal(blend(large, small, 1.0, layout, sizes, sizes), small)
    assert torch.equal(blend(large, large, 0.5, layout, sizes, sizes), large)


@each_layout
@each_seed
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("made", [torch.float32, torch.bfloat16])
def test_piece_by_piece(
    spec: str, seed: int, stored: torch.dtype, made: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row at a time or all at once, in any dtype: the same as taking, weighing and averaging whole tensors."""
    layout, (small_sizes, target, sizes, orders) = parse(spec), draw_sizes(f"{spec} {seed}")
    taken = {axis: order[: target[axis]] for axis, order in orders.items() if axis in layout.axes}
    large, small = random_tensor(spec, sizes, seed, stored), random_tensor(spec, small_sizes, seed + 1, stored)
    found = []
    for size in (1, 1 << 19):
        monkeypatch.setattr(tensors, "_CHUNK", size)
        out = torch.full(layout.shape(target), torch.nan, dtype=made)
        found.append(combine(out, large, layout, sizes, taken, target, [(0.5, 0.0)], small, small_sizes, 0.25, 0.75))
    assert torch.equal(*found)
    expected = 0.5 * take(large, layout, sizes, taken).double()
    mine = expand(torch.ones_like(small), layout, small_sizes, target).bool()
    matrix = len(layout.dims) == 2  # a bias has no units beside the stream's, and stacked experts are not weighed
    for dim, parts in enumerate(layout.dims if matrix else ()):
        if parts != (("hidden",),):
            has = mine.any(1 - dim)
            expected[(slice(None),) * dim + (~has,)] *= 0.75
    expected[mine] = 0.75 * expected[mine] + 0.25 * small.double().flatten()
    step = 2**-7 if torch.bfloat16 in (stored, made) else 1e-6
    torch.testing.assert_close(found[0].double(), expected, rtol=step, atol=step)


def test_large_tensors_are_blended_in_pieces() -> None:
    sizes, target = {"vocab": 3000, "hidden": 1500}, {"vocab": 3000, "hidden": 1600}
    small, large = random_tensor("vocab hidden", sizes, 0), random_tensor("vocab hidden", target, 1)
    assert large.nbytes > 4 * tensors._CHUNK
    got = blend(large, small, 0.25, parse("vocab hidden"), sizes, target)
    torch.testing.assert_close(got[:, :1500], 0.25 * small + 0.75 * large[:, :1500], rtol=0, atol=2e-6)
    assert torch.equal(got[:, 1500:], large[:, 1500:])


def test_take_copies_nothing_that_is_contiguous() -> None:
    tensor = random_tensor("ffn hidden", {"ffn": 8, "hidden": 6}, 0)
    part = take(tensor, parse("ffn hidden"), {"ffn": 8, "hidden": 6}, {"ffn": np.arange(2, 6)})
    assert part.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert expand(tensor, parse("ffn hidden"), {"ffn": 8, "hidden": 6}, {"ffn": 8, "hidden": 6}) is tensor


def test_a_unit_that_does_not_exist_is_refused() -> None:
    tensor = random_tensor("ffn hidden", {"ffn": 4, "hidden": 3}, 0)
    with pytest.raises(AxisMapError, match="axis 'ffn' has units 0 to 3; got 1 to 4"):
        take(tensor, parse("ffn hidden"), {"ffn": 4, "hidden": 3}, {"ffn": np.array([1, 4])})


def test_rescale() -> None:
    gain = torch.tensor([0.5, -0.25, 2.0], dtype=torch.bfloat16)
    assert rescale(gain, 1.0, 1.0) is gain
    got = rescale(gain, 0.3)
    assert got.dtype == torch.float32  # cast once, by whoever stores it
    assert torch.equal(got, gain.float() * 0.3)
    stored_less_one = rescale(gain, 0.3, 1.0)
    assert torch.allclose(stored_less_one + 1, (gain.float() + 1) * 0.3)
    assert rescale(gain.double(), 0.3).dtype == torch.float64


def test_labels_are_unique() -> None:
    for spec in LAYOUTS:
        sizes = dict.fromkeys(AXES, 3)
        for dim, length in zip(labels(spec, sizes), parse(spec).shape(sizes), strict=True):
            assert len(dim) == len(set(dim)) == length
    assert list(itertools.chain(*labels("(heads 2)", {"heads": 2})))[2] == (("part", 0), ("heads", 1), ("factor 1", 0))
