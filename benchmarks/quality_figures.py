"""Means, findings and the plot of quality.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from figures import error, human, mean, panels

from cbd_hub.evaluation import plots

OURS = "interpolate"
EXPANSIONS = ("expand, zero padding", "expand, duplication")
BELOW = "below: pruned + refit"
NOT_RIVALS = ("alpha", "anchor", "independent anchor", "below", "control")
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # of t, 97.5 %, 1 to 10 degrees
NEAR = 0.01  # nats; what a flat optimum may cost
COLORS = (*plots.COLORS, "#888888", "#7A4EAB")
PAPER_SPEED_UP = 80.26
Finding = tuple[str, str, bool]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.values)

    @property
    def error(self) -> float | None:
        """Its standard error; None for a single seed."""
        return error(self.values) if len(self.values) > 1 else None

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
        self.key_sizes = self.sizes("scratch, long")  # at which every arm recovered

    def mean(self, arm: str, size: int, steps: int = 0) -> Mean | None:
        """The loss of an arm, over the seeds that it was measured with."""
        rows = self.by.get((arm, size, steps))
        return Mean(tuple(row["loss"] for row in rows.values())) if rows else None

    def gap(self, arm: str, size: int, steps: int = 0, to: str = OURS) -> Mean | None:
        """How much more loss an arm has than another one, seed by seed."""
        mine, theirs = (self.by.get((name, size, steps), {}) for name in (arm, to))
        both = sorted(set(mine) & set(theirs))
        return Mean(tuple(mine[s]["loss"] - theirs[s]["loss"] for s in both)) if both else None

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

    def named(self, *beginnings: str) -> list[tuple[str, int]]:
        """Arms whose names begin so, and their sizes, at step 0."""
        return [(a, n) for a, n, s in self.by if a.startswith(beginnings) and s == 0]

    def steps(self, size: int, arm: str = OURS) -> list[int]:
        """After how many recovery steps an arm was measured."""
        return sorted(s for a, n, s in self.by if a == arm and n == size)

    def last(self, size: int) -> int:
        """The most steps after which every arm of a size was measured."""
        return max(s for s in self.steps(size) if ("prune + refit", size, s) in self.by)

    def shares(self, size: int) -> dict[int, Mean]:
        """Sizes that share the chain's compute → how far direct distillation is behind."""
        names = [a for a in self.arms(0, size) if "1/" in a]
        found = {int(a.split("1/")[1].split()[0]): self.gap(a, size) for a in names}
        return {n: gap for n, gap in sorted(found.items()) if gap is not None}

    # -- findings -----------------------------------------------------------------------------------------------------

    def findings(self) -> list[Finding]:
        """The paper's findings: what it says, our figure, whether it holds here."""
        found = [finding for size in self.key_sizes for finding in self._at_key_size(size)]
        known = [g.mean for n in self.sizes() if (g := self.gap("interpolate, no middle anchor", n))]
        if known:
            better = sum(g > 0 for g in known)
            text = f"better at {better} of {len(known)} sizes, by {mean(known):.3f} on average"
            found.append(("a denser chain is better", text, better > len(known) / 2))
        return [*found, *self._alphas(), self._smallest()]

    def _at_key_size(self, size: int) -> list[Finding]:
        ours, scratch, where = self.mean(OURS, size), self.mean("scratch, long", size), f"{size:,}: "
        assert ours and scratch
        spent = self.first("scratch, long", size)["tokens"]
        text = f"{where}{ours} against {scratch} after {spent:,} tokens"
        found = [("loss at step 0 below the final loss of a long scratch run", text, ours.mean < scratch.mean)]
        reached = [s for s in self.steps(size) if (m := self.mean(OURS, size, s)) and m.mean <= scratch.mean]
        batch = self.config["recovery"]["batch_size"] * self.config["recipe"]["data"]["sequence_length"]
        text, ratio = f"{where}the scratch run's final loss is not reached in {self.steps(size)[-1]} steps", 0.0
        if reached:
            ratio = spent / max(batch, reached[0] * batch)
            times = f"at least {ratio:.0f}x (one step)" if reached[0] == 0 else f"{ratio:.1f}x"
            text = f"{where}reached at step {reached[0]}: {times}"
        what = f"convergence {PAPER_SPEED_UP}x to 217.86x faster (anchors not counted)"
        found.append((what, text, ratio >= PAPER_SPEED_UP))
        for arm in EXPANSIONS:
            if steps := self.steps(size, arm):
                later = self.mean(arm, size, steps[-1])
                text = f"{where}{ours} at step 0 against {later} after {steps[-1]} steps of {arm}"
                what = "between two anchors, no recovery: better than single expansion with recovery"
                found.append((what, text, later is not None and ours.mean < later.mean))
        return found

    def _alphas(self) -> list[Finding]:
        best, cost = {}, []
        for size in self.sizes():
            names = [a for a, n in self.named("alpha 0") if n == size]
            losses = {float(a.split()[1]): m.mean for a in names if (m := self.mean(a, size))}
            if losses and (own := self.mean("alpha 1 - r", size)):
                best[size] = min(losses, key=losses.__getitem__)
                cost.append(max(0.0, own.mean - losses[best[size]]))
        if not best:
            return []
        places = [self.first(OURS, n)["position"] for n in best]
        each = "; ".join(f"r {r:.2f}: {a}" for r, a in zip(places, best.values(), strict=True))
        slope = np.polyfit(places, list(best.values()), 1)[0]
        text = f"alpha = 1 - r costs at most {max(cost):.3f} over the best of the grid"
        return [
            ("the best alpha falls with the position", f"{each} (slope {slope:.2f})", bool(slope < -0.05)),
            (f"our default alpha is within {NEAR} of the best", text, max(cost) <= NEAR),
        ]

    def _smallest(self) -> Finding:
        found = []
        for arm in (OURS, BELOW):
            for n in self.sizes(arm):
                steps = max((s for s in self.steps(n, "random init") if s in self.steps(n, arm)), default=0)
                mine, last = self.mean(arm, n), self.mean("random init", n, steps)
                if steps and mine and last and mine.mean < last.mean:
                    found.append((n, f"{n:,} ({arm}): {mine} against {last} after {steps} steps of random init"))
        what = "smallest size whose step 0 is ahead of random init after recovery (the paper: 51M of a chain to 762M)"
        return what, min(found, default=(0, "none"))[1], bool(found)

    def behind(self) -> list[list[Any]]:
        """Every row in which another arm has a lower loss by more than one standard error."""
        rows: list[list[Any]] = []
        for arm, size, steps in self.by:
            control = arm.startswith("control") and not arm.endswith(f": {OURS}")
            if arm == OURS or (arm.startswith(NOT_RIVALS) and not control):
                continue
            ours = arm.split(": ")[0] + f": {OURS}" if control else OURS
            gap = self.gap(arm, size, steps, ours)
            if gap is None or gap.mean >= 0 or (gap.error is not None and -gap.mean <= gap.error):
                continue
            own = self.first(arm, size, steps).get("tokens") if steps == 0 else None
            rows.append([arm, f"{size:,}", steps, self.mean(ours, size, steps), self.mean(arm, size, steps), gap, own])
        return sorted(rows, key=lambda row: (row[2], row[0], row[1]))

    def compared(self) -> int:
        """How many rows of rivals there are."""
        return sum(1 for a, n, s in self.by if not a.startswith(NOT_RIVALS) and a != OURS and self.gap(a, n, s))


def plot_quality(data: Any, path: Path) -> None:
    """Loss at step 0 over size, and over recovery steps at the first key size."""
    f = Figures(data)
    size, anchors = f.key_sizes[0], [(n, m.mean) for a, n in f.named("anchor") if (m := f.mean(a, n))]
    chosen = [OURS, EXPANSIONS[0], "prune + refit", "paper, aligned anchors", "paper, independent anchors"]
    chosen += ["passthrough, layers dropped", "boomerang, layers patched", "direct from a pruned start, equal tokens"]
    recovered = [OURS, *EXPANSIONS, "prune + refit", "random subset + refit", "weight subcloning"]
    recovered += ["paper, independent anchors", "random init"]
    with panels(path, 2, (13, 5.5), dpi=150, metadata={"Software": None}) as (left, right):
        for color, arm in zip(COLORS, chosen, strict=True):
            if points := [(n, m) for n in sorted(f.sizes(arm)) if (m := f.mean(arm, n))]:
                style = {"color": color, "marker": "o", "capsize": 3, "linestyle": "-" if len(points) > 2 else ""}
                values = zip(*((n, m.mean, m.error or 0) for n, m in points), strict=True)
                left.errorbar(*values, label=arm, **style)
        left.plot(*zip(*anchors, strict=True), "D", color="black", markersize=9, label="anchors")
        left.set(xlabel="parameters")
        left.set_title("Step 0", loc="left", fontweight="bold")
        steps = f.steps(size)
        for color, arm in zip(COLORS, recovered, strict=True):
            means = [(steps.index(s), m) for s in f.steps(size, arm) if s in steps and (m := f.mean(arm, size, s))]
            points = zip(*((at, m.mean, m.error or 0) for at, m in means), strict=True)
            right.errorbar(*points, label=arm, color=color, marker="o", capsize=3)
        if scratch := f.mean("scratch, long", size):
            label = f"scratch, {human(f.first('scratch, long', size)['tokens'])} tokens"
            right.axhline(scratch.mean, color="black", linestyle=":", label=label)
        right.set_xticks(range(len(steps)), [str(s) for s in steps])
        right.set(xlabel="recovery steps")
        right.set_title(f"Recovery, {size:,} parameters", loc="left", fontweight="bold")
        low, high = min(m for _, m in anchors), max(m for _, m in anchors)
        for axes in (left, right):
            axes.set_ylim(low - 0.3 * (high - low), high + 1.2 * (high - low))  # what is far above is in the tables
            axes.set_ylabel("held-out loss (nats a token)")
            axes.grid(color="#dddddd")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
