"""The table of ``benchmarks/speed.py`` and its goals, from speed.json alone."""

import statistics
from collections.abc import Mapping
from typing import Any

__all__ = ["bound", "goals", "markdown", "median", "ratios", "title"]

NEEDED = {
    "time / copy": 1.5,
    "by hand / time": 2.0,
    "peak / by hand": 0.6,
    "time and save / mergekit": 1.0,
    "peak / allowed": 1.0,
}
AT_LEAST = ("by hand / time",)


def median(row: Mapping[str, Any], way: str, what: str) -> float | None:
    """The median over the rounds; None where a way was not measured."""
    runs = row["runs"].get(way)
    return statistics.median(run[what] for run in runs) if runs else None


def ratios(row: Mapping[str, Any], what: str) -> dict[str, float]:
    """Goal → ratio, for those that were measured."""
    ours, saved = median(row, "from_chain", what), median(row, "from_chain + save", what)
    pairs = {
        "time / copy": (ours, median(row, "copy", what)),
        "by hand / time": (median(row, "by hand", what), ours),
        "peak / by hand": (median(row, "from_chain", "peak"), median(row, "by hand", "peak")),
        "time and save / mergekit": (saved, median(row, "mergekit", what)),
        "peak / allowed": (median(row, "from_chain", "peak"), 1.25 * row["bytes_made"] + row["largest_pair"]),
    }
    return {name: value / against for name, (value, against) in pairs.items() if value is not None and against}


def judged(row: Mapping[str, Any]) -> dict[str, float]:
    """Goal → the ratio that decides: of CPU time where the files were in the page cache, of wall time where not."""
    return ratios(row, "cpu" if row["cache"] == "warm" else "wall")


def goals(row: Mapping[str, Any]) -> dict[str, tuple[float, bool | None]]:
    """Goal → (ratio of CPU time, whether it is met; None where it does not count)."""
    deciding = judged(row)
    found: dict[str, tuple[float, bool | None]] = {}
    for name, value in ratios(row, "cpu").items():
        bound = deciding[name]
        met = bound >= NEEDED[name] if name in AT_LEAST else bound <= NEEDED[name]
        found[name] = value, None if name == "time / copy" and row["cache"] == "cold" else met
    return found


def title(row: Mapping[str, Any]) -> str:
    """What the row is of."""
    layout = "one file" if row["files"] == 2 else f"{row['files']} files"
    return f"{row['model']} {row['dtype']}, {layout}, {row['cache']}"


def _spread(row: Mapping[str, Any], way: str) -> str:
    walls = [run["wall"] for run in row["runs"][way]]
    return f"{statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})"


def markdown(result: Mapping[str, Any]) -> str:
    """Both tables and what has to be known to read them."""
    names = list(NEEDED)
    lines = [
        "# from_chain against what one would do instead",
        "",
        "Written by `python benchmarks/speed.py` from speed.json. Chains of random weights in the shapes of "
        "SmolLM2-135M and Llama-3.2-1B; a second anchor of 77 %, the target half-way. Each figure is the median over "
        "processes of their own, in turns. `by hand` loads both anchors and averages the corner they share, without "
        "cutting anything to the target's size; `mergekit` merges two models of the target's shape into a folder, so "
        "it is compared with `from_chain + save`; `copy` reads what from_chain reads and copies as many bytes as the "
        "model has. Allowed memory is 1.25 times the model and the largest pair of tensors that are averaged.",
        "",
        f"{result['machine']}, {result['memory_bytes'] / 2**30:.0f} GiB, "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f", commit {result['commit'][:10]}. {result['note']}".rstrip(),
        "",
        "## Goals",
        "",
        "Ratios of CPU time, in brackets of wall time. Where the files are in the page cache the verdict is on CPU "
        "time, which is what the clock shows on an idle core and does not depend on what else runs; where they are "
        "not, it is on wall time, and the copy bound does not count. –: not measured.",
        "",
        "| model, files, cache | " + " | ".join(f"{n}, {bound(n)}" for n in names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for row in result["rows"]:
        found, wall, cells = goals(row), ratios(row, "wall"), []
        for name in names:
            if name not in found:
                cells.append("–")
                continue
            value, met = found[name]
            beside = "" if name.startswith("peak") else f" ({wall[name]:.2f})"
            cells.append(f"{value:.2f}{beside}" + ("" if met is None else " pass" if met else " FAIL"))
        lines.append(f"| {title(row)} | {' | '.join(cells)} |")
    lines += ["", "## Figures", ""]
    lines.append("| model, files, cache | way | rounds | seconds (least to most) | CPU seconds | peak GB | in cache |")
    lines.append("|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        for way, runs in row["runs"].items():
            shares = [run["cached"] for run in runs if run["cached"] is not None]
            share = f"{statistics.mean(shares):.0%}" if shares else "not verified"
            lines.append(
                f"| {title(row)} | {way} | {len(runs)} | {_spread(row, way)} | {median(row, way, 'cpu'):.2f} | "
                f"{median(row, way, 'peak') / 1e9:.2f} | {share} |"
            )
        lines += [f"| {title(row)} | {way} | 0 | {why} | – | – | – |" for way, why in row["failed"].items()]
    made = {f"{row['model']} {row['dtype']}": row for row in result["rows"]}
    lines += ["", "| model | parameters made | read GB | made GB |", "|---|--:|--:|--:|"]
    for name, row in made.items():
        lines.append(
            f"| {name} | {row['parameters']:,} | {row['bytes_read'] / 1e9:.2f} | {row['bytes_made'] / 1e9:.2f} |"
        )
    return "\n".join(lines) + "\n"


def bound(name: str) -> str:
    """A goal in words."""
    return f"at {'least' if name in AT_LEAST else 'most'} {NEEDED[name]:g}"
