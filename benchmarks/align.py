"""What alignment is worth between models that were trained apart, on the quickstart's text.

Run with ``OMP_NUM_THREADS=1 python benchmarks/align.py``; writes docs/results/align.json and prints it as a Markdown
table. Models of different sizes are trained from different seeds, then a model in between is made of each pair, at
several weights alpha of the small one. Some minutes the first time; the trained models are kept for the next.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cbd_hub.alignment.align import align
from cbd_hub.alignment.basis import rotate
from cbd_hub.alignment.importance import collect
from cbd_hub.alignment.ranking import rank
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.build.inputs import BuildInputs, Text
from cbd_hub.build.recipe import load_recipe
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.interpolation import pair as interpolation
from cbd_hub.interpolation.materialize import blend_models
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.distill import distill
from cbd_hub.training.settings import DistillationConfig

ROOT = Path(__file__).parents[1]
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINING = DistillationConfig(tokens=800_000, learning_rate=4e-3, batch_size=8, kl=0, hidden=0)
TEST_TOKENS = 16_000

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 16,
}
LLAMA_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_positions": 256,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
GPT2_SHAPE = ("n_embd", "n_layer", "n_head", "n_inner")


@dataclass(frozen=True)
class Pair:
    """Two models and one in between, by the sizes that the family's fields take in order."""

    family: Mapping[str, Any]
    fields: tuple[str, ...]
    large: tuple[int, ...]
    small: tuple[int, ...]
    middle: tuple[int, ...]

    def config(self, values: tuple[int, ...]) -> dict[str, Any]:
        """The config fields of one of the three."""
        return {**self.family, **dict(zip(self.fields, values, strict=True))}


PAIRS = {
    "Llama, same width": Pair(LLAMA, LLAMA_SHAPE, (96, 5, 6, 256), (96, 4, 6, 176), (96, 4, 6, 216)),
    "GPT-2, same width": Pair(GPT2, GPT2_SHAPE, (96, 5, 6, 256), (96, 4, 6, 176), (96, 4, 6, 216)),
    "GPT-2, narrower": Pair(GPT2, GPT2_SHAPE, (96, 5, 6, 256), (64, 4, 4, 176), (80, 4, 5, 216)),
    "Llama, narrower": Pair(LLAMA, LLAMA_SHAPE, (96, 5, 6, 256), (64, 4, 4, 176), (80, 4, 4, 216)),
}


def trained(
    pair: Pair, shape: tuple[int, ...], seed: int, vocab_size: int, text: Text, cache: Path
) -> PreTrainedModel:
    """A model trained from scratch with cross-entropy, or the one that an earlier run left in the cache."""
    config = pair.config(shape)
    run = TRAINING.model_copy(update={"seed": seed})
    values = {k: v for k, v in config.items() if k != "model_type"} | {"vocab_size": vocab_size}
    name = "-".join(str(v) for v in (*config.values(), run.tokens, seed))
    if not (cache / name / "config.json").is_file():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **values))
        validation = text.validation.select(range(48))
        with tempfile.TemporaryDirectory() as work_dir:
            distill(model, None, text.train, validation, run, work_dir=Path(work_dir), progress=False)
        model.save_pretrained(cache / name)
    return AutoModelForCausalLM.from_pretrained(cache / name, dtype=torch.float32).eval()


def in_between(
    large: PreTrainedModel,
    small: PreTrainedModel,
    axis_map: AxisMap,
    target: Sizes,
    index_map: IndexMap,
    method: str,
    alpha: float,
) -> PreTrainedModel:
    """A model of the target's sizes, made as from_chain makes it of trained anchors."""
    sizes = axis_map.sizes(large.config), axis_map.sizes(small.config)
    own_weight = 1 - alpha**2 if method == "interpolate" else 1.0
    pair = interpolation.Pair(axis_map, sizes[1], sizes[0], index_map)
    return blend_models(list_operations(pair, target, method, alpha, own_weight), pair, target, large, small)


def in_order(large: PreTrainedModel, axis_map: AxisMap, small: Sizes, blocks: torch.Tensor) -> IndexMap:
    """Correspondence without alignment: units in index order, layers spread evenly."""
    sizes = axis_map.sizes(large.config)
    kept = np.linspace(0, sizes["layers"] - 1, small["layers"]).round().astype(np.int64)
    layers = np.concatenate([kept, np.setdiff1d(np.arange(sizes["layers"]), kept)])
    return IndexMap(layers, {}, collect(large, axis_map, sizes, blocks).energy)


def measure(pair: Pair, made: BuildInputs, text: Text, cache: Path) -> dict[str, Any]:
    """Losses on test text of everything that can be made of one pair."""
    if made.tokenizer is None or (blocks := made.calibration()) is None:
        raise SystemExit("the quickstart recipe has no text")
    vocab_size = len(made.tokenizer)
    large = trained(pair, pair.large, 1, vocab_size, text, cache)
    small = trained(pair, pair.small, 2, vocab_size, text, cache)
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config), axis_map.sizes(small.config)
    target = axis_map.sizes({**pair.config(pair.middle), "vocab_size": vocab_size})

    def loss(model: PreTrainedModel) -> float:
        return round(evaluate_loss(model, text.test, max_tokens=TEST_TOKENS).loss, 4)

    unaligned = in_order(large, axis_map, sizes[1], blocks)
    rows = {
        "plain averaging (paper)": (large, small, unaligned, "paper"),
        "masked averaging, index order": (large, small, unaligned, "interpolate"),
    }
    ours = large
    if axis_map.rotatable and sizes[0]["hidden"] != sizes[1]["hidden"]:
        ours = AutoModelForCausalLM.from_config(large.config)
        ours.load_state_dict(large.state_dict())
        rotate(ours.eval(), axis_map, sizes[0], blocks)
    aligned, index_map = align(ours, small, axis_map, *sizes, blocks)
    rows["masked averaging, aligned"] = (ours, aligned, index_map, "interpolate")
    table = {
        name: {f"{alpha:g}": loss(in_between(*row[:2], axis_map, target, row[2], row[3], alpha)) for alpha in ALPHAS}
        for name, row in rows.items()
    }
    ranked = rank(ours, axis_map, *sizes, blocks, prefix_hidden=ours is not large)
    alone = {
        "large": loss(large),
        "small": loss(small),
        "large pruned": loss(in_between(ours, small, axis_map, target, ranked, "prune", 0.0)),
        "small expanded": loss(in_between(ours, aligned, axis_map, target, index_map, "expand", 1.0)),
    }
    return {"large": pair.large, "small": pair.small, "middle": pair.middle, "alone": alone, "loss": table}


def main(cache: Path) -> None:
    """Measures all pairs, writes the JSON file and prints the table."""
    made = BuildInputs(*load_recipe(ROOT / "examples" / "recipes" / "quickstart.yaml"))
    if (text := made.text) is None:
        raise SystemExit("the quickstart recipe has no text")
    results = {name: measure(pair, made, text, cache) for name, pair in PAIRS.items()}
    result = {"tokens": TRAINING.tokens, "test_tokens": TEST_TOKENS, "alphas": ALPHAS, "pairs": results}
    (ROOT / "docs" / "results" / "align.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, found in results.items():
        print(f"\n**{name}**: " + ", ".join(f"{key} {value}" for key, value in found["alone"].items()) + "\n")
        print("| alpha | " + " | ".join(f"{alpha:g}" for alpha in ALPHAS) + " |")
        print("|---|" + "---|" * len(ALPHAS))
        for method, losses in found["loss"].items():
            print(f"| {method} | " + " | ".join(f"{value:.3f}" for value in losses.values()) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "cbd-hub-align")
    main(parser.parse_args().cache)
