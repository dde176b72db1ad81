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

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import pairwise
from math import ceil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import harness
import numpy as np
import quality_arms as arms
import results
import torch
import yaml
from datasets import Dataset
from harness import OURS
from models import Pair, kept_first, pruned, refitted
from quality_arms import Made
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_hub import Chain, build_chain
from cbd_hub.alignment.ranking import rank
from cbd_hub.alignment.ready_made import load_ready_made
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import Sizes, count_parameters, parse_count, solve
from cbd_hub.build.recipe import load_recipe
from cbd_hub.initialization.fresh import fresh_model
from cbd_hub.initialization.refit import REFIT_TOKENS
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.text.packing import pack
from cbd_hub.training.settings import DistillationConfig

HERE = Path(__file__).parent
PACKAGES = ("cbd_hub", "torch", "transformers", "tokenizers", "datasets", "numpy")
Make = Callable[[], Any]


def laid_over(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A config with some of it changed, at any depth."""
    inner = {key for key, value in change.items() if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return base | {key: laid_over(base[key], value) if key in inner else value for key, value in change.items()}


def digest(value: Any) -> str:
    """What tells configs apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def speed_of(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens, learning rate and batch size of a part of the config."""
    rate = float(spec["learning_rate"])
    return {"tokens": parse_count(spec["tokens"]), "learning_rate": rate, "batch_size": spec["batch_size"]}


# -- what is measured on, and with ------------------------------------------------------------------------------------


class Bench(harness.Figures):
    """The config, the text, and the figures so far."""

    def __init__(self, config: dict[str, Any], results: Path, work: Path) -> None:
        super().__init__(results, "quality", config_sha256=digest(config))
        # What was trained before stays good as long as all that decides it does.
        self.work = work / digest({name: config[name] for name in ("recipe", "independent", "validation_tokens")})
        self.config = self.found.setdefault("config", config)
        self.found.setdefault("runs", []).append(harness.about(*PACKAGES))
        self.figures = self.found.setdefault("figures", {})
        self.seconds = self.found.setdefault("seconds", {})
        self.sizes = [*map(parse_count, config["sizes"])]
        self.keys = [*map(parse_count, config["key_sizes"])]
        self.length = config["recipe"]["data"]["sequence_length"]
        made = harness.inputs(self.recipe(0))

        def some(blocks: Dataset, tokens: int) -> Dataset:
            return blocks.select(range(min(len(blocks), max(1, tokens // self.length))))

        self.train = made.text.train
        self.test = some(made.text.test, config["test_tokens"])
        self.validation = some(made.text.validation, config["validation_tokens"])
        self.calibration = made.calibration()
        self.refit_blocks = made.training_blocks(REFIT_TOKENS)
        # Another domain: the reference manual of the Python language, which every interpreter carries.
        pages = [topics[name] for name in sorted(topics)]
        split = pages[::5], [page for i, page in enumerate(pages) if i % 5]
        packed = [pack(Dataset.from_dict({"text": part}), made.tokenizer, self.length) for part in split]
        self.other_test, self.other_train = some(packed[0], config["test_tokens"]), packed[1]

    def recipe(self, seed: int) -> dict[str, Any]:
        """The chain's recipe for one seed."""
        recipe, change = self.config["recipe"], {"distillation": {"seed": seed}}
        if "train" in recipe["source"]:  # else a checkpoint, the same for all seeds
            change["source"] = {"train": {"training": {"seed": seed}}}
        if "text_files" in recipe["data"]:
            change["data"] = {"text_files": str((HERE / recipe["data"]["text_files"]).resolve())}
        return laid_over(recipe, change)

    def part(self, name: str, work: Callable[..., Any], *arguments: Any) -> None:
        """Does some work and adds its time to a part's (what a killed run was at is not counted)."""
        wall, cpu = time.monotonic(), time.process_time()
        work(*arguments)
        spent = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
        if spent["cpu"] >= 1:  # else all of it stood already
            before = self.seconds.get(name, {})
            self.seconds[name] = {clock: round(before.get(clock, 0.0) + s, 1) for clock, s in spent.items()}
            self.save()
            print(f"== {name}: {self.seconds[name]} s", flush=True)

    def loss(self, model: PreTrainedModel, blocks: Dataset | None = None) -> dict[str, Any]:
        """Loss on the test text (or on other blocks), and on how many tokens."""
        found = harness.loss(model, self.test if blocks is None else blocks)
        return {"loss": round(found.loss, 5), "held_out_tokens": found.num_tokens}

    def choose(self, model: PreTrainedModel) -> float:
        """Loss on the text that choices are made by."""
        return float(self.loss(model, self.validation)["loss"])


class Seed:
    """The chain of one seed, and every other model that is trained for it; made once, then read."""

    def __init__(self, bench: Bench, number: int) -> None:
        self.bench, self.number = bench, number
        self.folder = bench.work / f"seed-{number}"
        self.recipe = load_recipe(bench.recipe(number))[0]
        self.tokens = self.recipe.distillation.tokens

    @staticmethod
    def key(arm: str, size: int, seed: int, steps: int) -> str:
        """What a figure is kept under."""
        return f"{arm} | {size} | seed {seed} | {steps} steps"

    def measure(self, arm: str, size: int, make: Make, steps: int = 0) -> None:
        """Measures a model, or keeps the figures that were made of one, unless an earlier run did."""
        place = {"arm": arm, "size": size, "seed": self.number, "steps": steps}

        def figure() -> dict[str, Any]:
            made = make()
            return {**place, **(made if isinstance(made, dict) else self.bench.loss(made))}

        self.bench.keep(self.key(**place), figure, self.bench.figures)

    @cached_property
    def chain(self) -> Chain:
        """Its anchors are the source and those that the recipe names."""
        return build_chain(self.recipe, self.folder / "chain", progress=False)

    @cached_property
    def anchors(self) -> list[PreTrainedModel]:
        """The source first."""
        return [anchor.load() for anchor in self.chain.anchors]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Neighbors, the largest first."""
        maps = [self.chain.index_maps[a.name] for a in self.chain.anchors[1:]]
        return [Pair(*models, units) for models, units in zip(pairwise(self.anchors), maps, strict=True)]

    @property
    def source(self) -> PreTrainedModel:
        """What everything is distilled from."""
        return self.anchors[0]

    @staticmethod
    def sizes(model: PreTrainedModel) -> Sizes:
        """Axis sizes of a model."""
        return axis_map_for(model.config).sizes(model.config)

    def train(self, model: PreTrainedModel, teacher: Any, units: Any = None, text: Any = None, **more: Any) -> Any:
        """Trains a model as an anchor is, with something else changed; on the bench's text or on (train, held-out)."""
        names = ("tokens", "learning_rate", "batch_size")
        values = {name: getattr(self.recipe.distillation, name) for name in names} | {"seed": self.number}
        text = text or (self.bench.train, self.bench.validation)
        return harness.train(model, teacher, *text, DistillationConfig(**{**values, **more}), index_map=units)

    def saved(self, name: str, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """A model that takes long: read from disk if an earlier run made it."""
        folder = self.folder / name
        if not (folder / "config.json").is_file():
            make().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def refit(self, large: PreTrainedModel, sizes: Sizes, units: IndexMap) -> PreTrainedModel:
        """Units of a model, and output projections fitted to it."""
        return refitted(pruned(large, sizes, units), large, units, self.bench.refit_blocks)

    def distilled(self, name: str, sizes: Sizes, tokens: int, units: IndexMap | None = None) -> Pair:
        """A student of any sizes, cut from the source, refitted and distilled from it."""
        axis_map, blocks = axis_map_for(self.source.config), self.bench.calibration
        kept = units or rank(self.source, axis_map, self.sizes(self.source), sizes, blocks)

        def make() -> PreTrainedModel:
            student = self.refit(self.source, sizes, kept)
            self.train(student, self.source, kept, tokens=tokens)
            return student

        return Pair(self.source, self.saved(name, make), kept)

    @cached_property
    def layered(self) -> Pair:
        """Source and a student of every other layer, otherwise the same: what Boomerang starts from."""
        sizes = self.sizes(self.source)
        layers = np.arange(sizes["layers"])
        units = IndexMap(kept_first(layers[::2], len(layers)))
        return self.distilled("layered", {**sizes, "layers": len(layers[::2])}, self.tokens, units)

    @cached_property
    def sparse(self) -> Pair:
        """Source and smallest anchor with none in between, distilled on the tokens of both anchors."""
        return self.distilled("sparse", self.sizes(self.anchors[-1]), self.tokens * len(self.pairs))

    @cached_property
    def independent(self) -> list[Pair]:
        """The same sizes, each trained from scratch; units are paired in the order that they have, as in the paper."""

        def make(like: PreTrainedModel, index: int) -> PreTrainedModel:
            model = fresh_model(like.config, 1000 * (index + 1) + self.number)
            self.train(model, None, **speed_of(self.bench.config["independent"]))
            return model

        models, found = [self.source], []
        models += [self.saved(f"independent-{i}", partial(make, a, i)) for i, a in enumerate(self.anchors[1:])]
        for large, small in pairwise(models):
            small, units = load_ready_made(small, large, axis_map_for(large.config), None, progress=False)
            found.append(Pair(large, small, units))
        return found

    def plan(self, count: int) -> tuple[Plan, int]:
        """The library's own plan of a size, and the number of its pair."""
        plan = self.chain.plan(count, method="interpolate")
        return plan, [a.name for a in self.chain.anchors].index(plan.large)

    def fresh(self, count: int) -> PreTrainedModel:
        """Random weights in the shape of a size between anchors."""
        plan, number = self.plan(count)
        return fresh_model(self.pairs[number].combine(plan.sizes, "prune").config, self.number)

    def arms(self, count: int) -> dict[str, Callable[[], Made | None]]:
        """Every arm that needs no training of its own at a size."""
        plan, number = self.plan(count)
        pair, apart, choose, sizes = self.pairs[number], self.independent[number], self.bench.choose, plan.sizes
        axis_map, whole = pair.units.axis_map, pair.units.large
        layers = arms.depth_only(axis_map, whole, plan.num_parameters)
        chance = arms.random_map(axis_map, whole, sizes, self.number)

        def paper(which: Pair) -> Made:
            alphas = self.bench.config["alphas"]
            return arms.best_of({f"alpha {a}": partial(which.combine, sizes, "paper", a) for a in alphas}, choose)

        def sparse() -> Made:
            units = self.sparse.units
            wanted = solve(axis_map, plan.num_parameters, units.small, units.large)
            own = count_parameters(axis_map, wanted)
            return self.sparse.combine(wanted, OURS, 1 - units.position(own)), f"{own} parameters"

        def aligned_afterwards() -> PreTrainedModel:
            small, units = load_ready_made(apart.small, apart.large, axis_map, self.bench.calibration, progress=False)
            return Pair(apart.large, small, units).combine(sizes, OURS, plan.alpha)

        found: dict[str, Make] = {
            OURS: lambda: self.chain.initialize(plan, progress=False),
            "random init": lambda: self.fresh(count),
            "expand, zero padding": lambda: pair.combine(sizes, "expand", 1.0),
            "expand, duplication": lambda: arms.duplicate(sizes, pair),
            "prune": lambda: pruned(pair.large, sizes, pair.index_map),
            "prune + refit": lambda: self.refit(pair.large, sizes, pair.index_map),
            "random subset": lambda: pruned(pair.large, sizes, chance),
            "random subset + refit": lambda: self.refit(pair.large, sizes, chance),
            "weight subcloning": lambda: arms.subclone(pair.large, sizes),
            "interpolate, independent anchors aligned afterwards": aligned_afterwards,
            "paper, aligned anchors": lambda: paper(pair),
            "paper, independent anchors": lambda: paper(apart),
            "interpolate, no middle anchor": sparse,
        }
        if layers is not None:
            found["passthrough, layers dropped"] = lambda: arms.drop_layers(pair.large, layers, choose)
            if number == 0 and layers > self.layered.units.small["layers"]:
                found["boomerang, layers patched"] = lambda: arms.patch(self.layered, layers, choose)

        def whole_of(make: Make) -> Made | None:
            return (made, "") if isinstance(made := make(), PreTrainedModel) else made

        return {name: partial(whole_of, make) for name, make in found.items()}


# -- the questions ----------------------------------------------------------------------------------------------------


def start(seed: Seed) -> None:
    """Every arm at every size with no recovery, the anchors, and our loss along alpha."""
    for index, model in enumerate(seed.anchors):
        seed.measure(f"anchor {index}", model.num_parameters(), lambda m=model: m)
    for index, pair in enumerate(seed.independent):
        seed.measure(f"independent anchor {index + 1}", pair.small.num_parameters(), lambda p=pair: p.small)
    for count in seed.bench.sizes:
        start_of(seed, count)


def start_of(seed: Seed, count: int) -> None:
    """Every arm of one size with no recovery, on test text; ours along alpha, on the text that choices are made by."""
    plan, number = seed.plan(count)
    place = {"position": round(plan.position, 4), "pair": number}

    def one(make: Callable[[], Made | None]) -> dict[str, Any]:
        if (made := make()) is None:
            return {"loss": None}
        return {**seed.bench.loss(made[0]), "chosen": made[1], "own_size": made[0].num_parameters(), **place}

    def along(alpha: float) -> dict[str, Any]:
        return {"loss": round(seed.bench.choose(seed.pairs[number].combine(plan.sizes, OURS, alpha)), 5), **place}

    for arm, make in seed.arms(count).items():
        seed.measure(arm, plan.num_parameters, partial(one, make))
    alphas = {f"{alpha:.3f}": alpha for alpha in seed.bench.config["alphas"]} | {"1 - r": plan.alpha}
    for name, alpha in alphas.items():
        seed.measure(f"alpha {name}", plan.num_parameters, partial(along, alpha))


def recover(seed: Seed, arm: str, size: int, make: Callable[[], Made | None], steps: Sequence[int]) -> None:
    """Trains a start with cross-entropy alone, a constant learning rate, and measures along the way."""
    bench, spec = seed.bench, seed.bench.config["recovery"]
    wanted = [seed.key(arm, size, seed.number, n) for n in steps]
    if all(key in bench.figures for key in wanted) or (made := make()) is None:
        return
    step = spec["batch_size"] * bench.length
    speed = float(spec["random_init_learning_rate" if arm == "random init" else "learning_rate"])
    how = {"tokens": steps[-1] * step, "learning_rate": speed, "batch_size": spec["batch_size"]}
    how |= {"schedule": "constant", "eval_every": min(steps)}
    curve = seed.train(made[0], None, text=(bench.train, bench.test), **how)
    for n in steps:
        seed.measure(arm, size, lambda n=n: {"loss": curve[n], "tokens": n * step}, n)


def recovery(seed: Seed, count: int, only: Sequence[str] | None = None) -> None:
    """Nearly all arms (or some) after a few steps; a few of them after many, at the first key size."""
    spec, more = seed.bench.config["recovery"], seed.bench.config["long"]
    for arm, make in seed.arms(count).items():
        if arm not in spec["not"] if only is None else arm in only:
            long = [more["steps"]] if count == seed.bench.keys[0] and arm in more["arms"] else []
            recover(seed, arm, seed.plan(count)[0].num_parameters, make, [*spec["steps"], *long])


def direct(seed: Seed, count: int) -> None:
    """The size distilled from the source itself: on an anchor's tokens, and for shares of the chain's compute."""
    plan, _ = seed.plan(count)
    size, source = plan.num_parameters, seed.source.num_parameters()
    counts = [model.num_parameters() for model in seed.anchors]

    def compute(student: int, teacher: int) -> int:
        return 6 * student + 2 * teacher  # floating-point operations a token

    spent = sum(seed.tokens * compute(small, large) for large, small in pairwise(counts))
    step = seed.recipe.distillation.batch_size * seed.bench.length
    budgets = {"equal tokens": seed.tokens}
    budgets |= {f"1/{n} of the compute": spent // n // compute(size, source) for n in seed.bench.config["share"]}
    for label, tokens in budgets.items():
        tokens = ceil(tokens / step) * step

        def one(tokens: int = tokens, label: str = label) -> dict[str, Any]:
            name = f"direct-{size}-{label.replace('/', '-').replace(' ', '-')}"
            return {**seed.bench.loss(seed.distilled(name, plan.sizes, tokens).small), "tokens": tokens}

        seed.measure(f"direct from a pruned start, {label}", size, one)

    def fresh() -> dict[str, Any]:
        model = seed.fresh(count)
        seed.train(model, seed.source, learning_rate=float(seed.bench.config["scratch"]["learning_rate"]))
        return {**seed.bench.loss(model), "tokens": ceil(seed.tokens / step) * step}

    seed.measure("direct from random init, equal tokens", size, fresh)


def scratch(seed: Seed, count: int) -> None:
    """The size trained from scratch for long, measured along the way."""
    bench, spec = seed.bench, speed_of(seed.bench.config["scratch"])

    def one() -> dict[str, Any]:
        tokens, step = spec["tokens"], spec["batch_size"] * bench.length
        how = {**spec, "eval_every": max(1, tokens // step // 20)}
        curve = seed.train(seed.fresh(count), None, text=(bench.train, bench.test), **how)
        return {"loss": curve[max(curve)], "tokens": tokens, "curve": {str(n * step): v for n, v in curve.items()}}

    seed.measure("scratch, long", seed.plan(count)[0].num_parameters, one)


def controls(seed: Seed) -> None:
    """Whether the lead is alignment or adaptation to the text: the same tokens for all, and tokens of other text."""
    bench, (plan, number) = seed.bench, seed.plan(seed.bench.keys[0])
    pair, size = seed.pairs[number], plan.num_parameters
    ready = seed.arms(size)

    def elsewhere() -> PreTrainedModel:
        student = seed.refit(pair.large, pair.units.small, pair.index_map)
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

    ways: dict[str, Make] = {
        OURS: lambda: ready[OURS]()[0],
        "prune + refit": lambda: ready["prune + refit"]()[0],
        "pruned + refit, distilled on the same tokens": lambda: (
            seed.distilled(f"direct-{size}-equal-tokens", plan.sizes, seed.tokens).small
        ),
        "source trained on the same tokens, pruned + refit": lambda: seed.refit(
            seed.saved("adapted-source", source_again), plan.sizes, pair.index_map
        ),
        "interpolate, anchor distilled on the other domain": other_anchor,
    }
    for name, make in ways.items():
        for domain, blocks in {"own domain": bench.test, "other domain": bench.other_test}.items():
            seed.measure(f"control, {domain}: {name}", size, lambda m=make, b=blocks: bench.loss(m(), b))


def below(seed: Seed) -> None:
    """Sizes below the smallest anchor, cut from it, against random init after the same steps."""
    small, axis_map = seed.anchors[-1], axis_map_for(seed.source.config)
    whole = seed.sizes(small)
    lowest = {**whole, "layers": 1, "ffn": max(1, whole["ffn"] // 8)}
    for count in map(parse_count, seed.bench.config["below"]):
        sizes = solve(axis_map, count, lowest, whole, shallow=False)
        size = count_parameters(axis_map, sizes)

        def cut(sizes: Sizes = sizes) -> PreTrainedModel:
            return seed.refit(small, sizes, rank(small, axis_map, whole, sizes, seed.bench.calibration))

        ways = {
            "below: pruned + refit": cut,
            "random init": lambda c=cut: fresh_model(c().config, seed.number),
        }
        for arm, make in ways.items():
            seed.measure(arm, size, make)
            recover(seed, arm, size, lambda m=make: (m(), ""), seed.bench.config["recovery"]["steps"])


def measure(bench: Bench) -> None:
    """Everything, the most wanted first."""
    seeds = [Seed(bench, number) for number in bench.config["seeds"]]
    some = bench.config["recovery"]["elsewhere"]
    for seed in seeds:
        bench.part("chains and other anchors", lambda s=seed: (s.pairs, s.independent, s.layered, s.sparse))
        bench.part("every arm at step 0", start, seed)
    for count in bench.keys:
        main = count == bench.keys[0]
        for seed in seeds:
            bench.part("recovery at the key sizes", recovery, seed, count, None if main else some["keys"])
            bench.part("direct distillation", direct, seed, count)
            if main or seed is seeds[0]:
                bench.part("scratch, long", scratch, seed, count)
    for seed in seeds:
        bench.part("controls", controls, seed)
        bench.part("below the smallest anchor", below, seed)
    for count in (size for size in bench.sizes if size not in bench.keys):
        bench.part("recovery at the other sizes", recovery, seeds[0], count, some["others"])


def main() -> None:
    options = harness.options(
        __doc__,
        profiles=("smoke", "gpu"),
        config=(HERE / "quality.yaml", "what is run"),
        only=("all", "`tables` measures nothing"),
        work=(harness.ROOT / ".cache" / "quality", "models under way"),
    )
    settings = yaml.safe_load(options.config.read_text())
    profiles = {None: {}, **settings.pop("profiles", {})}
    if options.only != "tables":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        measure(Bench(laid_over(settings, profiles[options.profile]), options.results, options.work))
    results.save("quality", harness.read(options.results, "quality"), options.results)


if __name__ == "__main__":
    main()
