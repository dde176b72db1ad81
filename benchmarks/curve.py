"""The curve between two anchors against everything else at equal tokens: ``python benchmarks/curve.py CHAIN``.

CHAIN is what ``make quickstart`` leaves (``quickstart-output/chain``). Each seed trains, for every pair: the anchor
alone (N tokens), the anchor and its control point together (2 N), the control point alone beside the plain anchor (N),
one elastic model whose prefixes are the sizes (2 N), and each of a few sizes directly from the large anchor with parts
of N. All are measured on 20,000 test tokens at nine sizes a pair, with the large anchor pruned, pruned and refitted,
and the paper's rule beside them. Writes docs/results/curve.json after each arm, and a call goes on from there; then
curve.md. Two hours on one core.

``--profile gpu`` needs no chain: it cuts a near and a wide neighbor out of SmolLM2-135M (examples/smollm2.py fetches
it) and measures at three sizes, N = 4.83M tokens. It was not run on a GPU yet; counted from 135,000 tokens a second,
a pair takes some 9 minutes of one H100 or H200. ``--seconds 480`` begins no arm later, and the next call goes on.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial
from math import ceil
from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
import results
import torch
import yaml
from models import kept_first
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from cbd_hub import build_chain
from cbd_hub.axes.sizing import parse_count
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.students import curve_to_train, cut_student, refit_if_better
from cbd_hub.chain.chain import Chain
from cbd_hub.initialization.refit import REFIT_TOKENS
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.interpolation.tensors import take
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.curve import Curve, Point, curve_points
from cbd_hub.training.settings import ControlPointConfig
from cbd_hub.training.trainer import Objective

POSITIONS = tuple(k / 10 for k in range(1, 10))
DIRECT: dict[str, tuple[float, float, tuple[float, ...]]] = {
    # part of N → what it is, learning rate over the anchors' (the best of two to four, second pair), where measured
    "N/8": (0.125, 0.25, (0.5,)),
    "N/4": (0.25, 0.5, POSITIONS),
    "N/2": (0.5, 0.5, (0.2, 0.4, 0.6, 0.8)),
    "N": (1.0, 1.0, (0.5,)),
}
ELASTIC_RATE = 1.0
GPU_POSITIONS = (0.25, 0.5, 0.75)
GPU_SHAPES = (  # of the small anchor: the near and the wide pair
    {"num_hidden_layers": 26, "intermediate_size": 1152},
    {"num_hidden_layers": 20, "intermediate_size": 768},
)


def gpu_recipe(tokens: str) -> dict[str, Any]:
    """That of the chain from SmolLM2, divergence alone, 12,288 tokens a step."""
    made = yaml.safe_load((harness.RECIPES / "smollm2-135m.yaml").read_text(encoding="utf-8"))
    for section, key in (("source", "model"), ("data", "text_files")):
        made[section][key] = str((harness.RECIPES / made[section][key]).resolve())
    training = {"tokens": tokens, "ce": 0, "learning_rate": 5e-4, "batch_size": 48, "precision": "bf16"}
    return {**made, "distillation": training, "anchors": [0.77]}


class Elastic(Curve):
    """One set of weights, the large anchor's, whose prefixes are the sizes (MatFormer, arXiv 2310.07707)."""

    def weights(self, point: Point) -> dict[str, Tensor]:
        """The leading units of every tensor."""
        of, large = self.pair.axis_map.layout, self.pair.large
        operations = list_operations(self.pair, point.sizes, "prune", 0.0)
        units = {op.name: (str(op.large_name), of(op.pattern), self.pair.taken(op, point.sizes)) for op in operations}
        return {key: take(self.small.get_parameter(n), at, large, taken) for key, (n, at, taken) in units.items()}


class Bench:
    """One pair of a chain, and its text."""

    def __init__(
        self, chain: Chain, inputs: BuildInputs, index: int, tokens: int, elastic_rate: float, gpu: bool
    ) -> None:
        self.inputs, self.elastic_rate = inputs, elastic_rate
        self.config = inputs.recipe.distillation.model_copy(update={"tokens": tokens})
        self.positions = GPU_POSITIONS if gpu else POSITIONS
        self.parts = {n: (*DIRECT[n][:2], GPU_POSITIONS) for n in ("N/4", "N")} if gpu else DIRECT
        large, small = chain.anchors[index : index + 2]
        self.name, self.large = f"{large.name} → {small.name}", large.load("float32")
        axis_map = chain.manifest.resolved_axis_map
        sizes = chain.manifest.sizes(small.entry), chain.manifest.sizes(large.entry)
        self.pair = Pair(axis_map, *sizes, chain.index_maps[small.name])
        self.smallest, self.points = Point(sizes[0], 0, (), ()), curve_points(self.pair, chain.manifest.layers_last)
        self.fit = inputs.training_blocks(REFIT_TOKENS), inputs.validation
        self.cut, _ = cut_student(self.large, axis_map, sizes[0], self.pair.index_map, *self.fit, False)

    def loss(self, model: PreTrainedModel) -> float:
        """Test loss, nats a token."""
        return harness.loss(model, self.inputs.text.test, batch_size=16, max_tokens=20_000).loss

    def train(
        self, student: PreTrainedModel, tokens: int, seed: int, curve: Any = None, units: Any = None, rate: float = 1
    ) -> None:
        """Distills in place, at a share of the anchors' learning rate."""
        changes = {"tokens": tokens, "seed": seed, "learning_rate": rate * self.config.learning_rate}
        config = self.config.model_copy(update=changes)
        text = self.inputs.text.train, self.inputs.validation
        harness.train(student, self.large, *text, config, curve=curve, index_map=units or self.pair.index_map)

    def curve(self, student: PreTrainedModel, seed: int, together: bool) -> Curve:
        """A curve from the large anchor to a student, trained with it or after it."""
        tokens = self.config.tokens if together else 0
        control = ControlPointConfig(tokens=self.config.tokens, together=together)
        config = self.config.model_copy(update={"tokens": tokens, "seed": seed, "control_point": control})
        length = self.inputs.recipe.data.sequence_length
        if (found := curve_to_train(student, self.large, self.pair, config, True, length)) is None:
            raise SystemExit("the pair has no size between its anchors")
        self.train(student, tokens, seed, curve=found)
        return found

    def nearest(self, position: float) -> Point:
        """The point next to a position."""
        return min(self.points, key=lambda p: abs(self.pair.position(p.num_parameters) - position))

    def elastic(self, seed: int) -> PreTrainedModel:
        """The large anchor after 2 N tokens of training as an elastic model, with the losses of an anchor.

        Every batch passes the whole, the smallest and a random size (sandwich rule, arXiv 1903.05134), and counts
        three times.
        """
        config, points, random = self.config, self.points, np.random.default_rng(seed)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        model = nn.Module.to(deepcopy(self.large), device).train()
        nn.Module.to(self.large, device)
        curve = Elastic(self.large, model, self.pair, learning_rate=0.0, tokens=0, points=points)
        objective = Objective(model, config, self.large, list(range(self.pair.large["layers"])))
        objective.curve = curve
        text, length = self.inputs.text.train, self.inputs.recipe.data.sequence_length
        steps = ceil(2 * config.tokens / (3 * config.batch_size * length))
        optimizer = torch.optim.AdamW(model.parameters(), self.elastic_rate * config.learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup_fraction * steps), steps)
        for _ in range(steps):
            ids = torch.tensor(text[random.choice(len(text), config.batch_size, replace=False)]["input_ids"]).to(
                device
            )
            for objective.point in (None, self.smallest, points[random.integers(len(points))]):
                (objective(ids, input_ids=ids) / 3).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        nn.Module.to(self.large, "cpu")
        return nn.Module.to(model.eval(), "cpu")

    def prune(self, point: Point, large: PreTrainedModel | None = None) -> PreTrainedModel:
        """The large anchor's units alone."""
        return models.pruned(large or self.large, point.sizes, self.pair.index_map)

    def refitted(self, point: Point) -> PreTrainedModel:
        """The same with its output projections fitted."""
        model = self.prune(point)
        refit_if_better(model, self.large, self.pair.axis_map, self.pair.index_map, *self.fit, False)
        return model

    def paper(self, small: PreTrainedModel, point: Point) -> PreTrainedModel:
        """Zero filling."""
        alpha = 1 - self.pair.position(point.num_parameters)
        return models.Pair(self.large, small, self.pair.index_map).combine(point.sizes, "paper", alpha)

    def direct(self, part: float, rate: float, seed: int, point: Point) -> PreTrainedModel:
        """Distilled for this size alone."""
        student, layers = self.prune(point), self.pair.layers(point.sizes["layers"])
        index_map = IndexMap(kept_first(layers, self.pair.large["layers"]), self.pair.index_map.orders)
        self.train(student, round(part * self.config.tokens), seed, units=index_map, rate=rate)
        return student


def measure(bench: Bench, seed: int, keep: Callable[[str, Callable[[], dict[str, float]]], Any]) -> None:
    """All arms of one pair and seed; what an arm needs is trained when it is first needed."""

    @cache
    def plain() -> PreTrainedModel:
        student = deepcopy(bench.cut)
        bench.train(student, bench.config.tokens, seed)
        return student

    alone = cache(lambda: bench.curve(plain(), seed, together=False))
    together = cache(lambda: bench.curve(deepcopy(bench.cut), seed, together=True))
    elastic = cache(lambda: bench.elastic(seed))
    ends: dict[str, dict[str, Callable[[], PreTrainedModel]]] = {
        "anchors": {"large": lambda: bench.large, "plain": plain, "cut": lambda: bench.cut},
        "anchor together": {"small": lambda: together().small},
        "anchors elastic": {"large": elastic, "small": lambda: bench.prune(bench.smallest, elastic())},
    }
    untrained = {} if seed else {"pruned": bench.prune, "pruned + refit": bench.refitted}
    arms: dict[str, tuple[Callable[[Point], PreTrainedModel], tuple[float, ...]]] = {
        name: (make, bench.positions)
        for name, make in {
            "together": lambda point: together().model(point),
            "average": lambda point: alone().model(point, straight=True),
            "paper": lambda point: bench.paper(plain(), point),
            **untrained,
            "control point alone": lambda point: alone().model(point),
            "elastic": lambda point: bench.prune(point, elastic()),
        }.items()
    }
    arms |= {f"direct {n}": (partial(bench.direct, *how, seed), at) for n, (*how, at) in bench.parts.items()}
    for name, models_of in ends.items():
        keep(name, lambda of=models_of: {end: bench.loss(model()) for end, model in of.items()})
    for name, (make, where) in arms.items():
        keep(name, lambda m=make, at=where: {str(r): bench.loss(m(bench.nearest(r))) for r in at})


def main() -> None:
    options = harness.options(
        __doc__,
        "the chain of `make quickstart`",
        Path("quickstart-output/chain"),
        profiles=("smoke", "gpu"),
        seeds=([0, 1, 2], "of training", [0]),
        pairs=([0, 1], "of neighbors, the largest first", [0]),
        elastic_rate=(ELASTIC_RATE, "learning rate of the elastic model over the anchors'"),
        tokens=("", "N, by default the recipe's"),
        seconds=(0, "begin no arm later; 0: no limit"),
    )
    figures, gpu, begun = harness.Figures(options.results, "curve"), options.profile == "gpu", time.monotonic()
    recipe: Any = harness.toy_recipe() if options.smoke else harness.RECIPES / "quickstart.yaml"
    chains = [(harness.open_chain(options), index) for index in options.pairs] if not gpu else []
    for shape in GPU_SHAPES if gpu else ():
        recipe = gpu_recipe(options.tokens or "4830k")
        untrained = {**recipe, "anchors": [{"shape": shape}], "distillation": {"tokens": 0, "control_point": None}}
        chains.append((build_chain(untrained, options.results / f"chain-{shape['num_hidden_layers']}"), 0))
    inputs = harness.inputs(recipe)
    tokens = parse_count(options.tokens or inputs.recipe.distillation.tokens)
    figures.found |= {"tokens": tokens, "about": harness.about()}
    for chain, index in chains:
        bench = Bench(chain, inputs, index, tokens, options.elastic_rate, gpu)
        for seed in options.seeds[:1] if gpu else options.seeds:
            arms = figures.found.setdefault("pairs", {}).setdefault(bench.name, {}).setdefault(str(seed), {})

            def keep(name: str, make: Callable[[], Any], arms: dict[str, Any] = arms) -> None:
                if name in arms or not options.seconds or time.monotonic() - begun < options.seconds:
                    figures.keep(name, make, arms)

            measure(bench, seed, keep)
    results.save("curve", figures.found, options.results)


if __name__ == "__main__":
    main()
