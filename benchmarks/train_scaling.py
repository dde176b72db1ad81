"""What training an anchor costs against the size of the vocabulary, the length of a sequence and the processes.

Run with ``python benchmarks/train_scaling.py``; writes docs/results/train_scaling.json and train_scaling.md. Models of
random weights, small enough that the heads weigh (8 layers of 256, feed-forward 768); each measurement is a process of
``train.py``'s with one thread, AnchorTrainer and the plain loop in turns. A step has the same 1,024 tokens in every
row. Two processes are DDP over gloo: each has a core and a thread of its own, and half of the step.
"""

import json
from typing import Any

import harness
import results
import torch
from models import FIELDS
from train import medians, run

SHAPE = dict(zip(FIELDS, (256, 768, 8, 4, 2), strict=False))
TOKENS = 1024
"""Tokens of a step, over all processes."""
LENGTH, VOCABULARY = 256, 32_768
VOCABULARIES = (8_192, 32_768, 131_072, 262_144)
LENGTHS = (64, 256, 1024)
WAYS = ("AnchorTrainer", "plain loop")


def one(case: dict[str, Any], steps: int) -> dict[str, float]:
    """One measurement: tokens a second over all processes, and peak memory in bytes of the first."""
    vocabulary, length, processes = (case[name] for name in ("vocabulary", "length", "processes"))
    shape = {**SHAPE, "vocab_size": vocabulary, "max_position_embeddings": max(LENGTHS)}
    return run(case["way"], shape, TOKENS // length // processes, length, steps, processes=processes)


def measure(cases: list[dict[str, Any]], rounds: int, steps: int) -> list[dict[str, Any]]:
    """The cases with the median of each figure, measured in turns."""
    runs: list[list[dict[str, float]]] = [[] for _ in cases]
    for index in harness.turns(range(len(cases)), rounds):
        runs[index].append(one(cases[index], steps))
        print(json.dumps({**cases[index], **runs[index][-1]}), flush=True)
    return [{**case, **medians(found)} for case, found in zip(cases, runs, strict=True)]


def main() -> None:
    options = harness.options(
        __doc__,
        steps=(4, "timed steps", 1),
        rounds=(3, "processes of each way; the median counts", 1),
    )
    torch.set_num_threads(1)
    base = {"vocabulary": VOCABULARY, "length": LENGTH, "processes": 1}
    vocabularies, lengths = (VOCABULARIES[:1], LENGTHS[:1]) if options.smoke else (VOCABULARIES, LENGTHS)
    small = {"vocabulary": vocabularies[0]} if options.smoke else {}
    cases = {
        "vocabulary": [{**base, "way": way, "vocabulary": v} for v in vocabularies for way in WAYS],
        "length": [{**base, **small, "way": way, "length": n} for n in lengths for way in WAYS],
        "processes": [{**base, **small, "way": WAYS[0], "processes": n} for n in (1, 2)],
    }
    measured = {name: measure(some, options.rounds, options.steps) for name, some in cases.items()}
    result = {"about": harness.about(), "note": options.note, "rounds": options.rounds, "steps": options.steps}
    results.save("train_scaling", {**result, **measured}, options.results)


if __name__ == "__main__":
    main()
