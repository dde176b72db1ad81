"""What training an anchor costs against the size of the vocabulary, the length of a sequence and the processes.

Run with ``python benchmarks/train_scaling.py``; writes docs/results/train_scaling.json and train_scaling.md. Models of
random weights, small enough that the heads weigh (8 layers of 256, feed-forward 768); each measurement is a process of
``train.py`` with one thread, AnchorTrainer and the plain loop in turns. A step has the same 1,024 tokens in every row.
Two processes are DDP over gloo: each has a core and a thread of its own, and half of the step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import results
from random_chain import about

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = 1024
"""Tokens of a step, over all processes."""
LENGTH, VOCABULARY = 256, 32_768
VOCABULARIES = (8_192, 32_768, 131_072, 262_144)
LENGTHS = (64, 256, 1024)
WAYS = ("AnchorTrainer", "plain loop")


def run(way: str, vocabulary: int, length: int, processes: int, steps: int) -> dict[str, float]:
    """One measurement: tokens a second over all processes, and peak memory in bytes of the first."""
    shape = {**SHAPE, "vocab_size": vocabulary, "max_position_embeddings": max(LENGTHS)}
    flags = ["--shape", json.dumps(shape), "--batch", str(TOKENS // length // processes), "--length", str(length)]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    script = Path(__file__).with_name("train.py")
    command = [sys.executable, *launch, str(script), *flags, "--steps", str(steps), "--child", way]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith('{"tokens'))
    )
    return {name: found[name] for name in ("tokens_per_second", "peak_bytes", "above_models_bytes")}


def measure(cases: list[dict[str, Any]], rounds: int, steps: int) -> list[dict[str, Any]]:
    """The cases with the median of each figure, measured in turns."""
    runs: list[list[dict[str, float]]] = [[] for _ in cases]
    for turn in range(rounds):
        order = list(enumerate(cases))
        for index, case in order if turn % 2 == 0 else reversed(order):
            runs[index].append(run(**case, steps=steps))
            print(json.dumps({**case, **runs[index][-1]}), flush=True)
    return [
        {**case, **{name: statistics.median(r[name] for r in found) for name in found[0]}}
        for case, found in zip(cases, runs, strict=True)
    ]


def main(options: argparse.Namespace) -> None:
    """Measures and writes."""
    base = {"vocabulary": VOCABULARY, "length": LENGTH, "processes": 1}
    vocabularies, lengths = (VOCABULARIES[:1], LENGTHS[:1]) if options.quick else (VOCABULARIES, LENGTHS)
    small = {"vocabulary": vocabularies[0]} if options.quick else {}
    cases = {
        "vocabulary": [{**base, "way": way, "vocabulary": v} for v in vocabularies for way in WAYS],
        "length": [{**base, **small, "way": way, "length": n} for n in lengths for way in WAYS],
        "processes": [{**base, **small, "way": WAYS[0], "processes": n} for n in (1, 2)],
    }
    measured = {name: measure(some, options.rounds, options.steps) for name, some in cases.items()}
    result = {"about": about(), "note": options.note, "rounds": options.rounds, "steps": options.steps, **measured}
    results.save("train_scaling", result, options.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way; the median counts")
    parser.add_argument("--quick", action="store_true", help="one vocabulary and one length: shows that this runs")
    parser.add_argument("--note", default="", help="what else ran on the machine; goes into the results")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    main(parser.parse_args())
