"""The chain from SmolLM2-135M, measured: every method at six sizes, the fair controls, another domain, a second seed.

    python examples/smollm2.py
    cbd-hub build examples/recipes/smollm2-135m.yaml --output smollm2-chain
    python benchmarks/smollm2.py smollm2-chain

Writes docs/results/smollm2.json, .md and .png. Takes about an hour and a half on two cores; every figure is kept in
the JSON as soon as it stands, and a run that was cut off goes on from there. All losses are nats a token on 32 blocks
of held-out text that chose nothing; +- is one standard error of the paired difference to `interpolate`, over blocks.
"""

import argparse
import platform
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import results
import torch
from figures import DOMAINS
from harness import OURS
from models import Pair, pruned, refitted
from transformers import PreTrainedModel

from cbd_hub import Chain
from cbd_hub.axes.sizing import solve
from cbd_hub.initialization.refit import REFIT_TOKENS
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.plan import Plan
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import pack


class Bench(harness.Figures):
    """The chain, its text, and the figures so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.results, "smollm2")
        self.positions = options.positions
        self.chain = harness.open_chain(options)
        self.map = self.chain.manifest.resolved_axis_map
        self.made = harness.inputs(options.recipe or harness.toy_recipe())
        data, tokenizer = self.made.recipe.data, self.made.tokenizer
        speeches = data.model_copy(update={"text_files": f"{harness.SPEECHES}/*.txt"})
        picked = load_documents(speeches, Path("/")).shuffle(seed=0).select(range(12))
        texts = self.made.text.test, pack(picked, tokenizer, data.sequence_length)
        self.blocks = {name: harness.first(text, options.blocks) for name, text in zip(DOMAINS, texts, strict=True)}

    def losses(self, model: PreTrainedModel, domains: Iterable[str] = DOMAINS) -> dict[str, list[float]]:
        """Loss of every block, by domain."""
        return {d: [round(harness.loss(model, block[None]).loss, 5) for block in self.blocks[d]] for d in domains}

    def refit(self, model: PreTrainedModel, large: PreTrainedModel, index_map: Any) -> PreTrainedModel:
        """The model with its output projections fitted to the large anchor, on the tokens that the chain ships."""
        if (blocks := self.chain.calibration) is None:
            raise SystemExit("the chain ships no calibration tokens")
        return refitted(model, large, index_map, blocks[: REFIT_TOKENS // blocks.shape[1]])


# -- the methods ------------------------------------------------------------------------------------------------------


def by(method: str, bench: Bench, count: int, plan: Plan) -> PreTrainedModel:
    """One of the library's methods."""
    return bench.chain.initialize(bench.chain.plan(count, method=method), progress=False)


def prune_and_refit(bench: Bench, count: int, plan: Plan) -> PreTrainedModel:
    """Pruned, and fitted to the large anchor."""
    large = next(a for a in bench.chain.anchors if a.name == plan.large).load()
    return bench.refit(by("prune", bench, count, plan), large, plan.pair.index_map)


def variant(even: bool, heavy: bool, bench: Bench, count: int, plan: Plan) -> PreTrainedModel:
    """`interpolate` with layers spread evenly over the size, or what only the large anchor has at weight 1."""
    if even:
        sizes = solve(bench.map, count, plan.pair.small, plan.pair.large, shallow=False)
        plan = bench.chain.plan(shape=bench.map.config_fields(sizes), method=OURS)
    if heavy:
        operations = list_operations(plan.pair, plan.sizes, plan.method, plan.alpha, 1.0)
        plan = replace(plan, operations=operations)
    return bench.chain.initialize(plan, progress=False)


Make = Callable[[Bench, int, Plan], PreTrainedModel]
METHODS: dict[str, tuple[Make, tuple[str, ...]]] = {
    OURS: (partial(by, OURS), DOMAINS),
    "prune": (partial(by, "prune"), DOMAINS),
    "prune + refit": (prune_and_refit, DOMAINS),
    "expand": (partial(by, "expand"), DOMAINS[:1]),
    "paper": (partial(by, "paper"), DOMAINS[:1]),
}
VARIANTS: dict[str, tuple[Make, tuple[str, ...]]] = {
    "own units at weight 1": (partial(variant, False, True), DOMAINS[:1]),
    "even spread": (partial(variant, True, False), DOMAINS[:1]),
    "even spread, weight 1": (partial(variant, True, True), DOMAINS[:1]),
}


def measure(ways: dict[str, tuple[Make, tuple[str, ...]]], bench: Bench) -> None:
    """The anchors, and every way at three sizes between every two neighbors."""
    for anchor in bench.chain.anchors:
        bench.keep(f"anchor {anchor.name}", lambda a=anchor: bench.losses(a.load()))
    for large, small, count, plan in harness.between(bench.chain, bench.positions):
        size = plan.num_parameters
        for name, (make, domains) in ways.items():
            bench.keep(f"{size} {name}", lambda m=make, c=count, p=plan, d=domains: bench.losses(m(bench, c, p), d))
        facts = {"r": round(plan.position, 3), "shape": dict(plan.shape), "small": small.name, "large": large.name}
        bench.keep(f"{size} plan", lambda f=facts: f)


def measure_refine(bench: Bench) -> None:
    """`refine=True` at every size of the table, those in the middle of a pair first."""

    def run(size: int) -> dict[str, Any]:
        model = bench.chain.initialize(bench.chain.plan(size, method=OURS), refine=True)
        return {**bench.losses(model, DOMAINS[:1]), "report": model.config.cbd_hub["refine"]}

    for key in sorted((k for k in bench.found if k.endswith(" plan")), key=lambda k: abs(bench.found[k]["r"] - 0.5)):
        bench.keep(key.replace(" plan", " refine"), lambda k=key: run(int(k.split()[0])))


# -- the controls -----------------------------------------------------------------------------------------------------


def measure_controls(bench: Bench) -> None:
    """Whether the lead is alignment or adaptation to the text: the rivals get the same tokens; and a second seed."""
    chain, config = bench.chain, bench.made.recipe.distillation
    large, small = chain.anchors[:2]
    plan = chain.plan(round((large.num_parameters + small.num_parameters) / 2), method=OURS)
    source, units = large.load(), plan.pair.index_map

    def trained(student: PreTrainedModel, teacher: PreTrainedModel | None, index_map: Any, seed: int = 0) -> int:
        settings = config.model_copy(update={"seed": config.seed + seed} | ({} if teacher else {"ce": 1.0}))
        steps = harness.train(
            student, teacher, bench.made.text.train, bench.made.validation, settings, index_map=index_map
        )
        return max(steps) * config.batch_size * config.gradient_accumulation * bench.blocks[DOMAINS[0]].shape[1]

    def start(teacher: PreTrainedModel, sizes: Any) -> PreTrainedModel:
        return bench.refit(pruned(teacher, sizes, units), teacher, units)

    def pruned_distilled() -> dict[str, Any]:
        student, layers = start(source, plan.sizes), units.layers.copy()
        layers[: plan.sizes["layers"]].sort()
        tokens = trained(student, source, replace(units, layers=layers))
        return {**bench.losses(student), "tokens": tokens}

    def adapted_pruned() -> dict[str, Any]:
        teacher = large.load()
        tokens = trained(teacher, None, None)
        ways = {
            "teacher": lambda: teacher,
            "prune": lambda: pruned(teacher, plan.sizes, units),
            "prune + refit": lambda: start(teacher, plan.sizes),
        }
        return {"tokens": tokens, **{name: bench.losses(make()) for name, make in ways.items()}}

    def second_seed() -> dict[str, Any]:
        student = start(source, plan.pair.small)
        tokens = trained(student, source, units, seed=1)
        between = Pair(source, student, units).combine(plan.sizes, OURS, plan.alpha)
        losses = {"anchor": student, OURS: between}
        return {**{name: bench.losses(model, DOMAINS[:1]) for name, model in losses.items()}, "tokens": tokens}

    bench.keep("control: pruned, distilled on the same tokens", pruned_distilled)
    bench.keep("control: teacher adapted on the same tokens, then pruned", adapted_pruned)
    bench.keep("seed 1", second_seed)


# -- running ----------------------------------------------------------------------------------------------------------


def build_cost(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each anchor's ranking, and of its refit and distillation, from when a build wrote its records."""
    at = {path.stem: path.stat().st_mtime for path in (folder / ".build").glob("*.json")}
    steps = [i for i in range(1, len(at)) if f"ranking-{i}" in at and f"step-{i}" in at]
    spent = {"ranking": ("ranking-{1}", "step-{0}"), "training": ("step-{1}", "ranking-{1}")}
    return {
        f"step {i}": {
            name: round(at[end.format(i - 1, i)] - at[begin.format(i - 1, i)], 1)
            for name, (end, begin) in spent.items()
        }
        for i in steps
    }


def anchors(chain: Chain) -> list[dict[str, Any]]:
    """What the table says of the anchors."""
    return [
        {
            "name": a.name,
            "parameters": a.num_parameters,
            "tokens": t.tokens if (t := a.training) else 0,
            "losses": [t.cut_loss, t.start_loss, t.best_loss] if t else [None] * 3,
        }
        for a in chain.manifest.anchors
    ]


PARTS: dict[str, Callable[[Bench], None]] = {
    "methods": partial(measure, METHODS),
    "refine": measure_refine,
    "controls": measure_controls,
    "variants": partial(measure, VARIANTS),
}


def main() -> None:
    options = harness.options(
        __doc__,
        "the chain of examples/recipes/smollm2-135m.yaml",
        recipe=(harness.RECIPES / "smollm2-135m.yaml", "of the chain", None),
        positions=([0.25, 0.5, 0.75], "between neighbors, 0 to 1", [0.5]),
        blocks=(32, "held-out blocks of each domain", 2),
        only=([*PARTS], f"parts to measure, of {', '.join(PARTS)}, or table"),
    )
    bench = Bench(options)
    folder = options.chain or options.results / "chain"
    if (folder / ".build").is_dir():
        bench.keep("build", lambda: build_cost(folder))
    for name in options.only:
        if name != "table":
            PARTS[name](bench)
    tokens = sum(len(row) - 1 for row in bench.blocks[DOMAINS[0]])
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    bench.found |= {"anchors": anchors(bench.chain), "held_out_tokens": tokens, "machine": where}
    results.save("smollm2", bench.found, options.results)


if __name__ == "__main__":
    main()
