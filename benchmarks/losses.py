"""Peak memory and time of the chunked distillation loss, against the plain way that holds all logits.

Run with ``make bench`` or ``python benchmarks/losses.py``; prints a table and writes docs/results/losses.json. The
plain way is the student's and the teacher's logits whole, ``F.cross_entropy`` plus ``F.kl_div``, and a backward pass.

Memory: each way in a process of its own, one step; the peak of resident memory less what was held once the inputs
(hidden states, both heads) existed, so the head's gradient counts for both. Time: both ways by turns in one process
after a step of each to warm up, and the least of each, so what else runs on the machine slows both. Where all logits
would need more than ``--memory``, that row is run with the largest batch that fits.
"""

import platform
import sys
import time
from typing import Any

import harness
import results
import torch
import torch.nn.functional as F
from figures import GOALS_OF_LOSSES
from torch import Tensor, nn

from cbd_hub.losses.distillation import distillation_loss

HIDDEN = 576
PLAIN_TENSORS = 8  # (B, S, V) tensors that the plain way holds at its peak; measured, rounded up

Inputs = tuple[Tensor, nn.Linear, Tensor, nn.Linear, Tensor]


def make_inputs(batch: int, length: int, vocabulary: int) -> Inputs:
    """Student hidden states and head, the teacher's, and labels; both models are HIDDEN wide."""
    torch.manual_seed(0)
    student = torch.randn(batch, length, HIDDEN, requires_grad=True)
    teacher = torch.randn(batch, length, HIDDEN)
    heads = [nn.Linear(HIDDEN, vocabulary, bias=False) for _ in range(2)]
    labels = torch.randint(vocabulary, (batch, length))
    return student, heads[0], teacher, heads[1].requires_grad_(False), labels


def plain(student: Tensor, head: nn.Linear, teacher: Tensor, teacher_head: nn.Linear, labels: Tensor) -> Tensor:
    """The way it is usually written, with no copy that is not needed: sliced before the heads, not after."""
    logits = head(student[:, :-1]).flatten(0, 1)
    with torch.no_grad():
        target = torch.log_softmax(teacher_head(teacher[:, :-1]).flatten(0, 1), -1)
    ce = F.cross_entropy(logits, labels[:, 1:].flatten())
    return ce + F.kl_div(torch.log_softmax(logits, -1), target, reduction="batchmean", log_target=True)


WAYS = {"plain": plain, "chunked": lambda *inputs: distillation_loss(*inputs).loss}


def step(way: str, inputs: Inputs) -> tuple[float, float]:
    """Forward and backward; returns seconds and the loss."""
    inputs[0].grad = inputs[1].weight.grad = None
    start = time.perf_counter()
    loss = WAYS[way](*inputs)
    loss.backward()
    return time.perf_counter() - start, loss.item()


def peak(way: str, *shape: int) -> dict[str, float]:
    """Peak bytes and loss of one way."""
    inputs = make_inputs(*shape)
    harness.forget_peak()
    before = harness.memory("VmRSS")
    loss = step(way, inputs)[1]
    return {"peak_bytes": harness.memory("VmHWM") - before, "loss": loss}


def seconds(repeats: int, *shape: int) -> dict[str, float]:
    """The least seconds of both ways."""
    inputs = make_inputs(*shape)
    found = [{way: step(way, inputs)[0] for way in WAYS} for _ in range(repeats + 1)][1:]
    return {way: min(once[way] for once in found) for way in WAYS}


def measure(batch: int, length: int, vocabulary: int, repeats: int) -> dict[str, Any]:
    """One row: both ways' peaks, seconds and their ratios."""
    shape = batch, length, vocabulary
    peaks, times = {way: harness.forked(peak, way, *shape) for way in WAYS}, harness.forked(seconds, repeats, *shape)
    if None in (times, *peaks.values()):
        raise SystemExit(f"a process failed at batch {batch}, length {length}, vocabulary {vocabulary}")
    row = {way: {**peaks[way], "seconds": times[way]} for way in WAYS}
    ours, theirs = row["chunked"], row["plain"]
    if abs(ours["loss"] - theirs["loss"]) > 1e-4 * theirs["loss"]:
        raise SystemExit(f"the two ways disagree: {ours['loss']} and {theirs['loss']}")
    return {
        "vocabulary": vocabulary,
        "batch": batch,
        "length": length,
        **row,
        "peak_against_plain": ours["peak_bytes"] / theirs["peak_bytes"],
        "time_against_plain": ours["seconds"] / theirs["seconds"],
    }


def fitting_batch(batch: int, length: int, vocabulary: int, limit: float) -> int:
    """The batch, halved until the plain way needs at most `limit` bytes (or a batch of 1 is left)."""
    while batch > 1 and 4 * vocabulary * (PLAIN_TENSORS * batch * length + 3 * HIDDEN) > limit:
        batch //= 2
    return batch


def main() -> int:
    """Measures every vocabulary and writes the result; returns 1 where a goal is missed."""
    options = harness.options(
        __doc__,
        vocabulary=([49152, 262144], "one row each", [4096]),
        batch=(8, "sequences", 2),
        length=(512, "tokens a sequence", 64),
        repeats=(3, "timed steps of each way", 1),
        memory=(0.0, "GB the plain way may use; 0: 3/4 of what is available"),
    )
    limit, rows = 1e9 * options.memory or 0.75 * harness.memory("MemAvailable"), []
    for vocabulary in options.vocabulary:
        batch = fitting_batch(options.batch, options.length, vocabulary, limit)
        if batch < options.batch:
            print(f"Vocabulary {vocabulary:,}: batch {batch}, the plain way's largest in {limit / 1e9:.3g} GB.")
        rows.append(measure(batch, options.length, vocabulary, options.repeats))
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
    result = {"machine": machine, "hidden": HIDDEN, "batch_asked": options.batch, "rows": rows}
    results.save("losses", result, options.results)
    return int(not options.smoke and any(row[what] > most for row in rows for what, most in GOALS_OF_LOSSES.items()))


if __name__ == "__main__":
    sys.exit(main())
