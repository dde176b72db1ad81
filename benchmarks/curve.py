"""The curve between two anchors against everything else at equal tokens: ``python benchmarks/curve.py CHAIN``.

CHAIN is what ``make quickstart`` leaves (``quickstart-output/chain``). Each seed trains, for every pair: the anchor
alone (N tokens), the anchor and its control point together (2 N), the control point alone beside the plain anchor (N),
one elastic model whose prefixes are the sizes (2 N), and each of a few sizes directly from the large anchor with parts
of N. All are measured on 20,000 test tokens at nine sizes a pair, with the large anchor pruned, pruned and refitted,
and the paper's rule beside them. Writes docs/results/curve.json after each arm, and a call goes on from there; then
curve.md. Two hours on one core.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
import results
import torch
from models import kept_first
from torch import Tensor
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.students import curve_to_train, cut_student, refit_if_better
from cbd_hub.chain.chain import Chain
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.interpolation.tensors import take
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.curve import Curve, Point
from cbd_hub.training.settings import ControlPointConfig
from cbd_hub.training.trainer import Objective

POSITIONS = tuple(k / 10 for k in range(1, 10))
DIRECT: dict[str, tuple[float, tuple[float, ...]]] = {  # part of N → what it is, and where it is measured
    "N/8": (0.125, (0.5,)),
    "N/4": (0.25, POSITIONS),
    "N/2": (0.5, (0.2, 0.4, 0.6, 0.8)),
    "N": (1.0, (0.5,)),
}
ELASTIC_RATE = 1.0


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

    def __init__(self, chain: Chain, inputs: BuildInputs, index: int, elastic_rate: float) -> None:
        self.inputs, self.config, self.elastic_rate = inputs, inputs.recipe.distillation, elastic_rate
        large, small = chain.anchors[index : index + 2]
        self.name, self.large = f"{large.name} → {small.name}", large.load("float32")
        axis_map = chain.manifest.resolved_axis_map
        sizes = chain.manifest.sizes(small.entry), chain.manifest.sizes(large.entry)
        self.pair = Pair(axis_map, *sizes, chain.index_maps[small.name])
        self.smallest = Point(sizes[0], 0, (), ())
        self.fit = inputs.refit_blocks(), inputs.validation
        self.cut, _ = cut_student(self.large, axis_map, sizes[0], self.pair.index_map, *self.fit, False)

    def loss(self, model: PreTrainedModel) -> float:
        """Test loss, nats a token."""
        return harness.loss(model, self.inputs.text.test, batch_size=16, max_tokens=20_000).loss

    def train(
        self, student: PreTrainedModel, tokens: int, seed: int, curve: Any = None, index_map: Any = None
    ) -> None:
        """Distills in place."""
        config = self.config.model_copy(update={"tokens": tokens, "seed": seed})
        text = self.inputs.text.train, self.inputs.validation
        units = index_map or self.pair.index_map
        harness.train(student, self.large, *text, config, curve=curve, index_map=units)

    def curve(self, student: PreTrainedModel, seed: int, together: bool) -> Curve:
        """A curve from the large anchor to a student, trained with it or after it."""
        tokens = self.config.tokens if together else 0
        control = ControlPointConfig(tokens=self.config.tokens, together=together)
        config = self.config.model_copy(update={"tokens": tokens, "seed": seed, "control_point": control})
        length = self.inputs.recipe.data.sequence_length
        if (found := curve_to_train(student, self.large, self.pair, config, True, length)) is None:
            raise SystemExit("the pair has no size between its anchors")
        self.train(student, tokens, seed, found)
        return found

    def elastic(self, seed: int, points: Sequence[Point]) -> PreTrainedModel:
        """The large anchor after 2 N tokens of training as an elastic model, with the losses of an anchor.

        Every batch passes the whole, the smallest and a random size (sandwich rule, arXiv 1903.05134), and counts
        three times.
        """
        config, model, random = self.config, deepcopy(self.large).train(), np.random.default_rng(seed)
        curve = Elastic(self.large, model, self.pair, learning_rate=0.0, tokens=0, points=points)
        objective = Objective(model, config, self.large, list(range(self.pair.large["layers"])))
        objective.curve = curve
        text, length = self.inputs.text.train, self.inputs.recipe.data.sequence_length
        steps = ceil(2 * config.tokens / (3 * config.batch_size * length))
        optimizer = torch.optim.AdamW(model.parameters(), self.elastic_rate * config.learning_rate, weight_decay=0.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(config.warmup_fraction * steps), steps)
        for _ in range(steps):
            ids = torch.tensor(text[random.choice(len(text), config.batch_size, replace=False)]["input_ids"])
            for objective.point in (None, self.smallest, points[random.integers(len(points))]):
                (objective(ids, input_ids=ids) / 3).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return model.eval()

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

    def direct(self, part: float, seed: int, point: Point) -> PreTrainedModel:
        """Distilled for this size alone."""
        student, layers = self.prune(point), self.pair.layers(point.sizes["layers"])
        index_map = IndexMap(kept_first(layers, self.pair.large["layers"]), self.pair.index_map.orders)
        self.train(student, round(part * self.config.tokens), seed, index_map=index_map)
        return student


def measure(bench: Bench, seed: int, keep: Callable[[str, Callable[[], dict[str, float]]], Any]) -> None:
    """All arms of one pair and seed."""
    plain, both = deepcopy(bench.cut), deepcopy(bench.cut)
    bench.train(plain, bench.config.tokens, seed)
    alone = bench.curve(plain, seed, together=False)
    together = bench.curve(both, seed, together=True)
    elastic = bench.elastic(seed, alone.points)
    ends = {"large": bench.large, "plain": plain, "cut": bench.cut}
    keep("anchors", lambda: {name: bench.loss(model) for name, model in ends.items()})
    keep("anchor together", lambda: {"small": bench.loss(both)})
    least = bench.prune(bench.smallest, elastic)
    keep("anchors elastic", lambda: {"large": bench.loss(elastic), "small": bench.loss(least)})
    arms: dict[str, tuple[Callable[[Point], PreTrainedModel], tuple[float, ...]]] = {
        "average": (partial(alone.model, straight=True), POSITIONS),
        "paper": (partial(bench.paper, plain), POSITIONS),
        **({} if seed else {"pruned": (bench.prune, POSITIONS), "pruned + refit": (bench.refitted, POSITIONS)}),
        "control point alone": (alone.model, POSITIONS),
        "together": (together.model, POSITIONS),
        "elastic": (partial(bench.prune, large=elastic), POSITIONS),
        **{f"direct {n}": (partial(bench.direct, part, seed), where) for n, (part, where) in DIRECT.items()},
    }
    for name, (make, where) in arms.items():
        points = {str(r): alone.nearest(r) for r in where}
        keep(name, lambda m=make, p=points: {r: bench.loss(m(point)) for r, point in p.items()})


def main() -> None:
    """Measures what is missing and writes the tables."""
    options = harness.options(
        __doc__,
        "the chain of `make quickstart`",
        Path("quickstart-output/chain"),
        seeds=([0, 1, 2], "of training", [0]),
        pairs=([0, 1], "of neighbors, the largest first", [0]),
        elastic_rate=(ELASTIC_RATE, "learning rate of the elastic model over the anchors'"),
    )
    chain, figures = harness.open_chain(options), harness.Figures(options.results, "curve")
    inputs = harness.inputs(harness.toy_recipe() if options.smoke else harness.RECIPES / "quickstart.yaml")
    figures.found |= {"tokens": inputs.recipe.distillation.tokens, "about": harness.about()}
    for index in options.pairs:
        bench = Bench(chain, inputs, index, options.elastic_rate)
        for seed in options.seeds:
            arms = figures.found.setdefault("pairs", {}).setdefault(bench.name, {}).setdefault(str(seed), {})
            if "direct N" not in arms:
                measure(bench, seed, partial(figures.keep, place=arms))
    results.save("curve", figures.found, options.results)


if __name__ == "__main__":
    main()
