"""Draws the pictures of the documentation: ``python docs/pictures.py [FOLDER]`` writes them into docs/img.

``chain.png`` is the idea, ``axis-map.png`` the map of Llama as the library holds it, ``size-loss.png`` what was
measured (docs/results). Colors are those of every other plot. The same versions of matplotlib and its fonts give the
same bytes.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from cbd_hub.axes.architectures import AXIS_MAPS
from cbd_hub.axes.sizing import format_count, parse_count
from cbd_hub.evaluation.plots import COLORS

DOCS = Path(__file__).resolve().parent
BLUE, RED, GREEN, PINK, ORANGE, SKY = COLORS
INK, GRAY, PALE = "#222222", "#6b6b6b", "#f1f1f1"


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of width x height inches whose one unit is an inch, without axes."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    return figure, axes


def box(axes: Axes, x: float, y: float, width: float, height: float, **style: object) -> None:
    """A rectangle with round corners around the middle (x, y)."""
    shape = (x - width / 2, y - height / 2), width, height
    axes.add_patch(FancyBboxPatch(*shape, boxstyle="round,pad=0,rounding_size=0.08", **style))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """A straight arrow."""
    style = {"arrowstyle": "-|>", "mutation_scale": 14, "linewidth": 1.6, "color": color, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, **style))


def chain() -> Figure:
    """Three anchors from large to small, distillation between neighbors, and models in between; areas are sizes."""
    figure, axes = canvas(9.4, 4.9)
    top, bottom = 3.45, 1.1
    anchors = [(1.2, 744_672), (4.7, 461_280), (8.2, 300_000)]
    for index, (x, count) in enumerate(anchors):
        side = (count / 300_000) ** 0.5
        box(axes, x, top, side, side, facecolor=BLUE, edgecolor="none")
        label(axes, x, top, f"anchor {index}", format_count(count), "white")
    axes.text(anchors[0][0], 4.42, "the source", ha="center", color=GRAY, fontsize=10.5)
    for (x, count), (after, smaller) in pairwise(anchors):
        left, right = x + (count / 300_000) ** 0.5 / 2, after - (smaller / 300_000) ** 0.5 / 2
        arrow(axes, (left + 0.1, top), (right - 0.1, top), INK)
        axes.text((left + right) / 2, top + 0.14, "cut and distill", ha="center", color=INK, fontsize=10.5)
    for (x, count), (after, smaller), size in zip(anchors, anchors[1:], (573_600, 380_640), strict=False):
        side, middle = (size / 300_000) ** 0.5, (x + after) / 2
        box(axes, middle, bottom, side, side, facecolor="white", edgecolor=RED, linewidth=2, linestyle=(0, (3, 1.5)))
        label(axes, middle, bottom, "model", format_count(size), INK)
        for start, its, text in ((x, count, "1 - alpha"), (after, smaller, "alpha")):
            away = 1 if start < middle else -1
            foot = start + away * 0.25, top - (its / 300_000) ** 0.5 / 2 - 0.07
            head = middle - away * (side / 2 + 0.08), bottom + 0.25
            arrow(axes, foot, head, RED)
            x_text, y_text = (foot[0] + head[0]) / 2 + away * 0.14, (foot[1] + head[1]) / 2 + 0.05
            side_of = "left" if away > 0 else "right"
            axes.text(x_text, y_text, text, ha=side_of, color=RED, fontsize=10.5)
    note = "Any size between two neighbors: their weights averaged, in seconds, without training."
    axes.text(4.7, 0.1, note, ha="center", color=GRAY, fontsize=10)
    return figure


def label(axes: Axes, x: float, y: float, title: str, below: str, color: str) -> None:
    """Two lines in the middle of a box."""
    axes.text(x, y + 0.08, title, ha="center", color=color, fontsize=11, fontweight="bold")
    axes.text(x, y - 0.2, below, ha="center", color=color, fontsize=10.5)


AXIS_COLORS = {
    "hidden": BLUE,
    "ffn": RED,
    "kv_heads": GREEN,
    "q_per_kv": ORANGE,
    "head_dim": SKY,
    "vocab": PINK,
    "layers": INK,
}


def axis_map() -> Figure:
    """One row a tensor of Llama, one column an axis: where the axis runs along rows, columns, or the layers."""
    known = AXIS_MAPS["llama"]
    names = [name for name, text in known.tensors.items() if " if " not in text]
    step, left, wide, top = 0.31, 3.35, 0.86, 0.95
    width, height = left + wide * len(AXIS_COLORS) + 0.15, top + step * len(names) + 0.5
    figure, axes = canvas(width, height)
    for column, (axis, color) in enumerate(AXIS_COLORS.items()):
        x = left + (column + 0.5) * wide
        axes.text(x, height - 0.52, axis, ha="center", color=color, fontsize=10.5, fontweight="bold")
        fate = "fixed" if axis in known.frozen else "may shrink"
        axes.text(x, height - 0.76, fate, ha="center", color=GRAY, fontsize=8.5)
    axes.text(0.15, height - 0.52, "tensor", fontsize=10.5, fontweight="bold")
    for row, name in enumerate(names):
        y = height - top - (row + 0.5) * step
        if row % 2 == 0:
            axes.add_patch(Rectangle((0, y - step / 2), width, step, facecolor=PALE, edgecolor="none"))
        short = name.removeprefix("model.")
        axes.text(0.15, y, short, va="center", fontsize=9, family="DejaVu Sans Mono")
        dims = known.layout(name).dims
        for column, (axis, color) in enumerate(AXIS_COLORS.items()):
            runs = [side for side, dim in enumerate(dims) if any(axis in part for part in dim)]
            said = "one each" if axis == "layers" and "*" in name else " ".join(("rows", "columns")[i] for i in runs)
            if len(dims) == 1 and runs:
                said = "entries"
            if said:
                x = left + (column + 0.5) * wide
                box(axes, x, y, wide - 0.1, step - 0.07, facecolor=color, edgecolor="none")
                ink = INK if axis in ("head_dim", "q_per_kv", "vocab") else "white"
                axes.text(x, y, said, ha="center", va="center_baseline", color=ink, fontsize=8.5)
    note = "Drop a unit of an axis, and it goes from every tensor in its column at once."
    axes.text(0.15, 0.19, note, fontsize=9.5, color=GRAY)
    return figure


def mean(values: list[float]) -> float:
    """The mean over blocks of text."""
    return sum(values) / len(values)


def quickstart_points() -> tuple[list[tuple[int, float]], dict[str, list[tuple[int, float]]]]:
    """Anchors and lines (parameters, nats a token) of the quickstart."""
    told = json.loads((DOCS / "results" / "quickstart.json").read_text(encoding="utf-8"))
    lines = {
        method: [(target["num_parameters"], target[key]) for target in told["targets"]]
        for method, key in (("interpolated", "interpolate"), ("pruned", "prune"), ("the paper's rule", "paper"))
    }
    return [(size, loss) for _, size, loss in told["anchors"]], lines


def smollm2_points() -> tuple[list[tuple[int, float]], dict[str, list[tuple[int, float]]]]:
    """Anchors and lines (parameters, nats a token) of the chain from SmolLM2."""
    told = json.loads((DOCS / "results" / "smollm2.json").read_text(encoding="utf-8"))
    anchors, lines = [], {"interpolated": [], "pruned": [], "the paper's rule": []}
    keys = {"interpolate": "interpolated", "prune": "pruned", "paper": "the paper's rule"}
    for name, row in told.items():
        if name.startswith("anchor "):
            anchors.append((parse_count(name.rsplit("-", 1)[1]), mean(row["in domain"])))
        elif name.partition(" ")[2] in keys:
            lines[keys[name.partition(" ")[2]]].append((int(name.split()[0]), mean(row["in domain"])))
    return anchors, lines


def size_loss() -> Figure:
    """Held-out loss over size of two chains: anchors, the line between them, models in between."""
    figure = Figure(figsize=(9.4, 4.1), layout="constrained")
    parts = {
        "trained from scratch, 0.7M parameters": quickstart_points(),
        "cut from SmolLM2-135M-Instruct": smollm2_points(),
    }
    for axes, (title, (anchors, lines)) in zip(figure.subplots(1, 2), parts.items(), strict=True):
        axes.plot(*zip(*sorted(anchors), strict=True), color=GRAY, linewidth=1, linestyle=":", label="straight line")
        for (method, points), color, marker in zip(lines.items(), (BLUE, RED, GREEN), "osv", strict=True):
            axes.plot(
                *zip(*sorted(points), strict=True),
                color=color,
                marker=marker,
                linestyle="",
                label=method,
                zorder=4 - (color != BLUE),
            )
        axes.plot(*zip(*anchors, strict=True), "D", color="black", markersize=8, label="anchors", zorder=5)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
        axes.set_xlabel("parameters")
        axes.xaxis.set_major_formatter(lambda size, _: format_count(round(size)))
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.08, y=0.1)
    figure.axes[0].set_ylabel("held-out loss (nats a token)")
    figure.axes[0].legend(frameon=False, fontsize=9.5)
    return figure


PICTURES = {"chain.png": chain, "axis-map.png": axis_map, "size-loss.png": size_loss}


def main(folder: Path = DOCS / "img") -> None:
    """Writes every picture into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        draw().savefig(folder / name, format="png", dpi=180, facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
