"""What every benchmark stands on: its command line, figures that are kept, measured processes, text, and training.

All scripts take ``--results`` (a folder; docs/results by default), ``--note`` and ``--profile smoke``: the same code
at toy scale, in seconds to a few minutes, with results in .cache/smoke. Their ``main`` measures what is missing and
writes figures and tables.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import argparse
import json
import multiprocessing
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from cbd_hub import Chain, build_chain
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.errors import SizeError
from cbd_hub.evaluation.held_out import HeldOutLoss, evaluate_loss
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.manifest import Anchor
from cbd_hub.training.distill import distill
from cbd_hub.training.settings import DistillationConfig

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
RECIPES = ROOT / "examples" / "recipes"
SPEECHES = ROOT / "examples" / "data" / "sotu"
OURS = "interpolate"
"""The method that all others are compared with."""

# -- the command line -------------------------------------------------------------------------------------------------


def options(
    about: str | None,
    chain: str = "",
    usual: Path | None = None,
    profiles: Sequence[str] = ("smoke",),
    **flags: tuple[Any, ...],
) -> argparse.Namespace:
    """The flags that all scripts have, and those of one: ``name=(default, help[, value of the smoke profile])``.

    Args:
        about: The script's docstring.
        chain: What the positional argument, a chain's folder, is; "" for scripts that take none.
        usual: Where it lies if it is not named.
        profiles: Scales other than the one that docs/results are of.
        flags: A default of None is a path, a list takes one or more, False is a switch.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    if chain:
        parser.add_argument("chain", type=Path, nargs="?", help=chain)
    parser.add_argument("--profile", choices=profiles, help="another scale; smoke: a toy, to see that this runs")
    parser.add_argument("--quick", action="store_const", const="smoke", dest="profile", help="--profile smoke")
    parser.add_argument("--results", "--output", type=Path, help="folder of the results")
    parser.add_argument("--note", default="", help="what else ran on the machine; goes into the results")
    for name, (value, text, *_) in flags.items():
        several = isinstance(value, (list, tuple))
        kind = Path if value is None else type(value[0] if several else value)
        how: dict[str, Any] = {"action": "store_true"} if value is False else {"type": kind}
        parser.add_argument(f"--{name.replace('_', '-')}", help=text, **how, **({"nargs": "+"} if several else {}))
    found = parser.parse_args()
    found.smoke = found.profile == "smoke"
    for name, (value, _, *toy) in flags.items():
        if getattr(found, name) in (None, False):
            setattr(found, name, toy[0] if toy and found.smoke else value)
    found.results = found.results or (ROOT / ".cache" / found.profile if found.profile else RESULTS)
    found.results.mkdir(parents=True, exist_ok=True)
    if chain and not found.smoke:
        found.chain = found.chain or usual
        if found.chain is None or not (found.chain / "chain.json").is_file():
            parser.error(f"there is no chain in {found.chain}; name {chain}")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return found


# -- figures ----------------------------------------------------------------------------------------------------------


def keep(folder: Path, name: str, result: Any) -> None:
    """Writes the figures of a benchmark, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / f"{name}.json")


def read(folder: Path, name: str) -> Any:
    """The figures of a benchmark; empty where it was not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


class Figures:
    """The figures of a benchmark: each is written as soon as it stands, and a run that was cut off goes on there."""

    def __init__(self, folder: Path, name: str, **settings: Any) -> None:
        self.folder, self.name = folder, name
        self.found: dict[str, Any] = read(folder, name)
        for key, value in json.loads(json.dumps(settings)).items():
            if self.found.setdefault(key, value) != value:
                raise SystemExit(f"{folder / name}.json is of another {key}; remove it, or name another --results")

    def save(self) -> None:
        """Writes the file."""
        keep(self.folder, self.name, self.found)

    def keep(self, key: str, make: Callable[[], Any], place: dict[str, Any] | None = None) -> Any:
        """Returns a figure (of a part of the file), measured now or in an earlier run."""
        place = self.found if place is None else place
        if key not in place:
            place[key] = make()
            self.save()
            print(key, str(place[key])[:160], flush=True)
        return place[key]


def about(*packages: str) -> dict[str, Any]:
    """Machine, versions, commit: where and with what a run was made."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    threads, info = torch.get_num_threads(), Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "machine": f"{platform.machine()}, {threads} threads, {len(os.sched_getaffinity(0))} cores",
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": round(os.getloadavg()[0], 1),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "changed_files": git("status", "--porcelain", "cbd_hub").splitlines(),
        "versions": {name: version(name) for name in packages or ("torch", "transformers", "safetensors")},
    }


# -- processes --------------------------------------------------------------------------------------------------------


def memory(key: str) -> int:
    """Bytes of this process: VmRSS, resident now; VmHWM, the most so far; or of the machine: MemAvailable (Linux)."""
    path = Path("/proc/meminfo" if key.startswith("Mem") else "/proc/self/status")
    return next(int(line.split()[1]) * 1024 for line in path.read_text().splitlines() if line.startswith(key))


def forget_peak() -> None:
    """Starts VmHWM anew at what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def forked(work: Callable[..., Any], *arguments: Any, processes: int = 1) -> Any:
    """What a function returns in a process of its own, or in the first of several under DDP; None where it failed.

    Libraries are loaded already, so no import is timed. No thread pool is ever made in this process.
    """
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def run(rank: int) -> None:
        if processes > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
            os.environ |= {name: str(value) for name, value in ranks.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20000 + os.getppid() % 20000)}
        found = work(*arguments)
        if rank == 0:
            sender.send(found)

    running = [fork.Process(target=run, args=(rank,)) for rank in range(processes)]
    for process in running:
        process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        found = None
    for process in running:
        process.join()
    return None if any(process.exitcode for process in running) else found


def measure(work: Callable[[Any], Any], toy: Any, case: Any) -> dict[str, float] | None:
    """Seconds, CPU seconds and peak bytes of some work in a process of its own; a toy (or None) goes before."""

    def run() -> dict[str, float]:
        if toy is not None:
            work(toy)
        forget_peak()
        before, used, start = memory("VmHWM"), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        made = work(case)
        wall, now = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
        found = {"wall": wall, "cpu": cpu, "peak": memory("VmHWM") - before, "anonymous": memory("RssAnon")}
        del made
        return found

    return forked(run)


def turns(ways: Sequence[Any], rounds: int) -> Iterator[Any]:
    """The ways by turns, forwards and backwards, so that none profits from its place."""
    for turn in range(rounds):
        yield from ways if turn % 2 == 0 else reversed(ways)


# -- text, chains, training -------------------------------------------------------------------------------------------


def toy_recipe(anchors: int = 2, **changes: Any) -> dict[str, Any]:
    """A chain that is built in seconds."""
    shape = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = {**shape, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True}
    training = {"tokens": 256, "learning_rate": 1e-3, "batch_size": 8}
    return {
        "name": "growth",
        "source": {"train": {"config": config, "training": training}},
        "tokenizer": {"vocab_size": 300},
        "data": {"text_files": f"{SPEECHES}/179[03]*.txt", "sequence_length": 32, "held_out_fraction": 0.2},
        "anchors": [0.85] * anchors,
        "distillation": training,
        "calibration_tokens": 512,
        "evaluation": {"tokens": 500, "curve_points": 1},
        **changes,
    }


def inputs(recipe: Any) -> BuildInputs:
    """Text, tokenizer and source of a recipe (a file, or its content) that must have text."""
    made = BuildInputs(*load_recipe(recipe))
    if made.text is None or made.tokenizer is None:
        raise SystemExit("the recipe has no text")
    return made


def open_chain(options: argparse.Namespace) -> Chain:
    """The chain of the command line; the smoke profile builds one where none is named."""
    if options.chain is None:
        build_chain(toy_recipe(), options.results / "chain", progress=False)
    return Chain.from_pretrained(options.chain or options.results / "chain")


def between(chain: Chain, positions: Sequence[float]) -> Iterator[tuple[Anchor, Anchor, int, Plan]]:
    """Large and small anchor, count and plan of the sizes between every two anchors that the chain can reach."""
    for large, small in pairwise(chain.manifest.anchors):
        for position in positions:
            count = round(small.num_parameters + position * (large.num_parameters - small.num_parameters))
            try:
                yield large, small, count, chain.plan(count, method=OURS)
            except SizeError:
                continue


def first(blocks: Any, rows: int) -> torch.Tensor:
    """The first blocks as token ids (N, S)."""
    return torch.tensor([row["input_ids"] for row in blocks.select(range(min(rows, len(blocks))))])


def loss(model: PreTrainedModel, blocks: Any, **how: Any) -> HeldOutLoss:
    """Held-out loss, measured on the accelerator if there is one; the model ends in main memory."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    found = evaluate_loss(nn.Module.to(model, device), blocks, **how)
    nn.Module.to(model, "cpu")
    return found


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    text: Any,
    held_out: Any,
    config: DistillationConfig,
    **more: Any,
) -> dict[int, float]:
    """Trains a model in place, which ends with the weights that were best on `held_out`: step → loss on that."""
    with tempfile.TemporaryDirectory() as folder:
        distill(student, teacher, text, held_out, config, work_dir=Path(folder), progress=False, **more)
        log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    for model in (student, teacher, None if (curve := more.get("curve")) is None else curve.control):
        if model is not None:
            nn.Module.to(model, "cpu")
    return {row["step"]: round(row["eval_loss"], 5) for row in log if "eval_loss" in row}


def python(code: str, *arguments: str, env: dict[str, str]) -> str:
    """The last line that some code prints in an interpreter of its own."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, check=True, stdout=subprocess.PIPE)
    return done.stdout.decode().rstrip().rpartition("\n")[2]
