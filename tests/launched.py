"""What one process of a launch runs: ``launched.py FOLDER JSON`` distills a tiny student and leaves what came of it.

JSON has fields of the config, and ``family`` and ``rows`` of what is trained. All processes write into FOLDER:
``{rank}.safetensors``, the student's weights, and ``{rank}.json``, the losses and how the processes were used.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import save_file
from tiny_models import tiny_config, tiny_model
from torch.distributed.tensor import DTensor

from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.distill import distill
from cbd_hub.training.settings import DistillationConfig

VOCAB = 97
LENGTH = 24


def blocks(rows: int, seed: int) -> Dataset:
    """Random rows of (LENGTH,) tokens with unequal numbers of labels, so that devices differ in what they count."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (rows, LENGTH))
    labels = ids.copy()
    for row, masked in zip(labels, np.random.default_rng(seed).integers(0, LENGTH // 2, rows), strict=True):
        row[:masked] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def run(folder: Path, family: str = "llama", tied: bool = True, **config: Any) -> dict[str, Any]:
    """Distills in this process and returns what `main` writes."""
    overrides = {"vocab_size": VOCAB, "tie_word_embeddings": tied}
    teacher = tiny_model(tiny_config(family, **overrides), seed=0)
    student = tiny_model(tiny_config(family, **overrides, num_hidden_layers=2), seed=1)
    work_dir = folder / "work"
    training = distill(
        student,
        teacher,
        blocks(64, 0),
        blocks(8, 1).select_columns("input_ids"),
        DistillationConfig(learning_rate=1e-3, **config),
        index_map=IndexMap(np.array([0, 2, 1])),
        work_dir=work_dir,
        progress=False,
    )
    assert not any(isinstance(p, DTensor) for p in student.parameters())
    log = json.loads((work_dir / "trainer_state.json").read_text())["log_history"]
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    weights = {name: p.detach().contiguous() for name, p in student.named_parameters()}
    return {
        "log": log,
        "training": training.model_dump(exclude_none=True),
        "world": world,
        "strategy": AcceleratorState().distributed_type.value,
        "weights": weights,
    }


def main(folder: Path, config: dict[str, Any]) -> None:
    result = run(folder, **config)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    save_file(result.pop("weights"), folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(result))


def pass_for_accelerators() -> None:
    """Has accelerate take the processes on a CPU for accelerators.

    It shards on nothing else, and on CPUs falls back to DDP without a word, although FSDP and DeepSpeed run on gloo.
    """

    class Pretended(PartialState):
        def _prepare_backend(self, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
            return "gloo", DistributedType.MULTI_XPU

        def set_device(self) -> None:
            self.device = torch.device("cpu")

    PartialState._prepare_backend = Pretended._prepare_backend
    PartialState.set_device = Pretended.set_device
    torch.distributed.init_process_group("gloo")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if "true" in map(os.environ.get, ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")):
        pass_for_accelerators()
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
