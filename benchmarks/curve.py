"""The curve between two anchors against everything else at equal tokens: ``python benchmarks/curve.py CHAIN``.

CHAIN is what ``make quickstart`` leaves (``quickstart-output/chain``). Each seed trains, for every pair: the anchor
alone (N tokens), the anchor and its control point together (2 N), the control point alone beside the plain anchor (N),
and each of a few sizes directly from the large anchor with parts of N. All are measured on 20,000 test
tokens at nine sizes a pair, with the large anchor pruned, pruned and refitted, and the paper's rule beside them.
Figures go into docs/results/curve.json after each arm, and a call goes on from there; ``--report`` writes curve.md.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import harness
import models
from models import kept_first
from transformers import PreTrainedModel

from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.students import curve_to_train, cut_student, refit_if_better
from cbd_hub.chain.chain import Chain
from cbd_hub.interpolation.materialize import cut
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.curve import Curve, Point
from cbd_hub.training.settings import ControlPointConfig

POSITIONS = tuple(k / 10 for k in range(1, 10))
DIRECT: dict[str, tuple[float, tuple[float, ...]]] = {  # part of N → what it is, and where it is measured
    "N/8": (0.125, (0.5,)),
    "N/4": (0.25, POSITIONS),
    "N/2": (0.5, (0.2, 0.4, 0.6, 0.8)),
    "N": (1.0, (0.5,)),
}


class Bench:
    """One pair of a chain, and its text."""

    def __init__(self, chain: Chain, inputs: BuildInputs, index: int) -> None:
        self.inputs, self.config = inputs, inputs.recipe.distillation
        large, small = chain.anchors[index : index + 2]
        self.name, self.large = f"{large.name} → {small.name}", large.load("float32")
        axis_map = chain.manifest.resolved_axis_map
        sizes = chain.manifest.sizes(small.entry), chain.manifest.sizes(large.entry)
        self.pair = Pair(axis_map, *sizes, chain.index_maps[small.name])
        self.fit = inputs.refit_blocks(), inputs.validation
        self.cut, _ = cut_student(self.large, axis_map, sizes[0], self.pair.index_map, *self.fit, False)

    def loss(self, model: PreTrainedModel) -> float:
        """Test loss, nats a token."""
        return harness.loss(model, self.inputs.text.test, batch_size=16, max_tokens=20_000).loss

    def train(
        self, student: PreTrainedModel, tokens: int, seed: int, curve: Any = None, index_map: Any = None
    ) -> None:
        """Distills in place."""
        config = self.config.model_copy(update={"tokens": tokens, "seed": seed})
        text = self.inputs.text.train, self.inputs.validation
        units = index_map or self.pair.index_map
        harness.train(student, self.large, *text, config, curve=curve, index_map=units)

    def curve(self, student: PreTrainedModel, seed: int, together: bool) -> Curve:
        """A curve from the large anchor to a student, trained with it or after it."""
        tokens = self.config.tokens if together else 0
        control = ControlPointConfig(tokens=self.config.tokens, together=together)
        config = self.config.model_copy(update={"tokens": tokens, "seed": seed, "control_point": control})
        length = self.inputs.recipe.data.sequence_length
        if (found := curve_to_train(student, self.large, self.pair, config, True, length)) is None:
            raise SystemExit("the pair has no size between its anchors")
        self.train(student, tokens, seed, found)
        return found

    def prune(self, point: Point) -> PreTrainedModel:
        """The large anchor's units alone."""
        return cut(self.large, self.pair.axis_map, self.pair.large, dict(point.sizes), self.pair.index_map)

    def refitted(self, point: Point) -> PreTrainedModel:
        """The same with its output projections fitted."""
        model = self.prune(point)
        refit_if_better(model, self.large, self.pair.axis_map, self.pair.index_map, *self.fit, False)
        return model

    def paper(self, small: PreTrainedModel, point: Point) -> PreTrainedModel:
        """Zero filling."""
        alpha = 1 - self.pair.position(point.num_parameters)
        return models.Pair(self.large, small, self.pair.index_map).combine(point.sizes, "paper", alpha)

    def direct(self, part: float, seed: int, point: Point) -> PreTrainedModel:
        """Distilled for this size alone."""
        student, layers = self.prune(point), self.pair.layers(point.sizes["layers"])
        index_map = IndexMap(kept_first(layers, self.pair.large["layers"]), self.pair.index_map.orders)
        self.train(student, round(part * self.config.tokens), seed, index_map=index_map)
        return student


def measure(bench: Bench, seed: int, keep: Callable[[str, Callable[[], dict[str, float]]], Any]) -> None:
    """All arms of one pair and seed."""
    plain, both = deepcopy(bench.cut), deepcopy(bench.cut)
    bench.train(plain, bench.config.tokens, seed)
    alone = bench.curve(plain, seed, together=False)
    together = bench.curve(both, seed, together=True)
    ends = {"large": bench.large, "plain": plain, "cut": bench.cut}
    keep("anchors", lambda: {name: bench.loss(model) for name, model in ends.items()})
    keep("anchor together", lambda: {"small": bench.loss(both)})
    arms: dict[str, tuple[Callable[[Point], PreTrainedModel], tuple[float, ...]]] = {
        "average": (partial(alone.model, straight=True), POSITIONS),
        "paper": (partial(bench.paper, plain), POSITIONS),
        **({} if seed else {"pruned": (bench.prune, POSITIONS), "pruned + refit": (bench.refitted, POSITIONS)}),
        "control point alone": (alone.model, POSITIONS),
        "together": (together.model, POSITIONS),
        **{f"direct {n}": (partial(bench.direct, part, seed), where) for n, (part, where) in DIRECT.items()},
    }
    for name, (make, where) in arms.items():
        points = {str(r): alone.nearest(r) for r in where}
        keep(name, lambda m=make, p=points: {r: bench.loss(m(point)) for r, point in p.items()})


def report(results: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over seeds, one table a pair."""
    counts = " to ".join(map(str, sorted({len(seeds) for seeds in results["pairs"].values()})))
    lines = [
        f"Held-out loss, nats a token, on 20,000 test tokens; N = {results['tokens']:,} training tokens; "
        f"seeds: {counts}. "
        "Standard deviations stand where there are several. An anchor and its control point cost 2 N together, for "
        "all sizes between; direct distillation costs its part of N for each size.",
        *([] if "note" not in results else ["", results["note"]]),
    ]
    for pair, seeds in results["pairs"].items():
        names = list(dict.fromkeys(name for arms in seeds.values() for name in arms if not name.startswith("anchor")))
        lines += ["", f"## {pair}", "", "| arm | " + " | ".join(f"r = {r}" for r in POSITIONS) + " |"]
        lines.append("|---" + "|--:" * len(POSITIONS) + "|")
        for name in names:
            cells = []
            for r in map(str, POSITIONS):
                values = [arms[name][r] for arms in seeds.values() if r in arms.get(name, {})]
                spread = f" ±{stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{mean(values):.3f}{spread}" if values else "")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        done = [arms for arms in seeds.values() if "anchor together" in arms]
        ends = [(a["anchors"]["large"], a["anchors"]["plain"], a["anchor together"]["small"]) for a in done]
        if ends:
            large, alone, both = map(mean, zip(*ends, strict=True))
            lines += ["", f"Anchors: large {large:.3f}; small alone (N) {alone:.3f}, together (2 N) {both:.3f}."]
        lines += ["", *balance(list(seeds.values()))]
    return "\n".join(["# The curve between two anchors", "", *lines, ""])


def balance(seeds: list[dict[str, Any]]) -> list[str]:
    """Lines that compare the curve with every control, seed by seed: where it is not below, and at equal compute."""

    def apart(arm: str, r: float) -> list[float]:
        return [s["together"][str(r)] - s[arm][str(r)] for s in seeds if str(r) in s.get(arm, {}) and "together" in s]

    lines = [
        "| sizes K | a direct distillation of each gets | together less direct, mean over sizes |",
        "|--:|---|--:|",
    ]
    for sizes, arm in ((16, "direct N/8"), (8, "direct N/4"), (4, "direct N/2"), (2, "direct N")):
        each = [here for r in POSITIONS if (here := apart(arm, r))]
        if each:
            by_seed = [mean(values) for values in zip(*each, strict=True)] if len({len(e) for e in each}) == 1 else []
            spread = f" ±{stdev(by_seed):.3f}" if len(by_seed) > 1 else ""
            found = f"{mean(map(mean, each)):+.3f}{spread} ({len(each)} of them)"
            lines.append(f"| {sizes} | {arm.removeprefix('direct ')} | {found} |")
    above = [
        f"{arm} at r = {r} ({mean(found):+.3f})"
        for arm in ("average", "paper", "pruned", "pruned + refit")
        for r in POSITIONS
        if (found := apart(arm, r)) and mean(found) >= 0
    ]
    told = "; ".join(above) or "none"
    return [
        "At equal compute, 2 N for all sizes together:",
        "",
        *lines,
        "",
        f"Not below, of the controls without training: {told}.",
    ]


def main() -> None:
    """Runs what is missing, or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chain", type=Path, nargs="?")
    parser.add_argument("--recipe", type=Path, default=harness.RECIPES / "quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--results", type=Path, default=harness.RESULTS / "curve.json")
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    path = arguments.results
    figures = harness.Figures(path.parent, path.stem)
    if arguments.report:
        path.with_suffix(".md").write_text(report(figures.found), encoding="utf-8")
        return
    if arguments.chain is None:
        parser.error("name the chain's folder")
    inputs, chain = harness.inputs(arguments.recipe), Chain.from_pretrained(arguments.chain)
    pairs = figures.found.setdefault("pairs", {})
    figures.found["tokens"] = inputs.recipe.distillation.tokens
    for index in arguments.pairs:
        bench = Bench(chain, inputs, index)
        for seed in arguments.seeds:
            arms = pairs.setdefault(bench.name, {}).setdefault(str(seed), {})
            if "direct N" not in arms:
                measure(bench, seed, partial(figures.keep, place=arms))


if __name__ == "__main__":
    main()
