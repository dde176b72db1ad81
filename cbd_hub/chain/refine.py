"""``refine``: several ways to make one model, compared by their loss on the calibration tokens that a chain ships.

No rule is best everywhere, and a loss on a few thousand tokens is cheap next to any training. So the plan's model is
compared with its neighbors, one knob at a time: the weight of the small anchor, the weight of what only the large one
has, which layers carry a greater depth, the large anchor pruned and refitted, the small one expanded, and the best of
these refitted. Half of the tokens are for the refits, which overfit what they see. On the other half all candidates
are compared: on a part of it first, and the winner then has to beat the plan's own model on the whole by more than
chance would do (two paired standard errors), so that `refine` may only improve on it.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_hub.devices import working_device
from cbd_hub.errors import IntegrityError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.initialization.refit import REFIT_TOKENS, can_refit, refit
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.plan import Plan
from cbd_hub.interpolation.ranges import needed_by, needed_of_control
from cbd_hub.losses.heads import kept_hidden
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.manifest.manifest import Manifest
from cbd_hub.progress import progress_bar

__all__ = ["SCREEN_TOKENS", "Candidate", "choose", "list_candidates", "load_calibration", "save_calibration"]

SCREEN_TOKENS = 4096
"""Tokens on which the candidates are screened; the winner is confirmed on all that the chain ships."""

_ALPHA_STEP = 0.2
_MOST_DEPTHS = 3
_PARTS = 32  # groups of equally many blocks, at least, whose losses are compared pairwise


@dataclass(frozen=True)
class Candidate:
    """One way to make the model."""

    name: str
    plan: Plan
    refit: bool = False
    """Whether its output projections are then fitted to the large anchor (:mod:`cbd_hub.initialization.refit`)."""


def list_candidates(plan: Plan, manifest: Manifest) -> Generator[list[Candidate], Candidate, None]:
    """Yields the candidates beside the plan itself in stages; :func:`choose` sends the best so far back.

    Args:
        plan: What would be made without refining.
        manifest: The chain's manifest.
    """
    best = Candidate("planned", plan)
    if plan.method in ("interpolate", "bezier"):
        alpha = plan.alpha
        alphas = [a for a in (alpha - _ALPHA_STEP, alpha + _ALPHA_STEP) if 0 < a < 1]
        full = _again(plan, manifest, alpha, large_only_weight=1.0)
        best = yield [
            *(
                [Candidate(f"{plan.method}, large-only units at full weight", full)]
                if plan.large_only_weight < 1
                else []
            ),
            *(Candidate(f"{plan.method}, alpha {a:.2f}", _again(plan, manifest, a)) for a in alphas),
            *([Candidate("interpolate", _again(plan, manifest, method="interpolate"))] if plan.needed_control else []),
        ]
        best = yield [
            Candidate(f"{best.name}, other layers ({i + 1})", _again(best.plan, manifest, index_map=index_map))
            for i, index_map in enumerate(_other_layers(plan))
        ]
    others = [m for m in ("expand", "prune") if m != plan.method]
    fits = can_refit(manifest.resolved_axis_map)
    best = yield [
        Candidate(m + (" + refit" if fits and m == "prune" else ""), again, refit=fits and m == "prune")
        for m in others
        for again in [_again(plan, manifest, {"expand": 1.0, "prune": 0.0}[m], method=m)]
    ]
    if fits and not best.refit:
        yield [Candidate(f"{best.name} + refit", best.plan, refit=True)]


def choose(
    plan: Plan,
    manifest: Manifest,
    make: Callable[[Plan], PreTrainedModel],
    load_large: Callable[[], PreTrainedModel],
    blocks: Tensor,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> PreTrainedModel:
    """Makes and compares the candidates, and returns the best.

    Args:
        plan: What would be made without refining.
        manifest: The chain's manifest.
        make: Carries out a plan, in float32.
        load_large: Loads the plan's large anchor in float32; called at most once, for the refits.
        blocks: (N, S) token ids that no anchor was trained on.
        dtype: Of the result.
        progress: Show a progress bar.

    Returns:
        The model, on the CPU and in ``eval()`` mode. Its ``config.cbd_hub["refine"]`` records the chosen
        ``candidate``, its ``calibration_loss`` and the ``planned_loss`` in nats a token over ``calibration_tokens``,
        and the screened losses of all (``compared``).

    Cost: some ten models are made, one at a time, and evaluated on 4,096 tokens each, two of them on all tokens; a
    refit costs about five passes over 16,384 tokens. Memory: the best model so far, the one that is compared with it
    and its sources, all in float32, and from the first refit on the large anchor. An accelerator is used if there is
    one.
    """
    device = working_device()
    rows = max(1, SCREEN_TOKENS // blocks.shape[1])
    fit_rows = min(max(1, REFIT_TOKENS // blocks.shape[1]), len(blocks) // 2)
    blocks, fit_blocks = blocks[: len(blocks) - fit_rows], blocks[len(blocks) - fit_rows :]
    size = max(1, len(blocks) // _PARTS)
    parts = blocks[: len(blocks) // size * size].split(size)
    large: list[PreTrainedModel] = []

    def build(candidate: Candidate) -> PreTrainedModel:
        model = nn.Module.to(make(candidate.plan), device)
        if candidate.refit:
            if not large:
                large.append(nn.Module.to(load_large(), device))
            candidate_plan, axis_map = candidate.plan, manifest.resolved_axis_map
            units = candidate_plan.pair.index_map
            hidden_units = kept_hidden(
                units, candidate_plan.sizes["hidden"], axis_map.sizes(large[0].config)["hidden"]
            )
            refit(model, large[0], axis_map, units.layers_of(candidate_plan.sizes["layers"]), hidden_units, fit_blocks)
        return model

    best = Candidate("planned", plan)
    model = build(best)
    planned_losses = best_losses = _losses(model, parts)
    losses = {best.name: evaluate_loss(model, blocks[:rows]).loss}
    stages = list_candidates(plan, manifest)
    stage = next(stages, None)
    while stage is not None:
        possible = [candidate for candidate in stage if len(fit_blocks) or not candidate.refit]
        for candidate in progress_bar(possible, "comparing", unit="candidate", enabled=progress):
            candidate_model = build(candidate)
            losses[candidate.name] = evaluate_loss(candidate_model, blocks[:rows]).loss
            if losses[candidate.name] < losses[best.name]:
                best, model = candidate, candidate_model
            del candidate_model  # gone before the next is made
        try:
            stage = stages.send(best)
        except StopIteration:
            stage = None
    if best.name != "planned":
        best_losses = _losses(model, parts)
        gain = planned_losses - best_losses
        if len(gain) < 2 or not gain.mean() > 2 * gain.std(ddof=1) / np.sqrt(len(gain)):
            best, model, best_losses = Candidate("planned", plan), build(Candidate("planned", plan)), planned_losses
    model.config.cbd_hub["refine"] = {
        "candidate": best.name,
        "calibration_loss": float(best_losses.mean()),
        "planned_loss": float(planned_losses.mean()),
        "calibration_tokens": sum(part.numel() for part in parts),
        "compared": losses,
    }
    model.config.dtype = dtype
    for parameter in model.parameters():  # not Module.to(dtype), which would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    return nn.Module.to(model, "cpu")


def _losses(model: PreTrainedModel, parts: Sequence[Tensor]) -> np.ndarray:
    """Loss of each part of the text, (parts,)."""
    return np.array([evaluate_loss(model, part).loss for part in parts])


def _again(
    plan: Plan,
    manifest: Manifest,
    alpha: float | None = None,
    large_only_weight: float | None = None,
    method: str | None = None,
    index_map: IndexMap | None = None,
) -> Plan:
    """The same target, made otherwise."""
    weight, chosen_method = plan.alpha if alpha is None else alpha, method or plan.method
    pair = plan.pair if index_map is None else replace(plan.pair, index_map=index_map)
    if large_only_weight is None:
        # The weight is 1 where the small anchor was only cut out.
        rule = chosen_method in ("interpolate", "bezier") and plan.large_only_weight < 1
        large_only_weight = plan.large_only_weight if alpha is None else 1 - weight**2 if rule else 1.0
    operations = list_operations(pair, plan.sizes, chosen_method, weight, large_only_weight)
    entries = {a.name: a for a in manifest.anchors}
    both = entries[plan.large], entries[plan.small], pair, plan.sizes, operations
    return replace(
        plan,
        alpha=weight,
        method=chosen_method,
        large_only_weight=large_only_weight,
        operations=operations,
        pair=pair,
        needed=needed_by(*both),
        needed_control=needed_of_control(*both),
    )


def _other_layers(plan: Plan) -> list[IndexMap]:
    """Other choices of the layers that the target has beyond the small anchor's."""
    index_map, small = plan.pair.index_map, plan.pair.small["layers"]
    kept_layers, dropped_layers = np.split(index_map.layers, [small])
    if not small < plan.sizes["layers"] < small + len(dropped_layers):
        return []
    shifts = range(1, min(len(dropped_layers), _MOST_DEPTHS + 1))
    return [
        replace(index_map, layers=np.concatenate([kept_layers, np.roll(dropped_layers, -shift)])) for shift in shifts
    ]


def save_calibration(blocks: Tensor, path: Path) -> None:
    """Writes the token ids (N, S) that a chain ships, as int32."""
    save_file({"input_ids": blocks.cpu().numpy().astype(np.int32)}, path)


def load_calibration(manifest: Manifest, path: Path) -> Tensor:
    """Reads the token ids that a chain ships: (N, S) int64.

    Raises:
        IntegrityError: The file is damaged, or what it holds are no token ids of the chain's vocabulary.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, TypeError, AttributeError) as error:  # the last two: a dtype numpy does not have
        raise IntegrityError(f"{path} cannot be read: {error}") from None
    ids, vocabulary = tensors.get("input_ids"), manifest.sizes(manifest.anchors[0])["vocab"]
    if ids is None or ids.dtype != np.int32 or ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise IntegrityError(f"{path} must hold `input_ids`, int32 of shape (blocks, 2 or more tokens)")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise IntegrityError(f"{path} holds token ids outside the vocabulary of {vocabulary}")
    return torch.from_numpy(ids.astype(np.int64))
