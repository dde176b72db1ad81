"""Bytes and requests of a pull, against fetching the whole files: every method at several sizes, from a loopback Hub.

    python benchmarks/fetch.py CHAIN    # a folder; docs/results/fetch.* are of the chain of benchmarks/smollm2.py

The chain is published on a Hub in memory (tests/hub_server.py) and pulled by the real client into an empty cache, each
model in a process of its own. "Whole files" is what the same pull would take if anchors came as whole files. Writes
docs/results/fetch.json and fetch.md. Takes some minutes and as much memory as the chain has bytes, twice.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import results

sys.path.insert(0, str(harness.ROOT / "tests"))
from hub_server import HubServer

from cbd_hub import Chain

WAYS: list[dict[str, Any]] = [
    {"method": "interpolate"},
    {"method": "prune"},
    {"method": "expand"},
    {"method": "interpolate", "alpha": 0.0},
    {"method": "interpolate", "alpha": 1.0},
]
PUSH = "import sys; from cbd_hub import Chain; Chain.from_pretrained(sys.argv[1]).push_to_hub('owner/chain')"
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
        found = harness.python(PULL, job, env=hub.environment(home, "hf_owner"))
    planned, small, large, count = json.loads(found)
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


def main() -> None:
    positions = ([0.25, 0.75], "between neighbors, 0 to 1", [0.5])
    options = harness.options(__doc__, "the folder of a chain", positions=positions)
    chain, rows = harness.open_chain(options), []
    folder = str((options.chain or options.results / "chain").resolve())
    with tempfile.TemporaryDirectory() as place, HubServer() as hub:
        hub.add_user("owner", "hf_owner")
        home = Path(place)
        harness.python(PUSH, folder, env=hub.environment(home, "hf_owner"))
        for _, _, size, _ in harness.between(chain, options.positions):
            for way in WAYS[:2] if options.smoke else WAYS:
                rows.append(measure(hub, chain, size, way, home))
                print(json.dumps(rows[-1]), flush=True)
    results.save("fetch", {"chain": chain.manifest.name, "rows": rows}, options.results)


if __name__ == "__main__":
    main()
