"""The state of ``benchmarks/quality.py``: the figures so far, the text, and the models of one seed."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import harness
import numpy as np
import quality_arms as arms
import torch
from datasets import Dataset
from harness import OURS
from models import Pair, kept_first, pruned, refitted
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

Made = tuple[PreTrainedModel, str]
"""A model, and what was chosen to make it."""


class Bench(harness.Figures):
    """The config, the text, and the figures so far."""

    def __init__(self, config: dict[str, Any], results: Path, work: Path) -> None:
        super().__init__(results, "quality", config_sha256=_digest(config))
        # What was trained before stays good as long as all that decides it does.
        self.work = work / _digest({name: config[name] for name in ("recipe", "independent", "validation_tokens")})
        self.config = self.found.setdefault("config", config)
        self.found.setdefault("runs", []).append(harness.about(*PACKAGES))
        self.figures: dict[str, dict[str, Any]] = self.found.setdefault("figures", {})
        self.seconds: dict[str, dict[str, float]] = self.found.setdefault("seconds", {})
        made = harness.inputs(self.recipe(0))
        length = self.config["recipe"]["data"]["sequence_length"]

        def some(blocks: Dataset, tokens: int) -> Dataset:
            return blocks.select(range(min(len(blocks), max(1, tokens // length))))

        self.train = made.text.train
        self.test = some(made.text.test, config["test_tokens"])
        self.validation = some(made.text.validation, config["validation_tokens"])
        self.calibration = made.calibration()
        self.refit_blocks = made.training_blocks(REFIT_TOKENS)
        # Another domain: the reference manual of the Python language, which every interpreter carries.
        pages = [topics[name] for name in sorted(topics)]
        split = pages[::5], [page for i, page in enumerate(pages) if i % 5]
        packed = [pack(Dataset.from_dict({"text": part}), made.tokenizer, length) for part in split]
        self.other_test, self.other_train = some(packed[0], config["test_tokens"]), packed[1]

    def recipe(self, seed: int) -> dict[str, Any]:
        """The chain's recipe for one seed."""
        recipe = json.loads(json.dumps(self.config["recipe"]))
        if "train" in recipe["source"]:  # else a checkpoint, the same for all seeds
            recipe["source"]["train"]["training"]["seed"] = seed
        recipe["distillation"]["seed"] = seed
        if "text_files" in recipe["data"]:
            recipe["data"]["text_files"] = str((HERE / recipe["data"]["text_files"]).resolve())
        return recipe

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of what is inside to a part's (what a killed run was at is not counted)."""
        wall, cpu = time.monotonic(), time.process_time()
        yield
        spent = {"wall": time.monotonic() - wall, "cpu": time.process_time() - cpu}
        if spent["cpu"] < 1:  # all of it stood already
            return
        before = self.seconds.get(name, {})
        self.seconds[name] = {clock: round(before.get(clock, 0.0) + s, 1) for clock, s in spent.items()}
        self.save()
        print(f"== {name}: {self.seconds[name]} s", flush=True)

    def measure(self, arm: str, size: int, seed: int, steps: int, make: Callable[[], dict[str, Any]]) -> None:
        """Measures a figure, unless an earlier run did."""
        place = {"arm": arm, "size": size, "seed": seed, "steps": steps}
        self.keep(f"{arm} | {size} | seed {seed} | {steps} steps", lambda: {**place, **make()}, self.figures)

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

    @cached_property
    def chain(self) -> Chain:
        """The chain itself."""
        return build_chain(self.recipe, self.folder / "chain", progress=False)

    @cached_property
    def anchors(self) -> list[PreTrainedModel]:
        """Its anchors, the source first."""
        return [anchor.load() for anchor in self.chain.anchors]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Its pairs, the largest first."""
        maps = [self.chain.index_maps[a.name] for a in self.chain.anchors[1:]]
        return [Pair(*models, units) for models, units in zip(pairwise(self.anchors), maps, strict=True)]

    @property
    def source(self) -> PreTrainedModel:
        """The source."""
        return self.anchors[0]

    def sizes(self, model: PreTrainedModel) -> Sizes:
        """Axis sizes of a model."""
        return axis_map_for(model.config).sizes(model.config)

    def train(self, model: PreTrainedModel, teacher: Any, units: Any = None, text: Any = None, **more: Any) -> Any:
        """Trains a model as an anchor is, with something else changed; on the bench's text or on (train, held-out)."""
        d = self.recipe.distillation
        values = {
            "tokens": d.tokens,
            "learning_rate": d.learning_rate,
            "batch_size": d.batch_size,
            "seed": self.number,
        }
        config = DistillationConfig(**{**values, **more})
        return harness.train(
            model, teacher, *(text or (self.bench.train, self.bench.validation)), config, index_map=units
        )

    def saved(self, name: str, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """A model that takes long: read from disk if an earlier run made it."""
        folder = self.folder / name
        if not (folder / "config.json").is_file():
            make().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def distilled(self, name: str, sizes: Sizes, tokens: int, units: IndexMap | None = None) -> Pair:
        """A student of any sizes, cut from the source, refitted and distilled from it."""
        axis_map, blocks = axis_map_for(self.source.config), self.bench.calibration
        kept = units or rank(self.source, axis_map, self.sizes(self.source), sizes, blocks)

        def make() -> PreTrainedModel:
            student = refitted(pruned(self.source, sizes, kept), self.source, kept, self.bench.refit_blocks)
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

        models = [self.source]
        models += [self.saved(f"independent-{i}", lambda a=a, i=i: make(a, i)) for i, a in enumerate(self.anchors[1:])]
        found = []
        for large, small in pairwise(models):
            small, units = load_ready_made(small, large, axis_map_for(large.config), None, progress=False)
            found.append(Pair(large, small, units))
        return found

    def plan(self, count: int) -> tuple[Plan, int]:
        """The library's own plan of a size, and the number of its pair."""
        plan = self.chain.plan(count, method="interpolate")
        return plan, [a.name for a in self.chain.anchors].index(plan.large)

    def arms(self, count: int) -> dict[str, Callable[[], Made | None]]:
        """Every arm that needs no training of its own at a size."""
        plan, number = self.plan(count)
        pair, apart, bench, sizes = self.pairs[number], self.independent[number], self.bench, plan.sizes
        axis_map, whole = pair.units.axis_map, pair.units.large
        layers = arms.depth_only(axis_map, whole, plan.num_parameters)
        chance = arms.random_map(axis_map, whole, sizes, self.number)

        def paper(which: Pair) -> Made:
            made = {f"alpha {a}": lambda a=a: which.combine(sizes, "paper", a) for a in bench.config["alphas"]}
            return arms.best_of(made, bench.choose)[::-1]

        def sparse() -> Made:
            units = self.sparse.units
            wanted = solve(axis_map, plan.num_parameters, units.small, units.large)
            own = count_parameters(axis_map, wanted)
            return self.sparse.combine(wanted, OURS, 1 - units.position(own)), f"{own} parameters"

        def aligned_afterwards() -> PreTrainedModel:
            small, units = load_ready_made(apart.small, apart.large, axis_map, bench.calibration, progress=False)
            return Pair(apart.large, small, units).combine(sizes, OURS, plan.alpha)

        def refit(units: IndexMap) -> PreTrainedModel:
            return refitted(pruned(pair.large, sizes, units), pair.large, units, bench.refit_blocks)

        made: dict[str, Callable[[], PreTrainedModel]] = {
            OURS: lambda: self.chain.initialize(plan, progress=False),
            "random init": lambda: fresh_model(pair.combine(sizes, "prune").config, self.number),
            "expand, zero padding": lambda: pair.combine(sizes, "expand", 1.0),
            "expand, duplication": lambda: arms.duplicate(sizes, pair),
            "prune": lambda: pruned(pair.large, sizes, pair.index_map),
            "prune + refit": lambda: refit(pair.index_map),
            "random subset": lambda: pruned(pair.large, sizes, chance),
            "random subset + refit": lambda: refit(chance),
            "weight subcloning": lambda: arms.subclone(pair.large, sizes),
            "interpolate, independent anchors aligned afterwards": aligned_afterwards,
        }
        found: dict[str, Callable[[], Made | None]] = {name: lambda m=m: (m(), "") for name, m in made.items()}
        found |= {
            "paper, aligned anchors": lambda: paper(pair),
            "paper, independent anchors": lambda: paper(apart),
            "interpolate, no middle anchor": sparse,
        }
        if layers is not None:
            found["passthrough, layers dropped"] = lambda: arms.drop_layers(pair.large, layers, bench.choose)[::-1]
            if number == 0 and layers > self.layered.units.small["layers"]:
                found["boomerang, layers patched"] = lambda: (
                    None if (best := arms.patch(self.layered, layers, bench.choose)) is None else best[::-1]
                )
        return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def speed_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens, learning rate and batch size of a part of the config."""
    rate = float(spec["learning_rate"])
    return {"tokens": parse_count(spec["tokens"]), "learning_rate": rate, "batch_size": spec["batch_size"]}
