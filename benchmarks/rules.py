"""What the interpolation rule and the solver's order of axes are worth, on the quickstart's chain.

Run with ``python benchmarks/rules.py [CHAIN]`` after ``make quickstart``; writes docs/results/rules.json and rules.md.
Both comparisons are on the validation text, which chose the rules; the quickstart's own table is on text that chose
nothing.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import results

from cbd_hub import Chain, Plan
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.errors import SizeError
from cbd_hub.evaluation.held_out import evaluate_loss

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
MAX_TOKENS = 16_000
POSITIONS = [k / 8 for k in range(1, 8)]


def main(chain: Chain) -> None:
    """Measures both rules over every pair of anchors and writes the tables."""
    text = BuildInputs(*load_recipe(ROOT / "examples" / "recipes" / "quickstart.yaml")).text
    if text is None:
        raise SystemExit("the quickstart recipe has no text")

    def loss(plan: Plan) -> float:
        model = chain.initialize(plan, progress=False)
        return round(evaluate_loss(model, text.validation, max_tokens=MAX_TOKENS).loss, 4)

    weights, layers = [], []
    anchors = chain.manifest.anchors
    for large, small in pairwise(anchors):
        for position in POSITIONS:
            size = round(small.num_parameters + position * (large.num_parameters - small.num_parameters))
            row: dict[str, float | str] = {"pair": f"{small.name} / {large.name}", "parameters": size, "r": position}
            try:
                plan = chain.plan(size, method="interpolate")
            except SizeError:
                continue
            for label, weight in (("weight 1", 1.0), ("1 - alpha", 1 - plan.alpha)):
                row[label] = loss(weighted(plan, weight))
            row |= {"1 - alpha^2 (ours)": loss(plan), "small expanded": loss(chain.plan(size, method="expand"))}
            weights.append(row | {"pruned": loss(chain.plan(size, method="prune"))})
            layers.append(
                {k: row[k] for k in ("pair", "parameters", "r")} | by_layers(chain, small.name, large.name, size, loss)
            )
    result = {"tokens": MAX_TOKENS, "seed": 0, "own_weight": weights, "layers": layers}
    results.save("rules", result, RESULTS)


def weighted(plan: Plan, weight: float) -> Plan:
    """The plan with another weight for what units that only the large anchor has write."""
    operations = (replace(op, own_weight=weight if op.own_weight != 1 else 1.0) for op in plan.operations)
    return replace(plan, operations=tuple(operations))


def by_layers(
    chain: Chain, small: str, large: str, size: int, loss: Callable[[Plan], float]
) -> dict[str, float | str]:
    """Losses of interpolated models of one size, by number of layers."""
    sizes = {a.name: chain.manifest.sizes(a) for a in chain.manifest.anchors}
    axis_map, found = chain.manifest.resolved_axis_map, {}
    for number in range(sizes[small]["layers"], sizes[large]["layers"] + 1):
        widths = range(sizes[small]["ffn"], sizes[large]["ffn"] + 1)
        best = min(
            widths, key=lambda w: abs(count_parameters(axis_map, {**sizes[large], "layers": number, "ffn": w}) - size)
        )
        shape = axis_map.config_fields({**sizes[large], "layers": number, "ffn": best})
        plan = chain.plan(shape=shape, method="interpolate")
        near = abs(plan.num_parameters - size) <= 0.005 * size
        found[f"{number - sizes[small]['layers']} more layers"] = f"{loss(plan)} (ffn {best})" if near else "-"
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chain", nargs="?", type=Path, default=Path("quickstart-output/chain"))
    arguments = parser.parse_args()
    if not (arguments.chain / "chain.json").is_file():
        raise SystemExit(f"there is no chain in {arguments.chain}; run `make quickstart` first")
    main(Chain.from_pretrained(arguments.chain))
