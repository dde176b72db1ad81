"""docs/results.md from the JSON files in docs/results: every figure of it comes from there, none is typed.

``python benchmarks/results.py`` writes the page, and the tables of docs/scaling.md; ``--check`` (``make bench-check``)
writes nothing, prints a line for every difference between the JSON files and what is generated from them (the page,
README's table, the Markdown tables beside the JSON files, those of docs/scaling.md) and ends with 1 if there is one.
Files, and rows of them, that are not there yet are passed over.
"""

import argparse
import json
import re
import runpy
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"
SCALING = ("<!-- scaling:begin -->", "<!-- scaling:end -->")
OURS = "interpolate"
FINDINGS, BEHIND = "## The paper's findings, here", "## Where we are not ahead"
Row = Sequence[Any]


def table(head: Row, rows: Iterable[Row]) -> list[str]:
    """A Markdown table and an empty line."""
    body = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body, ""]


def section(text: str, heading: str) -> list[str]:
    """The lines below a heading of a Markdown page, up to the next of its rank; none where it is not there."""
    lines = text.splitlines()
    if heading not in lines:
        return []
    rest = lines[lines.index(heading) + 1 :]
    rank = heading.split()[0] + " "
    stop = next((i for i, line in enumerate(rest) if line.startswith(rank)), len(rest))
    return [*"\n".join(rest[:stop]).strip().splitlines(), ""]


# -- one function a JSON file: its part of the page, and the rows that were lost --------------------------------------


def quickstart(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """README's table, and the targets at which something else had a lower loss."""
    lines = ["## Quickstart", "", "`make quickstart`, in minutes.", "", *readme_table(root).splitlines(), ""]
    lost = [
        ("quickstart", f"{row['num_parameters']:,}", f"{row[OURS]:.3f}", name, f"{row[name]:.3f}")
        for row in data["targets"]
        for name in ("prune", "paper", "small anchor")
        if row[name] < row[OURS]
    ]
    return lines, lost


def smollm2(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """The methods at every size, and the controls."""
    methods, controls = smollm2_rows(data)
    names = [OURS, "prune", "prune + refit", "expand", "paper"]
    rows, lost = [], []
    for size, about, line, losses in methods:
        cells = [f"{losses[n]:.3f}" if n in losses else "–" for n in names]
        rows.append([f"{size / 1e6:.1f}M", f"{about['r']:.2f}", f"{line:.3f}", *cells])
        rivals = {"the straight line between the anchors": line, **losses}
        lost += [
            ("SmolLM2", f"{size / 1e6:.1f}M, held-out loss", f"{losses[OURS]:.3f}", name, f"{value:.3f}")
            for name, value in rivals.items()
            if value < losses[OURS]
        ]
    shown = [[name, *(f"{value:.3f}" for value in values)] for name, values in controls.items()]
    ours = next((values for name, values in controls.items() if name.startswith(OURS)), [])
    whole = "(whole)"  # a model of the source's size is no rival
    lost += [
        ("SmolLM2, controls", domain, f"{mine:.3f}", name, f"{value:.3f}")
        for name, values in controls.items()
        if whole not in name
        for domain, mine, value in zip(("in domain", "another domain"), ours, values, strict=False)
        if value < mine
    ]
    lines = ["## A chain from SmolLM2-135M", "", "`python benchmarks/smollm2.py`; [all of it](results/smollm2.md)."]
    lines += ["Held-out loss in nats a token, zero-shot.", ""]
    lines += table(["parameters", "r", "straight line", *names], rows)
    lines += ["The same tokens for the rivals:", "", *table(["model", "in domain", "another domain"], shown)]
    return lines, lost


def smollm2_rows(data: Any) -> tuple[list[tuple[int, Any, float, dict[str, float]]], dict[str, list[float]]]:
    """Methods: (parameters, about, straight line, losses); controls: name → loss in the domain and in another."""

    def mean(value: Any, domain: str = "in domain") -> float:
        return float(np.mean(value[domain]))

    plans = {int(key.split()[0]): value for key, value in data.items() if key.endswith(" plan")}
    rows = []
    for size, about in sorted(plans.items(), reverse=True):
        small, large = (mean(data[f"anchor {about[side]}"]) for side in ("small", "large"))
        losses = {
            key.split(" ", 1)[1]: mean(value)
            for key, value in data.items()
            if key.startswith(f"{size} ") and isinstance(value, dict) and "in domain" in value
        }
        if OURS in losses:
            rows.append((size, about, small + about["r"] * (large - small), losses))
    found = {}
    if rows:
        top = [size for size, about, _, _ in rows if about["large"] == rows[0][1]["large"]]
        middle = min(top, key=lambda size: abs(plans[size]["r"] - 0.5))
        names = [n for n in (OURS, "prune", "prune + refit") if f"{middle} {n}" in data]
        found = {f"{n} ({middle / 1e6:.1f}M)": data[f"{middle} {n}"] for n in names}
    for key, value in data.items():
        if key.startswith("control: pruned"):
            found["pruned + refit, then distilled on the anchor's tokens"] = value
        elif key.startswith("control: teacher"):
            found["teacher adapted on the anchor's tokens (whole)"] = value["teacher"]
            found["adapted teacher, pruned"] = value["prune"]
            found["adapted teacher, pruned + refit"] = value["prune + refit"]
    return rows, {name: [mean(value), mean(value, "another domain")] for name, value in found.items()}


def rules(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """How often the default rule was the best of those tried."""
    ours, names = "1 - alpha^2 (ours)", ("weight 1", "1 - alpha", "small expanded", "pruned")
    rows = data["own_weight"]
    ahead = [[name, f"{sum(row[ours] <= row[name] for row in rows)} of {len(rows)}"] for name in names]
    lost = [
        ("rules", f"{row['pair']}, {row['parameters']:,}", f"{row[ours]:.4f}", name, f"{row[name]:.4f}")
        for row in rows
        for name in names
        if row[name] < row[ours]
    ]
    lines = ["## The interpolation rule", "", "`python benchmarks/rules.py`; [every row](results/rules.md)."]
    return [*lines, "", *table(["the rule's loss is no higher than with", "at"], ahead)], lost


def align(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """Models of independent trainings, with and without alignment by computation."""
    rows, lost = [], []
    for pair, found in data["pairs"].items():
        for method, losses in found["loss"].items():
            rows.append([pair, method, *(f"{value:.3f}" for value in losses.values())])
        aligned = found["loss"]["masked averaging, aligned"]
        lost += [
            ("alignment", f"{pair}, alpha {alpha}", f"{aligned[alpha]:.3f}", method, f"{losses[alpha]:.3f}")
            for method, losses in found["loss"].items()
            for alpha in aligned
            if losses[alpha] < aligned[alpha]
        ]
        barrier = aligned["0.5"] - (aligned["0"] + aligned["1"]) / 2
        if barrier > 0:
            lost.append(("alignment", f"{pair}, barrier at alpha 0.5", f"{barrier:.3f}", "no barrier", "0"))
    head = ["pair", "method", *(f"alpha {alpha:g}" for alpha in data["alphas"])]
    lines = ["## Anchors of independent trainings, aligned by computation", "", "`python benchmarks/align.py`."]
    return [*lines, f"{data['tokens']:,} tokens each, held-out loss.", "", *table(head, rows)], lost


def quality(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """The findings, from the page beside the figures."""
    page = root / "docs" / "results" / "quality.md"
    lines = ["## Quality: a chain against what one would do instead", "", "`make bench-quality`"]
    if not page.is_file():
        return [f"{lines[0]}", "", f"{lines[2]}: figures in [quality.json](results/quality.json).", ""], []
    text = page.read_text(encoding="utf-8")
    found = section(text, FINDINGS) or first_table(text)
    return [*lines[:2], f"{lines[2]}; [all of it](results/quality.md).", "", *found], []


def first_table(text: str) -> list[str]:
    """The first table of a page."""
    match = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [*match[0].splitlines(), ""] if match else []


def speed(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """The goals."""
    import speed_tables

    lost = [
        (
            "speed",
            speed_tables.title(row),
            f"{speed_tables.judged(row)[name]:.2f}",
            f"goal: {name}",
            speed_tables.bound(name),
        )
        for row in data["rows"]
        for name, (_, met) in speed_tables.goals(row).items()
        if met is False
    ]
    lines = ["## Speed and memory of from_chain", "", "`make bench-speed`; [all of it](results/speed.md)."]
    return [*lines, "", *section(speed_tables.markdown(data), "## Goals")], lost


def growth(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """The exponents and the cost of an anchor."""
    import growth as script

    lines = ["## Growth", "", "`python benchmarks/growth.py`; [all of it](results/growth.md)."]
    lines += ["![Time and memory over parameters](results/growth.png)", ""]
    text = script.markdown(data)
    return [*lines, *(part for part in text.splitlines() if part.startswith(("With param", "A straight"))), ""], []


def train(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """Speed and memory of the trainer."""
    import train as script

    ours, lost = data["ways"]["AnchorTrainer"], []
    for way, found in data["ways"].items():
        if not way.startswith("AnchorTrainer"):
            for what, better, unit in (("tokens_per_second", 1, 1), ("peak_bytes", -1, 1e9)):
                if better * (found[what] - ours[what]) > 0:
                    lost.append(("training", what, f"{ours[what] / unit:.4g}", way, f"{found[what] / unit:.4g}"))
    return ["## Training an anchor", "", *section("## t\n" + script.markdown(data), "## t")], lost


def train_scaling(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """The trainer against vocabulary, length and processes."""
    import train_scaling as script

    lines = ["## What training costs, against vocabulary, length and processes", ""]
    lines += ["`python benchmarks/train_scaling.py`; [on what](results/train_scaling.md).", ""]
    rows = [row for name in ("vocabulary", "length") for row in data[name]]
    pairs = [(ours, plain) for ours in rows for plain in rows if script.same(ours, plain)]
    lost = [
        (
            "training",
            f"vocabulary {a['vocabulary']:,}, length {a['length']:,}",
            f"{a[s]:,.0f}",
            "plain loop",
            f"{b[s]:,.0f}",
        )
        for s in ("tokens_per_second",)
        for a, b in pairs
        if a[s] < b[s]
    ]
    return [*lines, *("#" + line if line.startswith("##") else line for line in script.tables(data)), ""], lost


def losses(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """The chunked loss."""
    import losses as script

    bounds = {"peak_against_plain": script.PEAK_ALLOWED, "time_against_plain": script.TIME_ALLOWED}
    lost = [
        ("chunked loss", f"vocabulary {row['vocabulary']:,}", f"{row[what]:.2f}", f"goal: {what}", f"{bound}")
        for row in data["rows"]
        for what, bound in bounds.items()
        if row[what] > bound
    ]
    lines = ["## The chunked distillation loss", "", "`python benchmarks/losses.py`, against all logits at once."]
    return [*lines, "", *script.table(data["rows"]).splitlines(), ""], lost


def bridge(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """Anchor zero by every way."""
    import bridge as script

    text = script.markdown(data)
    lost = [
        ("bridge", f"{name}: {way}", f"{value:.3f}", "corpus alone", f"{base:.3f}")
        for name, way, value, base in script.lost(data)
    ]
    lines = ["## Bridges: another architecture, another vocabulary", "", "`python benchmarks/bridge.py`."]
    return [*lines, "", *text.split("\n\n", 1)[1].replace("\n## ", "\n### ").splitlines(), ""], lost


def downstream(data: Any, root: Path) -> tuple[list[str], list[Row]]:
    """Tasks and summaries of the SmolLM2 chain, from the page beside the figures."""
    page = root / "docs" / "results" / "downstream.md"
    lines = ["## Downstream: tasks and summaries", "", "`python benchmarks/downstream.py`"]
    if not page.is_file():
        return [*lines[:2], f"{lines[2]}: figures in [downstream.json](results/downstream.json).", ""], []
    found = first_table(page.read_text(encoding="utf-8"))
    return [*lines[:2], f"{lines[2]}; [all of it](results/downstream.md).", "", *found], []


PARTS: dict[str, Callable[[Any, Path], tuple[list[str], list[Row]]]] = {
    "quickstart": quickstart,
    "smollm2": smollm2,
    "quality": quality,
    "downstream": downstream,
    "bridge": bridge,
    "rules": rules,
    "align": align,
    "speed": speed,
    "growth": growth,
    "train": train,
    "train_scaling": train_scaling,
    "losses": losses,
}
REASONS = {
    "quickstart": "",
    "SmolLM2": "probably the few tokens: an anchor distilled on 64k of them is still far from its teacher, so a model "
    "that takes its weights starts behind one that is cut from the large anchor and refitted on the text",
    "SmolLM2, controls": "the first had a training of its own for that one size, the others cross-entropy on the "
    "text, which teaches the text; the [design notes](design-notes.md#anchors-are-aligned-by-construction) say more",
    "rules": "one seed, gaps of thousandths: noise, or a small anchor so near that nothing is to be added",
    "alignment": "models trained apart keep a barrier after alignment. Such a pair is not averaged by `auto`",
    "speed": "at 135M, .1 s go into transformers' building of the model, whatever the weights; every byte is checked "
    "against a digest; in bfloat16 averaging costs more than copying half the bytes; with a cold cache, and where one "
    "saves, the disk decides",
    "bridge": "the text is not the corpus's: what is held out is of the corpus",
    "training": "",
    "chunked loss": "",
}


def figures(root: Path) -> dict[str, Any]:
    """The JSON files that are there, in the order of the page."""
    paths = {name: root / "docs" / "results" / f"{name}.json" for name in PARTS}
    return {n: json.loads(path.read_text(encoding="utf-8")) for n, path in paths.items() if path.is_file()}


def render(root: Path) -> str:
    """The page."""
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/results.py` from the JSON files in docs/results; `make bench-check` fails "
        "where this page, README's table or a table beside the figures says something else. Machines, versions and "
        "commits stand with the figures. What follows from them for large models: [scaling](scaling.md).",
        "",
    ]
    lost: list[Row] = []
    for name, data in figures(root).items():
        part, rows = PARTS[name](data, root)
        lines += part
        lost += rows
    lines += [BEHIND, "", "Every row in which something else was better, or a goal was missed.", ""]
    lines += table(["where", "row", "ours", "ahead of us", "its figure"], lost)
    sources = dict.fromkeys(row[0] for row in lost)
    lines += ["Why, as far as known:", ""] + [f"- {s}: {REASONS[s]}." for s in sources if REASONS[s]] + [""]
    page = root / "docs" / "results" / "quality.md"
    if page.is_file() and (behind := section(page.read_text(encoding="utf-8"), BEHIND)):
        lines += ["### Quality", "", *behind]
    return "\n".join(lines).rstrip() + "\n"


def scaling(root: Path) -> str:
    """docs/scaling.md with its tables."""
    import scaling_tables

    text = (root / "docs" / "scaling.md").read_text(encoding="utf-8")
    head, rest = text.split(SCALING[0])
    return f"{head}{SCALING[0]}\n{scaling_tables.tables(figures(root))}\n{SCALING[1]}{rest.split(SCALING[1])[1]}"


# -- checking ---------------------------------------------------------------------------------------------------------


def readme_table(root: Path) -> str:
    """The table between README's markers, from the script that writes it there."""
    return str(runpy.run_path(str(root / ".ci" / "readme_table.py"))["table"]())


def pages(root: Path) -> dict[Path, str]:
    """What every page that is wholly generated should be."""
    import growth
    import quality_tables
    import speed_tables
    import train
    import train_scaling

    folder, found = root / "docs" / "results", figures(root)
    made = {"speed": speed_tables.markdown, "growth": growth.markdown, "train": train.markdown}
    made["train_scaling"] = train_scaling.markdown
    pages = {folder / f"{name}.md": make(found[name]) for name, make in made.items() if name in found}
    if "quality" in found:
        with tempfile.TemporaryDirectory() as temporary:
            shutil.copy(folder / "quality.json", temporary)
            quality_tables.write(Path(temporary))
            pages[folder / "quality.md"] = (Path(temporary) / "quality.md").read_text(encoding="utf-8")
    return {**pages, root / "docs" / "results.md": render(root), root / "docs" / "scaling.md": scaling(root)}


def fragments(root: Path) -> dict[Path, list[str]]:
    """Beginnings of lines that pages must hold of which a part comes from elsewhere (the chain itself, a clock)."""
    import rules

    found, lines = figures(root), {}
    if "rules" in found:
        tables = [rules.table(found["rules"][part]) for part in ("own_weight", "layers")]
        lines[root / "docs" / "results" / "rules.md"] = "\n".join(tables).splitlines()
    if "smollm2" in found:
        methods, controls = smollm2_rows(found["smollm2"])
        wanted = [f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + " |" for name, values in controls.items()]
        for size, about, line, measured in methods:
            wanted.append(f"| {size / 1e6:.1f}M | {about['r']:.2f} | {line:.3f} | {measured[OURS]:.3f} |")
        lines[root / "docs" / "results" / "smollm2.md"] = wanted
    if "quickstart" in found:
        lines[root / "README.md"] = [BEGIN, *readme_table(root).splitlines(), END]
    return lines


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
            if kind != "equal":
                for i in range(max(b - a, d - c)):
                    has = is_now[a + i] if a + i < b else "(nothing)"
                    wants = should[c + i] if c + i < d else "(nothing)"
                    found.append(f"{name}:{a + i + 1}: is {has!r}, should be {wants!r}")
    for path, wanted in fragments(root).items():
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in wanted:
            if not any(there.startswith(line) for there in lines):
                found.append(f"{path.relative_to(root)}: has no line {line!r}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the page, or checks; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where something differs")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose results these are")
    options = parser.parse_args(arguments)
    if not options.check:
        for name, make in (("results.md", render), ("scaling.md", scaling)):
            (options.root / "docs" / name).write_text(make(options.root), encoding="utf-8")
        return 0
    found = differences(options.root)
    print("\n".join([*found, f"{len(found)} differences between the figures and the text"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
