"""Every plot: the size-loss curve of a chain, measured models over their size, and loss over training tokens.

The *size-loss curve* of a chain is the held-out loss at its anchors and at the sizes between them: a chain
interpolates well when the curve lies on or below the straight line between two anchors.

Rows of :mod:`cbd_hub.chain.compare` are drawn with one color an argument; the anchors of a chain are joined by a
line, a single model is a point. Losses of different tokenizers are drawn as bits a byte.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cbd_hub.axes.sizing import format_count
from cbd_hub.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "COLORS",
    "MARKERS",
    "check_plot",
    "one_tokenizer",
    "plot_losses",
    "plot_recovery",
    "plot_scores",
    "plot_size_loss",
]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette, told apart with every kind of color blindness; black is kept for the anchors."""

MARKERS = "osv^Px"
"""Matplotlib's markers, one a color."""

Row = Mapping[str, Any]
_STYLES = ("-", "--", ":")


def check_plot(path: str | Path) -> None:
    """Checks the place of a plot before hours are spent on what it shows.

    Args:
        path: The PNG file to write.

    Raises:
        RecipeError: No name that ends in ``.png``, or no folder to put it in.
    """
    if Path(path).suffix.lower() != ".png" or Path(path).is_dir():
        raise RecipeError(f"{path} is no name for the plot, which is a PNG file; name it FILE.png")
    if not Path(path).absolute().parent.is_dir():
        raise RecipeError(f"there is no folder for the plot {path}; make it first")


def one_tokenizer(rows: Sequence[Row]) -> bool:
    """Whether the text of all rows was cut into the same tokens, so that losses a token compare."""
    return len({row["tokenizer"] for row in rows}) <= 1


def plot_size_loss(
    series: dict[str, list[tuple[int, float]]],
    anchors: Sequence[tuple[str, int, float]],
    path: str | Path,
    title: str,
) -> None:
    """Draws held-out loss over model size, one line a method, and writes it as a PNG file.

    Sizes that span a factor of four or more are drawn on a logarithmic axis. The same data gives the same bytes.

    Args:
        series: method -> points (parameters, loss in nats per token).
        anchors: (name, parameters, loss), drawn as labeled diamonds.
        path: the PNG file to write; its folder must exist.
        title: shown above the plot.

    Raises:
        RecipeError: there is no point to draw.
    """
    from matplotlib.figure import Figure  # slow to import, and only plots need it
    from matplotlib.ticker import LogLocator, NullLocator

    sizes = [size for line in series.values() for size, _ in line] + [size for _, size, _ in anchors]
    if not sizes:
        raise RecipeError("There is no point to plot: pass a series or anchors.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, (method, line) in enumerate(series.items()):
        axes.plot(
            *zip(*sorted(line), strict=True),
            label=method,
            color=COLORS[index % len(COLORS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle=("-", "--", ":")[index // len(COLORS) % 3],
            linewidth=2,
            markersize=6,
        )
    for index, (name, size, loss) in enumerate(anchors):
        axes.plot(size, loss, "D", color="black", markersize=9, zorder=5, label=None if index else "anchors")
        axes.annotate(name, (size, loss), (8, 8), textcoords="offset points", fontweight="bold", zorder=6)
    if max(sizes) >= 4 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.12, y=0.12)
    _frame(axes, "parameters", "held-out loss (nats per token)", title)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_recovery(curves: Mapping[str, Sequence[tuple[int, float]]], path: str | Path, title: str) -> None:
    """Draws held-out loss over training tokens, a line each, and writes it as a PNG file.

    Args:
        curves: Name → points (training tokens, loss in nats per token).
        path: The PNG file to write; its folder must exist.
        title: Shown above the plot.

    Raises:
        RecipeError: There is no point to draw.
    """
    from matplotlib.figure import Figure  # slow to import, and only plots need it

    if not any(curves.values()):
        raise RecipeError("There is no point to plot: pass a curve.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(curves.items()):
        axes.plot(
            *zip(*points, strict=True), label=name, color=COLORS[index % 4], marker=MARKERS[index % 4], linewidth=2
        )
    _frame(axes, "training tokens", "held-out loss (nats per token)", title)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_losses(rows: Sequence[Row], path: str | Path) -> None:
    """Draws loss over parameters (logarithmic), or bits a byte where tokenizers differ, and writes a PNG file.

    The same rows give the same bytes.

    Args:
        rows: Of :func:`cbd_hub.chain.compare.evaluate_on_text`.
        path: The file.

    Raises:
        RecipeError: There is no row, or as :func:`check_plot` says.
    """
    value, label = "loss", "loss (nats per token)"
    if not one_tokenizer(rows):
        value, label = "bits_per_byte", "bits per byte of text"
    _plot({"": [{**row, "metric": value, "value": row[value], "stderr": None} for row in rows]}, label, path)


def plot_scores(rows: Sequence[Row], path: str | Path) -> None:
    """Draws accuracy or ROUGE over parameters (logarithmic), one panel a task, and writes a PNG file.

    Bars are one standard error to either side. The metrics of a task share its panel and differ by the line's style.

    Args:
        rows: Of :func:`cbd_hub.chain.compare.evaluate_on_tasks` or
            :func:`cbd_hub.chain.compare.evaluate_on_summaries`.
        path: The file.

    Raises:
        RecipeError: There is no row, or as :func:`check_plot` says.
    """
    label = "ROUGE (F1)" if any("implementation" in row for row in rows) else "accuracy"
    tasks = dict.fromkeys(row["task"] for row in rows)
    _plot({task: [row for row in rows if row["task"] == task] for task in tasks}, label, path)


def _plot(panels: Mapping[str, Sequence[Row]], label: str, path: str | Path) -> None:
    """One panel each: title -> rows with ``of``, ``name``, ``num_parameters``, ``metric``, ``value``, ``stderr``."""
    from matplotlib.figure import Figure  # slow to import, and only plots need it
    from matplotlib.lines import Line2D

    check_plot(path)
    rows = [row for panel in panels.values() for row in panel]
    if not rows:
        raise RecipeError("There is no point to plot: pass rows of measured models.")
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(8, 5) if len(panels) == 1 else (6 * columns, 4.2 * lines), layout="constrained")
    arguments = _short(list(dict.fromkeys(row["of"] for row in rows)))
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    for index, (title, panel) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, index)
        _draw(axes, panel, arguments, metrics)
        _frame(axes, "parameters", label, title)
    handles = [
        Line2D([], [], label=short_name, **_look(index, 0, any(row["of"] == of != row["name"] for row in rows)))
        for index, (of, short_name) in enumerate(arguments.items())
    ]
    if len(metrics) > 1:
        looks = [{**_look(0, style, True), "color": "black"} for style in range(len(metrics))]
        handles += [Line2D([], [], label=name, **look) for name, look in zip(metrics, looks, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    _save(figure, path)


def _draw(axes: "Axes", rows: Sequence[Row], arguments: Mapping[str, str], metrics: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for index, (of, short_name) in enumerate(arguments.items()):
        for style, metric in enumerate(metrics):
            measured = sorted((row for row in rows if (row["of"], row["metric"]) == (of, metric)), key=_size)
            chain = any(row["name"] != of for row in measured)
            errors = [row["stderr"] or 0.0 for row in measured]
            axes.errorbar(
                [_size(row) for row in measured],
                [row["value"] for row in measured],
                yerr=errors if any(errors) else None,
                capsize=3,
                **_look(index, style, chain),
            )
            for row in measured if not style else ():
                place, name = ((6, 6), row["name"]) if chain else ((6, -12), short_name)
                axes.annotate(name, (_size(row), row["value"]), place, textcoords="offset points", fontsize="small")
    axes.set_xscale("log")
    few = max(map(_size, rows)) < 4 * min(map(_size, rows))  # then decades alone would leave the axis bare
    axes.xaxis.set_major_locator(MaxNLocator(4) if few else LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.15, y=0.15)


def _frame(axes: "Axes", xlabel: str, ylabel: str, title: str) -> None:
    """What all plots share: the labels, counts such as 138M on the x axis, a pale grid, no frame."""
    from matplotlib.ticker import FuncFormatter

    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: format_count(max(0, round(count)))))
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", path: str | Path) -> None:
    """Writes a PNG file; without a version of the software in it the same data gives the same bytes."""
    figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def _look(index: int, style: int, line: bool) -> dict[str, Any]:
    """Color and marker of an argument, line style and filling of a metric."""
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "markerfacecolor": "white" if style else None,
        "linestyle": _STYLES[style % len(_STYLES)] if line else "none",
        "linewidth": 2,
        "markersize": 6,
    }


def _size(row: Row) -> int:
    return int(row["num_parameters"])


def _short(arguments: Sequence[str]) -> dict[str, str]:
    """Argument -> what the plot calls it: the last part of its path or repo id, unless two share that."""
    last = {of: (Path(of).resolve() if Path(of).is_dir() else Path(of)).name or of for of in arguments}
    return {of: name if list(last.values()).count(name) == 1 else of for of, name in last.items()}
