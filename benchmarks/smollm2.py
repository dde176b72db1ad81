"""The chain from SmolLM2-135M, measured: every method at six sizes, the fair controls, another domain, a second seed.

    python examples/smollm2.py
    cbd-hub build examples/recipes/smollm2-135m.yaml --output smollm2-chain
    python benchmarks/smollm2.py smollm2-chain

Writes docs/results/smollm2.json, .md and .png. Takes about an hour and a half on two cores; every figure is kept in
the JSON as soon as it stands, and a run that was cut off goes on from there. All losses are nats a token on 32 blocks
of held-out text that chose nothing; +- is one standard error of the paired difference to `interpolate`, over blocks.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from transformers import PreTrainedModel

from cbd_hub import Chain
from cbd_hub.axes.sizing import solve
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.initialization.refit import REFIT_TOKENS, refit
from cbd_hub.interpolation.materialize import blend_models, cut
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.plan import Plan
from cbd_hub.losses.heads import kept_hidden
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import pack
from cbd_hub.training.distill import distill

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
VARIANTS = ("own units at weight 1", "even spread", "even spread, weight 1")
POSITIONS = (0.25, 0.5, 0.75)
BLOCKS = 32
OTHER = ROOT / "examples" / "data" / "sotu"


class Bench:
    """The chain, its text, and the figures so far."""

    def __init__(self, folder: Path, recipe: Path, results: Path) -> None:
        self.chain = Chain.from_pretrained(folder)
        self.map = self.chain.manifest.resolved_axis_map
        self.recipe, base = load_recipe(recipe)
        self.made = BuildInputs(self.recipe, base)
        self.path = results / "smollm2.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        if self.made.text is None or self.made.tokenizer is None or self.recipe.data is None:
            raise SystemExit("the recipe has no text")
        self.train = self.made.text.train
        self.blocks = {"in domain": rows(self.made.text.test)}
        data = self.recipe.data.model_copy(update={"text_files": f"{OTHER}/*.txt"})
        documents = load_documents(data, Path("/"))
        picked = documents.shuffle(seed=0).select(range(12))
        self.blocks["another domain"] = rows(pack(picked, self.made.tokenizer, data.sequence_length))

    def keep(self, key: str, make: Callable[[], Any]) -> Any:
        """Returns a figure, measured now or in an earlier run."""
        if key not in self.found:
            started = time.monotonic()
            self.found[key] = make()
            self.found.setdefault("seconds", {})[key] = round(time.monotonic() - started, 1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")
            print(key, self.found[key] if not isinstance(self.found[key], dict) else "", flush=True)
        return self.found[key]

    def losses(self, model: PreTrainedModel, *domains: str) -> dict[str, list[float]]:
        """Loss of every block, by domain."""
        return {
            domain: [round(evaluate_loss(model, block[None]).loss, 5) for block in self.blocks[domain]]
            for domain in domains or ("in domain",)
        }

    def refitted(self, model: PreTrainedModel, large: PreTrainedModel, index_map: IndexMap) -> PreTrainedModel:
        """The model with its output projections fitted to the large anchor."""
        blocks = self.chain.calibration
        if blocks is None:
            raise SystemExit("the chain ships no calibration tokens")
        sizes = self.map.sizes(model.config)
        layers = index_map.layers_of(sizes["layers"])
        kept = kept_hidden(index_map, sizes["hidden"], self.map.sizes(large.config)["hidden"])
        refit(model, large, self.map, layers, kept, blocks[: REFIT_TOKENS // blocks.shape[1]])
        return model


def rows(blocks: Any) -> torch.Tensor:
    """The first blocks as a tensor (N, S)."""
    return torch.tensor([row["input_ids"] for row in blocks.select(range(min(BLOCKS, len(blocks))))])


def blend(plan: Plan, bench: Bench, large: PreTrainedModel, small: PreTrainedModel) -> PreTrainedModel:
    """Carries out a plan on two models in memory."""
    return blend_models(plan.operations, plan.pair, plan.sizes, large, small)


def measure_methods(bench: Bench, variants: bool = False) -> None:
    """Every method at three sizes between every two neighbors; or the variants of the rule."""
    chain, anchors = bench.chain, bench.chain.manifest.anchors
    for entry in chain.anchors:
        bench.keep(f"anchor {entry.name}", lambda e=entry: bench.losses(e.load(), *bench.blocks))
    for large, small in pairwise(anchors):
        for position in POSITIONS:
            size = round(small.num_parameters + position * (large.num_parameters - small.num_parameters))
            plan = chain.plan(size, method="interpolate")
            even = solve(bench.map, size, chain.manifest.sizes(small), chain.manifest.sizes(large), shallow=False)
            heavy = replace(plan, operations=operations(bench, plan, 1.0))
            ways: dict[str, Callable[[], PreTrainedModel]] = {
                "interpolate": lambda p=plan: chain.initialize(p, progress=False),
                "prune": lambda s=size: chain.initialize(chain.plan(s, method="prune"), progress=False),
                "prune + refit": lambda s=size, n=large.name: bench.refitted(
                    chain.initialize(chain.plan(s, method="prune"), progress=False),
                    next(a for a in chain.anchors if a.name == n).load(),
                    chain.plan(s, method="prune").pair.index_map,
                ),
                "expand": lambda s=size: chain.initialize(chain.plan(s, method="expand"), progress=False),
                "paper": lambda s=size: chain.initialize(chain.plan(s, method="paper"), progress=False),
                "own units at weight 1": lambda p=heavy: chain.initialize(p, progress=False),
                "even spread": lambda e=even: chain.initialize(
                    chain.plan(shape=bench.map.config_fields(e), method="interpolate"), progress=False
                ),
                "even spread, weight 1": lambda e=even: chain.initialize(
                    heavier(bench, chain.plan(shape=bench.map.config_fields(e), method="interpolate")), progress=False
                ),
            }
            for name, make in ways.items():
                if variants is not (name in VARIANTS):
                    continue
                domains = bench.blocks if name in ("interpolate", "prune", "prune + refit") else ("in domain",)
                bench.keep(f"{plan.num_parameters} {name}", lambda m=make, d=domains: bench.losses(m(), *d))
            bench.keep(f"{plan.num_parameters} plan", lambda p=plan, lo=small, hi=large: facts(p, lo.name, hi.name))


def heavier(bench: Bench, plan: Plan) -> Plan:
    return replace(plan, operations=operations(bench, plan, 1.0))


def operations(bench: Bench, plan: Plan, own_weight: float) -> Any:
    """The plan's operations with another weight for what only the large anchor has."""
    return list_operations(plan.pair, plan.sizes, plan.method, plan.alpha, own_weight)


def facts(plan: Plan, small: str, large: str) -> dict[str, Any]:
    """What the table says of a size."""
    return {"r": round(plan.position, 3), "shape": dict(plan.shape), "small": small, "large": large}


def measure_refine(bench: Bench) -> None:
    """`refine=True` at every size of the table, those in the middle of a pair first."""
    for key in sorted((k for k in bench.found if k.endswith(" plan")), key=lambda k: abs(bench.found[k]["r"] - 0.5)):
        size = int(key.split()[0])

        def run(size: int = size) -> dict[str, Any]:
            model = bench.chain.initialize(bench.chain.plan(size, method="interpolate"), refine=True)
            return {**bench.losses(model), "report": model.config.cbd_hub["refine"]}

        bench.keep(f"{size} refine", run)


def measure_controls(bench: Bench) -> None:
    """Whether the lead is alignment or adaptation to the text: the rivals get the same tokens."""
    chain, recipe = bench.chain, bench.recipe
    large, small = chain.anchors[:2]
    middle = round((large.num_parameters + small.num_parameters) / 2)
    plan = chain.plan(middle, method="interpolate")
    config, pair = recipe.distillation, chain.index_maps[small.name]
    layers = np.concatenate([np.sort(pair.layers[: plan.sizes["layers"]]), pair.layers[plan.sizes["layers"] :]])
    index_map = replace(pair, layers=layers)
    source, sizes = large.load(), chain.manifest.sizes(chain.manifest.anchors[0])
    work = bench.path.parent / "work"

    def trained(student: PreTrainedModel, teacher: PreTrainedModel | None, units: IndexMap | None, seed: int) -> Any:
        settings = config.model_copy(update={"seed": seed} | ({} if teacher else {"ce": 1.0}))
        return distill(
            student, teacher, bench.train, bench.made.validation, settings, index_map=units, work_dir=work / "run"
        )

    def pruned_distilled() -> dict[str, Any]:
        student = bench.refitted(cut(source, bench.map, sizes, plan.sizes, index_map), source, index_map)
        training = trained(student, source, index_map, config.seed)
        return {**bench.losses(student, *bench.blocks), "tokens": training.tokens}

    def adapted_pruned() -> dict[str, Any]:
        teacher = large.load()
        training = trained(teacher, None, None, config.seed)
        result = {"teacher": bench.losses(teacher, *bench.blocks), "tokens": training.tokens}
        student = cut(teacher, bench.map, sizes, plan.sizes, index_map)
        result["prune"] = bench.losses(student, *bench.blocks)
        return result | {"prune + refit": bench.losses(bench.refitted(student, teacher, index_map), *bench.blocks)}

    def second_seed() -> dict[str, Any]:
        small_sizes = chain.manifest.sizes(chain.manifest.anchors[1])
        student = bench.refitted(cut(source, bench.map, sizes, small_sizes, pair), source, pair)
        training = trained(student, source, pair, config.seed + 1)
        between = blend(plan, bench, source, student)
        return {"anchor": bench.losses(student), "interpolate": bench.losses(between), "tokens": training.tokens}

    bench.keep("control: pruned, distilled on the same tokens", pruned_distilled)
    bench.keep("control: teacher adapted on the same tokens, then pruned", adapted_pruned)
    bench.keep("seed 1", second_seed)


def build_cost(folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of each anchor's ranking, and of its refit and distillation, from when a build wrote its records."""
    at = {path.name: path.stat().st_mtime for path in (folder / ".build").glob("*.json")}
    return {
        f"step {i}": {
            "ranking": round(at[f"ranking-{i}.json"] - at[f"step-{i - 1}.json"], 1),
            "training": round(at[f"step-{i}.json"] - at[f"ranking-{i}.json"], 1),
        }
        for i in range(1, len(at))
        if f"ranking-{i}.json" in at and f"step-{i}.json" in at
    }


def main() -> None:
    """Measures what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", type=Path)
    parser.add_argument("--recipe", type=Path, default=ROOT / "examples" / "recipes" / "smollm2-135m.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=("methods", "controls", "refine", "variants", "table"), nargs="*")
    options = parser.parse_args()
    bench = Bench(options.chain, options.recipe, options.results)
    if (options.chain / ".build").is_dir():
        bench.keep("build", lambda: build_cost(options.chain))
    parts: dict[str, Callable[[Bench], None]] = {
        "methods": measure_methods,
        "refine": measure_refine,
        "controls": measure_controls,
        "variants": lambda bench: measure_methods(bench, variants=True),
    }
    for name, measure in parts.items():
        if options.only is None or name in options.only:
            measure(bench)
    anchors = [
        {
            "name": a.name,
            "parameters": a.num_parameters,
            "tokens": t.tokens if (t := a.training) else 0,
            "losses": [t.cut_loss, t.start_loss, t.best_loss] if t else [None] * 3,
        }
        for a in bench.chain.manifest.anchors
    ]
    tokens = sum(len(row) - 1 for row in bench.blocks["in domain"])
    where = f"{platform.machine()}, {torch.get_num_threads()} threads"
    bench.found |= {"anchors": anchors, "held_out_tokens": tokens, "machine": where}
    results.save("smollm2", bench.found, options.results)


if __name__ == "__main__":
    main()
