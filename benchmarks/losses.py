"""Peak memory and time of the chunked distillation loss, against the plain way that holds all logits.

Run with ``make bench`` or ``python benchmarks/losses.py``; prints a table and writes docs/results/losses.json. The
plain way is the student's and the teacher's logits whole, ``F.cross_entropy`` plus ``F.kl_div``, and a backward pass.

Memory: each way in a process of its own, one step; the peak of resident memory less what was held once the inputs
(hidden states, both heads) existed, so the head's gradient counts for both. Time: both ways by turns in one process
after a step of each to warm up, and the least of each, so what else runs on the machine slows both. Where all logits
would need more than ``--memory``, that row is run with the largest batch that fits.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import results
import torch
import torch.nn.functional as F
from figures import PEAK_ALLOWED, TIME_ALLOWED
from torch import Tensor, nn

from cbd_hub.losses.distillation import distillation_loss

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "losses.json"
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


def chunked(*inputs: Tensor | nn.Linear) -> Tensor:
    """Ours, as the Trainer calls it."""
    return distillation_loss(*inputs).loss


WAYS = {"plain": plain, "chunked": chunked}


def step(way: str, inputs: Inputs) -> tuple[float, float]:
    """Forward and backward; returns seconds and the loss."""
    inputs[0].grad = inputs[1].weight.grad = None
    start = time.perf_counter()
    loss = WAYS[way](*inputs)
    loss.backward()
    return time.perf_counter() - start, loss.item()


def memory(field: str) -> int:
    """A field of this process's memory in bytes: VmRSS, resident now, or VmHWM, the most so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def available() -> int:
    """Bytes of main memory that can be had without swapping (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def child(what: str, batch: int, length: int, vocabulary: int, repeats: int) -> None:
    """Prints the peak bytes and loss of one way, or the seconds of both."""
    inputs = make_inputs(batch, length, vocabulary)
    if what == "time":
        seconds = [{way: step(way, inputs)[0] for way in WAYS} for _ in range(repeats + 1)][1:]
        print(json.dumps({way: min(once[way] for once in seconds) for way in WAYS}))
    else:
        before = memory("VmRSS")
        loss = step(what, inputs)[1]
        print(json.dumps({"peak_bytes": memory("VmHWM") - before, "loss": loss}))


def measure(batch: int, length: int, vocabulary: int, repeats: int) -> dict:
    """One row: both ways' peaks, seconds and their ratios."""

    def run(what: str) -> dict:
        arguments = [what, *map(str, (batch, length, vocabulary, repeats))]
        command = [sys.executable, __file__, "--child", *arguments]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)

    row = {way: run(way) for way in WAYS}
    for way, seconds in run("time").items():
        row[way]["seconds"] = seconds
    ours, theirs = row["chunked"], row["plain"]
    if abs(ours["loss"] - theirs["loss"]) > 1e-4 * theirs["loss"]:
        sys.exit(f"the two ways disagree: {ours['loss']} and {theirs['loss']}")
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


def main(options: argparse.Namespace) -> None:
    """Measures every vocabulary, prints the table, writes the result; fails where a goal is missed."""
    limit = 1e9 * options.memory if options.memory else 0.75 * available()
    rows = []
    for vocabulary in options.vocabulary:
        batch = fitting_batch(options.batch, options.length, vocabulary, limit)
        if batch < options.batch:
            print(
                f"Vocabulary {vocabulary:,}: batch {batch} instead of {options.batch}, the largest at which the "
                f"plain way needs less than {limit / 1e9:.3g} GB.\n"
            )
        rows.append(measure(batch, options.length, vocabulary, options.repeats))
    print(results.page("losses", {"rows": rows}))
    if options.output:
        machine = f"{platform.machine()}, {torch.get_num_threads()} threads"
        result = {"machine": machine, "hidden": HIDDEN, "batch_asked": options.batch, "rows": rows}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if any(row["peak_against_plain"] > PEAK_ALLOWED or row["time_against_plain"] > TIME_ALLOWED for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49152, 262144], help="one row each")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each way")
    parser.add_argument("--memory", type=float, help="GB the plain way may use; default 3/4 of what is available")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the result is written")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], *map(int, arguments.child[1:]))
    else:
        main(arguments)
