"""Bytes and requests of a pull, against fetching the whole files: every method at several sizes, from a loopback Hub.

    python benchmarks/fetch.py CHAIN    # a folder; docs/results/fetch.* are of the chain of benchmarks/smollm2.py

The chain is published on a Hub in memory (tests/hub_server.py) and pulled by the real client into an empty cache, each
model in a process of its own. "Whole files" is what the same pull would take if anchors came as whole files. Writes
docs/results/fetch.json and fetch.md. Takes some minutes and as much memory as the chain has bytes, twice.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import results  # noqa: E402
from hub_server import HubServer  # noqa: E402

from cbd_hub import Chain  # noqa: E402

RESULTS = ROOT / "docs" / "results"
WAYS: list[dict[str, Any]] = [
    {"method": "interpolate"},
    {"method": "prune"},
    {"method": "expand"},
    {"method": "interpolate", "alpha": 0.0},
    {"method": "interpolate", "alpha": 1.0},
]
PULL = """
import json, sys
from cbd_hub import Chain
repo, cache, size, options = json.loads(sys.argv[1])
chain = Chain.from_pretrained(repo, cache_dir=cache)
plan = chain.plan(size, **options)
chain.initialize(plan, progress=False)
print(json.dumps([plan.bytes_to_fetch, plan.small, plan.large, plan.num_parameters]))
"""


def measure(hub: HubServer, chain: Chain, size: int, options: dict[str, Any], home: Path) -> dict[str, Any]:
    """One pull into an empty cache."""
    hub.clear()
    with tempfile.TemporaryDirectory(dir=home) as cache:
        job = json.dumps(["owner/chain", cache, size, options])
        env = hub.environment(home, "hf_owner")
        done = subprocess.run([sys.executable, "-c", PULL, job], env=env, check=True, capture_output=True, text=True)
    planned, small, large, count = json.loads(done.stdout.splitlines()[-1])
    files = {
        a.name: sum(e.size for n, e in a.files.items() if n.endswith(".safetensors")) for a in chain.manifest.anchors
    }
    weights = [r for r in hub.requests if r.method == "GET" and (r.range or r.sent > 1_000_000)]
    used = {"prune": [large], "expand": [small]}.get(options["method"], [small, large])
    if "alpha" in options:
        used = [large] if options["alpha"] == 0 else [small, large]
    return {
        "num_parameters": count,
        **options,
        "planned_bytes": planned,
        "fetched_bytes": sum(r.sent for r in weights),
        "requests": len(weights),
        "whole_bytes": sum(files[name] for name in set(used)),
        "pair_bytes": files[small] + files[large],
    }


def main(options: argparse.Namespace) -> None:
    """Publishes the chain on loopback, pulls, and writes the results."""
    chain = Chain.from_pretrained(options.chain)
    rows = []
    with tempfile.TemporaryDirectory() as folder, HubServer() as hub:
        hub.add_user("owner", "hf_owner")
        home = Path(folder)
        push = "import sys; from cbd_hub import Chain; Chain.from_pretrained(sys.argv[1]).push_to_hub('owner/chain')"
        env = hub.environment(home, "hf_owner")
        subprocess.run([sys.executable, "-c", push, os.path.abspath(options.chain)], env=env, check=True)
        for large, small in pairwise(chain.manifest.anchors):
            for position in options.positions:
                size = small.num_parameters + round(position * (large.num_parameters - small.num_parameters))
                for way in WAYS:
                    rows.append(measure(hub, chain, size, way, home))
                    print(json.dumps(rows[-1]), flush=True)
    result = {"chain": chain.manifest.name, "rows": rows}
    results.save("fetch", result, options.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", help="folder of a chain")
    parser.add_argument("--positions", type=float, nargs="+", default=[0.25, 0.75], help="between neighbors, 0 to 1")
    parser.add_argument("--output", type=Path, default=RESULTS)
    main(parser.parse_args())
