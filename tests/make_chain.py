"""Chains on disk from tiny random models, made without training: every anchor is cut out of its larger neighbor.

The units of every axis that shrinks are kept in a random order, so nothing may rely on prefixes, and noise is added
to the smaller anchor's weights, so that the two differ wherever they overlap.
"""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tiny_models import VARIANTS, tiny_config, tiny_model
from transformers import PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.chain.refine import save_calibration
from cbd_hub.interpolation.checkpoints import checksum_file
from cbd_hub.interpolation.control_points import factor_shapes
from cbd_hub.interpolation.materialize import blend, build_model, target_config
from cbd_hub.interpolation.operations import list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest.index_maps import IndexMap, load_index_maps, save_index_maps
from cbd_hub.manifest.manifest import (
    CALIBRATION_NAME,
    CHECKSUMS_NAME,
    CONTROL_POINTS_NAME,
    INDEX_MAPS_NAME,
    MANIFEST_NAME,
    Anchor,
    ControlPoint,
    Manifest,
    file_entry,
    read_manifest,
    write_manifest,
)
from cbd_hub.text.packing import train_tokenizer

__all__ = [
    "add_calibration",
    "add_control_points",
    "add_tokenizer",
    "edit_manifest",
    "labels",
    "make_chain",
    "random_index_map",
    "refresh",
    "steps_for",
    "variant_model",
]

_FILES = {"index_maps": INDEX_MAPS_NAME, "checksums": CHECKSUMS_NAME, "calibration": CALIBRATION_NAME}


def variant_model(variant: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """The tiny random model of a variant, with an ffn wide enough to reach any size in between (see below)."""
    family, fields = VARIANTS[variant]
    ffn = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size")
    return tiny_model(tiny_config(family, **{ffn: 300, **fields, **overrides}), dtype)


def steps_for(axis_map: AxisMap, sizes: Mapping[str, int], width: bool = True) -> list[dict[str, int]]:
    """Sizes of two smaller anchors: fewer ffn units and layers, then less of everything that a family allows.

    The ffn takes so large a share that it closes the gaps which whole layers and heads leave in a model this tiny.
    """
    middle = {**sizes, "ffn": sizes["ffn"] // 2, "layers": sizes["layers"] - 1}
    small = {**middle, "ffn": sizes["ffn"] // 15}
    if width:
        for axis in ("kv_heads", "q_per_kv", "heads"):
            if sizes.get(axis, 1) > 1:
                small[axis] = sizes[axis] // 2
                break
        heads = small.get("heads", small.get("kv_heads", 0) * small.get("q_per_kv", 0))
        if "hidden" in axis_map.equal:
            small["hidden"] = heads * small["head_dim"]
        else:
            small["hidden"] = sizes["hidden"] * 2 // 3 // heads * heads
    else:
        small["layers"] = max(1, middle["layers"] - 1)
    return [middle, small]


def random_index_map(
    axis_map: AxisMap,
    large: Mapping[str, int],
    small: Mapping[str, int],
    rng: np.random.Generator,
    energy: bool = False,
) -> IndexMap:
    """A random order of the units of every axis that differs, and of the layers."""
    kept = np.sort(rng.permutation(large["layers"])[: small["layers"]])
    rest = rng.permutation(np.setdiff1d(np.arange(large["layers"]), kept))
    orders = {}
    for axis in large:
        if axis == "layers" or large[axis] == small[axis]:
            continue
        rows = 1 if axis == "hidden" else large["layers"]
        order = np.stack([rng.permutation(large[axis]) for _ in range(rows)]).astype(np.int32)
        orders[axis] = order[0] if axis == "hidden" else order
    shares = {}
    for gain in axis_map.norms if energy else ():
        if "hidden" in axis_map.layout(gain).axes:
            shape = (large["layers"], large["hidden"]) if "*" in gain else (large["hidden"],)
            share = rng.gamma(2.0, size=shape)
            shares[gain] = (share / share.mean(-1, keepdims=True)).astype(np.float32)
    return IndexMap(np.concatenate([kept, rest]), orders, shares)


def make_chain(
    folder: Path,
    model: PreTrainedModel,
    steps: Sequence[Mapping[str, int]] | None = None,
    *,
    width: bool = True,
    seed: int = 0,
    noise: float = 0.02,
    energy: bool = False,
    max_shard_size: str = "1GB",
    checksums: bool = True,
    names: Sequence[str] = (),
    **claims: Any,
) -> Path:
    """Writes a chain folder whose largest anchor is ``model``.

    Args:
        folder: Where to; made.
        model: The source.
        steps: Axis sizes of the smaller anchors, largest first; None for those of :func:`steps_for`.
        width: Passed to :func:`steps_for`.
        seed: Of the random orders and the noise.
        noise: Standard deviation of what is added to the smaller anchor's weights.
        energy: Whether the index maps hold (random) energies.
        max_shard_size: Passed to ``save_pretrained``.
        checksums: Whether to write ``checksums.json``.
        names: Names of the anchors.
        claims: Further fields of every anchor but the first (``aligned``).
    """
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    axis_map = axis_map_for(model.config)
    sizes = axis_map.sizes(model.config)
    dtype = model.dtype
    folder.mkdir(parents=True)
    maps: dict[str, IndexMap] = {}
    anchors: list[Anchor] = []
    previous = sizes
    for i, target in enumerate([sizes, *(steps_for(axis_map, sizes, width) if steps is None else steps)]):
        name = names[i] if names else f"a{i}"
        if i:
            maps[name] = random_index_map(axis_map, previous, target, rng, energy)
            pair = Pair(axis_map, target, previous, maps[name])
            read = model.state_dict().__getitem__
            state = dict(blend(list_operations(pair, target, "prune", 0.0), pair, target, read, read, dtype))
            for value in state.values():
                value += noise * torch.randn(value.shape, generator=generator, dtype=torch.float64)
            model = build_model(target_config(model.config, pair, target), state, dtype)
        model.save_pretrained(folder / "anchors" / name, max_shard_size=max_shard_size)
        anchors.append(
            Anchor(
                name=name,
                subfolder=f"anchors/{name}",
                shape=axis_map.config_fields(target),
                num_parameters=count_parameters(axis_map, target),
                dtype=str(dtype).removeprefix("torch."),  # type: ignore[arg-type]
                parent=anchors[-1].name if anchors else None,
                layer_order=maps[name].layers.tolist() if i else None,
                files={"config.json": file_entry(folder / "anchors" / name / "config.json")},
                **(claims if i else {}),
            )
        )
        previous = dict(target)
    if any(m.orders or m.energy for m in maps.values()):
        save_index_maps(maps, folder / INDEX_MAPS_NAME)
    manifest = Manifest(
        name=f"{model.config.model_type}-chain",
        architecture=model.config.model_type,
        axis_map=axis_map.to_dict(),
        source="random",
        anchors=anchors,
    )
    write_manifest(manifest, folder)
    if checksums:
        (folder / CHECKSUMS_NAME).write_text("{}", encoding="utf-8")
    refresh(folder)
    return folder


def refresh(folder: Path) -> None:
    """Brings every hash and size of a chain folder in line with its files."""
    data = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    digests = {}
    for anchor in data["anchors"]:
        place = folder / anchor["subfolder"]
        anchor["files"] = {p.name: file_entry(p).model_dump() for p in sorted(place.iterdir())}
        digests[anchor["name"]] = checksum_file(place, [p.name for p in sorted(place.glob("*.safetensors"))])
        control = folder / CONTROL_POINTS_NAME / f"{anchor['name']}.safetensors"
        if control.exists():
            anchor["control_point"]["file"] = file_entry(control).model_dump()
            digests[f"{CONTROL_POINTS_NAME}/{anchor['name']}"] = checksum_file(control.parent, [control.name])
    if (folder / CHECKSUMS_NAME).exists():
        (folder / CHECKSUMS_NAME).write_text(json.dumps(digests), encoding="utf-8")
    for key, name in _FILES.items():
        if (folder / name).exists():
            data[key] = file_entry(folder / name).model_dump()
    (folder / MANIFEST_NAME).write_text(json.dumps(data), encoding="utf-8")


def add_calibration(folder: Path, blocks: torch.Tensor) -> Path:
    """Lets a chain ship token ids (N, S) for ``refine``; returns its folder."""
    save_calibration(blocks, folder / CALIBRATION_NAME)
    refresh(folder)
    return folder


def add_control_points(folder: Path, rank: int = 3, scale: float = 0.05, seed: int = 0) -> Path:
    """Gives every pair of a chain a random control point; returns its folder."""
    manifest = read_manifest(folder / MANIFEST_NAME)
    maps = load_index_maps(manifest, folder / INDEX_MAPS_NAME if manifest.index_maps else None)
    generator = torch.Generator().manual_seed(seed)
    (folder / CONTROL_POINTS_NAME).mkdir(exist_ok=True)
    for i, (large, small) in enumerate(itertools.pairwise(manifest.anchors)):
        pair = Pair(manifest.resolved_axis_map, manifest.sizes(small), manifest.sizes(large), maps[small.name])
        dtype = getattr(torch, large.dtype)
        factors = {
            name: (scale * torch.randn(shape, generator=generator)).to(dtype)
            for name, shape in factor_shapes(pair, rank).items()
        }
        path = folder / f"{small.control_point_name}.safetensors"
        save_file(factors, path)
        measured = {"sizes": [small.num_parameters + 1], "losses": [1.0], "straight_losses": [2.0]}
        record = ControlPoint(file=file_entry(path), rank=rank, tokens=9, seed=seed, together=True, **measured)
        edit_manifest(folder, "anchors", i + 1, "control_point", value=record.model_dump(mode="json"))
    edit_manifest(folder, "format", value=2)
    refresh(folder)
    return folder


def add_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """Lets a chain ship a tokenizer, trained on a few words; returns its folder."""
    rows = [{"text": f"word {i} and the next one, {i * i}"} for i in range(50)]
    saved = train_tokenizer(Dataset.from_list(rows), vocab_size).save_pretrained(folder)
    names = sorted({Path(name).name for name in saved if Path(name).is_file()})
    edit_manifest(folder, "tokenizer", value={name: file_entry(folder / name).model_dump() for name in names})
    return folder


def edit_manifest(folder: Path, *path: str | int, value: Any) -> None:
    """Replaces one value of ``chain.json``, as an editor would."""
    data = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / MANIFEST_NAME).write_text(json.dumps(data), encoding="utf-8")


def labels(spec: str, sizes: Mapping[str, int]) -> list[list[tuple[tuple[str, int], ...]]]:
    """For every stored dimension of an axis string, what each row stands for, written out by plain loops.

    ``labels("(heads 2)", {"heads": 2})[0][2]`` is ``(("part", 0), ("heads", 1), ("factor 1", 0))``.
    """
    dims = []
    for dim in re.findall(r"\([^)]*\)|\S+", spec):
        rows: list[tuple[tuple[str, int], ...]] = []
        for number, part in enumerate(dim.strip("()").split("+")):
            factors = part.split()
            named = [f"factor {i}" if f.isdigit() else f for i, f in enumerate(factors)]
            counts = [int(f) if f.isdigit() else sizes[f] for f in factors]
            for units in itertools.product(*map(range, counts)):
                rows.append((("part", number), *zip(named, units, strict=True)))
        dims.append(rows)
    return dims
