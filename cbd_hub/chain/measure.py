"""What a finished chain says about itself: the losses between its anchors, and the barrier between neighbors."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from cbd_hub.chain.chain import Chain
from cbd_hub.devices import on_accelerator
from cbd_hub.errors import SizeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.evaluation.plots import plot_size_loss
from cbd_hub.manifest.manifest import Anchor, Barrier, CurvePoint, Manifest
from cbd_hub.progress import progress_bar
from cbd_hub.text.documents import Documents

__all__ = ["BARRIER_LIMIT", "barrier_height", "measure_barriers", "measure_curve", "plot_chain"]

BARRIER_LIMIT = 0.1
"""Nats a token. Where the losses along alpha rise higher above the line between their ends, weights are not averaged.
Anchors from independent trainings show .5 to 2; those cut out of their neighbor none, unless half of a tiny model's
layers go at once (up to .33)."""

_ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def measure_barriers(chain: Chain, blocks: Documents, max_tokens: int | None, progress: bool = True) -> list[Anchor]:
    """Measures, for every two neighbors, the loss along alpha at the shape halfway between them.

    At alpha 0 the model is the large anchor pruned, at alpha 1 the small one expanded; between anchors whose units
    correspond the loss falls or sags, between others it rises (Frankle et al. 2020, "Linear Mode Connectivity").

    Returns:
        The manifest's anchors, each with its ``barrier`` to the larger neighbor, and with ``aligned`` False where it
        is above :data:`BARRIER_LIMIT`. A pair with no reachable size in between keeps None.

    Cost: five models a pair are made and evaluated.
    """
    anchors = list(chain.manifest.anchors)
    for i, (large, small) in enumerate(pairwise(anchors)):
        target = (large.num_parameters + small.num_parameters) // 2
        losses: list[float] = []
        try:
            for alpha in progress_bar(_ALPHAS, f"barrier above {small.name}", unit="alpha", enabled=progress):
                plan = chain.plan(target, alpha=alpha, method="interpolate")
                model = chain.initialize(plan, dtype=torch.float32, progress=False)
                with on_accelerator(model):
                    losses.append(evaluate_loss(model, blocks, max_tokens=max_tokens).loss)
        except SizeError:  # a tiny chain whose steps are coarser than the tolerance
            continue
        height = barrier_height(_ALPHAS, losses)
        barrier = Barrier(num_parameters=plan.num_parameters, alphas=list(_ALPHAS), losses=losses, height=height)
        aligned = height <= BARRIER_LIMIT
        anchors[i + 1] = small.model_copy(update={"barrier": barrier, "aligned": aligned})
    return anchors


def barrier_height(alphas: Sequence[float], losses: Sequence[float]) -> float:
    """The largest excess of the inner losses over the straight line between the first and the last."""
    line = np.interp(alphas, [alphas[0], alphas[-1]], [losses[0], losses[-1]])
    return float((np.asarray(losses) - line)[1:-1].max())


def measure_curve(
    chain: Chain, blocks: Documents, per_pair: int, max_tokens: int | None, progress: bool = True
) -> list[CurvePoint]:
    """Measures the held-out loss of models between every two anchors, evenly spaced in parameters.

    Where a pair has a control point, both the curve and the straight line are measured.

    Args:
        chain: A chain with its anchors on disk.
        blocks: Test text.
        per_pair: Sizes between two neighbors.
        max_tokens: Most predicted tokens a measurement.
        progress: Show a progress bar.

    Cost: as many models are made and evaluated, one at a time.
    """
    anchors, points = chain.manifest.anchors, []
    targets = [
        small.num_parameters + (large.num_parameters - small.num_parameters) * k // (per_pair + 1)
        for large, small in pairwise(anchors)
        for k in range(1, per_pair + 1)
    ]
    for target in progress_bar(targets, "size-loss curve", unit="size", enabled=progress):
        try:
            plan = chain.plan(target)
        except SizeError:  # a tiny chain whose steps are coarser than the tolerance
            continue
        plans = [plan, *([chain.plan(target, method="interpolate")] if plan.method == "bezier" else [])]
        for plan in plans:
            model = chain.initialize(plan, dtype=torch.float32, progress=False)
            with on_accelerator(model):
                result = evaluate_loss(model, blocks, max_tokens=max_tokens)
            points.append(CurvePoint(num_parameters=plan.num_parameters, loss=result.loss, method=plan.method))
    return points


def plot_chain(manifest: Manifest, path: Path) -> None:
    """Draws the size-loss curve as a PNG."""
    anchors = [(a.name, a.num_parameters, a.evaluation.loss) for a in manifest.anchors if a.evaluation]
    series: dict[str, list[tuple[int, float]]] = {}
    for point in manifest.curve:
        series.setdefault(point.method, []).append((point.num_parameters, point.loss))
    plot_size_loss({k: sorted(v) for k, v in series.items()}, anchors, path, f"{manifest.name}: held-out loss by size")
