"""docs/results.md and every table and plot beside it, from the JSON files in docs/results: no figure is typed.

``python benchmarks/results.py`` (``make bench-results``) writes them, and the tables of docs/scaling.md; ``--check``
(``make bench-check``) writes nothing, prints a line for every difference between what stands there, or in README's
table, and what the JSON files give, and ends with 1 if there is one. Files that are not there yet are passed over.
Every page is a template of this folder's ``templates``, filled from one JSON file; benchmarks call :func:`save`.
"""

import argparse
import runpy
import sys
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import figures as f
from harness import ROOT, keep, read
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from quality_figures import Figures, plot_quality

PAGES = "curve smollm2 quality downstream bridge rules speed growth train train_scaling fetch".split()
OWN_PAGES = ("quickstart",)  # written by its own script
NAMES = (*OWN_PAGES, *PAGES, "align", "losses")
PLOTS = {"smollm2": f.plot_smollm2, "quality": plot_quality, "growth": f.plot_growth}
BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"
SCALING = ("<!-- scaling:begin -->", "<!-- scaling:end -->")
NONE = "–"

# -- templates --------------------------------------------------------------------------------------------------------


def row(cells: Iterable[Any]) -> str:
    """A row of a Markdown table; None is a dash."""
    return "| " + " | ".join(NONE if cell is None else str(cell) for cell in cells) + " |"


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], rule: str = "---") -> str:
    """A Markdown table, without its last line's end."""
    return "\n".join([row(head), "|" + f"{rule}|" * len(head), *map(row, rows)])


def digits(value: float | None, count: int = 2, unit: float = 1) -> str:
    """A number in a unit, with so many digits behind the point and commas at the thousands."""
    return NONE if value is None else f"{value / unit:,.{count}f}"


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
_PAGES.filters.update(d=digits, med=f.median, human=f.human, mean=f.mean, error=f.error, pow2=lambda value: value**2)
_PAGES.filters["of"] = lambda values, key: values[key]  # for keys with a dot
_PAGES.globals.update({name: getattr(f, name) for name in dir(f) if not name.startswith("_")})
_PAGES.globals.update(row=row, table=table, machine=machine, section=section, Figures=Figures)


def page(name: str, data: Any = None, **values: Any) -> str:
    """The tables of one file of figures."""
    return _PAGES.get_template(f"{name}.md.jinja").render(data=data, **values)


# -- pages ------------------------------------------------------------------------------------------------------------


def save(name: str, result: Any, folder: Path) -> None:
    """Writes what a benchmark found: its figures, its tables and its plot; prints the tables."""
    keep(folder, name, result)
    if name in PAGES:
        (folder / f"{name}.md").write_text(page(name, result), encoding="utf-8")
    if name in PLOTS:
        PLOTS[name](result, folder / f"{name}.png")
    print(page(name, result))


def readme_table(root: Path) -> str:
    """The table between README's markers, from the script that writes it there."""
    return str(runpy.run_path(str(root / ".ci" / "readme_table.py"))["table"]())


def pages(root: Path) -> dict[Path, str]:
    """What every generated page should be."""
    docs = root / "docs"
    figures = {name: data for name in NAMES if (data := read(docs / "results", name))}
    texts = {name: page(name, data) for name, data in figures.items() if name not in OWN_PAGES}
    values = {
        "figures": figures,
        "pages": texts,
        "lost_rows": [row for name in f.LOST if name in figures for row in f.lost(name, figures[name])],
        "readme_table": readme_table(root) if "quickstart" in figures else "",
    }
    head, rest = (docs / "scaling.md").read_text(encoding="utf-8").split(SCALING[0])
    return {
        **{docs / "results" / f"{name}.md": text for name, text in texts.items() if name in PAGES},
        docs / "results.md": page("results", **values),
        docs / "scaling.md": f"{head}{SCALING[0]}\n{page('scaling', **values)}{SCALING[1]}{rest.split(SCALING[1])[1]}",
    }


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
    if read(root / "docs" / "results", "quickstart"):
        lines = (root / "README.md").read_text(encoding="utf-8").splitlines()
        wanted = (BEGIN, *readme_table(root).splitlines(), END)
        found += [f"README.md: has no line {line!r}" for line in wanted if line not in lines]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the pages and plots, or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where something differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose results these are")
    options = parser.parse_args(arguments)
    if options.check:
        found = differences(options.root)
        print("\n".join([*found, f"{len(found)} differences between the figures and the text"]))
        return 1 if found else 0
    for path, text in pages(options.root).items():
        path.write_text(text, encoding="utf-8")
    folder = options.root / "docs" / "results"
    for name, plot in PLOTS.items():
        if data := read(folder, name):
            plot(data, folder / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
