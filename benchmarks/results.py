"""docs/results.md and every table and plot beside it, from the JSON files in docs/results: no figure is typed.

``python benchmarks/results.py`` (``make bench-results``) writes them, and the tables of docs/scaling.md; ``--check``
(``make bench-check``) writes nothing, prints a line for every difference between what stands there, or in README's
table, and what the JSON files give, and ends with 1 if there is one. Files that are not there yet are passed over.
"""

import argparse
import runpy
import sys
from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import figures as f
import report
from quality_figures import Figures, plot_quality

NAMES = (
    "quickstart smollm2 quality downstream bridge rules align speed growth train train_scaling losses fetch".split()
)
PAGES = "smollm2 quality downstream bridge rules speed growth train train_scaling fetch".split()
PLOTS = {"smollm2": f.plot_smollm2, "quality": plot_quality, "growth": f.plot_growth}
BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"
SCALING = ("<!-- scaling:begin -->", "<!-- scaling:end -->")
HELPERS: dict[str, Any] = {name: getattr(f, name) for name in dir(f) if not name.startswith("_")}


def page(name: str, data: Any) -> str:
    """The tables of one file of figures."""
    return report.fill(name, data=data, Figures=Figures, **HELPERS)


def save(name: str, result: Any, folder: Path) -> None:
    """Writes what a benchmark found: its figures, its tables and its plot; prints the tables."""
    report.keep(folder, name, result)
    text = page(name, result)
    if name in PAGES:
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    if name in PLOTS:
        PLOTS[name](result, folder / f"{name}.png")
    print(text)


def readme_table(root: Path) -> str:
    """The table between README's markers, from the script that writes it there."""
    return str(runpy.run_path(str(root / ".ci" / "readme_table.py"))["table"]())


def pages(root: Path) -> dict[Path, str]:
    """What every generated page should be."""
    docs = root / "docs"
    figures = {name: data for name in NAMES if (data := report.read(docs / "results", name))}
    texts = {name: page(name, data) for name, data in figures.items() if name in (*PAGES, "losses")}
    lost = [row for name, data in figures.items() for row in f.lost(name, data)]
    table = readme_table(root) if "quickstart" in figures else ""
    results = report.fill("results", figures=figures, pages=texts, lost_rows=lost, readme_table=table, **HELPERS)
    found = {docs / "results" / f"{name}.md": text for name, text in texts.items() if name in PAGES}
    found[docs / "results.md"] = results
    head, rest = (docs / "scaling.md").read_text(encoding="utf-8").split(SCALING[0])
    tables = report.fill("scaling", figures=figures, **HELPERS)
    found[docs / "scaling.md"] = f"{head}{SCALING[0]}\n{tables}{SCALING[1]}{rest.split(SCALING[1])[1]}"
    return found


def differences(root: Path) -> list[str]:
    """One line for every line of a page that is not what the JSON files give."""
    found = []
    for path, expected in pages(root).items():
        name = path.relative_to(root)
        if not path.is_file():
            found.append(f"{name}: is missing")
            continue
        is_now, should = path.read_text(encoding="utf-8").splitlines(), expected.splitlines()
        for kind, a, b, c, d in SequenceMatcher(None, is_now, should, autojunk=False).get_opcodes():
            for i in range(max(b - a, d - c) if kind != "equal" else 0):
                has = is_now[a + i] if a + i < b else "(nothing)"
                wants = should[c + i] if c + i < d else "(nothing)"
                found.append(f"{name}:{a + i + 1}: is {has!r}, should be {wants!r}")
    if report.read(root / "docs" / "results", "quickstart"):
        lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
        for line in (BEGIN, *readme_table(root).splitlines(), END):
            if line not in lines:
                found.append(f"README.md: has no line {line!r}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages and plots, or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where something differs")
    parser.add_argument("--root", type=Path, default=report.ROOT, help="checkout whose results these are")
    options = parser.parse_args(arguments)
    if options.check:
        found = differences(options.root)
        print("\n".join([*found, f"{len(found)} differences between the figures and the text"]))
        return 1 if found else 0
    for path, text in pages(options.root).items():
        path.write_text(text, encoding="utf-8")
    folder = options.root / "docs" / "results"
    for name, plot in PLOTS.items():
        if data := report.read(folder, name):
            plot(data, folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
