"""from_chain against what one would do instead: time, CPU time and peak memory.

Run with ``make bench-speed`` or ``OMP_NUM_THREADS=1 python benchmarks/speed.py``; writes docs/results/speed.json and
speed.md. Chains of random weights (the weights do not matter here) in the shapes of SmolLM2-135M and Llama-3.2-1B,
whose second anchor has 77 % of the first one's parameters; the model that is made lies half-way. The ways:

- ``from_chain``: the model in memory.
- ``from_chain + save``: the same, then ``save_pretrained``; what mergekit's result is compared with.
- ``by hand``: both anchors through ``from_pretrained``, the corner they share averaged in place. That is less than
  ``from_chain`` does, as nothing is cut to the target's size.
- ``mergekit``: a linear merge of two models of the target's shape, into a folder.
- ``copy``: the bytes that ``from_chain`` reads, read through a buffer of 4 MiB, and as many bytes as the model has
  copied to fresh memory: the copy bound.

Every measurement is a process of its own, forked when the libraries are loaded; it first does the same at toy size, so
that no import is timed. The ways take turns, forwards and backwards. Warm: the files were read just before. Cold: they
were dropped from the page cache. ``fincore`` tells how much of them was in it. Peak memory is resident memory above
what the process held before, so it counts pages of files that are mapped. At 1B the sharded and the cold rows have
from_chain, by hand and copy alone, unless ``--full``.

mergekit is measured where it is there; it needs no installing beside the package:
``pip install --no-deps --target FOLDER mergekit peft immutables``, then ``--mergekit FOLDER``.
"""

import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import harness
import results
import torch
from models import SHAPES, make_chain, middle, resized, save_random
from transformers import AutoConfig, AutoModelForCausalLM

from cbd_hub import Chain, from_chain
from cbd_hub.chain.assemble import open_weights
from cbd_hub.interpolation.checkpoints import find_files
from cbd_hub.manifest.manifest import read_manifest

FEW = ("from_chain", "by hand", "copy")
WAYS = ("from_chain", "from_chain + save", "by hand", "mergekit", "copy")
SHARD = {"toy": "100kB", "135M": "100MB", "1B": "1GB"}
BUFFER = 4 << 20


@dataclass(frozen=True)
class Case:
    """Files on disk, and what is to be made of them."""

    folder: Path
    target: int
    """Parameters."""
    runs: tuple[tuple[Path, int, int], ...]
    """What from_chain reads: file, first byte, byte behind the last."""
    target_bytes: int

    @property
    def chain(self) -> Path:
        """The chain's folder."""
        return self.folder / "chain"

    def files(self, way: str) -> list[Path]:
        """The weights that a way reads."""
        inside = self.folder / "merge" if way == "mergekit" else self.chain / "anchors"
        return sorted(inside.rglob("*.safetensors"))


def make_merge(folder: Path, dtype: torch.dtype, shard: str) -> None:
    """Writes two models of random weights in the target's shape, for mergekit."""
    chain = Chain.from_pretrained(folder / "chain")
    config = AutoConfig.from_pretrained(folder / "chain" / "anchors" / "large")
    shape = chain.plan(middle(chain.manifest)).shape
    for seed, name in enumerate(("a", "b")):
        save_random(resized(config, shape), folder / "merge" / name, dtype, shard, seed)


def case_of(folder: Path) -> Case:
    """What from_chain reads of the chain in a folder, from its plan and the files' headers."""
    chain = Chain.from_pretrained(folder / "chain")
    plan = chain.plan(middle(chain.manifest))
    stored = {anchor.name: open_weights(chain, anchor, progress=False).tensors for anchor in chain.manifest.anchors}
    read = {(plan.large, op.large_name) for op in plan.operations} | {
        (plan.small, op.small_name) for op in plan.operations
    }
    runs = sorted(
        (info.file, info.start, info.stop) for anchor, name in read if name for info in [stored[anchor][name]]
    )
    assert sum(stop - start for _, start, stop in runs) == plan.bytes_to_read
    item = getattr(torch, chain.manifest.anchors[0].dtype).itemsize
    return Case(folder, plan.num_parameters, tuple(runs), plan.num_parameters * item)


# -- the ways ---------------------------------------------------------------------------------------------------------


def by_hand(case: Case) -> Any:
    """Loads both anchors and averages the corner that they share."""
    large, small = (AutoModelForCausalLM.from_pretrained(case.chain / "anchors" / n) for n in ("large", "small"))
    mine, theirs = large.state_dict(), small.state_dict()
    for name, tensor in mine.items():
        if name in theirs:
            corner = tuple(slice(0, n) for n in theirs[name].shape)
            tensor[corner] = 0.5 * tensor[corner] + 0.5 * theirs[name]
    return large


def merge(case: Case) -> None:
    """Lets mergekit average two models of the target's shape into a folder."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": str(case.folder / "merge" / name), "parameters": {"weight": 0.5}} for name in ("a", "b")]
    dtype = read_manifest(case.chain / "chain.json").anchors[0].dtype
    config = MergeConfiguration.model_validate({"merge_method": "linear", "models": models, "dtype": dtype})
    options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
    run_merge(config, str(case.folder / "out"), options)
    find_files(case.folder / "out")


def copy(case: Case) -> torch.Tensor:
    """Reads the bytes that from_chain reads, and copies as many as the target has to fresh memory."""
    made = torch.empty(case.target_bytes, dtype=torch.uint8)
    buffer, fresh, filled = memoryview(bytearray(BUFFER)), memoryview(made.numpy()), 0
    for path, start, stop in case.runs:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < stop:
                count = file.readinto(buffer[: min(BUFFER, stop - start)])
                if not count:
                    raise EOFError(path)
                start += count
                take = min(count, len(fresh) - filled)
                fresh[filled : filled + take] = buffer[:take]
                filled += take
    return made


def run_way(way: str, case: Case) -> Any:
    """Does what a way does; returns what it made."""
    if way.startswith("from_chain"):
        model = from_chain(case.chain, num_parameters=case.target)
        if way.endswith("save"):
            model.save_pretrained(case.folder / "out")
        return model
    return {"by hand": by_hand, "mergekit": merge, "copy": copy}[way](case)


# -- measuring --------------------------------------------------------------------------------------------------------


def cached_share(files: Iterable[Path]) -> float | None:
    """The share of some files that is in the page cache; None where fincore is not there to tell."""
    if shutil.which("fincore") is None:
        return None
    command = ["fincore", "--bytes", "--noheadings", "--raw", "--output", "RES,SIZE", *map(str, files)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    resident, size = (sum(column) for column in zip(*(map(int, line.split()) for line in lines), strict=True))
    return min(1.0, resident / size)  # whole pages are counted


def set_cache(files: list[Path], cache: str) -> float | None:
    """Brings files into the page cache, or drops them from it; returns the share that is in it then."""
    for path in files if cache == "cold" or cached_share(files) != 1 else ():
        with path.open("rb", buffering=0) as file:
            if cache == "cold":
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                buffer = memoryview(bytearray(BUFFER))
                while file.readinto(buffer):
                    pass
    return cached_share(files)


def measure_row(case: Case, toy: Case, ways: Iterable[str], cache: str, rounds: int) -> dict[str, Any]:
    """All ways at one size, in turns; a way that fails is left out of the later rounds, and said so."""
    runs, failed = {way: [] for way in ways}, {}
    for way in harness.turns(list(ways), rounds):
        files = case.files(way)
        if way == "by hand" and harness.memory("MemAvailable") < 1.2 * sum(path.stat().st_size for path in files):
            failed[way] = "there was not enough memory for two models"
        if way in failed:
            continue
        share = set_cache(files, cache)
        found = harness.measure(lambda it, way=way: run_way(way, it), toy, case)
        for out in (case.folder / "out", toy.folder / "out"):
            shutil.rmtree(out, ignore_errors=True)
        if found is None:
            failed[way] = "it failed with these versions"
        else:
            runs[way].append({**found, "cached": share})
            print(f"  {cache} {way}: {found['wall']:.2f} s, {found['peak'] / 1e9:.2f} GB", flush=True)
    return {"cache": cache, "runs": {way: found for way, found in runs.items() if found}, "failed": failed}


def make_case(folder: Path, scale: str, dtype: torch.dtype, sharded: bool, full: bool = False) -> Case:
    """Writes the chain and the models to merge, in a process of its own, and says what from_chain reads."""

    def make() -> bool:
        shard = SHARD[scale] if sharded else "100GB"
        make_chain(folder / "chain", SHAPES[scale], dtype, shard)
        if not sharded or scale != "1B" or full:
            make_merge(folder, dtype, shard)
        return True

    if not harness.forked(make):
        raise SystemExit(f"the chain of {scale} could not be made")
    print(f"{scale}, {dtype}, {'sharded' if sharded else 'one file'}", flush=True)
    return case_of(folder)


def main() -> None:
    options = harness.options(
        __doc__,
        mergekit=(None, "folder that mergekit was installed into"),
        rounds=(5, "processes of each way at 135M; the median counts"),
        rounds_large=(3, "the same at 1B"),
        full=(False, "every way in every row at 1B as well"),
        scratch=(None, "where the chains are written (28 GB at most)"),
    )
    ways, failed = list(WAYS), {}
    if options.mergekit is not None:
        sys.path.append(str(options.mergekit.resolve()))
    if importlib.util.find_spec("mergekit") is None:
        ways.remove("mergekit")
        failed["mergekit"] = "it was not installed"
    else:
        importlib.import_module("mergekit.merge")
    packages = ("torch", "transformers", "safetensors", *(["mergekit"] if "mergekit" in ways else []))
    result = {**harness.about(*packages), "note": options.note, "rows": []}
    scales = {"toy": 1} if options.smoke else {"135M": options.rounds, "1B": options.rounds_large}
    dtypes = (torch.float32,) if options.smoke else (torch.float32, torch.bfloat16)
    layouts = (True,) if options.smoke else (False, True)
    with tempfile.TemporaryDirectory(dir=options.scratch) as temporary:
        toys = {dtype: make_case(Path(temporary) / f"toy-{dtype}", "toy", dtype, False) for dtype in dtypes}
        for (dtype, toy), scale, sharded in product(toys.items(), scales, layouts):
            folder = Path(temporary) / "case"
            case = make_case(folder, scale, dtype, sharded, options.full)
            for cache in ("warm", "cold"):
                some = scale == "1B" and (sharded or cache == "cold") and not options.full
                if some and sharded and cache == "cold":
                    continue
                embedding = SHAPES[scale]["vocab_size"] * SHAPES[scale]["hidden_size"]
                row = {
                    "model": scale,
                    "dtype": str(dtype).removeprefix("torch."),
                    "files": len(case.files("copy")),
                    "parameters": case.target,
                    "bytes_read": sum(stop - start for _, start, stop in case.runs),
                    "bytes_made": case.target_bytes,
                    "largest_pair": 2 * embedding * dtype.itemsize,
                    **measure_row(case, toy, FEW if some else ways, cache, scales[scale]),
                }
                row["failed"] |= {} if some else failed
                result["rows"].append(row)
                results.save("speed", result, options.results)
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
