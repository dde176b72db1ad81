"""The state of ``benchmarks/quality.py``: the figures so far, the text, and the models of one seed."""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import quality_arms as arms
import torch
from datasets import Dataset
from quality_arms import Pair, Settings
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_hub import Chain, build_chain
from cbd_hub.alignment.ranking import rank
from cbd_hub.alignment.ready_made import load_ready_made
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import Sizes, parse_count
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.text.packing import pack

__all__ = ["OURS", "Bench", "Made", "Seed", "speed_of"]

HERE = Path(__file__).parent
OURS = "interpolate"
"""The arm that all others are compared with."""

Made = tuple[PreTrainedModel, str]
"""A model, and what was chosen to make it."""


class Bench:
    """The config, the text, and the figures so far."""

    def __init__(self, config: dict[str, Any], results: Path, work: Path) -> None:
        self.config, self.path = config, results / "quality.json"
        digest = _digest(config)
        # What was trained before stays good as long as all that decides it does.
        self.work = work / _digest({name: config[name] for name in ("recipe", "independent", "validation_tokens")})
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        if self.found.setdefault("config_sha256", digest) != digest:
            raise SystemExit(f"{self.path} is of another config; remove it, or name another folder (--results)")
        self.found.setdefault("config", config)
        self.found.setdefault("runs", []).append(_machine())
        self.figures: dict[str, dict[str, Any]] = self.found.setdefault("figures", {})
        self.seconds: dict[str, dict[str, float]] = self.found.setdefault("seconds", {})
        made = BuildInputs(load_recipe(self.recipe(0))[0], Path.cwd())
        if made.text is None or made.tokenizer is None:
            raise SystemExit("the recipe has no text")
        length = self.config["recipe"]["data"]["sequence_length"]

        def some(blocks: Dataset, tokens: int) -> Dataset:
            return blocks.select(range(min(len(blocks), max(1, tokens // length))))

        self.train = made.text.train
        self.test = some(made.text.test, config["test_tokens"])
        self.validation = some(made.text.validation, config["validation_tokens"])
        self.calibration = made.calibration()
        self.refit_blocks = made.refit_blocks()
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

    def save(self) -> None:
        """Writes the JSON whole, or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n")
        partial.replace(self.path)

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

    def keep(self, arm: str, size: int, seed: int, steps: int, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns a figure, measured now or in an earlier run."""
        key = f"{arm} | {size} | seed {seed} | {steps} steps"
        if key not in self.figures:
            started = time.monotonic()
            value = make()
            self.figures[key] = {"arm": arm, "size": size, "seed": seed, "steps": steps, **value}
            self.figures[key]["seconds"] = round(time.monotonic() - started, 2)
            self.save()
            print(key, value.get("loss"), flush=True)
        return self.figures[key]

    def loss(self, model: PreTrainedModel, blocks: Dataset | None = None) -> dict[str, Any]:
        """Loss on the test text (or on other blocks), and on how many tokens."""
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        found = evaluate_loss(nn.Module.to(model, device), self.test if blocks is None else blocks)
        nn.Module.to(model, "cpu")
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

    def settings(self, tokens: int | None = None, **more: Any) -> Settings:
        """How an anchor is trained, with something else changed."""
        d = self.recipe.distillation
        values: dict[str, Any] = {"learning_rate": d.learning_rate, "batch_size": d.batch_size, "seed": self.number}
        return Settings(**{"tokens": tokens or self.tokens, "work": self.folder / "work", **values, **more})

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
            student = arms.pruned(self.source, sizes, kept)
            arms.refitted(student, self.source, kept, self.bench.refit_blocks)
            arms.train(student, self.source, self.bench.train, self.bench.validation, self.settings(tokens), kept)
            return student

        return Pair(self.source, self.saved(name, make), kept)

    @cached_property
    def layered(self) -> Pair:
        """Source and a student of every other layer, otherwise the same: what Boomerang starts from."""
        sizes = self.sizes(self.source)
        layers = np.arange(sizes["layers"])
        units = IndexMap(np.concatenate([layers[::2], layers[1::2]]))
        return self.distilled("layered", {**sizes, "layers": len(layers[::2])}, self.tokens, units)

    @cached_property
    def sparse(self) -> Pair:
        """Source and smallest anchor with none in between, distilled on the tokens of both anchors."""
        return self.distilled("sparse", self.sizes(self.anchors[-1]), self.tokens * len(self.pairs))

    @cached_property
    def independent(self) -> list[Pair]:
        """The same sizes, each trained from scratch; units are paired in the order that they have, as in the paper."""

        def make(like: PreTrainedModel, index: int) -> PreTrainedModel:
            model = arms.random_init(like.config, 1000 * (index + 1) + self.number)
            spec = self.bench.config["independent"]
            settings = self.settings(parse_count(spec["tokens"]), **speed_of(spec))
            arms.train(model, None, self.bench.train, self.bench.validation, settings)
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
        pair, apart, bench = self.pairs[number], self.independent[number], self.bench
        axis_map = pair.axis_map
        layers = arms.depth_only(axis_map, pair.sizes[1], plan.num_parameters)

        def paper(which: Pair) -> Made:
            made = {f"alpha {a}": lambda a=a: arms.combine(plan, which, "paper", a) for a in bench.config["alphas"]}
            return arms.best_of(made, bench.choose)[::-1]

        def sparse() -> Made:
            other = arms.plan_between(self.sparse, plan.num_parameters)
            return arms.combine(other, self.sparse), f"{other.num_parameters} parameters"

        def aligned_afterwards() -> Made:
            small, units = load_ready_made(apart.small, apart.large, axis_map, bench.calibration, progress=False)
            return arms.combine(plan, Pair(apart.large, small, units)), ""

        def cut(units: Any, refit: bool) -> Made:
            model = arms.pruned(pair.large, plan.sizes, units)
            return (arms.refitted(model, pair.large, units, bench.refit_blocks) if refit else model), ""

        chance = arms.random_map(axis_map, pair.sizes[1], plan.sizes, self.number)
        config = pair.large.config
        found: dict[str, Callable[[], Made | None]] = {
            OURS: lambda: (self.chain.initialize(plan, progress=False), ""),
            "random init": lambda: (arms.random_init(arms.combine(plan, pair, "prune").config, self.number), ""),
            "expand, zero padding": lambda: (arms.combine(plan, pair, "expand"), ""),
            "expand, duplication": lambda: (arms.duplicate(plan, pair), ""),
            "prune": lambda: cut(pair.index_map, False),
            "prune + refit": lambda: cut(pair.index_map, True),
            "random subset": lambda: cut(chance, False),
            "random subset + refit": lambda: cut(chance, True),
            "weight subcloning": lambda: (arms.subclone(pair.large, plan.sizes), ""),
            "paper, aligned anchors": lambda: paper(pair),
            "paper, independent anchors": lambda: paper(apart),
            "interpolate, independent anchors aligned afterwards": aligned_afterwards,
            "interpolate, no middle anchor": sparse,
        }
        if layers is not None and config.num_hidden_layers > layers:
            found["passthrough, layers dropped"] = lambda: arms.drop_layers(pair.large, layers, bench.choose)[::-1]
            if number == 0 and layers > self.sizes(self.layered.small)["layers"]:
                found["boomerang, layers patched"] = lambda: (
                    None if (made := arms.patch(self.layered, layers, bench.choose)) is None else made[::-1]
                )
        return found


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def speed_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Learning rate and batch size of a part of the config."""
    return {"learning_rate": float(spec["learning_rate"]), "batch_size": spec["batch_size"]}


def _machine() -> dict[str, Any]:
    """Where and with what a run is made."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": gpu,
        "commit": git("rev-parse", "HEAD"),
        "changed_files": git("status", "--porcelain", "../cbd_hub").splitlines(),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("cbd_hub", "torch", "transformers", "tokenizers", "datasets", "numpy")},
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
