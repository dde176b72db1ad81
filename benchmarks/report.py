"""Figures to text: every page is a template of this folder's ``templates``, filled from one JSON file."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

__all__ = ["RESULTS", "ROOT", "error", "fill", "human", "keep", "mean", "median", "panels", "read"]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
NONE = "–"
Cells = Sequence[Any]


def row(cells: Iterable[Any]) -> str:
    """A row of a Markdown table; None is a dash."""
    return "| " + " | ".join(NONE if cell is None else str(cell) for cell in cells) + " |"


def table(head: Cells, rows: Iterable[Cells], rule: str = "---") -> str:
    """A Markdown table, without its last line's end."""
    return "\n".join([row(head), "|" + f"{rule}|" * len(head), *map(row, rows)])


def digits(value: float | None, count: int = 2, unit: float = 1) -> str:
    """A number in a unit, with so many digits behind the point and commas at the thousands."""
    return NONE if value is None else f"{value / unit:,.{count}f}"


def human(count: float) -> str:
    """A count in thousands or millions."""
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.4g}k"


def mean(values: Iterable[float]) -> float:
    """The mean."""
    return float(np.mean(list(values)))


def error(values: Sequence[float]) -> float:
    """Standard error of a mean; 0 of a single value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def median(runs: Iterable[dict[str, float]], what: str) -> float:
    """The median of one measure over runs."""
    return statistics.median(run[what] for run in runs)


def minus(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Paired differences."""
    return [a - b for a, b in zip(values, others, strict=True)]


def machine(about: dict[str, Any]) -> str:
    """Where and with what something was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return f"{about['machine']}, {about['memory_bytes'] / 2**30:.0f} GiB, {versions}, commit {about['commit'][:10]}."


def section(text: str, heading: str) -> str:
    """What stands below a heading of a Markdown page, up to the next of its rank."""
    rest = f"\n{text}".split(f"\n{heading}\n", 1)[1]
    return rest.split(f"\n{heading.split()[0]} ")[0].strip()


_PAGES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_PAGES.filters.update(
    d=digits,
    med=median,
    human=human,
    mean=mean,
    error=error,
    pow2=lambda value: value**2,
    of=lambda values, key: values[key],
)
_PAGES.globals.update(row=row, table=table, machine=machine, section=section, minus=minus)


def fill(name: str, **values: Any) -> str:
    """A template with its blanks filled."""
    return _PAGES.get_template(f"{name}.md.jinja").render(values)


@contextmanager
def panels(path: Path, columns: int, size: tuple[float, float], **save: Any) -> Iterator[Any]:
    """Axes side by side, written as a PNG file at the end."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(1, columns)
    figure.savefig(path, format="png", **save)


def keep(folder: Path, name: str, result: Any) -> None:
    """Writes the figures of a benchmark, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / f"{name}.json")


def read(folder: Path, name: str) -> Any:
    """The figures of a benchmark; empty where it was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
