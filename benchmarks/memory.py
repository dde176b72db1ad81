"""Peak memory and time of from_chain on a pair of anchors of about 1 GB, against averaging two loaded models by hand.

Run with ``make bench`` or ``python benchmarks/memory.py``; writes docs/results/memory.json. Every measurement is a
process of its own: peak resident memory less what the interpreter and the libraries hold before the call.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "memory.json"


def make_pair(folder: Path, layers: int) -> None:
    """A random source of about 1 GB in float32, and a neighbour of 70 % cut out of it; nothing is trained."""
    from cbd_hub import build_chain

    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "source")
    recipe = {
        "name": "pair",
        "source": {"model": str(folder / "source")},
        "anchors": [0.7],
        "distillation": {"tokens": 0},
        "evaluation": {"curve_points": 0},
    }
    build_chain(recipe, folder / "chain", progress=False)


def by_hand(chain: Path) -> None:
    """What a user would do instead: load both anchors, average the corner that they share."""
    manifest = json.loads((chain / "chain.json").read_text())
    large, small = (AutoModelForCausalLM.from_pretrained(chain / "anchors" / a["name"]) for a in manifest["anchors"])
    mine, theirs = large.state_dict(), small.state_dict()
    for name, tensor in mine.items():
        if name in theirs:
            corner = tuple(slice(0, n) for n in theirs[name].shape)
            tensor[corner] = 0.5 * tensor[corner] + 0.5 * theirs[name]


def peak_resident() -> int:
    """Largest resident memory so far, in bytes (Linux; getrusage would also count the parent's before exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def child(way: str, chain: Path, target: int) -> None:
    """Runs one way and prints its peak memory (bytes above the start) and seconds."""
    from cbd_hub import from_chain

    before = peak_resident()
    start = time.perf_counter()
    if way == "from_chain":
        from_chain(chain, num_parameters=target)
    else:
        by_hand(chain)
    seconds = time.perf_counter() - start
    peak = peak_resident() - before
    print(json.dumps({"peak_bytes": peak, "seconds": seconds}))


def main(layers: int) -> None:
    """Makes the pair, measures both ways twice (the second time warm) and writes the result."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_pair(folder, layers)
        manifest = json.loads((folder / "chain" / "chain.json").read_text())
        sizes = [a["num_parameters"] for a in manifest["anchors"]]
        target = sum(sizes) // 2
        measured = {}
        for way in ("from_chain", "by_hand"):
            for _ in range(2):
                command = [sys.executable, __file__, "--child", way, str(folder / "chain"), str(target)]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                measured[way] = json.loads(output.splitlines()[-1])
    ours, theirs = measured["from_chain"], measured["by_hand"]
    peak, largest_pair = ours["peak_bytes"], 2 * 4 * 32000 * 1024
    allowed = 1.25 * 4 * target + largest_pair
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "anchors": sizes,
        "target": target,
        **measured,
        "allowed_bytes": allowed,
        "share_of_allowed": peak / allowed,
        "share_of_target": peak / (4 * target),
        "peak_against_by_hand": peak / theirs["peak_bytes"],
        "time_against_by_hand": ours["seconds"] / theirs["seconds"],
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if peak > allowed:
        sys.exit(f"peak memory {peak:,} is above the allowed {allowed:,.0f} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=15, help="layers of the source; 15 make 1 GB")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]), int(arguments.child[2]))
    else:
        main(arguments.layers)
