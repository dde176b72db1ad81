"""What the tables say beyond the figures themselves: ratios, goals, exponents, and the rows that were lost."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from transformers import LlamaConfig

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import count_parameters, ladder
from cbd_hub.evaluation.plots import plot_size_loss

OURS = "interpolate"
NEEDED = {  # goal → bound of speed.json's ratios
    "time / copy": 1.5,
    "by hand / time": 2.0,
    "peak / by hand": 0.6,
    "time and save / mergekit": 1.0,
    "peak / allowed": 1.0,
}
AT_LEAST = ("by hand / time",)
GOALS_OF_LOSSES = {"peak_against_plain": 0.25, "time_against_plain": 1.1}  # the most of the chunked loss
WAYS = ("corpus alone", "transplant", "logits", "transplant + logits", "seqkd", "transplant + seqkd")
WAYS += ("seqkd + logits", "transplant + seqkd + logits")  # to found a bridge by
DOMAINS = ("in domain", "another domain")
CHANCE = {"boolq": 0.5, "piqa": 0.5, "openbookqa": 0.25, "commonsense_qa": 0.2}
Row = Mapping[str, Any]

# -- of any figures ---------------------------------------------------------------------------------------------------


def human(count: float) -> str:
    """A count in thousands or millions."""
    return f"{count / 1e6:.3g}M" if count >= 1e6 else f"{count / 1e3:.4g}k"


def mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def error(values: Sequence[float]) -> float:
    """Standard error of a mean; 0 of a single value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def plus_minus(values: Sequence[float], how: str = ".3f") -> str:
    """Mean and standard deviation; "" of nothing."""
    spread = f" ±{statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{how}}{spread}" if values else ""


def median(runs: Iterable[dict[str, float]], what: str) -> float:
    """The median of one measure over runs."""
    return statistics.median(run[what] for run in runs)


def minus(values: Sequence[float], others: Sequence[float]) -> list[float]:
    """Paired differences."""
    return [a - b for a, b in zip(values, others, strict=True)]


@contextmanager
def panels(path: Path, columns: int, size: tuple[float, float], **save: Any) -> Iterator[Any]:
    """Axes side by side, written as a PNG file at the end."""
    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(1, columns)
    figure.savefig(path, format="png", **save)


# -- from_chain: speed and growth -------------------------------------------------------------------------------------


def title(row: Row) -> str:
    """What a row of speed.json is of."""
    layout = "one file" if row["files"] == 2 else f"{row['files']} files"
    return f"{row['model']} {row['dtype']}, {layout}, {row['cache']}"


def bound(name: str) -> str:
    """A goal in words."""
    return f"at {'least' if name in AT_LEAST else 'most'} {NEEDED[name]:g}"


def ratios(row: Row, what: str) -> dict[str, float]:
    """Goal → ratio, for those that were measured."""

    def of(way: str, what: str = what) -> float | None:
        return median(row["runs"][way], what) if way in row["runs"] else None

    ours = of("from_chain")
    pairs = {
        "time / copy": (ours, of("copy")),
        "by hand / time": (of("by hand"), ours),
        "peak / by hand": (of("from_chain", "peak"), of("by hand", "peak")),
        "time and save / mergekit": (of("from_chain + save"), of("mergekit")),
        "peak / allowed": (of("from_chain", "peak"), 1.25 * row["bytes_made"] + row["largest_pair"]),
    }
    return {name: value / against for name, (value, against) in pairs.items() if value is not None and against}


def goals(row: Row) -> dict[str, tuple[float, bool | None, float]]:
    """Goal → (ratio of CPU time, whether it is met, the ratio that decides); None where it does not count.

    CPU time decides where the files were in the page cache, wall time where they were not.
    """
    deciding, found = ratios(row, "cpu" if row["cache"] == "warm" else "wall"), {}
    for name, value in ratios(row, "cpu").items():
        met = deciding[name] >= NEEDED[name] if name in AT_LEAST else deciding[name] <= NEEDED[name]
        found[name] = value, None if name == "time / copy" and row["cache"] == "cold" else met, deciding[name]
    return found


def verdict(row: Row, name: str) -> str | None:
    """A cell of the table of goals."""
    if (found := goals(row).get(name)) is None:
        return None
    value, met, _ = found
    beside = "" if name.startswith("peak") else f" ({ratios(row, 'wall')[name]:.2f})"
    return f"{value:.2f}{beside}" + ("" if met is None else " pass" if met else " FAIL")


def made(rows: Sequence[Row]) -> dict[str, Row]:
    """Model and dtype → the last row of it."""
    return {f"{row['model']} {row['dtype']}": row for row in rows}


def slope(rows: Sequence[Row], what: str) -> float:
    """The exponent of parameters with which something grows: least squares on logarithms."""
    values = [median(row["runs"], what) for row in rows]
    return float(np.polyfit(np.log([row["parameters"] for row in rows]), np.log(values), 1)[0])


def line(rows: Sequence[Row]) -> tuple[float, float, float]:
    """CPU seconds of a build without anchors, of each anchor, and the largest miss of that line as a share."""
    numbers, cpu = [row["anchors"] for row in rows], [median(row["runs"], "cpu") for row in rows]
    each, fixed = np.polyfit(numbers, cpu, 1)
    miss = max(abs(fixed + each * n - c) / c for n, c in zip(numbers, cpu, strict=True))
    return float(fixed), float(each), float(miss)


def plot_growth(data: Any, path: Path) -> None:
    """Time and memory over parameters, and a build's time over anchors."""
    rows, builds = data["from_chain"], data["builds"]
    with panels(path, 3, (11, 3.5), dpi=110) as axes:
        for axis, what, label, unit in ((axes[0], "cpu", "CPU seconds", 1), (axes[1], "peak", "peak GB", 1e9)):
            values = [median(row["runs"], what) / unit for row in rows]
            axis.loglog([row["parameters"] for row in rows], values, "o-")
            axis.set(xlabel="parameters", ylabel=label, title=f"from_chain: exponent {slope(rows, what):.2f}")
        axes[2].plot([row["anchors"] for row in builds], [median(row["runs"], "cpu") for row in builds], "o-")
        axes[2].set(xlabel="anchors beside the source", ylabel="CPU seconds", title="a build", ylim=(0, None))
        for axis in axes:
            axis.grid(alpha=0.3)


# -- the curve --------------------------------------------------------------------------------------------------------


class Curves:
    """The arms of one pair of curve.json, over seeds."""

    def __init__(self, seeds: Mapping[str, Row]) -> None:
        self.seeds = [arms for arms in seeds.values() if "together" in arms]
        names = dict.fromkeys(name for arms in self.seeds for name in arms)
        self.arms = [name for name in names if not name.startswith("anchor")]
        self.positions = sorted({r for arms in self.seeds for r in arms["together"]})

    def cell(self, arm: str, r: str) -> str:
        """Mean and standard deviation at a position."""
        return plus_minus([arms[arm][r] for arms in self.seeds if r in arms.get(arm, {})])

    def apart(self, arm: str, r: str) -> list[float]:
        """How far the curve is above another arm, seed by seed."""
        return [arms["together"][r] - arms[arm][r] for arms in self.seeds if r in arms.get(arm, {})]

    @property
    def ends(self) -> str:
        """The anchors' losses."""
        names = {"large": ("anchors", "large"), "small alone (N)": ("anchors", "plain")}
        names |= {"together (2 N)": ("anchor together", "small"), "elastic, large": ("anchors elastic", "large")}
        names |= {"elastic, small (2 N)": ("anchors elastic", "small")}
        of = {name: [s[part][end] for s in self.seeds if part in s] for name, (part, end) in names.items()}
        return ", ".join(f"{name} {mean(values):.3f}" for name, values in of.items() if values)

    def balance(self) -> Iterator[list[Any]]:
        """The curve less each direct distillation that has as many tokens for K sizes together, over positions."""
        for sizes, part in ((16, "N/8"), (8, "N/4"), (4, "N/2"), (2, "N")):
            if each := [here for r in self.positions if (here := self.apart(f"direct {part}", r))]:
                by_seed = [mean(values) for values in zip(*each, strict=False)]
                yield [sizes, part, f"{plus_minus(by_seed, '+.3f')} ({len(each)} of them)"]

    def above(self) -> Iterator[str]:
        """The controls that are nowhere near direct distillation in cost, where the curve is not below them."""
        for arm in ("average", "paper", "pruned", "pruned + refit", "elastic"):
            for r in self.positions:
                if (found := self.apart(arm, r)) and mean(found) >= 0:
                    yield f"{arm} at r = {r} ({mean(found):+.3f})"


# -- the chain from SmolLM2 -------------------------------------------------------------------------------------------


class SmolLM2:
    """The sizes of smollm2.json, largest first, with every method's loss at each; and the controls."""

    def __init__(self, found: Row) -> None:
        plans = {int(key.split()[0]): value for key, value in found.items() if key.endswith(" plan")}
        self.sizes = {size: plans[size] for size in sorted(plans, reverse=True) if f"{size} {OURS}" in found}
        self.found, self.plans = found, plans
        self.middle = 0
        if self.sizes:
            large = next(iter(self.sizes.values()))["large"]
            top = [size for size, plan in self.sizes.items() if plan["large"] == large]
            self.middle = min(top, key=lambda size: abs(plans[size]["r"] - 0.5))

    def loss(self, key: str, domain: str = "in domain") -> float:
        """The mean loss of a model."""
        return mean(self.found[key][domain])

    def line(self, size: int) -> float:
        """The loss at a size on the straight line between its anchors."""
        plan = self.plans[size]
        small, large = (self.loss(f"anchor {plan[side]}") for side in ("small", "large"))
        return small + plan["r"] * (large - small)

    def losses(self, size: int) -> dict[str, float]:
        """Method → loss at a size."""
        keys = [key for key, value in self.found.items() if key.startswith(f"{size} ") and "in domain" in value]
        return {key.split(" ", 1)[1]: self.loss(key) for key in keys}

    def cell(self, size: int, name: str) -> str | None:
        """Loss of a method, with the standard error of its difference to ours over blocks."""
        if (key := f"{size} {name}") not in self.found:
            return None
        gap = np.array(self.found[key]["in domain"]) - np.array(self.found[f"{size} {OURS}"]["in domain"])
        spread = f" ±{gap.std(ddof=1) / len(gap) ** 0.5:.3f}" if gap.any() else ""
        return f"{self.loss(key):.3f}{spread}"

    def controls(self) -> dict[str, list[float]]:
        """Name → loss in the domain and in another."""
        names = {
            f"{self.middle} {name}": f"{name} ({self.middle / 1e6:.1f}M)" for name in (OURS, "prune", "prune + refit")
        }
        found = {name: self.found[key] for key, name in names.items() if key in self.found}
        for key, value in self.found.items():
            if key.startswith("control: pruned"):
                found["pruned + refit, then distilled on the anchor's tokens"] = value
            elif key.startswith("control: teacher"):
                found["teacher adapted on the anchor's tokens (whole)"] = value["teacher"]
                found["adapted teacher, pruned"] = value["prune"]
                found["adapted teacher, pruned + refit"] = value["prune + refit"]
        return {name: [mean(v[domain]) for domain in DOMAINS] for name, v in found.items()}


def plot_smollm2(data: Any, path: Path) -> None:
    """Held-out loss over size, one line a method."""
    view, series = SmolLM2(data), {}
    for name in (OURS, "refine", "prune", "prune + refit", "expand", "paper"):
        points = [(size, view.loss(key)) for size in view.sizes if (key := f"{size} {name}") in data]
        series |= {name: sorted(points)} if points else {}
    anchors = [(a["name"], a["parameters"], view.loss(f"anchor {a['name']}")) for a in data["anchors"]]
    plot_size_loss(series, anchors, path, "SmolLM2 chain: held-out loss by size")


# -- a 7B chain on paper ----------------------------------------------------------------------------------------------

LLAMA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
TOKENS = 1_000_000_000
LENGTH = 4096  # tokens of the one sequence on a GPU
PEAK_FLOPS, USED = 989e12, 0.4  # H100, bf16 without sparsity; the share of it that training reaches
GPUS = (8, 64)
TRAINED_BYTES, TEACHER_BYTES = 16, 4  # weight, gradient and two moments of AdamW in float32; a weight in float32


def pairs_of_7b() -> list[tuple[int, Mapping[str, int], int, Mapping[str, int]]]:
    """(parameters, sizes) of teacher and student, for anchors of 70 % each, as the ladder would choose them."""
    config = LlamaConfig(**LLAMA_7B, num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False)
    axis_map = axis_map_for(config)
    sizes = axis_map.sizes(config)
    chain = [(count_parameters(axis_map, sizes), sizes)]
    for _ in range(3):
        sizes = ladder(axis_map, sizes, round(0.7 * chain[-1][0]))
        chain.append((count_parameters(axis_map, sizes), sizes))
    return [(*large, *small) for large, small in pairwise(chain)]


def compute_of_7b() -> list[list[str]]:
    """Operations and hours of every anchor."""

    def cells(work: float) -> list[str]:
        hours = work / (PEAK_FLOPS * USED) / 3600
        return [f"{work:.2e}", f"{hours:,.0f}", *(f"{hours / n:,.1f}" for n in GPUS)]

    work = [(large, small, (6 * small + 2 * large) * TOKENS) for large, _, small, _ in pairs_of_7b()]
    rows = [[f"{small / 1e9:.2f}B", f"{large / 1e9:.2f}B", *cells(each)] for large, small, each in work]
    return [*rows, ["whole chain", "", *cells(sum(each for *_, each in work))]]


def memory_of_7b() -> list[list[str]]:
    """Gigabytes on a GPU, and in a process's main memory, for every anchor."""
    rows = []
    for large, teacher, small, student in pairs_of_7b():
        held, states = TEACHER_BYTES * large, 4 * LENGTH * teacher["hidden"] * (teacher["layers"] + student["layers"])
        needed = [held + states + TRAINED_BYTES * small / n for n in (1, *GPUS)]
        cells = [f"{v / 1e9:.0f}" for v in (*needed, 4 * (large + 2 * small))]
        rows.append([f"{small / 1e9:.2f}B", f"{held / 1e9:.0f}", f"{states / 1e9:.1f}", *cells])
    return rows


def assembly_of_7b(measured: Row) -> list[list[str]]:
    """from_chain half-way between every two anchors, from the largest sizes that were measured."""
    top = measured["from_chain"][-3:]
    last, exponent = top[-1], slope(top, "cpu")
    size, cpu, peak = last["parameters"], median(last["runs"], "cpu"), median(last["runs"], "peak")
    rows = [[f"{size / 1e9:.2f}B (measured)", f"{cpu:.1f}", f"{peak / 1e9:.1f}"]]
    for large, _, small, _ in reversed(pairs_of_7b()):
        middle = (large + small) // 2
        time, held = cpu * (middle / size) ** exponent, peak / last["bytes_made"] * 2 * middle / 1e9
        rows.append([f"{middle / 1e9:.2f}B", f"{time:.0f}", f"{held:.0f}"])
    return rows


# -- downstream, bridges, training, alignment -------------------------------------------------------------------------


def by_size(figures: Row, what: str) -> list[Row]:
    """The figures of downstream.json that have a measure, the largest first."""
    return sorted((f for f in figures.values() if what in f), key=lambda f: (-f.get("size", 0), f["arm"]))


def bridge_chains(found: Row) -> dict[str, dict[str, list[Any]]]:
    """Chain → way → what was measured of it, a seed each."""
    chains: dict[str, dict[str, list[Any]]] = {}
    for key, value in found.items():
        if " | seed " in key:
            name, way, _ = key.split(" | ")
            chains.setdefault(name, {}).setdefault(way, []).append(value)
    order = {way: index for index, way in enumerate(WAYS)}
    return {n: dict(sorted(ways.items(), key=lambda way: order.get(way[0], 9))) for n, ways in chains.items()}


def spread(bits: Sequence[float]) -> str:
    """Half of the range over the seeds, or a mark where there is one."""
    return f" ±{np.ptp(bits) / 2:.3f}" if len(bits) > 1 else "¹"


def paired(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """AnchorTrainer's and the plain loop's measurements of every case of train_scaling.json."""
    keys, ways = ("vocabulary", "length", "processes"), ("AnchorTrainer", "plain loop")
    both = ((a, b) for a in rows for b in rows if (a["way"], b["way"]) == ways)
    return [(a, b) for a, b in both if all(a[key] == b[key] for key in keys)]


# -- what was lost ----------------------------------------------------------------------------------------------------

Lost = tuple[str, str, str, str, str]
"""File, row, our figure, what was ahead, its figure."""


def below(where: str, row: str, ours: float, rivals: Mapping[str, float], count: int = 3) -> list[Lost]:
    """The rivals with a lower loss."""
    better = {rival: value for rival, value in rivals.items() if value < ours}
    return [(where, row, f"{ours:.{count}f}", rival, f"{value:.{count}f}") for rival, value in better.items()]


def _quickstart(data: Any) -> Iterator[Lost]:
    for row in data["targets"]:
        rivals = {rival: row[rival] for rival in ("prune", "paper", "small anchor")}
        yield from below("quickstart", f"{row['num_parameters']:,}", row[OURS], rivals)


def _smollm2(data: Any) -> Iterator[Lost]:
    view = SmolLM2(data)
    for size in view.sizes:
        rivals = {"the straight line between the anchors": view.line(size), **view.losses(size)}
        yield from below("SmolLM2", f"{size / 1e6:.1f}M, held-out loss", rivals[OURS], rivals)
    controls = view.controls()
    for rival, values in controls.items():
        if "(whole)" not in rival:  # a model of the source's size is no rival
            for domain, ours, value in zip(DOMAINS, next(iter(controls.values())), values, strict=True):
                yield from below("SmolLM2, controls", domain, ours, {rival: value})


def _curve(data: Any) -> Iterator[Lost]:
    for pair, seeds in data["pairs"].items():
        view = Curves(seeds)
        whats = {"pruned + refit": "", "elastic": "", "direct N/4": ", at equal compute over eight sizes"}
        for (arm, what), r in product(whats.items(), view.positions):
            both = [(s["together"][r], s[arm][r]) for s in view.seeds if r in s.get(arm, {})]
            if both:
                ours, rival = (mean(values) for values in zip(*both, strict=True))
                yield from below("curve", f"{pair}, r = {r}", ours, {f"{arm}{what}": rival})


def _bridge(data: Any) -> Iterator[Lost]:
    for chain, ways in bridge_chains(data).items():
        means = {way: mean(row["bits"] for row in rows) for way, rows in ways.items() if way != "chain"}
        base = means.pop("corpus alone")
        for way, value in means.items():
            yield from below("bridge", f"{chain}: {way}", value, {"corpus alone": base})


def _rules(data: Any) -> Iterator[Lost]:
    for row in data["own_weight"]:
        rivals = {rival: row[rival] for rival in ("weight 1", "1 - alpha", "small expanded", "pruned")}
        yield from below("rules", f"{row['pair']}, {row['parameters']:,}", row["1 - alpha^2 (ours)"], rivals, 4)


def _align(data: Any) -> Iterator[Lost]:
    for pair, measured in data["pairs"].items():
        aligned = measured["loss"]["masked averaging, aligned"]
        for rival, losses in measured["loss"].items():
            for alpha, ours in aligned.items():
                yield from below("alignment", f"{pair}, alpha {alpha}", ours, {rival: losses[alpha]})
        if (barrier := aligned["0.5"] - (aligned["0"] + aligned["1"]) / 2) > 0:
            yield "alignment", f"{pair}, barrier at alpha 0.5", f"{barrier:.3f}", "no barrier", "0"


def _speed(data: Any) -> Iterator[Lost]:
    for row in data["rows"]:
        for goal, (_, met, value) in goals(row).items():
            if met is False:
                yield "speed", title(row), f"{value:.2f}", f"goal: {goal}", bound(goal)


def _train(data: Any) -> Iterator[Lost]:
    for way, rival in data["ways"].items():
        for what, better, unit in (("tokens_per_second", 1, 1), ("peak_bytes", -1, 1e9)):
            ours = data["ways"]["AnchorTrainer"][what]
            if not way.startswith("AnchorTrainer") and better * (rival[what] - ours) > 0:
                yield "training", what, f"{ours / unit:.4g}", way, f"{rival[what] / unit:.4g}"


def _train_scaling(data: Any) -> Iterator[Lost]:
    for a, b in paired([*data["vocabulary"], *data["length"]]):
        mine, plain = a["tokens_per_second"], b["tokens_per_second"]
        if mine < plain:
            row = f"vocabulary {a['vocabulary']:,}, length {a['length']:,}"
            yield "training", row, f"{mine:,.0f}", "plain loop", f"{plain:,.0f}"


def _losses(data: Any) -> Iterator[Lost]:
    for row in data["rows"]:
        for what, most in GOALS_OF_LOSSES.items():
            if row[what] > most:
                where = f"vocabulary {row['vocabulary']:,}"
                yield "chunked loss", where, f"{row[what]:.2f}", f"goal: {what}", f"{most}"


_FOUND_IN = _quickstart, _smollm2, _curve, _bridge, _rules, _align, _speed, _train, _train_scaling, _losses
LOST = {function.__name__[1:]: function for function in _FOUND_IN}
"""File of figures → where something else was better in it, or a goal was missed."""


def lost(name: str, data: Any) -> list[Lost]:
    """Where something else was better, or a goal was missed."""
    return list(LOST[name](data))
