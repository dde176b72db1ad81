"""Models in memory: what lies between two, what is cut from one, and chains of random weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import Sizes, count_parameters, ladder
from cbd_hub.initialization.refit import refit
from cbd_hub.interpolation import pair as interpolation
from cbd_hub.interpolation.checkpoints import checksum_file, find_files
from cbd_hub.interpolation.materialize import blend_models, build_model, cut
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.losses.heads import kept_hidden
from cbd_hub.manifest.index_maps import IndexMap, save_index_maps
from cbd_hub.manifest.manifest import CHECKSUMS_NAME, INDEX_MAPS_NAME, Anchor, Manifest, file_entry, write_manifest

FIELDS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size".split()
SHAPES: dict[str, dict[str, Any]] = {
    "toy": dict(zip(FIELDS, (32, 128, 4, 4, 2, 512), strict=True)),
    "135M": dict(zip(FIELDS, (576, 1536, 30, 9, 3, 49152), strict=True)),
    "1B": dict(zip(FIELDS, (2048, 8192, 16, 32, 8, 128256), strict=True)),
}

# -- two models, and one ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """Two neighbors and how their units correspond."""

    large: PreTrainedModel
    small: PreTrainedModel
    index_map: IndexMap

    @property
    def units(self) -> interpolation.Pair:
        """The same without weights."""
        axis_map = axis_map_for(self.large.config)
        return interpolation.Pair(
            axis_map, axis_map.sizes(self.small.config), axis_map.sizes(self.large.config), self.index_map
        )

    def combine(self, target: Sizes, method: str = "interpolate", alpha: float = 0.0) -> PreTrainedModel:
        """A model of any sizes between the two, by one of the library's rules, as from_chain makes it."""
        large_only_weight = 1 - alpha**2 if method == "interpolate" else 1.0
        units = self.units
        operations = list_operations(units, target, method, alpha, large_only_weight)
        return blend_models(operations, units, target, self.large, self.small)


def pruned(large: PreTrainedModel, sizes: Sizes, index_map: IndexMap) -> PreTrainedModel:
    """The units of a model that an index map puts first."""
    axis_map = axis_map_for(large.config)
    return cut(large, axis_map, axis_map.sizes(large.config), sizes, index_map)


def refitted(model: PreTrainedModel, large: PreTrainedModel, index_map: IndexMap, blocks: Tensor) -> PreTrainedModel:
    """The model, its output projections fitted to those of the model it was cut from."""
    axis_map = axis_map_for(large.config)
    sizes, whole = axis_map.sizes(model.config), axis_map.sizes(large.config)
    kept_units = kept_hidden(index_map, sizes["hidden"], whole["hidden"])
    refit(model, large, axis_map, index_map.layers_of(sizes["layers"]), kept_units, blocks, progress=False)
    return model


def kept_first(kept: Any, count: int) -> np.ndarray:
    """An order of `count` layers that begins with some of them."""
    return np.concatenate([np.asarray(kept, dtype=np.int64), np.setdiff1d(np.arange(count), kept)])


# -- chains of random weights -----------------------------------------------------------------------------------------


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


def make_chain(folder: Path, shape: Mapping[str, Any], dtype: torch.dtype, shard: str = "100GB") -> None:
    """Writes a chain of two anchors of random weights, the second of 77 %, cut as the library would cut it."""
    config = LlamaConfig(**shape, tie_word_embeddings=True)
    axis_map = axis_map_for(config)
    large = axis_map.sizes(config)
    small = ladder(axis_map, large, round(0.77 * count_parameters(axis_map, large)))
    rng, count = np.random.default_rng(0), large["layers"]
    layers = kept_first(np.sort(rng.permutation(count)[: small["layers"]]), count)
    shrunk = [axis for axis in large if axis not in ("layers", "hidden") and large[axis] != small[axis]]
    orders = {a: np.stack([rng.permutation(large[a]) for _ in range(count)]).astype(np.int32) for a in shrunk}
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
    about = {"name": "random", "architecture": "llama", "axis_map": axis_map.to_dict(), "source": "random"}
    write_manifest(Manifest(**about, anchors=anchors, **named), folder)  # type: ignore[arg-type]


def middle(manifest: Manifest) -> int:
    """The size half-way between the two anchors."""
    return sum(anchor.num_parameters for anchor in manifest.anchors) // 2
