"""How from_chain's time and memory grow with the model, and a build's time with the number of anchors.

Run with ``OMP_NUM_THREADS=1 python benchmarks/growth.py``; writes docs/results/growth.json, growth.md and growth.png.

The first part makes models of 10M to 1.7B parameters, bfloat16, half-way between two anchors of random weights (the
second has 77 % of the first one's parameters) whose files were read just before. Every measurement is a process of
its own, forked when the libraries are loaded, that first makes a toy model. The second part builds chains of 1 to 4
anchors from a model of 0.8M parameters, with as many tokens for every anchor. Needs 10 GiB of memory, 7 GB of disk.
"""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness
import results
import torch
from models import FIELDS, SHAPES, make_chain, middle

from cbd_hub import Chain, build_chain, from_chain

SIZES = ((192, 6), (384, 8), (640, 12), (1024, 16), (1792, 18), (2048, 27))  # hidden width, layers
ANCHORS = (1, 2, 4)


def shape(hidden: int, layers: int) -> dict[str, int]:
    """A Llama of heads of 64, an ffn of four times the width, and 32,000 tokens."""
    return dict(zip(FIELDS, (hidden, 4 * hidden, layers, hidden // 64, hidden // 64, 32000), strict=True))


def make(case: tuple[Path, int]) -> Any:
    """What is measured: from_chain of a folder, at a size."""
    return from_chain(case[0], num_parameters=case[1])


def prepared(folder: Path, wanted: Mapping[str, int]) -> tuple[Path, int]:
    """Writes a chain in a process of its own; returns its folder and the size half-way."""
    if not harness.forked(lambda: make_chain(folder, wanted, torch.bfloat16) or True):
        raise SystemExit(f"the chain of {dict(wanted)} could not be made")
    for path in folder.rglob("*.safetensors"):
        path.read_bytes()  # into the page cache
    return folder, middle(Chain.from_pretrained(folder).manifest)


def grow(scratch: Path, shapes: Sequence[Mapping[str, int]], rounds: int) -> list[dict[str, Any]]:
    """from_chain at every size."""
    toy, rows = prepared(scratch / "toy", SHAPES["toy"]), []
    for wanted in shapes:
        case = prepared(scratch / "chain", wanted)
        plan = Chain.from_pretrained(case[0]).plan(case[1])
        rows.append(
            {
                "parameters": plan.num_parameters,
                "tensors": len(plan.operations),
                "bytes_read": plan.bytes_to_read,
                "bytes_made": 2 * plan.num_parameters,
                "runs": [measured(f"{plan.num_parameters:,}", make, toy, case) for _ in range(rounds)],
            }
        )
        shutil.rmtree(case[0])
    return rows


def measured(name: str, *work: Any) -> dict[str, float]:
    """One measurement, which must not fail."""
    if (found := harness.measure(*work)) is None:
        raise SystemExit(f"{name}: failed")
    print(f"{name}: {found['cpu']:.2f} s of CPU", flush=True)
    return found


def recipe(anchors: int) -> dict[str, Any]:
    """The quickstart's model on a part of its text, with a few tokens."""
    toy = harness.toy_recipe(anchors)
    source, training = toy["source"]["train"], {**toy["distillation"], "tokens": 16384}
    widths = {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 6, "num_attention_heads": 6}
    return {
        **toy,
        "source": {"train": {"config": source["config"] | widths, "training": training}},
        "tokenizer": {"vocab_size": 1024},
        "data": {**toy["data"], "text_files": f"{harness.SPEECHES}/1*.txt", "sequence_length": 128},
        "distillation": training,
        "calibration_tokens": 4096,
        "evaluation": {"tokens": 4000, "curve_points": 1},
    }


def build(wanted: dict[str, Any]) -> None:
    """What is measured: a whole build."""
    with tempfile.TemporaryDirectory() as folder:
        build_chain(wanted, Path(folder) / "chain", progress=False)


def main() -> None:
    options = harness.options(
        __doc__,
        rounds=(3, "processes at each size; the median counts", 1),
        rounds_builds=(2, "builds with each number of anchors", 1),
        scratch=(None, "where the chains are written"),
    )
    toy = SHAPES["toy"]
    shapes = [toy, {**toy, "hidden_size": 64}] if options.smoke else [shape(*size) for size in SIZES]
    numbers, kind = ((1, 2), harness.toy_recipe) if options.smoke else (ANCHORS, recipe)
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        rows = grow(Path(temporary), shapes, options.rounds)
    runs: dict[int, list[dict[str, float]]] = {number: [] for number in numbers}
    for number in [*numbers] * options.rounds_builds:
        first = None if options.smoke else harness.toy_recipe(1)
        runs[number].append(measured(f"{number} anchors", build, first, kind(number)))
    result = {
        **harness.about(),
        "note": options.note,
        "tokens": kind(1)["distillation"]["tokens"],
        "from_chain": rows,
        "builds": [{"anchors": number, "runs": found} for number, found in runs.items()],
    }
    results.save("growth", result, options.results)


if __name__ == "__main__":
    main()
