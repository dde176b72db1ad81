"""From a parameter count to a shape and back: exact counts, targets met, hardware-friendly widths, clear refusals."""

import contextlib
import itertools
import random
import re
from statistics import median

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, VARIANTS, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import ROUND, count_parameters, format_count, ladder, parse_count, solve
from cbd_hub.errors import SizeError

PUBLISHED = {
    "llama": {  # SmolLM2-135M
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "mistral": {  # Mistral-7B
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336, "vocab_size": 32000,
    },
    "smollm3": {  # SmolLM3-3B
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 4,
        "intermediate_size": 11008, "vocab_size": 128256, "pad_token_id": 0,
    },
    "qwen2": {  # Qwen2.5-0.5B
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 151936, "tie_word_embeddings": True,
    },
    "qwen3": {  # Qwen3-0.6B
        "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "intermediate_size": 3072, "vocab_size": 151936, "head_dim": 128, "tie_word_embeddings": True,
    },
    "gemma3_text": {  # gemma-3-270m
        "hidden_size": 640, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
        "intermediate_size": 2048, "vocab_size": 262144, "head_dim": 256,
    },
    "olmo2": {  # OLMo-2-1B
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "intermediate_size": 8192, "vocab_size": 100352,
    },
    "phi3": {  # Phi-3-mini
        "hidden_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "intermediate_size": 8192, "vocab_size": 32064,
    },
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},  # GPT-2
    "gpt_neox": {  # Pythia-160M
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "vocab_size": 50304,
    },
    "opt": {  # OPT-125M
        "hidden_size": 768, "word_embed_proj_dim": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "ffn_dim": 3072, "vocab_size": 50272,
    },
}  # fmt: skip
"""family -> the sizes of a published model."""

each_family = pytest.mark.parametrize("family", PUBLISHED)


def published(family: str) -> tuple[AxisMap, dict[str, int]]:
    config = AutoConfig.for_model(family, **PUBLISHED[family])
    axis_map = axis_map_for(config)
    return axis_map, axis_map.sizes(config)


# -- counts -----------------------------------------------------------------------------------------------------------


def test_every_family_has_a_published_size() -> None:
    assert set(PUBLISHED) == set(FAMILIES)


@each_family
def test_count_is_the_model_s_own(family: str) -> None:
    axis_map, sizes = published(family)
    for layers in (2, 3):
        config = AutoConfig.for_model(family, **PUBLISHED[family])
        fields = axis_map.config_fields({**sizes, "layers": layers})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(type(config).from_dict({**_no_lists(config), **fields}))
        assert count_parameters(axis_map, {**sizes, "layers": layers}) == model.num_parameters()


def _no_lists(config: object) -> dict[str, object]:
    values = config.to_dict()  # type: ignore[attr-defined]
    return {k: v for k, v in values.items() if k not in ("layer_types", "no_rope_layers")}


def test_known_counts() -> None:
    assert count_parameters(*published("llama")) == 134_515_008
    assert count_parameters(*published("gpt2")) == 124_439_808
    assert count_parameters(*published("opt")) == 125_239_296


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("138M", 138_000_000), ("1.2B", 1_200_000_000), ("853k", 853_000), (" 2.5 m ", 2_500_000),
        ("1_000_000", 10**6), ("1,000,000", 10**6), (138_000_000, 138_000_000), ("7", 7), (".5B", 500_000_000),
        ("0.1234567B", 123_456_700),
        ("1T", 10**12), (1, 1),
        (np.int64(7), 7), (np.float32(5e6), 5 * 10**6), (torch.tensor(9), 9), (138e6, 138 * 10**6),
    ],
)  # fmt: skip
def test_parse_count(text: int | str, count: int) -> None:
    assert parse_count(text) == count
    assert isinstance(parse_count(text), int)


@pytest.mark.parametrize(
    "wrong",
    ["138X", "", "M", "1.2.3M", "-5M", "1e8", "12MB", "nan", "inf", "one", True, False, 0, -1, "0", "0.0001k", None,
     "1,5M", "1,500M", "1,5", "1,50,000", "12,34", "1.5,000", np.True_, float("nan"),
     float("inf"), 1.5, np.float32(0.5),
     torch.tensor(True), torch.ones(2), "9" * 400 + "T", "9" * 5000, 10**15, 10**400, "138 M B", [138]],
)  # fmt: skip
def test_parse_count_refuses(wrong: object) -> None:
    with pytest.raises(SizeError, match=r"is not a parameter count|between 1 and 10\^15"):
        parse_count(wrong)  # type: ignore[arg-type]


@given(st.one_of(st.text(max_size=12), st.integers(), st.floats(), st.booleans(), st.none()))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_parse_count_gives_a_count_or_a_size_error(value: object) -> None:
    with contextlib.suppress(SizeError):
        assert 1 <= parse_count(value) < 10**15  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("count", "text"),
    [(134_515_008, "134.5M"), (999, "999"), (1_000, "1k"), (1_235_814_400, "1.236B"), (10**12, "1T")],
)
def test_format_count(count: int, text: str) -> None:
    assert format_count(count) == text
    if count >= 1000:
        assert abs(parse_count(text) - count) / count < 1e-3


# -- solve ------------------------------------------------------------------------------------------------------------


def pairs(family: str) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Neighbors as `ladder` makes them (to 3/4, then 2/3), and a pair that differs in width and depth."""
    axis_map, large = published(family)
    count = count_parameters(axis_map, large)
    middle = ladder(axis_map, large, round(0.75 * count))
    found = [(middle, large), (ladder(axis_map, middle, round(0.5 * count)), middle)]
    narrow = {**large, "layers": large["layers"] * 2 // 3, "ffn": large["ffn"] // 3}
    if "hidden" in axis_map.equal:
        narrow |= {"heads": large["heads"] // 2, "hidden": large["hidden"] // 2}
    else:
        heads = large["kv_heads"] * large["q_per_kv"]
        narrow["hidden"] = large["hidden"] * 3 // 4 // heads * heads
    return [*found, (narrow, large)]


@each_family
def test_targets_are_met(family: str) -> None:
    axis_map, _ = published(family)
    errors = []
    for small, large in pairs(family):
        low, high = count_parameters(axis_map, small), count_parameters(axis_map, large)
        for i in range(1, 9):
            target = low + (high - low) * i // 9
            sizes = solve(axis_map, target, small, large)
            assert all(type(value) is int for value in sizes.values())
            assert all(small[a] <= sizes[a] <= large[a] for a in sizes)
            axis_map.check_sizes(sizes)
            fields = axis_map.config_fields(sizes)
            assert axis_map.sizes(fields) == sizes  # what the config states is what was meant
            if "num_key_value_heads" in fields:
                assert fields["num_attention_heads"] % fields["num_key_value_heads"] == 0
            assert fields.get("hidden_size", sizes["hidden"]) % sizes.get("heads", 1) == 0
            assert sizes["ffn"] % 8 == 0 or sizes["ffn"] in (small["ffn"], large["ffn"])
            errors.append(abs(count_parameters(axis_map, sizes) - target) / target)
            assert sizes == solve(axis_map, target, small, large)
    assert max(errors) <= 0.01
    assert median(errors) <= 0.002


def test_shapes_follow_the_line_between_the_neighbors() -> None:
    """Every axis moves along: none stays at an end while another goes all the way."""
    axis_map, large = published("llama")
    small = {**large, "layers": 20, "ffn": 768}
    low, high = count_parameters(axis_map, small), count_parameters(axis_map, large)
    for share in (0.2, 0.4, 0.6, 0.8):
        sizes = solve(axis_map, round(low + share * (high - low)), small, large, shallow=False)
        moved = [(sizes[a] - small[a]) / (large[a] - small[a]) for a in ("layers", "ffn")]
        assert max(moved) - min(moved) < 0.15
        assert min(moved) < share + 0.15
        assert max(moved) > share - 0.05


def test_a_target_takes_as_few_layers_as_can_carry_it() -> None:
    axis_map, large = published("llama")
    small = ladder(axis_map, large, round(0.75 * count_parameters(axis_map, large)))
    assert small["layers"] < large["layers"]
    low, high = count_parameters(axis_map, small), count_parameters(axis_map, large)
    for share in (0.2, 0.4, 0.6, 0.8):
        target = round(low + share * (high - low))
        layers = solve(axis_map, target, small, large)["layers"]
        one_less = count_parameters(axis_map, {**large, "layers": layers - 1})
        assert layers == small["layers"] or one_less < target * 1.002


@each_family
def test_the_two_neighbors_are_their_own_solutions(family: str) -> None:
    axis_map, _ = published(family)
    for small, large in pairs(family):
        assert solve(axis_map, count_parameters(axis_map, small), small, large) == small
        assert solve(axis_map, count_parameters(axis_map, large), small, large) == large


def test_a_target_outside_names_the_range_and_the_nearest_size() -> None:
    axis_map, large = published("llama")
    small = ladder(axis_map, large, 100_000_000)
    low = count_parameters(axis_map, small)
    for target, nearest in ((low - 1, low), (200_000_000, 134_515_008)):
        with pytest.raises(SizeError) as caught:
            solve(axis_map, target, small, large)
        message = str(caught.value)
        assert f"{low} to 134515008" in message
        assert f"({target}) is outside the range" in message
        assert f"the nearest size is {format_count(nearest)} ({nearest})" in message


def test_an_unreachable_target_names_the_nearest_size() -> None:
    axis_map, large = published("gpt2")
    small = {**large, "layers": 10}  # nothing but whole layers in between
    step = (count_parameters(axis_map, large) - count_parameters(axis_map, small)) // 2
    middle = count_parameters(axis_map, small) + step
    with pytest.raises(SizeError, match=rf"within 1\.00%; the nearest size is {middle} parameters") as caught:
        solve(axis_map, middle + step // 3, small, large)
    nearest = int(re.search(r"nearest size is (\d+)", str(caught.value)).group(1))  # type: ignore[union-attr]
    assert solve(axis_map, nearest, small, large)["layers"] == 11
    assert solve(axis_map, middle + step // 2, small, large, tolerance=0.05)["layers"] in (11, 12)


def test_tolerance_zero_wants_the_exact_count() -> None:
    axis_map, large = published("llama")
    small = ladder(axis_map, large, 110_000_000)
    sizes = solve(axis_map, 122_000_000, small, large)
    exact = count_parameters(axis_map, sizes)
    assert count_parameters(axis_map, solve(axis_map, exact, small, large, tolerance=0)) == exact
    with pytest.raises(SizeError, match="larger tolerance"):
        solve(axis_map, exact + 1, small, large, tolerance=0)


def test_absurd_sizes_cost_no_time() -> None:
    axis_map, large = published("llama")
    large = {**large, "ffn": 2**34}
    small = {**large, "ffn": 1}
    assert solve(axis_map, count_parameters(axis_map, large) // 2, small, large)["ffn"] > 2**30


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_models_are_met_or_refused(variant: str) -> None:
    family, overrides = VARIANTS[variant]
    config = tiny_config(family, **overrides)
    axis_map = axis_map_for(config)
    large, draw = axis_map.sizes(config), random.Random(variant)
    small = {**large, "ffn": large["ffn"] // 4, "layers": large["layers"] - 1}
    low, high = count_parameters(axis_map, small), count_parameters(axis_map, large)
    for target in draw.sample(range(low, high), 5):
        try:
            assert abs(count_parameters(axis_map, solve(axis_map, target, small, large)) - target) <= 0.01 * target
        except SizeError as error:
            nearest = int(re.search(r"nearest size is (\d+)", str(error)).group(1))  # type: ignore[union-attr]
            assert abs(nearest - target) > 0.01 * target
            assert count_parameters(axis_map, solve(axis_map, nearest, small, large)) == nearest


# -- widths that quantized formats store whole ------------------------------------------------------------------------


def roundness(sizes: dict[str, int], like: dict[str, int]) -> int:
    """The largest of the preferred multiples that divides every width in which two sizes differ; 1 for none."""
    widths = [sizes[axis] for axis in ("hidden", "ffn") if sizes[axis] != like[axis]]
    return next((m for m in ROUND if all(width % m == 0 for width in widths)), 1)


@each_family
def test_round_widths_are_taken_wherever_the_tolerance_has_them(family: str) -> None:
    axis_map, _ = published(family)
    for small, large in pairs(family):
        low, high = count_parameters(axis_map, small), count_parameters(axis_map, large)
        for i in range(1, 9):
            target = low + (high - low) * i // 9
            nearest, sizes = (solve(axis_map, target, small, large, round_widths=on) for on in (False, True))
            axis_map.check_sizes(sizes)
            assert all(small[a] <= sizes[a] <= large[a] for a in sizes)
            assert abs(count_parameters(axis_map, sizes) - target) <= 0.01 * target
            assert sizes["layers"] <= nearest["layers"]  # a round width is not worth a layer
            taken = next(m for m in (*ROUND, 1) if sizes["ffn"] % m == 0)
            for better in ROUND[: (*ROUND, 1).index(taken)] if small["hidden"] == large["hidden"] else ():
                for ffn in range(-(-small["ffn"] // better) * better, large["ffn"] + 1, better):
                    assert abs(count_parameters(axis_map, {**sizes, "ffn": ffn}) - target) > 0.01 * target


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])
def test_models_of_a_usual_size_always_get_a_multiple_of_32(family: str) -> None:
    axis_map, large = published(family)
    count, found = count_parameters(axis_map, large), []
    small = ladder(axis_map, large, round(0.7 * count), round_widths=True)
    for percent in range(71, 100):
        found.append(roundness(solve(axis_map, count * percent // 100, small, large, round_widths=True), large))
        found.append(roundness(ladder(axis_map, large, count * percent // 100, round_widths=True), large))
    assert min(found) >= 32 and found.count(256) >= len(found) // 5


@pytest.mark.parametrize("variant", [*FAMILIES, *VARIANTS])
def test_round_widths_cost_a_tiny_model_none_of_its_targets(variant: str) -> None:
    family, overrides = VARIANTS.get(variant, (variant, {}))
    config = tiny_config(family, **overrides)
    axis_map = axis_map_for(config)
    large = axis_map.sizes(config)
    small = {**large, "ffn": large["ffn"] // 2}
    low, high = count_parameters(axis_map, small), count_parameters(axis_map, large)
    for target in range(low, high + 1, max(1, (high - low) // 7)):
        results = []
        for on in (False, True):
            with contextlib.suppress(SizeError):
                results.append(count_parameters(axis_map, solve(axis_map, target, small, large, round_widths=on)))
        assert len(results) in (0, 2) and all(abs(count - target) <= 0.01 * target for count in results)


# -- ladder -----------------------------------------------------------------------------------------------------------


@each_family
def test_a_ladder_spends_ffn_then_layers_then_width(family: str) -> None:
    axis_map, large = published(family)
    count = count_parameters(axis_map, large)
    changed = []
    for percent in (97, 90, 80, 70, 60, 50, 40):
        sizes = ladder(axis_map, large, count * percent // 100)
        axis_map.check_sizes(sizes)
        assert all(type(v) is int and v <= large[a] for a, v in sizes.items())
        assert abs(count_parameters(axis_map, sizes) / (count * percent / 100) - 1) <= 0.01
        changed.append({a for a in sizes if sizes[a] != large[a]})
    assert changed[0] == {"ffn"}
    assert all("ffn" in axes for axes in changed)
    for earlier, later in itertools.pairwise(changed):  # an axis that is touched once stays touched
        assert earlier <= later | {"layers"}
    first_width = next((i for i, axes in enumerate(changed) if "hidden" in axes), len(changed))
    assert any("layers" in axes for axes in changed[:first_width])
    assert not any(axes & {"head_dim", "vocab", "positions"} for axes in changed)


def test_a_ladder_keeps_the_width_while_ffn_and_layers_can_carry_it() -> None:
    axis_map, large = published("llama")
    sizes = ladder(axis_map, large, 103_000_000)
    assert {a for a in sizes if sizes[a] != large[a]} == {"ffn", "layers"}
    assert ladder(axis_map, large, 50_000_000)["hidden"] < large["hidden"]


def test_a_ladder_goes_down_only_and_not_too_far() -> None:
    axis_map, large = published("llama")
    with pytest.raises(SizeError, match="is not smaller than its neighbor"):
        ladder(axis_map, large, 134_515_008)
    with pytest.raises(SizeError, match=r"too far below.*Put an anchor in between"):
        ladder(axis_map, large, 1_000_000)
