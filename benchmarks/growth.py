"""How from_chain's time and memory grow with the model, and a build's time with the number of anchors.

Run with ``OMP_NUM_THREADS=1 python benchmarks/growth.py``; writes docs/results/growth.json, growth.md and growth.png.

The first part makes models of 10M to 1.7B parameters, bfloat16, half-way between two anchors of random weights (the
second has 77 % of the first one's parameters) whose files were read just before. Every measurement is a process of
its own, forked when the libraries are loaded, that first makes a toy model. The second part builds chains of 1 to 4
anchors from a model of 0.8M parameters, with as many tokens for every anchor. Needs 10 GiB of memory, 7 GB of disk.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import results
import torch
from random_chain import SHAPES, about, in_child, make_chain, measure, middle
from transformers.utils import logging

from cbd_hub import Chain, build_chain, from_chain

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
SIZES = ((192, 6), (384, 8), (640, 12), (1024, 16), (1792, 18), (2048, 27))  # hidden width, layers
ANCHORS = (1, 2, 4)


def shape(hidden: int, layers: int) -> dict[str, int]:
    """A Llama of heads of 64, an ffn of four times the width, and 32,000 tokens."""
    return {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": 32000,
    }


def make(case: tuple[Path, int]) -> Any:
    """What is measured: from_chain of a folder, at a size."""
    return from_chain(case[0], num_parameters=case[1])


def prepared(folder: Path, wanted: Mapping[str, int]) -> tuple[Path, int]:
    """Writes a chain in a process of its own; returns its folder and the size half-way."""
    if not in_child(make_chain, folder, wanted, torch.bfloat16):
        raise SystemExit(f"the chain of {dict(wanted)} could not be made")
    for path in folder.rglob("*.safetensors"):
        path.read_bytes()  # into the page cache
    return folder, middle(Chain.from_pretrained(folder).manifest)


def grow(scratch: Path, shapes: Sequence[Mapping[str, int]], rounds: int) -> list[dict[str, Any]]:
    """from_chain at every size."""
    toy, rows = prepared(scratch / "toy", SHAPES["toy"]), []
    for wanted in shapes:
        case = prepared(scratch / "chain", wanted)
        chain = Chain.from_pretrained(case[0])
        plan = chain.plan(case[1])
        runs = [found for _ in range(rounds) if (found := measure(make, toy, case)) is not None]
        if len(runs) < rounds:
            raise SystemExit(f"from_chain failed at {case[1]:,} parameters")
        rows.append(
            {
                "parameters": plan.num_parameters,
                "tensors": len(plan.operations),
                "bytes_read": plan.bytes_to_read,
                "bytes_made": 2 * plan.num_parameters,
                "runs": runs,
            }
        )
        shutil.rmtree(case[0])
        print(f"{plan.num_parameters:,}: {statistics.median(r['cpu'] for r in runs):.2f} s of CPU", flush=True)
    return rows


def recipe(anchors: int, quick: bool) -> dict[str, Any]:
    """The quickstart's model on a part of its text, with a few tokens."""
    config = {
        "hidden_size": 32 if quick else 96,
        "intermediate_size": 96 if quick else 288,
        "num_hidden_layers": 3 if quick else 6,
        "num_attention_heads": 4 if quick else 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    training = {"tokens": 256 if quick else 16384, "learning_rate": 1e-3, "batch_size": 8}
    return {
        "name": "growth",
        "source": {"train": {"config": config, "training": training}},
        "tokenizer": {"vocab_size": 300 if quick else 1024},
        "data": {
            "text_files": str(ROOT / "examples" / "data" / "sotu" / ("179[03]*.txt" if quick else "1*.txt")),
            "sequence_length": 32 if quick else 128,
            "held_out_fraction": 0.2,
        },
        "anchors": [0.85] * anchors,
        "distillation": training,
        "calibration_tokens": 512 if quick else 4096,
        "evaluation": {"tokens": 500 if quick else 4000, "curve_points": 1},
    }


def build(case: tuple[int, bool]) -> None:
    """What is measured: a whole build with a number of anchors."""
    with tempfile.TemporaryDirectory() as folder:
        build_chain(recipe(*case), Path(folder) / "chain", progress=False)


def grow_builds(numbers: Sequence[int], rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Builds with every number of anchors, in turns."""
    runs: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    for _ in range(rounds):
        for number in numbers:
            found = measure(build, None if quick else (1, True), (number, quick))
            if found is None:
                raise SystemExit(f"the build with {number} anchors failed")
            runs[number].append(found)
            print(f"{number} anchors: {found['cpu']:.1f} s of CPU", flush=True)
    return [{"anchors": number, "runs": found} for number, found in runs.items()]


# -- the tables -------------------------------------------------------------------------------------------------------


def main(options: argparse.Namespace) -> None:
    """Measures both and writes the results."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    quick = options.quick
    shapes = [SHAPES["toy"], {**SHAPES["toy"], "hidden_size": 64}] if quick else [shape(*size) for size in SIZES]
    tokens = recipe(1, quick)["distillation"]["tokens"]
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        rows = grow(Path(temporary), shapes, 1 if quick else options.rounds)
    builds = grow_builds((1, 2) if quick else ANCHORS, 1 if quick else options.rounds_builds, quick)
    result = {**about(), "note": options.note, "tokens": tokens, "from_chain": rows, "builds": builds}
    results.save("growth", result, options.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes at each size; the median counts")
    parser.add_argument("--rounds-builds", type=int, default=2, help="builds with each number of anchors")
    parser.add_argument("--quick", action="store_true", help="toy sizes, once: shows that this runs")
    parser.add_argument("--scratch", type=Path, help="where the chains are written")
    parser.add_argument("--note", default="", help="what else ran on the machine; goes into the results")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    main(parser.parse_args())
