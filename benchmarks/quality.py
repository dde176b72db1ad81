"""The paper's questions at CPU scale: models between anchors, against what users would do instead.

    python benchmarks/quality.py                # everything; one slow core: about an hour
    python benchmarks/quality.py --only tables  # tables and plot again, from the JSON alone
    python benchmarks/quality.py --profile smoke  # a toy scale, to try the script: minutes

benchmarks/quality.yaml says what is run, and how the same is run on a GPU (``--profile gpu``). Writes quality.json,
quality.md and quality.png into docs/results. Every figure is kept in the JSON as soon as it stands (its key says arm,
size, seed and steps), and a run that was cut off goes on from there; models that take long to train lie in ``--work``.

All losses are nats a token on held-out text that chose nothing. A seed decides the weights that the source starts
from, the order of all text, and every random subset; each has a chain of its own.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import harness
import results
import torch
import yaml
from harness import OURS
from models import Pair, pruned, refitted
from quality_seed import Bench, Made, Seed, speed_of
from transformers import PreTrainedModel

from cbd_hub.alignment.ranking import rank
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import Sizes, count_parameters, parse_count, solve
from cbd_hub.initialization.fresh import fresh_model

HERE = Path(__file__).parent


def measure_start(bench: Bench, seed: Seed) -> None:
    """Every arm at every size with no recovery, the anchors, and our loss along alpha."""
    for index, model in enumerate(seed.anchors):
        bench.measure(f"anchor {index}", model.num_parameters(), seed.number, 0, lambda m=model: bench.loss(m))
    for index, pair in enumerate(seed.independent):
        size = pair.small.num_parameters()
        bench.measure(f"independent anchor {index + 1}", size, seed.number, 0, lambda p=pair: bench.loss(p.small))
    for count in map(parse_count, bench.config["sizes"]):
        measure_size(bench, seed, count)


def measure_size(bench: Bench, seed: Seed, count: int) -> None:
    """Every arm of one size with no recovery, on test text; ours along alpha, on the text that choices are made by."""
    plan, number = seed.plan(count)
    place = {"position": round(plan.position, 4), "pair": number}

    def one(make: Callable[[], Made | None]) -> dict[str, Any]:
        if (made := make()) is None:
            return {"loss": None}
        return {**bench.loss(made[0]), "chosen": made[1], "own_size": made[0].num_parameters(), **place}

    def along(alpha: float) -> dict[str, Any]:
        return {"loss": round(bench.choose(seed.pairs[number].combine(plan.sizes, OURS, alpha)), 5), **place}

    for arm, make in seed.arms(count).items():
        bench.measure(arm, plan.num_parameters, seed.number, 0, partial(one, make))
    for alpha in bench.config["alphas"]:
        bench.measure(f"alpha {alpha:.3f}", plan.num_parameters, seed.number, 0, partial(along, alpha))
    bench.measure("alpha 1 - r", plan.num_parameters, seed.number, 0, partial(along, plan.alpha))


def recover(
    bench: Bench, seed: Seed, arm: str, size: int, make: Callable[[], Made | None], steps: Sequence[int]
) -> None:
    """Trains a start with cross-entropy alone, a constant learning rate, and measures along the way."""
    spec = bench.config["recovery"]
    wanted = [f"{arm} | {size} | seed {seed.number} | {n} steps" for n in steps]
    if all(key in bench.figures for key in wanted) or (made := make()) is None:
        return
    step = spec["batch_size"] * bench.config["recipe"]["data"]["sequence_length"]
    speed = float(spec["random_init_learning_rate" if arm == "random init" else "learning_rate"])
    how = {"tokens": steps[-1] * step, "learning_rate": speed, "batch_size": spec["batch_size"]}
    how |= {"schedule": "constant", "eval_every": min(steps)}
    curve = seed.train(made[0], None, text=(bench.train, bench.test), **how)
    for n in steps:
        bench.measure(arm, size, seed.number, n, lambda n=n: {"loss": curve[n], "tokens": n * step})


def measure_recovery(bench: Bench, seed: Seed, count: int, only: Sequence[str] | None = None) -> None:
    """Nearly all arms (or some) after a few steps; a few of them after many, at the first key size."""
    plan, _ = seed.plan(count)
    spec, more = bench.config["recovery"], bench.config["long"]
    first = count == parse_count(bench.config["key_sizes"][0])
    for arm, make in seed.arms(count).items():
        if arm not in spec["not"] if only is None else arm in only:
            long = [more["steps"]] if first and arm in more["arms"] else []
            recover(bench, seed, arm, plan.num_parameters, make, [*spec["steps"], *long])


def measure_direct(bench: Bench, seed: Seed, count: int) -> None:
    """The size distilled from the source itself: on an anchor's tokens, and for shares of the chain's compute."""
    plan, _ = seed.plan(count)
    size, source = plan.num_parameters, seed.source.num_parameters()
    counts = [model.num_parameters() for model in seed.anchors]

    def compute(student: int, teacher: int) -> int:
        return 6 * student + 2 * teacher  # floating-point operations a token

    spent = sum(seed.tokens * compute(small, large) for large, small in pairwise(counts))
    step = seed.recipe.distillation.batch_size * bench.config["recipe"]["data"]["sequence_length"]
    budgets = {"equal tokens": seed.tokens}
    budgets |= {f"1/{n} of the compute": spent // n // compute(size, source) for n in bench.config["share"]}
    for label, tokens in budgets.items():
        tokens = ceil(tokens / step) * step

        def one(tokens: int = tokens, label: str = label) -> dict[str, Any]:
            name = f"direct-{size}-{label.replace('/', '-').replace(' ', '-')}"
            return {**bench.loss(seed.distilled(name, plan.sizes, tokens).small), "tokens": tokens}

        bench.measure(f"direct from a pruned start, {label}", size, seed.number, 0, one)

    def fresh() -> dict[str, Any]:
        model = fresh_model(seed.pairs[0].combine(plan.sizes, "prune").config, seed.number)
        seed.train(model, seed.source, learning_rate=float(bench.config["scratch"]["learning_rate"]))
        return {**bench.loss(model), "tokens": ceil(seed.tokens / step) * step}

    bench.measure("direct from random init, equal tokens", size, seed.number, 0, fresh)


def measure_scratch(bench: Bench, seed: Seed, count: int) -> None:
    """The size trained from scratch for long, measured along the way."""
    plan, number = seed.plan(count)
    spec = bench.config["scratch"]

    def one() -> dict[str, Any]:
        tokens = parse_count(spec["tokens"])
        step = spec["batch_size"] * bench.config["recipe"]["data"]["sequence_length"]
        model = fresh_model(seed.pairs[number].combine(plan.sizes, "prune").config, seed.number)
        how = {**speed_of(spec), "eval_every": max(1, tokens // step // 20)}
        curve = seed.train(model, None, text=(bench.train, bench.test), **how)
        return {"loss": curve[max(curve)], "tokens": tokens, "curve": {str(n * step): v for n, v in curve.items()}}

    bench.measure("scratch, long", plan.num_parameters, seed.number, 0, one)


def measure_controls(bench: Bench, seed: Seed) -> None:
    """Whether the lead is alignment or adaptation to the text: the same tokens for all, and tokens of other text."""
    plan, number = seed.plan(parse_count(bench.config["key_sizes"][0]))
    pair, size = seed.pairs[number], plan.num_parameters
    ready = seed.arms(size)
    tokens = seed.tokens

    def refit(large: PreTrainedModel, sizes: Sizes) -> PreTrainedModel:
        return refitted(pruned(large, sizes, pair.index_map), large, pair.index_map, bench.refit_blocks)

    def elsewhere() -> PreTrainedModel:
        student = refit(pair.large, pair.units.small)
        half = bench.other_train.train_test_split(0.1, seed=0)  # the best weights are chosen by other text as well
        seed.train(student, pair.large, pair.index_map, text=(half["train"], half["test"]))
        return student

    def source_again() -> PreTrainedModel:
        model = seed.chain.anchors[number].load()
        seed.train(model, None)
        return model

    def other_anchor() -> PreTrainedModel:
        other = Pair(pair.large, seed.saved("other-domain", elsewhere), pair.index_map)
        return other.combine(plan.sizes, OURS, plan.alpha)

    ways: dict[str, Callable[[], PreTrainedModel]] = {
        OURS: lambda: ready[OURS]()[0],  # type: ignore[index]
        "prune + refit": lambda: ready["prune + refit"]()[0],  # type: ignore[index]
        "pruned + refit, distilled on the same tokens": lambda: (
            seed.distilled(f"direct-{size}-equal-tokens", plan.sizes, tokens).small
        ),
        "source trained on the same tokens, pruned + refit": lambda: refit(
            seed.saved("adapted-source", source_again), plan.sizes
        ),
        "interpolate, anchor distilled on the other domain": other_anchor,
    }
    for name, make in ways.items():
        for domain, blocks in {"own domain": bench.test, "other domain": bench.other_test}.items():
            bench.measure(
                f"control, {domain}: {name}", size, seed.number, 0, lambda m=make, b=blocks: bench.loss(m(), b)
            )


def measure_below(bench: Bench, seed: Seed) -> None:
    """Sizes below the smallest anchor, cut from it, against random init after the same steps."""
    small, axis_map = seed.anchors[-1], axis_map_for(seed.source.config)
    whole = seed.sizes(small)
    lowest = {**whole, "layers": 1, "ffn": max(1, whole["ffn"] // 8)}
    for count in map(parse_count, bench.config["below"]):
        sizes = solve(axis_map, count, lowest, whole, shallow=False)
        size = count_parameters(axis_map, sizes)

        def cut(sizes: Sizes = sizes) -> Made:
            units = rank(small, axis_map, whole, sizes, bench.calibration)
            return refitted(pruned(small, sizes, units), small, units, bench.refit_blocks), ""

        ways = {
            "below: pruned + refit": cut,
            "random init": lambda s=sizes: (fresh_model(cut(s)[0].config, seed.number), ""),
        }
        for arm, make in ways.items():
            bench.measure(arm, size, seed.number, 0, lambda m=make: bench.loss(m()[0]))
            recover(bench, seed, arm, size, make, bench.config["recovery"]["steps"])


def measure(bench: Bench) -> None:
    """Everything, the most wanted first."""
    seeds = [Seed(bench, number) for number in bench.config["seeds"]]
    keys = [parse_count(size) for size in bench.config["key_sizes"]]
    for seed in seeds:
        with bench.part("chains and other anchors"):
            _ = seed.pairs, seed.independent, seed.layered, seed.sparse
        with bench.part("every arm at step 0"):
            measure_start(bench, seed)
    some = bench.config["recovery"]["elsewhere"]
    for count in keys:
        for seed in seeds:
            with bench.part("recovery at the key sizes"):
                measure_recovery(bench, seed, count, None if count == keys[0] else some["keys"])
            with bench.part("direct distillation"):
                measure_direct(bench, seed, count)
            if count == keys[0] or seed is seeds[0]:
                with bench.part("scratch, long"):
                    measure_scratch(bench, seed, count)
    for seed in seeds:
        with bench.part("controls"):
            measure_controls(bench, seed)
        with bench.part("below the smallest anchor"):
            measure_below(bench, seed)
    with bench.part("recovery at the other sizes"):
        for count in map(parse_count, bench.config["sizes"]):
            if count not in keys:
                measure_recovery(bench, seeds[0], count, some["others"])


def _laid_over(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The config with a profile's changes."""
    merged = dict(base)
    for key, value in change.items():
        inner = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _laid_over(base[key], value) if inner else value
    return merged


def main() -> None:
    """Measures what is missing and writes the tables."""
    options = harness.options(
        __doc__,
        profiles=("smoke", "gpu"),
        config=(HERE / "quality.yaml", "what is run"),
        only=("all", "`tables` measures nothing"),
        work=(harness.ROOT / ".cache" / "quality", "models under way"),
    )
    settings = yaml.safe_load(options.config.read_text())
    profiles = settings.pop("profiles", {})
    settings = _laid_over(settings, profiles[options.profile]) if options.profile else settings
    if options.only != "tables":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        measure(Bench(settings, options.results, options.work))
    results.save("quality", harness.read(options.results, "quality"), options.results)


if __name__ == "__main__":
    main()
