"""The manifest ``chain.json``: what a chain is made of, strict and readable.

A chain is a list of anchors, largest first. How the units of neighbors correspond is stored once a pair, as an
*order* for every axis: a permutation of the larger anchor's units whose first n entries are the partners of the
smaller anchor's n units, in turn, and whose other entries follow by importance. A model in between takes the first m
entries, n <= m. Orders of layers stand in the manifest; those of hidden units, heads and ffn units in
``index_maps.safetensors``.

Everything is checked here before any weight is read: shapes against counts, orders for being permutations, file names
for staying inside their folder.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.errors import AxisMapError, CbdError, IntegrityError, ManifestError, did_you_mean
from cbd_hub.manifest.json_files import read_json
from cbd_hub.manifest.records import (
    Barrier,
    Bridge,
    ControlPoint,
    CurvePoint,
    Evaluation,
    FileEntry,
    PositiveInt,
    Strict,
    Training,
)

__all__ = [
    "CALIBRATION_NAME",
    "CHECKSUMS_NAME",
    "CONTROL_POINTS_NAME",
    "FORMAT",
    "INDEX_MAPS_NAME",
    "MANIFEST_NAME",
    "Anchor",
    "Barrier",
    "Bridge",
    "ControlPoint",
    "CurvePoint",
    "Evaluation",
    "FileEntry",
    "Manifest",
    "Training",
    "check_file",
    "file_entry",
    "manifest_text",
    "read_manifest",
    "write_manifest",
]

FORMAT = 3
"""The latest manifest format that this version reads. See :meth:`Manifest.needed_format` for the one it writes."""

MANIFEST_NAME = "chain.json"
"""The manifest's file, at the top of a chain."""

INDEX_MAPS_NAME = "index_maps.safetensors"
"""Orders of hidden units, heads and ffn units, and energies, of all pairs."""

CALIBRATION_NAME = "calibration.safetensors"
"""Token ids that ``refine`` compares candidates on."""
CHECKSUMS_NAME = "checksums.json"
"""XXH3-128 of every tensor of every anchor."""

CONTROL_POINTS_NAME = "control_points"
"""Folder with one safetensors file for every pair with a control point, named after its smaller anchor."""


_TEMPLATES = "additional_chat_templates"
"""Folder of a tokenizer's further chat templates."""

_MOST_BYTES = 1 << 24
_MOST_LAYERS = 1_000
_MOST_TENSORS = 256
"""Lines of an axis map."""
_MOST_AXES = 12
_LONGEST_TEXT = 256
_MOST_ROWS = 1 << 24
"""Of a stored dimension."""


_PART = r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}"
_INNER = re.compile(rf"{_PART}(/{_PART}){{0,7}}")
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def _inside(path: str) -> str:
    if not _INNER.fullmatch(path):
        raise ValueError(
            f"{path[:200]!r} is not a path inside the repository (names of letters, digits and ._+-, joined by '/'; "
            "none begins with a dot)"
        )
    return path


def _repository(repo_id: str) -> str:
    if not _REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id or repo_id.endswith((".git", ".", "-")):
        raise ValueError(f"{repo_id[:200]!r} is no repository id (owner/name); addresses and paths are not followed")
    return repo_id


InnerPath = Annotated[str, AfterValidator(_inside)]
"""A POSIX path that stays inside its repository."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]


class Anchor(Strict):
    """One anchor of the chain."""

    name: Name
    repo_id: Annotated[str, AfterValidator(_repository)] | None = None
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
    """The larger neighbor that this anchor was made from."""
    init: str | None = None
    """The public checkpoint that it started from; None for a subset of the parent."""
    layer_order: list[Annotated[int, Field(ge=0)]] | None = None
    """Order of the parent's layers (see :mod:`cbd_hub.manifest.manifest`); None keeps all, in order."""
    aligned: bool = True
    """Whether its weights can be averaged with its parent's: their units correspond, and no high barrier was met."""
    barrier: Barrier | None = None
    """What was measured between this anchor and its parent."""
    files: dict[InnerPath, FileEntry]
    """Every file that makes up the model, relative to the anchor's folder."""
    training: Training | None = None
    evaluation: Evaluation | None = None
    control_point: ControlPoint | None = None
    """The learned bend between this anchor and its parent; None means the straight line."""

    @property
    def control_point_name(self) -> str:
        """Where its control point lies in the chain, without the suffix."""
        return f"{CONTROL_POINTS_NAME}/{self.name}"

    @property
    def bent(self) -> bool:
        """Whether there is a control point between this anchor and its parent."""
        return self.control_point is not None and self.control_point.file is not None

    @model_validator(mode="after")
    def _place(self) -> "Anchor":
        if (self.repo_id is None) != (self.revision is None):
            raise ValueError("repo_id and revision (a full commit hash) go together")
        if "config.json" not in self.files:
            raise ValueError("files must list config.json")
        return self


class Manifest(Strict):
    """``chain.json``."""

    format: Literal[1, 2, 3] = 1
    name: Name
    architecture: str
    """``model_type`` of the transformers config."""
    axis_map: dict[str, Any]
    """The resolved axis map, so that a chain of a family this library does not know can be read."""
    basis: Literal["native", "pca"] = "native"
    """Whether the residual stream was rotated into the PCA basis of its activations."""
    layers_last: bool = True
    """Whether models in between take ffn units before layers (:func:`cbd_hub.axes.sizing.solve`)."""
    round_widths: Literal[True] | None = None
    """Whether their widths are multiples of 256, 64 or 32 wherever the tolerance allows; None in earlier chains."""
    source: str
    """What the chain was made from: a repo id, a folder's name, or ``trained from scratch``."""
    source_revision: str | None = None
    bridge: Bridge | None = None
    """How the largest anchor came from a source that is no neighbor of it; None where it is one."""
    license: str | None = None
    anchors: Annotated[list[Anchor], Field(min_length=1)]
    """Largest first."""
    tokenizer: dict[InnerPath, FileEntry] = Field(default_factory=dict)
    """The tokenizer's files, at the top of the chain's repository."""
    index_maps: FileEntry | None = None
    """``index_maps.safetensors``; None only where neighbors differ in nothing but layers."""
    checksums: FileEntry | None = None
    """``checksums.json``: anchor → tensor → XXH3-128 of its bytes."""
    calibration: FileEntry | None = None
    """``calibration.safetensors``: token ids (N, S) int32 that no anchor was trained on, for ``refine``."""
    curve: list[CurvePoint] = Field(default_factory=list)
    recipe: dict[str, Any] | None = None
    versions: dict[str, str] = Field(default_factory=dict)

    @cached_property
    def resolved_axis_map(self) -> AxisMap:
        """The axis map as an object."""
        return AxisMap.from_dict(self.axis_map)

    @property
    def top_files(self) -> dict[str, FileEntry]:
        """Every file at the top of the chain that the manifest vouches for."""
        named = {
            INDEX_MAPS_NAME: self.index_maps,
            CHECKSUMS_NAME: self.checksums,
            CALIBRATION_NAME: self.calibration,
        }
        for anchor in self.anchors:
            if anchor.control_point is not None:
                named[f"{anchor.control_point_name}.safetensors"] = anchor.control_point.file
        return {**self.tokenizer, **{name: entry for name, entry in named.items() if entry is not None}}

    @property
    def better_than_source(self) -> list[str]:
        """Names of anchors whose held-out loss is more than .01 nats a token below the source's.

        Empty where the largest anchor was trained with the chain, on the chain's own text.
        """
        losses = {a.name: a.evaluation.loss for a in self.anchors if a.evaluation is not None}
        source = None if self.anchors[0].training is not None else losses.get(self.anchors[0].name)
        return [] if source is None else [name for name, loss in losses.items() if loss < source - 0.01]

    @staticmethod
    def needed_format(anchors: Iterable[Anchor], round_widths: bool | None) -> Literal[1, 2, 3]:
        """Returns the format that says what a reader must know: 3 round widths, 2 control points, 1 neither."""
        return 3 if round_widths else 2 if any(anchor.control_point is not None for anchor in anchors) else 1

    def sizes(self, anchor: Anchor) -> dict[str, int]:
        """Returns the axis sizes of an anchor."""
        return self.resolved_axis_map.sizes(anchor.shape)

    @field_validator("axis_map")
    @classmethod
    def _modest(cls, value: dict[str, Any]) -> dict[str, Any]:
        """Nothing in an axis map is large: what is would only cost endless work."""
        level: list[Any] = [value]
        while level:
            if any(len(v) > _LONGEST_TEXT for v in level if isinstance(v, str)):
                raise ValueError(f"the axis map holds a string of more than {_LONGEST_TEXT} characters")
            if any(len(v) > _MOST_TENSORS for v in level if isinstance(v, dict | list)):
                raise ValueError(f"the axis map holds a list of more than {_MOST_TENSORS} entries")
            inner = [v for v in level if isinstance(v, dict | list)]
            level = [x for v in inner for x in ([*v, *v.values()] if isinstance(v, dict) else v)]
        return value

    @model_validator(mode="after")
    def _files_apart(self) -> "Manifest":
        """No file takes the place of another, or of a folder."""
        own = {MANIFEST_NAME, INDEX_MAPS_NAME, CHECKSUMS_NAME, CALIBRATION_NAME}
        for name in self.tokenizer:
            inner = "/" in name and not name.startswith(f"{_TEMPLATES}/")
            if inner or name in own or name.startswith((MANIFEST_NAME, "anchors", CONTROL_POINTS_NAME)):
                raise ValueError(f"a tokenizer file cannot be called {name!r}")
        for anchor in self.anchors:
            folders = {name.rsplit("/", n)[0] for name in anchor.files for n in range(1, name.count("/") + 1)}
            if clash := folders & set(anchor.files):
                raise ValueError(f"anchor {anchor.name!r}: {sorted(clash)[0]!r} cannot be both a file and a folder")
        return self

    @model_validator(mode="after")
    def _fits(self) -> "Manifest":
        axis_map = self.resolved_axis_map
        if len(axis_map.axes) > _MOST_AXES:
            raise ValueError(f"the axis map has {len(axis_map.axes)} axes; at most {_MOST_AXES} are read")
        previous: Anchor | None = None
        for anchor in self.anchors:
            try:
                sizes = axis_map.sizes(anchor.shape)
            except AxisMapError as error:
                raise ValueError(f"anchor {anchor.name!r}: {error}") from None
            if axis_map.config_fields(sizes) != anchor.shape:
                raise ValueError(f"anchor {anchor.name!r}: its shape does not state exactly {list(axis_map.fields)}")
            if sizes["layers"] > _MOST_LAYERS:
                raise ValueError(f"anchor {anchor.name!r} claims {sizes['layers']} layers; at most {_MOST_LAYERS}")
            rows = max(max(axis_map.layout(p).shape(sizes), default=0) for p in axis_map.tensors)
            if max(rows, *sizes.values()) > _MOST_ROWS:
                raise ValueError(f"anchor {anchor.name!r} claims a size of more than {_MOST_ROWS} units")
            count = count_parameters(axis_map, sizes)
            if count != anchor.num_parameters:
                raise ValueError(
                    f"anchor {anchor.name!r} claims {anchor.num_parameters} parameters; its shape has {count}"
                )
            if previous is None:
                if anchor.parent is not None:
                    raise ValueError(f"anchor {anchor.name!r} is the largest and can have no parent")
                if anchor.control_point is not None:
                    raise ValueError(f"anchor {anchor.name!r} is the largest and can have no control point")
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
                control = anchor.control_point
                if control is not None and control.rank > axis_map.largest_rank(large):
                    raise ValueError(
                        f"anchor {anchor.name!r}: its control point has rank {control.rank}; at most "
                        f"{axis_map.largest_rank(large)} is possible"
                    )
            previous = anchor
        if self.format != (needed := self.needed_format(self.anchors, self.round_widths)):
            raise ValueError(f"a chain with these anchors has format {needed}")
        if len({a.name for a in self.anchors}) != len(self.anchors):
            raise ValueError("two anchors have the same name")
        return self


def manifest_text(manifest: Manifest) -> str:
    """Returns what ``chain.json`` holds."""
    return json.dumps(manifest.model_dump(mode="json", exclude_none=True), indent=1, ensure_ascii=False) + "\n"


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes ``chain.json`` atomically (never half a file)."""
    partial = folder / (MANIFEST_NAME + ".partial")
    partial.write_text(manifest_text(manifest), encoding="utf-8")
    partial.replace(folder / MANIFEST_NAME)


def read_manifest(path: Path) -> Manifest:
    """Reads and checks ``chain.json``.

    Raises:
        ManifestError: Not JSON, a later format, unknown keys, or claims that contradict each other.
    """
    try:
        data = read_json(path, _MOST_BYTES)
    except IntegrityError as error:
        raise ManifestError(str(error)) from None
    version = data.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise ManifestError(
            f"{path} has format {version}; this cbd_hub reads formats up to {FORMAT}. "
            "Upgrade it: pip install -U cbd_hub"
        )
    if version not in range(1, FORMAT + 1):
        raise ManifestError(f"{path} has format {version!r}; expected 1 to {FORMAT}")
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
        raise IntegrityError(f"{path} is not the file that the manifest names (its size or SHA-256 differs)", path)
