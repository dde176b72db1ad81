"""What one process of a launch runs: ``launched_curve.py PREFIX`` trains a tiny curve and leaves what came of it."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from make_chain import random_index_map
from safetensors.torch import save_file
from tiny_models import tiny_config, tiny_model

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.interpolation.materialize import cut
from cbd_hub.interpolation.pair import Pair
from cbd_hub.training.curve import Curve
from cbd_hub.training.distill import distill
from cbd_hub.training.settings import DistillationConfig


def main(prefix: str) -> None:
    """Trains with the same tokens a step, however many processes there are."""
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    large = tiny_model(tiny_config("llama", intermediate_size=256, vocab_size=97))
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config)
    small = {**sizes, "layers": sizes["layers"] - 1, "ffn": 128}
    index_map = random_index_map(axis_map, sizes, small, np.random.default_rng(0))
    student = cut(large, axis_map, sizes, small, index_map)
    curve = Curve(large, student, Pair(axis_map, small, sizes, index_map), learning_rate=1e-3, tokens=512)
    rows = np.random.default_rng(1).integers(3, 97, (72, 16)).tolist()
    blocks = [Dataset.from_dict({"input_ids": part}) for part in (rows[:64], rows[64:])]
    config = DistillationConfig(tokens=512, learning_rate=1e-3, batch_size=4 // world, hidden=1.0)
    work = Path(f"{prefix}-work")
    distill(student, large, *blocks, config, index_map=index_map, curve=curve, work_dir=work, progress=False)
    state = {**curve.factors(), **{n: p.detach().clone() for n, p in student.named_parameters()}}
    save_file(state, f"{prefix}-{os.environ.get('RANK', '0')}.st")


if __name__ == "__main__":
    main(sys.argv[1])
