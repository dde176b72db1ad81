"""What the interpolation rule and the solver's order of axes are worth, on the quickstart's chain.

Run with ``python benchmarks/rules.py [CHAIN]`` after ``make quickstart``; writes docs/results/rules.json and rules.md.
Both comparisons are on the validation text, which chose the rules; the quickstart's own table is on text that chose
nothing.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import harness
import results

from cbd_hub import Chain, Plan
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.manifest.manifest import Anchor

MAX_TOKENS = 16_000
POSITIONS = [k / 8 for k in range(1, 8)]


def weighted(plan: Plan, weight: float) -> Plan:
    """The plan with another weight for what units that only the large anchor has write."""
    operations = (
        replace(op, large_only_weight=weight if op.large_only_weight != 1 else 1.0) for op in plan.operations
    )
    return replace(plan, operations=tuple(operations))


def by_layers(
    chain: Chain, large: Anchor, small: Anchor, size: int, loss: Callable[[Plan], float]
) -> dict[str, float | str]:
    """Losses of interpolated models of one size, by number of layers."""
    low, high = chain.manifest.sizes(small), chain.manifest.sizes(large)
    axis_map, found = chain.manifest.resolved_axis_map, {}
    for number in range(low["layers"], high["layers"] + 1):
        of = {w: {**high, "layers": number, "ffn": w} for w in range(low["ffn"], high["ffn"] + 1)}
        best = min(of, key=lambda w: abs(count_parameters(axis_map, of[w]) - size))
        plan = chain.plan(shape=axis_map.config_fields(of[best]), method="interpolate")
        near = abs(plan.num_parameters - size) <= 0.005 * size
        found[f"{number - low['layers']} more layers"] = f"{loss(plan)} (ffn {best})" if near else "-"
    return found


def main() -> None:
    options = harness.options(__doc__, "the chain of `make quickstart`", Path("quickstart-output/chain"))
    chain = harness.open_chain(options)
    recipe = harness.toy_recipe() if options.smoke else harness.RECIPES / "quickstart.yaml"
    validation = harness.inputs(recipe).text.validation

    def loss(plan: Plan) -> float:
        model = chain.initialize(plan, progress=False)
        return round(harness.loss(model, validation, max_tokens=MAX_TOKENS).loss, 4)

    weights, layers = [], []
    for large, small, size, plan in harness.between(chain, POSITIONS):
        row = {"pair": f"{small.name} / {large.name}", "parameters": size, "r": round(8 * plan.position) / 8}
        plans = {
            "weight 1": weighted(plan, 1.0),
            "1 - alpha": weighted(plan, 1 - plan.alpha),
            "1 - alpha^2 (ours)": plan,
            "small expanded": chain.plan(size, method="expand"),
            "pruned": chain.plan(size, method="prune"),
        }
        weights.append({**row, **{label: loss(wanted) for label, wanted in plans.items()}})
        layers.append({**row, **by_layers(chain, large, small, size, loss)})
    result = {"tokens": MAX_TOKENS, "seed": 0, "own_weight": weights, "layers": layers}
    results.save("rules", result, options.results)


if __name__ == "__main__":
    main()
