"""Plots of measured models: what is drawn where, in which colors, and what is refused before anything is measured."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.plots import check_plot, one_tokenizer, plot_losses, plot_recovery, plot_scores, plot_size_loss

BLUE, VERMILION, GREEN, BLACK = 0x0072B2, 0xD55E00, 0x009E73, 0x000000
SIZES = {"chain": [100_000_000, 120_000_000, 150_000_000], "org/model": [130_000_000]}


def losses(tokenizer: str = "x") -> list[dict[str, Any]]:
    """Three anchors and a model, which has a tokenizer of its own where another is named."""
    return [
        {
            "name": of if len(sizes) == 1 else f"a{i}",
            "of": of,
            "num_parameters": size,
            "loss": 4 - size / 1e8,
            "bits_per_byte": 1 + size / 1e8,
            "tokenizer": tokenizer if of == "org/model" else "x",
        }
        for of, sizes in SIZES.items()
        for i, size in enumerate(sizes)
    ]


def scores(tasks: dict[str, tuple[str, ...]], stderr: float | None = 0.02, **more: Any) -> list[dict[str, Any]]:
    return [
        {**row, "task": task, "metric": metric, "value": 0.4 + 0.1 * i, "stderr": stderr, **more}
        for row in losses()
        for task, metrics in tasks.items()
        for i, metric in enumerate(metrics)
    ]


def read_png(path: Path) -> Tensor:
    """The pixels of a PNG file as (height, width) integers 0xRRGGBB."""
    red, green, blue, *_ = (torch.from_numpy(imread(path)) * 255).round().long().unbind(-1)
    return red << 16 | green << 8 | blue


def middle(image: Tensor, color: int) -> Tensor:
    """(row, column) in the middle of what is drawn in a color inside the axes: the legend below is left out."""
    return (image[: int(0.85 * len(image))] == color).nonzero().float().mean(0)


def test_an_argument_has_a_color_and_only_a_chain_a_line(tmp_path: Path) -> None:
    plot_losses(losses(), tmp_path / "a.png")
    image = read_png(tmp_path / "a.png")
    assert image.shape == (1000, 1600)
    drawn = image[:850]
    columns = {color: (drawn == color).any(0).nonzero().flatten() for color in (BLUE, VERMILION)}
    assert len(columns[BLUE]) > 700  # from the first anchor to the last
    assert len(columns[VERMILION]) < 40  # one marker
    assert GREEN not in image
    assert (image[900:] == BLUE).any() and (image[900:] == VERMILION).any()  # the legend


def test_the_axis_of_sizes_is_logarithmic(tmp_path: Path) -> None:
    rows = [{**row, "num_parameters": size} for row, size in zip(losses(), (10**6, 10**7, 10**8, 10**7), strict=True)]
    plot_losses([rows[0], rows[2], rows[3]], tmp_path / "a.png")
    image = read_png(tmp_path / "a.png")[:850]
    ends = (image == BLUE).any(0).nonzero().flatten()
    assert middle(image, VERMILION)[1].item() == pytest.approx((ends[0] + ends[-1]).item() / 2, abs=4)


def test_other_tokenizers_are_drawn_as_bits_a_byte(tmp_path: Path) -> None:
    """The loss falls with size here and bits a byte rise, so the model lies on the other side of the middle."""
    assert one_tokenizer(losses()) and not one_tokenizer(losses("y"))
    slopes = []
    for tokenizer in "xy":
        plot_losses(losses(tokenizer), tmp_path / "a.png")
        places = (read_png(tmp_path / "a.png")[:850] == BLUE).nonzero().float()
        slopes.append(torch.corrcoef(places.T)[0, 1].item())
    assert slopes[0] > 0.9 and slopes[1] < -0.9  # rows are counted from above


@pytest.mark.parametrize(
    ("tasks", "shape"),
    [
        ({"boolq": ("acc",)}, (1000, 1600)),
        ({"boolq": ("acc",), "piqa": ("acc", "acc_norm")}, (840, 2400)),
        ({"boolq": ("acc",), "piqa": ("acc", "acc_norm"), "openbookqa": ("acc",)}, (1680, 2400)),
    ],
)
def test_a_panel_a_task(tasks: dict[str, tuple[str, ...]], shape: tuple[int, int], tmp_path: Path) -> None:
    plot_scores(scores(tasks), tmp_path / "a.png")
    image = read_png(tmp_path / "a.png")
    assert image.shape == shape
    for number in range(len(tasks)):  # in each half or quarter that has a panel, both arguments
        row, column = divmod(number, 2)
        part = image[: int(0.88 * len(image))]
        part = part.chunk(1 if len(tasks) < 3 else 2)[row].chunk(min(len(tasks), 2), 1)[column]
        assert (part == BLUE).sum() > 500 and (part == VERMILION).sum() > 100


def test_bars_are_a_standard_error_to_either_side(tmp_path: Path) -> None:
    """Of a single model: with the axis's margins of 0.15, the bar takes 1 / 1.3 of the panel's height."""
    rows = [row for row in scores({"boolq": ("acc",)}) if row["of"] == "org/model"]
    heights = []
    for name, stderr in (("bar", 0.02), ("none", None)):
        plot_scores([{**row, "stderr": stderr} for row in rows], tmp_path / f"{name}.png")
        image = read_png(tmp_path / f"{name}.png")[:850]
        marks = (image == BLUE).any(1).nonzero().flatten()
        axis = (image == BLACK).sum(0).max().item()  # the left spine
        heights.append((marks[-1] - marks[0]).item() / axis)
    assert heights[0] == pytest.approx(1 / 1.3, abs=0.03)
    assert heights[1] < 0.05


def test_rouge_has_three_styles_in_one_panel(tmp_path: Path) -> None:
    for metrics in (("rouge1",), ("rouge1", "rouge2", "rougeL")):
        plot_scores(scores({"s.jsonl": metrics}, None, implementation="rouge-score"), tmp_path / "a.png")
        image = read_png(tmp_path / "a.png")
        assert image.shape == (1000, 1600)
        rows = (image[:850] == BLUE).any(1).nonzero().flatten()
        assert (rows.diff() > 20).sum() + 1 == len(metrics)  # a level line each


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plot_scores(scores({"boolq": ("acc",), "piqa": ("acc", "acc_norm")}), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Two arguments end alike: the legend says their whole paths, and is longer."""
    widths = []
    for names in (("one/model", "two/other"), ("one/model", "two/model")):
        rows = [{**losses()[3], "of": name, "name": name} for name in names]
        plot_losses(rows, tmp_path / "a.png")
        legend = read_png(tmp_path / "a.png")[920:]
        used = (legend == BLACK).any(0).nonzero().flatten()
        widths.append((used[-1] - used[0]).item())
    assert widths[1] > widths[0] + 80


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.pdf", "FILE.png"), ("a", "FILE.png"), ("folder.png", "FILE.png"), ("no/a.png", "no folder")],
)
def test_a_place_without_a_png_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(RecipeError, match=message):
        check_plot(tmp_path / name)
    with pytest.raises(RecipeError, match=message):
        plot_losses(losses(), tmp_path / name)


def test_nothing_to_draw_is_refused(tmp_path: Path) -> None:
    check_plot(tmp_path / "A.PNG")
    for plot in (plot_losses, plot_scores):
        with pytest.raises(RecipeError, match="no point to plot"):
            plot([], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


SERIES = {
    "interpolate": [(124_600_000, 3.755), (111_900_000, 3.872), (118_200_000, 3.814)],
    "prune": [(111_900_000, 4.204), (118_200_000, 3.996)],
}
ANCHORS = [("large", 134_500_000, 3.688), ("small", 103_100_000, 3.956)]


def test_the_size_loss_curve_draws_a_line_a_method_and_the_anchors(tmp_path: Path) -> None:
    plot_size_loss(SERIES, ANCHORS, tmp_path / "curve.png", "A chain")
    image = read_png(tmp_path / "curve.png")
    assert image.shape == (1000, 1600)
    colors = set(image.unique().tolist())
    assert {BLUE, VERMILION, BLACK} <= colors
    assert GREEN not in colors


def test_the_size_loss_curve_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("first.png", "second.png"):
        plot_size_loss(SERIES, ANCHORS, tmp_path / name, "A chain")
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


@pytest.mark.parametrize(
    ("series", "anchors"),
    [
        ({}, ANCHORS),
        (SERIES, []),
        ({f"method {i}": [(763_000 * 4**i, 4.0 - i / 10)] for i in range(14)}, [("tiny", 763, 9.0)]),
    ],
    ids=["anchors-only", "series-only", "many-methods-on-a-log-axis"],
)
def test_the_size_loss_curve_takes_any_data(series: dict, anchors: list, tmp_path: Path) -> None:
    plot_size_loss(series, anchors, tmp_path / "curve.png", "")
    assert read_png(tmp_path / "curve.png").shape == (1000, 1600)


def test_a_size_loss_curve_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no point to plot"):
        plot_size_loss({}, [], tmp_path / "curve.png", "A chain")


def test_a_recovery_is_a_line_each_over_tokens(tmp_path: Path) -> None:
    curves = {"recovered": [(0, 4.0), (1000, 3.5)], "from scratch": [(0, 6.0), (1000, 5.0)]}
    plot_recovery(curves, tmp_path / "plot.png", "Recovery")
    assert {BLUE, VERMILION} <= set(read_png(tmp_path / "plot.png").unique().tolist())


def test_a_recovery_without_points_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no point to plot"):
        plot_recovery({"recovered": []}, tmp_path / "plot.png", "Nothing")
