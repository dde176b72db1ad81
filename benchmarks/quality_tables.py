"""Tables, findings and the plot of ``benchmarks/quality.py``, from quality.json alone."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cbd_hub.evaluation import plots

__all__ = ["write"]

OURS = "interpolate"
EXPANSIONS = ("expand, zero padding", "expand, duplication")
NOT_RIVALS = ("alpha", "anchor", "independent anchor", "below", "control")
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # of t, 97.5 %, 1 to 10 degrees
NEAR = 0.01  # nats; what a flat optimum may cost
COLORS = (*plots.COLORS, "#888888", "#7A4EAB")
PAPER_SPEED_UP = 80.26


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean itself."""
        return float(np.mean(self.values))

    @property
    def error(self) -> float | None:
        """Its standard error; None for a single seed."""
        n = len(self.values)
        return float(np.std(self.values, ddof=1) / n**0.5) if n > 1 else None

    @property
    def interval(self) -> str:
        """The 95 % t-interval."""
        if self.error is None:
            return "–"
        reach = QUANTILES[min(len(self.values) - 1, len(QUANTILES)) - 1] * self.error
        return f"{self.mean - reach:.3f} to {self.mean + reach:.3f}"

    def __str__(self) -> str:
        """Mean ± standard error; a single seed is marked."""
        return f"{self.mean:.3f}" + ("¹" if self.error is None else f" ±{self.error:.3f}")


class Figures:
    """The figures, by what they are of."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.rows = [row for row in found["figures"].values() if row["loss"] is not None]
        self.config = found["config"]
        self.by: dict[tuple[str, int, int], dict[int, dict[str, Any]]] = {}
        for row in self.rows:
            self.by.setdefault((row["arm"], row["size"], row["steps"]), {})[row["seed"]] = row

    def mean(self, arm: str, size: int, steps: int = 0) -> Mean | None:
        """The loss of an arm, over the seeds that it was measured with."""
        rows = self.by.get((arm, size, steps))
        return Mean(tuple(row["loss"] for row in rows.values())) if rows else None

    def gap(self, arm: str, size: int, steps: int = 0, to: str = OURS, at: int | None = None) -> Mean | None:
        """How much more loss an arm has than another one, seed by seed."""
        mine, theirs = self.by.get((arm, size, steps)), self.by.get((to, size, steps if at is None else at))
        both = sorted(set(mine or ()) & set(theirs or ()))
        return Mean(tuple(mine[s]["loss"] - theirs[s]["loss"] for s in both)) if mine and theirs and both else None

    def first(self, arm: str, size: int, steps: int = 0) -> dict[str, Any]:
        """One row of an arm: its tokens and whatever else is no loss."""
        return next(iter(self.by.get((arm, size, steps), {}).values()), {})

    def sizes(self, arm: str = OURS, steps: int = 0) -> list[int]:
        """The sizes of an arm, largest first."""
        return sorted({size for a, size, s in self.by if a == arm and s == steps}, reverse=True)

    def arms(self, steps: int = 0, size: int | None = None) -> list[str]:
        """The arms, in the order in which they were measured."""
        found = (a for a, n, s in self.by if s == steps and size in (None, n))
        return [a for a in dict.fromkeys(found) if not a.startswith(NOT_RIVALS)]

    def steps(self, size: int, arm: str = OURS) -> list[int]:
        """After how many recovery steps an arm was measured."""
        return sorted(s for a, n, s in self.by if a == arm and n == size)

    def key_sizes(self) -> list[int]:
        """The sizes at which every arm recovered."""
        return self.sizes("scratch, long")


def _human(count: float) -> str:
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.4g}k"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    body = ["| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *body, ""]


def _about(found: Mapping[str, Any], f: Figures) -> list[str]:
    config, runs = found["config"], found["runs"]
    run, recipe = runs[-1], config["recipe"]
    length, batch = recipe["data"]["sequence_length"], config["recovery"]["batch_size"]
    tokens = {row["held_out_tokens"] for row in f.rows if "held_out_tokens" in row}
    commits = ", ".join(dict.fromkeys(r["commit"][:10] for r in runs))
    changed = sorted({line for r in runs for line in r["changed_files"]})
    training = recipe["source"]["train"]["training"]
    return [
        "# Quality: a chain against what users would do instead",
        "",
        f"Written by `python benchmarks/quality.py` from quality.json. Nats a token on {min(tokens):,} to "
        f"{max(tokens):,} held-out tokens that chose nothing (speeches that no model was trained on; the other "
        "domain: the Python reference manual). Mean ± standard error over the seeds; ¹ is a single seed. A seed "
        f"decides the source's weights, the order of all text and every random subset. Seeds: {config['seeds']}.",
        "",
        f"Tokens: source {training['tokens']}; every anchor {recipe['distillation']['tokens']}; independent anchors "
        f"{config['independent']['tokens']} each; scratch {config['scratch']['tokens']}; a recovery step "
        f"{batch * length:,} (cross-entropy alone, constant learning rate {config['recovery']['learning_rate']}, "
        f"{config['recovery']['random_init_learning_rate']} for random init).",
        "",
        f"Machine: {run['processor']}, {run['cores']} cores, {run['threads']} thread(s), accelerator "
        f"{run['accelerator'] or 'none'}. Commit {commits}"
        + (f", with {len(changed)} changed files of the package" if changed else "")
        + f". {', '.join(f'{name} {v}' for name, v in run['versions'].items())}.",
        "",
        *_table(
            ["part", "wall seconds", "processor seconds"],
            [(name, spent["wall"], spent["cpu"]) for name, spent in found["seconds"].items()],
        ),
    ]


def _anchors(f: Figures) -> list[str]:
    kept = [(a, n) for a, n, s in f.by if a.startswith(("anchor", "independent anchor")) and s == 0]
    rows = [(a, f"{n:,}", f.mean(a, n), (f.mean(a, n) or Mean((0.0,))).interval) for a, n in kept]
    head = ["anchor (0 is the source)", "parameters", "loss", "95 % interval"]
    return ["## Anchors", "", *_table(head, rows)]


def _start(f: Figures) -> list[str]:
    sizes = f.sizes()
    place = ["r in its pair", *(f"{f.first(OURS, n)['position']:.2f} ({f.first(OURS, n)['pair'] + 1})" for n in sizes)]
    names = [a for a in f.arms() if not a.startswith(("direct", "scratch"))]
    rows = [place, *([arm, *(f.mean(arm, n) for n in sizes)] for arm in names)]
    return ["## At step 0", "", *_table(["arm", *map(_human, sizes)], rows)]


def _recovery(f: Figures) -> list[str]:
    lines = ["## After a short recovery", ""]
    for size in f.sizes():
        steps = f.steps(size)
        if len(steps) < 2:
            continue
        last = sorted(s for s in steps if len(f.by.get(("prune + refit", size, s), {})))[-1]
        seeds = len(f.by[OURS, size, last])
        rows = []
        for arm in f.arms(last, size):
            gap = f.gap(arm, size, last)
            apart = [None, None] if arm == OURS or gap is None else [gap, gap.interval]
            rows.append([arm, *(f.mean(arm, size, s) for s in steps), *apart])
        head = ["arm", *(f"{s} steps" for s in steps), f"minus ours at {last}", "95 % interval"]
        lines += [f"### {size:,} parameters, {seeds} seed(s)", "", *_table(head, rows)]
    return lines


def _direct(f: Figures) -> list[str]:
    lines = ["## The size distilled from the source directly", ""]
    lines += [
        "N sizes that share the chain's compute (anchors' training, 6 operations a student weight and token, 2 a"
    ]
    lines += ["teacher weight) get 1/N of it each; a model between anchors costs nothing more.", ""]
    for size in f.key_sizes():
        names = [a for a in f.arms(0, size) if a.startswith("direct")]
        rows = [[OURS, 0, f.mean(OURS, size), None, None]]
        for arm in names:
            gap = f.gap(arm, size)
            rows.append([arm, f"{f.first(arm, size)['tokens']:,}", f.mean(arm, size), gap, gap and gap.interval])
        lines += [f"### {size:,} parameters", ""]
        lines += _table(["arm", "its own tokens", "loss", "minus ours", "95 % interval"], rows)
        shares = {int(a.split("1/")[1].split()[0]): f.gap(a, size) for a in names if "1/" in a}
        won = [n for n, gap in sorted(shares.items()) if gap is not None and gap.mean > 0]
        most = max(shares, default=0)
        lines += [
            f"At equal compute the chain wins from N = {won[0]} sizes on (mean over seeds)."
            if won
            else f"At equal compute direct distillation stays ahead up to N = {most}, the most tried.",
            "",
        ]
    return lines


def _controls(f: Figures) -> list[str]:
    names = [a for a, _, _ in f.by if a.startswith("control, own domain")]
    if not names:
        return []
    size, rows = f.sizes(names[0])[0], []
    ours = {d: f"control, {d} domain: {OURS}" for d in ("own", "other")}
    for arm in names:
        what, other = arm.split(": ", 1)[1], arm.replace("own domain", "other domain")
        gaps = [None if what == OURS else f.gap(a, size, to=ours[d]) for d, a in (("own", arm), ("other", other))]
        rows.append([what, f.mean(arm, size), gaps[0], f.mean(other, size), gaps[1]])
    head = ["model", "own domain", "minus ours", "other domain", "minus ours"]
    text = (
        "Every anchor of the chain saw its tokens of the speeches; here the rivals see as many, and one anchor sees "
        "as many of the other domain instead: what it keeps of the lead cannot come from knowing the text."
    )
    return [f"## Controls, {size:,} parameters", "", text, "", *_table(head, rows)]


def _alphas(f: Figures) -> list[str]:
    names = [a for a in dict.fromkeys(arm for arm, _, _ in f.by) if a.startswith("alpha")]
    rows = [[_human(n), f"{f.first(OURS, n)['position']:.2f}", *(f.mean(a, n) for a in names)] for n in f.sizes()]
    return ["## Alpha, on validation text", "", *_table(["parameters", "r", *names], rows)]


def _below(f: Figures) -> list[str]:
    arm = "below: pruned + refit"
    rows = [
        [f"{n:,}", name, *(f.mean(name, n, s) for s in f.steps(n, arm))]
        for n in f.sizes(arm)
        for name in (arm, "random init")
    ]
    if not rows:
        return []
    head = ["parameters", "arm", *(f"{s} steps" for s in f.steps(f.sizes(arm)[0], arm))]
    return ["## Below the smallest anchor", "", *_table(head, rows)]


def _findings(f: Figures) -> list[tuple[str, str, bool]]:
    """The paper's findings: what it says, our figure, whether it holds here."""
    found = []
    for size in f.key_sizes():
        ours, scratch = f.mean(OURS, size), f.mean("scratch, long", size)
        if ours is None or scratch is None:
            continue
        spent, where = f.first("scratch, long", size)["tokens"], f"{size:,}: "
        what = "loss at step 0 below the final loss of a long scratch run"
        text = f"{where}{ours} against {scratch} after {spent:,} tokens"
        found.append((what, text, ours.mean < scratch.mean))
        reached = [s for s in f.steps(size) if (m := f.mean(OURS, size, s)) is not None and m.mean <= scratch.mean]
        batch = f.config["recovery"]["batch_size"] * f.config["recipe"]["data"]["sequence_length"]
        text = f"{where}the scratch run's final loss is not reached in {f.steps(size)[-1]} steps"
        ratio = 0.0
        if reached:
            ratio = spent / max(batch, reached[0] * batch)
            text = f"{where}reached at step {reached[0]}: " + (
                f"at least {ratio:.0f}x (one step)" if reached[0] == 0 else f"{ratio:.1f}x"
            )
        found.append(
            (f"convergence {PAPER_SPEED_UP}x to 217.86x faster (anchors not counted)", text, ratio >= PAPER_SPEED_UP)
        )
        expansions = [a for a in EXPANSIONS if f.mean(a, size)]
        for arm in expansions:
            last = f.steps(size, arm)[-1]
            later = f.mean(arm, size, last)
            text = f"{where}{ours} at step 0 against {later} after {last} steps of {arm}"
            found.append(
                (
                    "between two anchors, no recovery: better than single expansion with recovery",
                    text,
                    ours.mean < later.mean,
                )  # type: ignore[union-attr]
            )
    gaps = {n: f.gap("interpolate, no middle anchor", n) for n in f.sizes()}
    known = {n: g.mean for n, g in gaps.items() if g is not None}
    if known:
        better = sum(g > 0 for g in known.values())
        text = f"better at {better} of {len(known)} sizes, by {np.mean(list(known.values())):.3f} on average"
        found.append(("a denser chain is better", text, better > len(known) / 2))
    found += _alpha_findings(f) + _smallest(f)
    return found


def _alpha_findings(f: Figures) -> list[tuple[str, str, bool]]:
    values = {a: float(a.split()[1]) for a, _, _ in f.by if a.startswith("alpha 0")}
    best, cost = {}, {}
    for size in f.sizes():
        losses = {v: m.mean for a, v in values.items() if (m := f.mean(a, size)) is not None}
        own = f.mean("alpha 1 - r", size)
        if losses and own is not None:
            best[size] = min(losses, key=losses.__getitem__)
            cost[size] = max(0.0, own.mean - losses[best[size]])
    if not best:
        return []
    each = "; ".join(f"r {f.first(OURS, n)['position']:.2f}: {a}" for n, a in best.items())
    slope = np.polyfit([f.first(OURS, n)["position"] for n in best], list(best.values()), 1)[0]
    worst = max(cost.values())
    text = f"alpha = 1 - r costs at most {worst:.3f} over the best of the grid"
    return [
        ("the best alpha falls with the position", f"{each} (slope {slope:.2f})", bool(slope < -0.05)),
        (f"our default alpha is within {NEAR} of the best", text, worst <= NEAR),
    ]


def _smallest(f: Figures) -> list[tuple[str, str, bool]]:
    found = []
    for arm in (OURS, "below: pruned + refit"):
        for n in f.sizes(arm):
            steps = [s for s in f.steps(n, "random init") if s in f.steps(n, arm)]
            mine, last = f.mean(arm, n), f.mean("random init", n, steps[-1]) if steps else None
            if mine is not None and last is not None and steps[-1] and mine.mean < last.mean:
                found.append((n, steps[-1], mine, last, arm))
    what = "smallest size whose step 0 is ahead of random init after recovery (the paper: 51M of a chain to 762M)"
    if not found:
        return [(what, "none", False)]
    n, steps, mine, last, arm = min(found, key=lambda x: x[0])
    return [(what, f"{n:,} ({arm}): {mine} against {last} after {steps} steps of random init", True)]


def _behind(f: Figures) -> list[str]:
    """Every row in which another arm has a lower loss by more than one standard error."""
    rows = []
    for arm, size, steps in f.by:
        control = arm.startswith("control") and not arm.endswith(f": {OURS}")
        if arm == OURS or (arm.startswith(NOT_RIVALS) and not control):
            continue
        ours = arm.split(": ")[0] + f": {OURS}" if control else OURS
        gap = f.gap(arm, size, steps, to=ours)
        if gap is None or gap.mean >= 0 or (gap.error is not None and -gap.mean <= gap.error):
            continue
        own = f.first(arm, size, steps).get("tokens") if steps == 0 else None
        rows.append([arm, f"{size:,}", steps, f.mean(ours, size, steps), f.mean(arm, size, steps), gap, own])
    rows.sort(key=lambda row: (row[2], row[0], row[1]))
    total = sum(1 for arm, n, s in f.by if not arm.startswith(NOT_RIVALS) and arm != OURS and f.gap(arm, n, s))
    head = ["arm", "parameters", "steps", "ours", "theirs", "theirs minus ours, paired", "tokens it alone was given"]
    text = (
        f"Every row in which another arm's loss is lower than ours by more than one standard error of the paired "
        f"difference over seeds (¹: lower with the one seed there is). {len(rows)} rows; {total} were compared, and "
        "those of the controls."
    )
    return ["## Where we are not ahead", "", text, "", *_table(head, rows)]


def _plot(f: Figures, path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    chosen = [OURS, "expand, zero padding", "prune + refit", "paper, aligned anchors", "paper, independent anchors"]
    chosen += ["passthrough, layers dropped", "boomerang, layers patched", "direct from a pruned start, equal tokens"]
    for color, arm in zip(COLORS, chosen, strict=True):
        points = [(n, m) for n in sorted(f.sizes(arm)) if (m := f.mean(arm, n)) is not None]
        if points:
            errors = [m.error or 0 for _, m in points]
            style = {"color": color, "marker": "o", "capsize": 3, "linestyle": "-" if len(points) > 2 else ""}
            left.errorbar([n for n, _ in points], [m.mean for _, m in points], errors, label=arm, **style)
    anchors = [(n, m.mean) for a, n, s in f.by if a.startswith("anchor") and (m := f.mean(a, n)) is not None]
    left.plot(*zip(*anchors, strict=True), "D", color="black", markersize=9, label="anchors")
    left.set_xlabel("parameters")
    left.set_title("Step 0", loc="left", fontweight="bold")
    for size in f.key_sizes()[:1]:
        shown = [OURS, *EXPANSIONS, "prune + refit", "random subset + refit", "weight subcloning"]
        for color, arm in zip(COLORS, [*shown, "paper, independent anchors", "random init"], strict=True):
            means = [(s, m) for s in f.steps(size, arm) if (m := f.mean(arm, size, s)) is not None]
            at = [f.steps(size).index(s) for s, _ in means if s in f.steps(size)]
            values, errors = [m.mean for _, m in means], [m.error or 0 for _, m in means]
            right.errorbar(at, values[: len(at)], errors[: len(at)], label=arm, color=color, marker="o", capsize=3)
        scratch = f.mean("scratch, long", size)
        if scratch is not None:
            label = f"scratch, {_human(f.first('scratch, long', size)['tokens'])} tokens"
            right.axhline(scratch.mean, color="black", linestyle=":", label=label)
        right.set_xticks(range(len(f.steps(size))), [str(s) for s in f.steps(size)])
        right.set_xlabel("recovery steps")
        right.set_title(f"Recovery, {size:,} parameters", loc="left", fontweight="bold")
    low, high = min(m for _, m in anchors), max(m for _, m in anchors)
    for axes in (left, right):
        axes.set_ylim(low - 0.3 * (high - low), high + 1.2 * (high - low))  # what is far above is in the tables
        axes.set_ylabel("held-out loss (nats a token)")
        axes.grid(color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None})


def write(folder: Path) -> None:
    """Writes quality.md and quality.png beside quality.json."""
    found = json.loads((folder / "quality.json").read_text())
    f = Figures(found)
    verdicts = [(what, text, "holds" if holds else "FAILS") for what, text, holds in _findings(f)]
    lines = [
        *_about(found, f),
        "## The paper's findings, here",
        "",
        *_table(["finding", "our figure", "verdict"], verdicts),
        *_anchors(f),
        *_start(f),
        *_recovery(f),
        *_direct(f),
        *_controls(f),
        *_alphas(f),
        *_below(f),
        *_behind(f),
    ]
    (folder / "quality.md").write_text("\n".join(lines).rstrip() + "\n")
    _plot(f, folder / "quality.png")
