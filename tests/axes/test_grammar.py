"""The axis grammar against brute force: every row number is recomputed with ``np.ix_`` on a labeled array."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbd_hub.axes.grammar import Layout, parse, product
from cbd_hub.errors import AxisMapError, CbdError

AXES = ("hidden", "ffn", "kv_heads", "q_per_kv", "_x9")

factors = st.one_of(st.sampled_from(AXES), st.integers(1, 3))
parts = st.lists(factors, min_size=1, max_size=3).map(tuple)
layouts = st.lists(st.lists(parts, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3).map(
    lambda dims: Layout(tuple(dims))
)
all_sizes = st.fixed_dictionaries({axis: st.integers(1, 4) for axis in AXES})

# The same examples on every machine, and no time limit that a busy machine breaks.
repeatable = settings(deadline=None, derandomize=True, database=None)


@st.composite
def units(draw: Any, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """For some axes a few of their units, in any order."""
    axes = draw(st.sets(st.sampled_from(AXES)))
    return {
        axis: np.array(draw(st.lists(st.sampled_from(range(sizes[axis])), min_size=1, unique=True)), dtype=np.int64)
        for axis in axes
    }


def brute_force_rows(dim: tuple[tuple[str | int, ...], ...], sizes: dict[str, int], taken: Any) -> np.ndarray:
    """Numbers the rows, folds every part into one array dimension per factor, and takes units with ``np.ix_``."""
    pieces, offset = [], 0
    for part in dim:
        shape = [sizes[f] if isinstance(f, str) else f for f in part]
        labels = offset + np.arange(int(np.prod(shape))).reshape(shape)
        pieces.append(labels[np.ix_(*[taken.get(f, range(n)) for f, n in zip(part, shape, strict=True)])].reshape(-1))
        offset += labels.size
    return np.concatenate(pieces)


# -- parsing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("hidden", ((("hidden",),),)),
        ("vocab hidden", ((("vocab",),), (("hidden",),))),
        ("  vocab\t hidden\n", ((("vocab",),), (("hidden",),))),
        ("(2 ffn) hidden", (((2, "ffn"),), (("hidden",),))),
        ("(positions + 2) hidden", ((("positions",), (2,)), (("hidden",),))),
        ("(heads 3 head_dim)", ((("heads", 3, "head_dim"),),)),
        ("(a b+c d+e)", ((("a", "b"), ("c", "d"), ("e",)),)),
        ("(a)(b)3", ((("a",),), (("b",),), ((3,),))),
    ],
)
def test_parse(text: str, dims: Any) -> None:
    assert parse(text).dims == dims


@repeatable
@given(layouts)
def test_string_form_reads_back(layout: Layout) -> None:
    assert parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("()", "nothing before it"),
        ("( ) hidden", "nothing before it"),
        ("(a + ) hidden", "empty or zero-sized part in 'a +'"),
        ("(+ a)", "empty or zero-sized part"),
        ("(a + + b)", "empty or zero-sized part"),
        ("(+)", "empty or zero-sized part"),
        ("(0 ffn)", "empty or zero-sized part in '0 ffn'"),
        ("0", "empty or zero-sized part"),
        ("((a b) c)", "nested"),
        ("(a b", "never closed"),
        ("a (", "never closed"),
        ("a b)", "without '('"),
        (")", "without '('"),
        ("a + b", "'+' must stand inside parentheses"),
        ("a * b", "unexpected '* b'"),
        ("(a - 1) b", "unexpected '- 1) b'"),
        ("a,b", "unexpected ',b'"),
        ("2ffn", "unexpected '2ffn'"),
        ("-2", "unexpected '-2'"),
        ("1.5 a", "unexpected '.5 a'"),
        ("größe", "unexpected"),
        ("٣ ffn", "unexpected"),  # a digit, but not one of ours
        ("9" * 5000, "unexpected"),  # more digits than int() reads
        ("a\0b", "unexpected"),
        ("a; import os", "unexpected '; import o'"),
    ],
)
def test_malformed_strings_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(AxisMapError) as caught:
        parse(text)
    assert complaint in str(caught.value)


@repeatable
@given(st.text(alphabet="ab_ 012()+*\n٣é", max_size=12))
def test_any_string_is_parsed_or_refused(text: str) -> None:
    try:
        layout = parse(text)
    except CbdError:
        return
    assert parse(str(layout)) == layout
    assert all(size > 0 for size in layout.shape(dict.fromkeys(layout.axes, 2)))


def test_long_strings_take_linear_time() -> None:
    assert parse(" ".join(["(a b + c)"] * 20_000)).dims[-1] == (("a", "b"), ("c",))
    with pytest.raises(AxisMapError, match="nested"):
        parse("(" * 50_000)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_shapes_and_counts() -> None:
    layout = parse("(kv_heads q_per_kv head_dim + 2 kv_heads head_dim) hidden")
    sizes = {"kv_heads": 2, "q_per_kv": 3, "head_dim": 8, "hidden": 40}
    assert layout.shape(sizes) == (48 + 32, 40)
    assert layout.count(sizes) == 80 * 40
    assert layout.axes == {"kv_heads", "q_per_kv", "head_dim", "hidden"}
    assert product(("kv_heads", 5), sizes) == 10
    assert product((), sizes) == 1


@repeatable
@given(layouts, all_sizes)
def test_count_is_the_product_of_the_shape(layout: Layout, sizes: dict[str, int]) -> None:
    shape = layout.shape(sizes)
    assert shape == tuple(len(brute_force_rows(dim, sizes, {})) for dim in layout.dims)
    assert layout.count(sizes) == np.prod(shape)


def test_an_axis_without_a_size_is_named() -> None:
    for use in (
        lambda: parse("ffn hidden").shape({"hidden": 4}),
        lambda: parse("ffn hidden").count({"hidden": 4}),
        lambda: parse("(3 ffn)").rows(0, {"hidden": 4}, {"ffn": np.arange(2)}),
        lambda: product(("ffn",), {"hidden": 4}),
    ):
        with pytest.raises(AxisMapError, match=r"axis 'ffn' has no size; sizes are known for \['hidden'\]"):
            use()


# -- rows -------------------------------------------------------------------------------------------------------------


@settings(repeatable, max_examples=300)
@given(st.data(), layouts, all_sizes)
def test_rows_against_brute_force(data: Any, layout: Layout, sizes: dict[str, int]) -> None:
    taken = data.draw(units(sizes))
    for number, dim in enumerate(layout.dims):
        expected = brute_force_rows(dim, sizes, taken)
        rows = layout.rows(number, sizes, taken)
        if np.array_equal(expected, np.arange(layout.shape(sizes)[number])):
            assert rows is None
        else:
            assert rows is not None
            assert rows.dtype == np.int64
            np.testing.assert_array_equal(rows, expected)


def test_rows_of_a_fused_projection_by_hand() -> None:
    """Group 1 of 2 with query heads (1, 0) of 2, head_dim 2: q has 8 rows, k and v have 4 each."""
    layout = parse("(kv q d + kv d + kv d) hidden")
    sizes = {"kv": 2, "q": 2, "d": 2, "hidden": 3}
    rows = layout.rows(0, sizes, {"kv": np.array([1]), "q": np.array([1, 0])})
    assert rows is not None
    assert rows.tolist() == [6, 7, 4, 5, 10, 11, 14, 15]
    assert layout.rows(1, sizes, {"kv": np.array([1])}) is None


def test_units_may_repeat_and_be_none() -> None:
    """Duplication (an expansion) and an empty choice are rows like any others."""
    layout = parse("(2 ffn)")
    for chosen, expected in (([1, 1, 0], [1, 1, 0, 4, 4, 3]), ([], [])):
        rows = layout.rows(0, {"ffn": 3}, {"ffn": np.array(chosen, dtype=np.int64)})
        assert rows is not None
        assert rows.tolist() == expected


@pytest.mark.parametrize("chosen", [[3], [0, 7], [-1, 0], [2**40]])
def test_units_that_do_not_exist_are_refused(chosen: list[int]) -> None:
    """Row-major arithmetic would turn unit 3 of 3 into unit 0 of the next head without a word."""
    with pytest.raises(AxisMapError, match="axis 'heads' has units 0 to 2"):
        parse("(heads 3 head_dim) hidden").rows(
            0, {"heads": 3, "head_dim": 4, "hidden": 5}, {"heads": np.array(chosen)}
        )
