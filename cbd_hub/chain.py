"""The manifest ``chain.json``: what a chain is made of, strict and readable.

A chain is a list of anchors, largest first. How the units of neighbours correspond is stored once a pair, as an
*order* for every axis: a permutation of the larger anchor's units whose first n entries are the partners of the
smaller anchor's n units, in turn, and whose other entries follow by importance. A model in between takes the first m
entries, n <= m. Orders of layers stand in the manifest; those of hidden units, heads and ffn units in
``index_maps.safetensors``.

Everything is checked here before any weight is read: shapes against counts, orders for being permutations, file names
for staying inside their folder.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cbd_hub.axis_map import AxisMap
from cbd_hub.errors import AxisMapError, CbdError, IntegrityError, ManifestError, did_you_mean
from cbd_hub.sizing import count_parameters

__all__ = [
    "CHECKSUMS_NAME",
    "FORMAT",
    "INDEX_MAPS_NAME",
    "MANIFEST_NAME",
    "Anchor",
    "CurvePoint",
    "Evaluation",
    "FileEntry",
    "IndexMap",
    "Manifest",
    "Training",
    "check_file",
    "file_entry",
    "load_index_maps",
    "read_index_map",
    "read_manifest",
    "save_index_maps",
    "write_manifest",
]

FORMAT = 1
"""The manifest format that this version writes, and the latest it reads."""

MANIFEST_NAME = "chain.json"
"""The manifest's file, at the top of a chain."""

INDEX_MAPS_NAME = "index_maps.safetensors"
"""Orders of hidden units, heads and ffn units, and energies, of all pairs."""

CHECKSUMS_NAME = "checksums.json"
"""XXH3-128 of every tensor of every anchor."""


_MOST_LAYERS = 10_000


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not path or path.startswith("/") or "\\" in path or ":" in path or "\0" in path or ".." in parts:
        raise ValueError(f"{path!r} is not a path inside the repository (no '..', no leading '/', no '\\' or ':')")
    return path


InnerPath = Annotated[str, AfterValidator(_inside)]
"""A POSIX path that stays inside its repository."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
PositiveInt = Annotated[int, Field(gt=0, lt=2**50)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Strict):
    """Size and hash of one file."""

    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Evaluation(_Strict):
    """Loss on text that took no part in training or selection."""

    loss: float
    """Nats a token."""
    perplexity: float
    """exp(loss)."""
    num_tokens: PositiveInt
    """Predicted tokens."""


class Training(_Strict):
    """What was spent on an anchor."""

    tokens: Annotated[int, Field(ge=0)]
    """Training tokens seen; 0 for an anchor that was only cut out."""
    seed: int
    start_loss: float | None = None
    """Validation loss of the untrained start, nats a token."""
    best_loss: float | None = None
    """Validation loss of the checkpoint that was kept, nats a token."""
    best_step: int | None = None
    """Optimizer step of that checkpoint; 0 is the start."""


class Anchor(_Strict):
    """One anchor of the chain."""

    name: Name
    repo_id: str | None = None
    """Hub repository; None where the anchor lies in the chain's own repository or folder."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """Commit of ``repo_id``."""
    subfolder: InnerPath | None = None
    """Folder of the anchor inside its repository; None for the top."""
    shape: dict[str, PositiveInt]
    """Sizes, in the architecture's own config fields."""
    num_parameters: PositiveInt
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    parent: Name | None = None
    """The larger neighbour that this anchor was made from."""
    layer_order: list[Annotated[int, Field(ge=0)]] | None = None
    """Order of the parent's layers (see :mod:`cbd_hub.chain`); None keeps all, in order."""
    aligned: bool = True
    """Whether the anchor started as a subset of its parent, so that their units correspond."""
    files: dict[InnerPath, FileEntry]
    """Every file that makes up the model, relative to the anchor's folder."""
    training: Training | None = None
    evaluation: Evaluation | None = None

    @model_validator(mode="after")
    def _place(self) -> "Anchor":
        if (self.repo_id is None) != (self.revision is None):
            raise ValueError("repo_id and revision (a full commit hash) go together")
        if "config.json" not in self.files:
            raise ValueError("files must list config.json")
        return self


class CurvePoint(_Strict):
    """Measured held-out loss of a model between two anchors."""

    num_parameters: PositiveInt
    loss: float
    """Nats a token."""
    method: str


class Manifest(_Strict):
    """``chain.json``."""

    format: Literal[1] = 1
    name: Name
    architecture: str
    """``model_type`` of the transformers config."""
    axis_map: dict[str, Any]
    """The resolved axis map, so that a chain of a family this library does not know can be read."""
    basis: Literal["native", "pca"] = "native"
    """Whether the residual stream was rotated into the PCA basis of its activations."""
    source: str
    """What the chain was made from: a repo id, a folder's name, or ``trained from scratch``."""
    source_revision: str | None = None
    license: str | None = None
    anchors: Annotated[list[Anchor], Field(min_length=1)]
    """Largest first."""
    tokenizer: dict[InnerPath, FileEntry] = Field(default_factory=dict)
    """The tokenizer's files, at the top of the chain's repository."""
    index_maps: FileEntry | None = None
    """``index_maps.safetensors``; None only where neighbours differ in nothing but layers."""
    checksums: FileEntry | None = None
    """``checksums.json``: anchor → tensor → XXH3-128 of its bytes."""
    curve: list[CurvePoint] = Field(default_factory=list)
    recipe: dict[str, Any] | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @cached_property
    def resolved_axis_map(self) -> AxisMap:
        """The axis map as an object."""
        return AxisMap.from_dict(self.axis_map)

    def sizes(self, anchor: Anchor) -> dict[str, int]:
        """Returns the axis sizes of an anchor."""
        return self.resolved_axis_map.sizes(anchor.shape)

    @model_validator(mode="after")
    def _fits(self) -> "Manifest":
        axis_map = self.resolved_axis_map
        previous: Anchor | None = None
        for anchor in self.anchors:
            try:
                sizes = axis_map.sizes(anchor.shape)
            except AxisMapError as error:
                raise ValueError(f"anchor {anchor.name!r}: {error}") from None
            if axis_map.config_fields(sizes) != anchor.shape:
                raise ValueError(f"anchor {anchor.name!r}: its shape does not state exactly {list(axis_map.fields)}")
            if sizes["layers"] > _MOST_LAYERS:
                raise ValueError(f"anchor {anchor.name!r} claims {sizes['layers']} layers")
            count = count_parameters(axis_map, sizes)
            if count != anchor.num_parameters:
                raise ValueError(
                    f"anchor {anchor.name!r} claims {anchor.num_parameters} parameters; its shape has {count}"
                )
            if previous is None:
                if anchor.parent is not None:
                    raise ValueError(f"anchor {anchor.name!r} is the largest and can have no parent")
            else:
                large = axis_map.sizes(previous.shape)
                if count >= previous.num_parameters or any(sizes[a] > large[a] for a in sizes):
                    raise ValueError(f"anchor {anchor.name!r} is not smaller than {previous.name!r} on every axis")
                if any(sizes[a] != large[a] for a in axis_map.frozen if a in sizes):
                    raise ValueError(f"anchor {anchor.name!r} changes a frozen axis ({', '.join(axis_map.frozen)})")
                if anchor.parent != previous.name:
                    raise ValueError(
                        f"anchor {anchor.name!r} must have parent {previous.name!r}, not {anchor.parent!r}"
                    )
                order = anchor.layer_order
                if order is None and sizes["layers"] != large["layers"]:
                    raise ValueError(f"anchor {anchor.name!r} does not say which layers it keeps (layer_order)")
                if order is not None and sorted(order) != list(range(large["layers"])):
                    raise ValueError(f"anchor {anchor.name!r}: layer_order is no permutation of its parent's layers")
                if order is not None and sorted(order[: sizes["layers"]]) != order[: sizes["layers"]]:
                    raise ValueError(f"anchor {anchor.name!r}: the kept layers of layer_order must ascend")
            previous = anchor
        if len({a.name for a in self.anchors}) != len(self.anchors):
            raise ValueError("two anchors have the same name")
        return self


@dataclass(frozen=True)
class IndexMap:
    """How the units of an anchor correspond to those of its larger neighbour."""

    layers: np.ndarray
    """(layers of the parent,) the parent's layers: first the kept ones, ascending, then the others."""
    orders: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Axis → order of the parent's units; (units,) for ``hidden``, (layers of the parent, units) for others."""
    energy: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Norm gain → share of every hidden unit in the mean square of the norm's input, times the number of units, so
    that it averages 1: (units,), or (layers of the parent, units) for a norm in every layer."""

    def order(self, axis: str, layer: int | None, size: int) -> np.ndarray:
        """Returns the order of the parent's units on an axis (of one layer): int64, (size,)."""
        order = self.orders.get(axis)
        if order is None:
            return np.arange(size, dtype=np.int64)
        return (order if order.ndim == 1 else order[layer]).astype(np.int64)


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes ``chain.json`` atomically (never half a file)."""
    text = json.dumps(manifest.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False)
    partial = folder / (MANIFEST_NAME + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(folder / MANIFEST_NAME)


def read_manifest(path: Path) -> Manifest:
    """Reads and checks ``chain.json``.

    Raises:
        ManifestError: Not JSON, a later format, unknown keys, or claims that contradict each other.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, no JSON, or a number too long
        raise ManifestError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ManifestError(f"{path} is no JSON object")
    version = data.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise ManifestError(
            f"{path} has format {version}; this cbd_hub reads formats up to {FORMAT}. "
            "Upgrade it: pip install -U cbd_hub"
        )
    if version != FORMAT:
        raise ManifestError(f"{path} has format {version!r}; expected {FORMAT}")
    try:
        return Manifest.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the manifest"
        known = {*Manifest.model_fields, *Anchor.model_fields}
        hint = did_you_mean(str(first["loc"][-1]), known) if first["type"] == "extra_forbidden" else ""
        more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
        raise ManifestError(f"{path} is not valid at {where}: {first['msg']}.{hint}{more}") from None
    except (CbdError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ManifestError(f"{path} is not valid: {error}") from None


def file_entry(path: Path) -> FileEntry:
    """Returns size and SHA-256 of a file. Cost: reads it once (about 2 GB/s)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return FileEntry(size=path.stat().st_size, sha256=digest.hexdigest())


def check_file(path: Path, entry: FileEntry) -> None:
    """Checks size and SHA-256 of a file.

    Raises:
        IntegrityError: The file is missing or differs from the manifest's entry.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} is named by the manifest and does not exist")
    if path.stat().st_size != entry.size or file_entry(path) != entry:
        raise IntegrityError(f"{path} is not the file that the manifest names (its size or SHA-256 differs)")


def save_index_maps(maps: Mapping[str, IndexMap], path: Path) -> None:
    """Writes the orders and energies of all pairs, keyed by the smaller anchor's name, as one safetensors file."""
    tensors = {}
    for name, index_map in maps.items():
        for axis, order in index_map.orders.items():
            tensors[f"{name}/order/{axis}"] = np.ascontiguousarray(order, dtype=np.int32)
        for gain, energy in index_map.energy.items():
            tensors[f"{name}/energy/{gain}"] = np.ascontiguousarray(energy, dtype=np.float32)
    save_file(dict(sorted(tensors.items())), path)


def load_index_maps(manifest: Manifest, path: Path | None) -> dict[str, IndexMap]:
    """Reads the index maps of all pairs, keyed by the smaller anchor's name.

    Args:
        manifest: The chain's manifest.
        path: ``index_maps.safetensors``, already checked against the manifest's hash; None when there is none.

    Raises:
        IntegrityError: The file is damaged, what it holds is no order of the units it is for, or the order of an
            axis on which two neighbours differ is missing (hidden units of the PCA basis are in order already).
    """
    try:
        tensors = load_file(path) if path else {}
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        raise IntegrityError(f"{path} cannot be read: {error}") from None
    axis_map, maps = manifest.resolved_axis_map, {}
    for large, small in zip(manifest.anchors, manifest.anchors[1:], strict=False):
        sizes = axis_map.sizes(large.shape)
        layers = np.array(small.layer_order if small.layer_order else range(sizes["layers"]), dtype=np.int64)
        orders, energy = {}, {}
        for key in [k for k in tensors if k.startswith(f"{small.name}/")]:
            _, kind, what = key.split("/", 2) if key.count("/") >= 2 else (key, "", "")
            value = tensors.pop(key)
            if kind == "order" and what in sizes and what not in ("layers", *axis_map.frozen):
                _check_order(key, value, what, sizes)
                orders[what] = value
            elif kind == "energy" and what in axis_map.norms:
                _check_energy(key, value, what, sizes)
                energy[what] = value
            else:
                raise IntegrityError(f"{path} holds {key!r}, which the axis map does not know")
        _check_complete(manifest, small, sizes, orders)
        maps[small.name] = IndexMap(layers, orders, energy)
    if tensors:
        raise IntegrityError(f"{path} holds {next(iter(tensors))!r}, which belongs to no anchor of the chain")
    return maps


def _check_complete(manifest: Manifest, small: Anchor, large: Mapping[str, int], orders: Mapping[str, Any]) -> None:
    """Refuses a pair that does not say which units it kept: a guess would make a model of mismatched weights."""
    own = {"layers"} | ({"hidden"} if manifest.basis == "pca" else set())  # those in the manifest; those in order
    for axis, size in manifest.sizes(small).items():
        if size != large[axis] and axis not in own and axis not in orders:
            raise IntegrityError(f"the index maps do not say which {axis} units anchor {small.name!r} keeps")


def read_index_map(anchor: Anchor, path: Path) -> IndexMap:
    """Reads back the one index map that :func:`save_index_maps` wrote for an anchor (a build's own record)."""
    orders: dict[str, np.ndarray] = {}
    energy: dict[str, np.ndarray] = {}
    for key, value in load_file(path).items():
        _, kind, what = key.split("/", 2)
        (orders if kind == "order" else energy)[what] = value
    return IndexMap(np.array(anchor.layer_order, dtype=np.int64), orders, energy)


def _check_order(key: str, order: np.ndarray, axis: str, sizes: Mapping[str, int]) -> None:
    shape = (sizes["hidden"],) if axis == "hidden" else (sizes["layers"], sizes[axis])
    if order.dtype != np.int32 or order.shape != shape or not (np.sort(order) == np.arange(shape[-1])).all():
        raise IntegrityError(f"{key!r} must be int32 {shape}, each row a permutation of its {shape[-1]} {axis} units")


def _check_energy(key: str, energy: np.ndarray, gain: str, sizes: Mapping[str, int]) -> None:
    shape = (sizes["layers"], sizes["hidden"]) if "*" in gain else (sizes["hidden"],)
    if energy.dtype != np.float32 or energy.shape != shape or not np.isfinite(energy).all() or (energy < 0).any():
        raise IntegrityError(f"{key!r} must be float32 {shape}, finite and not negative")
