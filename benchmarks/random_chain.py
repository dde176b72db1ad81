"""Chains of random weights, and measurements in processes of their own: what speed.py and growth.py share."""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import count_parameters, ladder
from cbd_hub.interpolation.checkpoints import checksum_file, find_files
from cbd_hub.interpolation.materialize import build_model
from cbd_hub.manifest.index_maps import IndexMap, save_index_maps
from cbd_hub.manifest.manifest import CHECKSUMS_NAME, INDEX_MAPS_NAME, Anchor, Manifest, file_entry, write_manifest

__all__ = [
    "SHAPES",
    "about",
    "available",
    "in_child",
    "make_chain",
    "measure",
    "middle",
    "resized",
    "save_random",
]

SHAPES: dict[str, dict[str, Any]] = {
    "toy": {
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def save_random(config: LlamaConfig, folder: Path, dtype: torch.dtype, shard: str, seed: int) -> None:
    """Saves a model of random weights; each weight is drawn once, which is quicker than an initialization."""
    axis_map = axis_map_for(config)
    generator = torch.Generator().manual_seed(seed)
    shapes = axis_map.shapes(axis_map.sizes(config))
    state = {k: torch.empty(v, dtype=dtype).uniform_(-0.05, 0.05, generator=generator) for k, v in shapes.items()}
    build_model(config, state, dtype).save_pretrained(folder, max_shard_size=shard)


def resized(config: LlamaConfig, fields: Mapping[str, int]) -> LlamaConfig:
    """The config with other sizes."""
    return type(config).from_dict({**config.to_dict(), **fields})


def make_chain(
    folder: Path, shape: Mapping[str, Any], dtype: torch.dtype, shard: str = "100GB", fraction: float = 0.77
) -> None:
    """Writes a chain of two anchors of random weights, the smaller one cut as the library would cut it."""
    config = LlamaConfig(**shape, tie_word_embeddings=True)
    axis_map = axis_map_for(config)
    large = axis_map.sizes(config)
    small = ladder(axis_map, large, round(fraction * count_parameters(axis_map, large)))
    rng = np.random.default_rng(0)
    kept = np.sort(rng.permutation(large["layers"])[: small["layers"]])
    layers = np.concatenate([kept, np.setdiff1d(np.arange(large["layers"]), kept)])
    shrunk = [axis for axis in large if axis not in ("layers", "hidden") and large[axis] != small[axis]]
    orders = {
        a: np.stack([rng.permutation(large[a]) for _ in range(large["layers"])]).astype(np.int32) for a in shrunk
    }
    if large["hidden"] != small["hidden"]:
        orders["hidden"] = rng.permutation(large["hidden"]).astype(np.int32)
    anchors, digests = [], {}
    for name, sizes, parent in (("large", large, None), ("small", small, "large")):
        place = folder / "anchors" / name
        save_random(resized(config, axis_map.config_fields(sizes)), place, dtype, shard, seed=len(anchors))
        digests[name] = checksum_file(place, find_files(place))
        anchors.append(
            Anchor(
                name=name,
                subfolder=f"anchors/{name}",
                shape=axis_map.config_fields(sizes),
                num_parameters=count_parameters(axis_map, sizes),
                dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
                parent=parent,
                layer_order=layers.tolist() if parent else None,
                files={path.name: file_entry(path) for path in sorted(place.iterdir())},
            )
        )
    save_index_maps({"small": IndexMap(layers, orders)}, folder / INDEX_MAPS_NAME)
    (folder / CHECKSUMS_NAME).write_text(json.dumps(digests))
    named = {"index_maps": file_entry(folder / INDEX_MAPS_NAME), "checksums": file_entry(folder / CHECKSUMS_NAME)}
    manifest = Manifest(
        name="random", architecture="llama", axis_map=axis_map.to_dict(), source="random", anchors=anchors, **named
    )
    write_manifest(manifest, folder)


def middle(manifest: Manifest) -> int:
    """The size half-way between the two anchors."""
    return sum(anchor.num_parameters for anchor in manifest.anchors) // 2


def status(key: str) -> int:
    """A field of this process's memory in bytes: VmHWM is the most so far (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def child(sender: Any, work: Callable[[Any], Any], toy: Any, case: Any) -> None:
    """Works on a toy (None: not), then on the case; sends seconds, CPU seconds and peak memory of the second."""
    if toy is not None:
        work(toy)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, used, start = status("VmHWM"), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    made = work(case)
    wall, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    sender.send({"wall": wall, "cpu": cpu, "peak": status("VmHWM") - before, "anonymous": status("RssAnon")})
    del made


def in_child(target: Callable[..., Any], *arguments: Any) -> bool:
    """Runs a function in a forked process; False where it failed. No thread pool is ever made in this one."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode == 0


def measure(work: Callable[[Any], Any], toy: Any, case: Any) -> dict[str, float] | None:
    """One measurement in a process of its own; None where it failed."""
    receiver, sender = multiprocessing.get_context("fork").Pipe(duplex=False)
    good = in_child(child, sender, work, toy, case)
    return receiver.recv() if good else None


def available() -> int:
    """Bytes of memory that can be had without swapping (Linux)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def about(mergekit: bool = False) -> dict[str, Any]:
    """Machine, versions, commit: what every results file of this kind opens with."""
    root = Path(__file__).parents[1]
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    names = ("torch", "transformers", "safetensors", *(["mergekit"] if mergekit else []))
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {len(os.sched_getaffinity(0))} cores",
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": round(os.getloadavg()[0], 1),
        "commit": git.stdout.strip() or "unknown",
        "versions": {name: importlib.metadata.version(name) for name in names},
    }
