"""What alignment is worth between models that were trained apart, on the quickstart's text.

Run with ``OMP_NUM_THREADS=1 python benchmarks/align.py``; writes docs/results/align.json. Models of different sizes
are trained from different seeds, then a model in between is made of each pair, at several weights alpha of the small
one. Some minutes the first time; the trained models are kept for the next.
"""

import argparse
import tempfile
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

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
from cbd_hub.alignment.ranking import rank
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.initialization.fresh import fresh_model
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.settings import DistillationConfig

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
TRAINING = DistillationConfig(tokens=800_000, learning_rate=4e-3, batch_size=8, kl=0, hidden=0)

LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "max_position_embeddings": 256, "head_dim": 16}
LLAMA_SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
GPT2 = {"model_type": "gpt2", "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT2_SHAPE = ("n_embd", "n_layer", "n_head", "n_inner")


class Kind(NamedTuple):
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
    "Llama, same width": Kind(LLAMA, LLAMA_SHAPE, (96, 5, 6, 256), (96, 4, 6, 176), (96, 4, 6, 216)),
    "GPT-2, same width": Kind(GPT2, GPT2_SHAPE, (96, 5, 6, 256), (96, 4, 6, 176), (96, 4, 6, 216)),
    "GPT-2, narrower": Kind(GPT2, GPT2_SHAPE, (96, 5, 6, 256), (64, 4, 4, 176), (80, 4, 5, 216)),
    "Llama, narrower": Kind(LLAMA, LLAMA_SHAPE, (96, 5, 6, 256), (64, 4, 4, 176), (80, 4, 4, 216)),
}


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


def measure(kind: Kind, options: argparse.Namespace, made: BuildInputs) -> dict[str, Any]:
    """Losses on test text of everything that can be made of one pair."""
    blocks = made.calibration()
    large, small = (
        trained(kind.config(shape), options.tokens, seed, made, options.cache)
        for seed, shape in ((1, kind.large), (2, kind.small))
    )
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config), axis_map.sizes(small.config)
    target = axis_map.sizes({**kind.config(kind.middle), "vocab_size": len(made.tokenizer)})

    def loss(model: PreTrainedModel) -> float:
        return round(harness.loss(model, made.text.test, max_tokens=options.test_tokens).loss, 4)

    # Without alignment: units in index order, layers spread evenly.
    layers = kept_first(np.linspace(0, sizes[0]["layers"] - 1, sizes[1]["layers"]).round(), sizes[0]["layers"])
    apart = models.Pair(large, small, IndexMap(layers, {}, collect(large, axis_map, sizes[0], blocks).energy))
    ours = deepcopy(large)
    turned = axis_map.rotatable and sizes[0]["hidden"] != sizes[1]["hidden"]
    if turned:
        rotate(ours, axis_map, sizes[0], blocks)
    aligned = models.Pair(ours, *align(ours, small, axis_map, *sizes, blocks))
    ranked = models.Pair(ours, small, rank(ours, axis_map, *sizes, blocks, prefix_hidden=turned))
    rows = {
        "plain averaging (paper)": (apart, "paper"),
        "masked averaging, index order": (apart, "interpolate"),
        "masked averaging, aligned": (aligned, "interpolate"),
    }
    return {
        "large": kind.large,
        "small": kind.small,
        "middle": kind.middle,
        "alone": {
            "large": loss(large),
            "small": loss(small),
            "large pruned": loss(ranked.combine(target, "prune", 0.0)),
            "small expanded": loss(aligned.combine(target, "expand", 1.0)),
        },
        "loss": {
            name: {f"{alpha:g}": loss(pair.combine(target, method, alpha)) for alpha in ALPHAS}
            for name, (pair, method) in rows.items()
        },
    }


def main() -> None:
    """Measures all pairs and writes the figures."""
    cache = Path(tempfile.gettempdir()) / "cbd-hub-align"
    options = harness.options(
        __doc__,
        tokens=(TRAINING.tokens, "of each training", 512),
        test_tokens=(16_000, "that losses are measured on", 500),
        pairs=([*PAIRS], "that are measured", ["Llama, narrower"]),
        cache=(cache, "folder of the trained models"),
    )
    made = harness.inputs(harness.toy_recipe() if options.smoke else harness.RECIPES / "quickstart.yaml")
    about = {"tokens": options.tokens, "test_tokens": options.test_tokens, "alphas": ALPHAS}
    pairs = {name: measure(PAIRS[name], options, made) for name in options.pairs}
    results.save("align", {**about, "pairs": pairs}, options.results)


if __name__ == "__main__":
    main()
