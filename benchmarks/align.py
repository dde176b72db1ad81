"""What alignment is worth between models that were trained apart, on the quickstart's text.

Run with ``OMP_NUM_THREADS=1 python benchmarks/align.py``; writes docs/results/align.json. Models of different sizes
are trained from different seeds, then a model in between is made of each pair, at several weights alpha of the small.
"""

import argparse
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import harness
import models
import numpy as np
import results
import torch
from models import kept_first
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cbd_hub.alignment.align import align
from cbd_hub.alignment.basis import rotate
from cbd_hub.alignment.importance import collect
from cbd_hub.alignment.learned import LEARNING_TOKENS, learn_maps
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.students import curve_to_train
from cbd_hub.initialization.fresh import fresh_model
from cbd_hub.interpolation.materialize import blend_models
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.settings import AnchorDistillation, ControlPointConfig, DistillationConfig

ROWS = ("plain averaging (paper)", "masked averaging, index order", "masked averaging, aligned", "learned")
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINING = DistillationConfig(tokens=800_000, learning_rate=4e-3, batch_size=8, kl=0, hidden=0)

LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16}
GPT2 = {"model_type": "gpt2", "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
FAMILIES = {
    "Llama": (LLAMA, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")),
    "GPT-2": (GPT2, ("n_embd", "n_layer", "n_head", "n_inner")),
}
PAIRS = {
    "Llama, same width": ((96, 5, 6, 256), (96, 4, 6, 176), (96, 4, 6, 216)),
    "GPT-2, same width": ((96, 5, 6, 256), (96, 4, 6, 176), (96, 4, 6, 216)),
    "GPT-2, narrower": ((96, 5, 6, 256), (64, 4, 4, 176), (80, 4, 5, 216)),
    "Llama, narrower": ((96, 5, 6, 256), (64, 4, 4, 176), (80, 4, 4, 216)),
}
"""Sizes of a large model, a small one, and one in between, as the family's fields take them in order."""


def trained(config: dict[str, Any], tokens: int, seed: int, made: BuildInputs, cache: Path) -> PreTrainedModel:
    """A model trained from scratch with cross-entropy, or the one that an earlier run left in the cache."""
    folder = cache / "-".join(str(v) for v in (*config.values(), tokens, seed))
    if not (folder / "config.json").is_file():
        model = fresh_model(AutoConfig.for_model(**config, vocab_size=len(made.tokenizer)), seed)
        run = TRAINING.model_copy(update={"seed": seed, "tokens": tokens})
        validation = made.text.validation
        harness.train(model, None, made.text.train, validation.select(range(min(48, len(validation)))), run)
        model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def measure(name: str, options: argparse.Namespace, made: BuildInputs, seed: int) -> dict[str, Any]:
    """Losses on test text of everything that can be made of one pair."""
    blocks, (family, fields) = made.calibration(), FAMILIES[name.split(",")[0]]
    configs = [{**family, **dict(zip(fields, shape, strict=True))} for shape in PAIRS[name]]
    large, small = (trained(configs[i], options.tokens, seed + i, made, options.cache) for i in (0, 1))
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config), axis_map.sizes(small.config)
    target = axis_map.sizes({**configs[2], "vocab_size": len(made.tokenizer)})

    def loss(model: PreTrainedModel) -> float:
        return round(harness.loss(model, made.text.test, max_tokens=options.test_tokens).loss, 4)

    layers = kept_first(np.linspace(0, sizes[0]["layers"] - 1, sizes[1]["layers"]).round(), sizes[0]["layers"])
    apart = models.Pair(large, small, IndexMap(layers, {}, collect(large, axis_map, sizes[0], blocks).energy))
    ours = deepcopy(large)
    if axis_map.rotatable and sizes[0]["hidden"] != sizes[1]["hidden"]:
        rotate(ours, axis_map, sizes[0], blocks)
    aligned = models.Pair(ours, *align(ours, small, axis_map, *sizes, blocks))
    maps = learn_maps(ours, aligned.small, aligned.units, made.training_blocks(LEARNING_TOKENS), blocks)
    learned = models.Pair(ours, maps, aligned.index_map)
    config = AnchorDistillation(
        tokens=0, control_point=ControlPointConfig(tokens=options.curve_tokens, together=False)
    )
    curve = curve_to_train(maps, ours, learned.units, config, True, blocks.shape[1])
    harness.train(maps, ours, made.text.train, made.validation, config, index_map=learned.index_map, curve=curve)
    bent = list_operations(learned.units, target, "bezier", 0.5, 0.75)
    pairs = dict(zip(ROWS, (apart, apart, aligned, learned), strict=True))
    losses = {
        row: {f"{a:g}": loss(pair.combine(target, "paper" if "paper" in row else "interpolate", a)) for a in ALPHAS}
        for row, pair in pairs.items()
    }
    middle = {row: of["0.5"] for row, of in losses.items()}
    middle["learned, with control point"] = loss(
        blend_models(bent, learned.units, target, ours, maps, curve.factors())
    )
    middle["both ends' mean"] = (loss(large) + loss(small)) / 2
    return {"learned": losses.pop("learned"), "loss": losses, "middle": middle}


def main() -> None:
    options = harness.options(
        __doc__,
        tokens=(TRAINING.tokens, "of each training", 512),
        test_tokens=(16_000, "that losses are measured on", 500),
        curve_tokens=(200_000, "that a control point is trained on", 512),
        seeds=([1, 3, 5], "of the large models; the small one's is one more", [1]),
        pairs=([*PAIRS], "that are measured", ["Llama, narrower"]),
        cache=(Path(tempfile.gettempdir()) / "cbd-hub-align", "folder of the trained models"),
    )
    made = harness.inputs(harness.toy_recipe() if options.smoke else harness.RECIPES / "quickstart.yaml")
    about = {
        "tokens": options.tokens,
        "curve_tokens": options.curve_tokens,
        "test_tokens": options.test_tokens,
        "alphas": ALPHAS,
    }
    pairs = {}
    for name in options.pairs:
        runs = [measure(name, options, made, seed) for seed in options.seeds]
        pairs[name] = {**runs[0], "middle": {key: [run["middle"][key] for run in runs] for key in runs[0]["middle"]}}
    results.save("align", {**about, "pairs": pairs}, options.results)


if __name__ == "__main__":
    main()
