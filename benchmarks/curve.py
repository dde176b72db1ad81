"""The curve between two anchors against everything else at equal tokens: ``python benchmarks/curve.py CHAIN``.

CHAIN is what ``make quickstart`` leaves (``quickstart-output/chain``). Each seed trains, for every pair: the anchor
alone (N tokens), the anchor and its control point together (2 N), the control point alone beside the plain anchor (N),
and each of a few sizes directly from the large anchor with parts of N. All are measured on 20,000 test
tokens at nine sizes a pair, with the large anchor pruned, pruned and refitted, and the paper's rule beside them.
Figures go into docs/results/curve.json after each arm, and a call goes on from there; ``--report`` writes curve.md.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.build.students import curve_to_train, cut_student, refit_if_better
from cbd_hub.chain.chain import Chain
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation.materialize import blend_models, cut
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.training.curve import Curve, Point
from cbd_hub.training.distill import distill
from cbd_hub.training.settings import ControlPointConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results" / "curve.json"
POSITIONS = tuple(k / 10 for k in range(1, 10))
SHARES = {"N/8": 0.125, "N/4": 0.25, "N/2": 0.5, "N": 1.0}
DIRECT_AT = {"N/8": (0.5,), "N/4": POSITIONS, "N/2": (0.2, 0.4, 0.6, 0.8), "N": (0.5,)}


class Bench:
    """One pair of a chain, and its text."""

    def __init__(self, chain: Chain, inputs: BuildInputs, index: int) -> None:
        self.inputs, self.recipe = inputs, inputs.recipe
        large, small = chain.anchors[index : index + 2]
        self.large = large.load("float32")
        axis_map = chain.manifest.resolved_axis_map
        sizes = chain.manifest.sizes(small.entry), chain.manifest.sizes(large.entry)
        self.pair = Pair(axis_map, *sizes, chain.index_maps[small.name])
        blocks, validation = inputs.refit_blocks(), inputs.validation
        self.cut, _ = cut_student(self.large, axis_map, sizes[0], self.pair.index_map, blocks, validation, False)

    def loss(self, model: PreTrainedModel) -> float:
        """Test loss, nats a token."""
        return evaluate_loss(model, self.inputs.text.test, batch_size=16, max_tokens=20_000).loss  # type: ignore[union-attr]

    def train(self, student: PreTrainedModel, tokens: int, seed: int, curve: Curve | None = None, **kw: Any) -> None:
        """Distills in place."""
        config = self.recipe.distillation.model_copy(update={"tokens": tokens, "seed": seed})
        with tempfile.TemporaryDirectory() as work:
            text = self.inputs.text.train, self.inputs.validation  # type: ignore[union-attr]
            maps = {"index_map": self.pair.index_map, **kw}
            distill(student, self.large, *text, config, curve=curve, work_dir=Path(work), progress=False, **maps)

    def curve(self, student: PreTrainedModel, tokens: int, seed: int, together: bool) -> Curve:
        """A curve from the large anchor to a student."""
        control = ControlPointConfig(tokens=tokens, together=together)
        config = self.recipe.distillation.model_copy(
            update={"tokens": tokens if together else 0, "seed": seed, "control_point": control}
        )
        length = self.recipe.data.sequence_length  # type: ignore[union-attr]
        found = curve_to_train(student, self.large, self.pair, config, True, length)
        if found is None:
            raise SystemExit("the pair has no size between its anchors")
        return found

    def prune(self, point: Point) -> PreTrainedModel:
        """The large anchor's units alone."""
        return cut(self.large, self.pair.axis_map, self.pair.large, dict(point.sizes), self.pair.index_map)

    def refitted(self, point: Point) -> PreTrainedModel:
        """The same with its output projections fitted."""
        model, axis_map = self.prune(point), self.pair.axis_map
        blocks = self.inputs.refit_blocks()
        refit_if_better(model, self.large, axis_map, self.pair.index_map, blocks, self.inputs.validation, False)
        return model

    def paper(self, point: Point, small: PreTrainedModel) -> PreTrainedModel:
        """Zero filling."""
        operations = list_operations(self.pair, point.sizes, "paper", 1 - self.pair.position(point.num_parameters))
        return blend_models(operations, self.pair, point.sizes, self.large, small)


def measure(bench: Bench, seed: int, record: Callable[[str, dict[str, float]], None], done: set[str]) -> None:
    """All arms of one pair and seed."""
    tokens = bench.recipe.distillation.tokens
    plain, both = deepcopy(bench.cut), deepcopy(bench.cut)
    bench.train(plain, tokens, seed)
    curve = bench.curve(plain, tokens, seed, together=False)
    points = {str(r): curve.nearest(r) for r in POSITIONS}

    def arm(name: str, make: Callable[[Point], PreTrainedModel], at: dict[str, Point] = points) -> None:
        if name not in done:
            record(name, {r: bench.loss(make(point)) for r, point in at.items()})

    arm("average", lambda p: curve.model(p, straight=True))
    record("anchors", {"large": bench.loss(bench.large), "plain": bench.loss(plain), "cut": bench.loss(bench.cut)})
    arm("paper", lambda p: bench.paper(p, plain))
    if seed == 0:  # no training, so no seed
        arm("pruned", bench.prune)
        arm("pruned + refit", bench.refitted)
    bench.train(plain, 0, seed, curve)
    arm("control point alone", curve.model)
    together = bench.curve(both, tokens, seed, together=True)
    bench.train(both, tokens, seed, together)
    record("anchor together", {"small": bench.loss(both)})
    arm("together", together.model)
    for share, part in SHARES.items():

        def direct(point: Point, part: float = part) -> PreTrainedModel:
            student = bench.prune(point)
            layers = bench.pair.layers(point.sizes["layers"])
            rest = [i for i in range(bench.pair.large["layers"]) if i not in layers]
            index_map = type(bench.pair.index_map)(np.array(layers + rest), bench.pair.index_map.orders)
            bench.train(student, round(part * tokens), seed, index_map=index_map)
            return student

        arm(f"direct {share}", direct, {str(r): points[str(r)] for r in DIRECT_AT[share]})


def report(results: dict[str, Any]) -> str:
    """Markdown: mean and standard deviation over seeds, one table a pair."""
    counts = " to ".join(map(str, sorted({len(seeds) for seeds in results["pairs"].values()})))
    lines = [
        f"Held-out loss, nats a token, on 20,000 test tokens; N = {results['tokens']:,} training tokens; "
        f"seeds: {counts}. "
        "Standard deviations stand where there are several. An anchor and its control point cost 2 N together, for "
        "all sizes between; direct distillation costs its part of N for each size."
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
        ends = [(arms["anchors"]["large"], arms["anchors"]["plain"], arms["anchor together"]["small"])
                for arms in seeds.values() if "anchor together" in arms]  # fmt: skip
        if ends:
            large, alone, both = map(mean, zip(*ends, strict=True))
            lines += ["", f"Anchors: large {large:.3f}; small alone (N) {alone:.3f}, together (2 N) {both:.3f}."]
    return "\n".join(["# The curve between two anchors", "", *lines, ""])


def main() -> None:
    """Runs what is missing, or writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chain", type=Path, nargs="?")
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "recipes" / "quickstart.yaml")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true")
    arguments = parser.parse_args()
    path = arguments.results
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"pairs": {}}
    if arguments.report:
        path.with_suffix(".md").write_text(report(results), encoding="utf-8")
        return
    if arguments.chain is None:
        parser.error("name the chain's folder")
    inputs = BuildInputs(*load_recipe(arguments.recipe))
    results["tokens"] = inputs.recipe.distillation.tokens
    chain = Chain.from_pretrained(arguments.chain)
    for index in arguments.pairs:
        bench = Bench(chain, inputs, index)
        name = f"{chain.anchors[index].name} → {chain.anchors[index + 1].name}"
        for seed in arguments.seeds:
            arms = results["pairs"].setdefault(name, {}).setdefault(str(seed), {})

            def record(
                arm: str, losses: dict[str, float], arms: dict[str, Any] = arms, label: str = f"{name}, seed {seed}"
            ) -> None:
                arms[arm] = losses
                path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
                print(label, arm, {r: round(v, 4) for r, v in losses.items()}, flush=True)

            if "direct N" not in arms:
                measure(bench, seed, record, set(arms))


if __name__ == "__main__":
    main()
