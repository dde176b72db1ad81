"""The weights of an anchor, opened.

Weights come from a whole file where one is at hand or nearly all of it is needed, and otherwise from the byte ranges
that a plan needs. Either way the headers are checked before a weight is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import ChainNotFoundError, IntegrityError
from cbd_hub.hub.read import Location, NoRangesError, checked_file, dropping_damage
from cbd_hub.interpolation.checkpoints import Checkpoint, Digest, read_header
from cbd_hub.interpolation.materialize import Read, parse_dtype
from cbd_hub.interpolation.plan import nearly_all
from cbd_hub.interpolation.ranges import Run, count_bytes
from cbd_hub.manifest import manifest as manifests
from cbd_hub.manifest.json_files import read_json
from cbd_hub.manifest.manifest import Anchor, FileEntry, Manifest

__all__ = [
    "open_checkpoint",
    "open_control_point",
    "reader",
    "weight_files",
]

_MOST_CHECKSUMS = 1 << 26
_HEADER = 1 << 17
"""Bytes that are fetched first: nearly every header fits."""

NeededRuns = Mapping[str, Sequence[Run]]
"""Parameter name → runs within the tensor that are needed."""


def read_checksums(manifest: Manifest, chain: Location) -> dict[str, dict[str, Digest]]:
    """Returns anchor → checkpoint key → digest of the tensor; nothing where the chain ships none.

    Raises:
        IntegrityError: The file is not what the manifest says, or malformed.
    """
    if manifest.checksums is None:
        return {}
    path = checked_file(chain, manifests.CHECKSUMS_NAME, manifest.checksums)
    try:
        return TypeAdapter(dict[str, dict[str, Digest]]).validate_python(read_json(path, _MOST_CHECKSUMS))
    except ValidationError as error:
        raise IntegrityError(f"{path} is malformed: {error.errors()[0]['msg']}") from None


def weight_files(anchor: Anchor) -> list[str]:
    """Returns the names of an anchor's safetensors files.

    Raises:
        IntegrityError: It has none.
    """
    names = [name for name in anchor.files if name.endswith(".safetensors")]
    if not names:
        raise IntegrityError(f"anchor {anchor.name!r} has no safetensors file; no other weights are read")
    return names


def open_checkpoint(
    place: Location,
    anchor: Anchor,
    axis_map: AxisMap,
    checksums: Mapping[str, Digest] | None,
    needed: NeededRuns | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Opens an anchor's weights and checks their headers against the manifest; reads no weight.

    Args:
        place: From :func:`cbd_hub.hub.read.anchor_place`.
        anchor: Its entry in the manifest.
        axis_map: The resolved map of the family.
        checksums: Digest of every tensor; None checks whole files against their SHA-256 instead.
        needed: What will be read; None is everything. Fetched in ranges where the files are not cached and this is
            less than :data:`cbd_hub.interpolation.plan.WHOLE_ABOVE` of them.
        progress: Show a progress bar while ranges are fetched.

    Raises:
        IntegrityError: Damaged files, or other tensors than the manifest says.
        ChainNotFoundError: A file that cannot be fetched.
    """
    files = {name: anchor.files[name] for name in weight_files(anchor)}
    if needed is not None and nearly_all(anchor, needed):
        needed = None
    with _naming(place, f"anchor {anchor.name!r}"):
        checkpoint, paths = _open(place, files, axis_map, checksums, needed, progress)
        checkpoint.check(axis_map.sizes(anchor.shape), parse_dtype(anchor.dtype))
        _check_whole(paths, files, checksums)
    return checkpoint


def open_control_point(
    chain: Location,
    anchor: Anchor,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    checksums: Mapping[str, Digest] | None,
    needed: NeededRuns | None = None,
    progress: bool = True,
) -> Checkpoint:
    """Opens the control point between an anchor and its parent, and checks its header; reads no tensor.

    Args:
        chain: Where the chain is.
        anchor: The smaller anchor of the pair; it has a control point.
        shapes: Name → shape of every tensor (:func:`cbd_hub.interpolation.control_points.factor_shapes`).
        dtype: What every tensor must be stored as.
        checksums: Digest of every tensor; None checks the whole file against its SHA-256 instead.
        needed: What will be read; None is everything.
        progress: Show a progress bar while ranges are fetched.

    Raises:
        IntegrityError: A damaged file, or one of another pair.
        ChainNotFoundError: It cannot be fetched.
    """
    if anchor.control_point is None or anchor.control_point.file is None:
        raise IntegrityError(f"the pair of anchor {anchor.name!r} has no control point")
    files = {f"{anchor.control_point_name}.safetensors": anchor.control_point.file}
    with _naming(chain, f"control point of anchor {anchor.name!r}"):
        checkpoint, paths = _open(chain, files, None, checksums, needed, progress)
        checkpoint.check_shapes(shapes, dtype)
        _check_whole(paths, files, checksums)
    return checkpoint


@contextmanager
def _naming(place: Location, what: str) -> Iterator[None]:
    """Errors say which files they are about; a fetched file that is damaged is dropped."""
    try:
        yield
    except IntegrityError as error:
        place.forget(error.path)
        raise IntegrityError(f"{what}: {error}", error.path) from None
    except ChainNotFoundError as error:
        if place.is_local:
            raise IntegrityError(f"{what}: {error}") from None
        raise


def _open(
    place: Location,
    files: Mapping[str, FileEntry],
    axis_map: AxisMap | None,
    checksums: Mapping[str, Digest] | None,
    needed: NeededRuns | None,
    progress: bool,
) -> tuple[Checkpoint, list[Path]]:
    """Opens files whose sizes are the manifest's: cached ones whole, others in ranges where ``needed`` says which."""
    paths: list[Path] = []
    partly: dict[str, Sequence[Run]] = {}
    for name, entry in files.items():
        path = place.cached(name)
        if path is None and checksums is not None and needed is not None:
            with dropping_damage(place):
                path, held = _fetch_needed(place, name, entry, axis_map, needed, progress)
            partly |= held
        path = path or place.file(name)
        if path.stat().st_size != entry.size:
            raise IntegrityError(
                f"{name} has {path.stat().st_size} bytes; the manifest says {entry.size}: the file is damaged or "
                "incomplete, fetch it again",
                path,
            )
        paths.append(path)
    return Checkpoint(paths, axis_map, checksums, partly), paths


def _check_whole(
    paths: Sequence[Path], files: Mapping[str, FileEntry], checksums: Mapping[str, Digest] | None
) -> None:
    """Where no tensor has a digest: checks whole files, whose headers were found right first."""
    if checksums is None:
        for path, entry in zip(paths, files.values(), strict=True):
            manifests.check_file(path, entry)


def reader(place: Location, checkpoint: Checkpoint) -> Read:
    """Returns the function that reads a parameter, and drops the fetched file if it turns out to be damaged."""

    def read(name: str) -> torch.Tensor:
        with dropping_damage(place):
            return checkpoint.read(name)

    return read


def _fetch_needed(
    place: Location, name: str, entry: FileEntry, axis_map: AxisMap | None, needed: NeededRuns, progress: bool
) -> tuple[Path | None, dict[str, Sequence[Run]]]:
    """Fetches a file's header, then what is needed of its tensors; returns also the runs of those that are not whole.

    None where the server sends whole files only.
    """
    try:
        file, first = place.ranged(name, entry.size, entry.sha256), min(_HEADER, entry.size)
        path = file.fetch([(0, first)], progress=False)
        with path.open("rb") as start:
            length = 8 + int.from_bytes(start.read(8), "little")
        if first < length <= entry.size:
            file.fetch([(0, length)], progress=False)
        runs: list[Run] = []
        partly: dict[str, Sequence[Run]] = {}
        for key, info in read_header(path).items():
            parameter = key if axis_map is None else axis_map.parameter_name(key)
            wanted = needed.get(parameter or "", ())
            runs += [(info.start + a, min(info.start + b, info.stop)) for a, b in wanted]
            if parameter is not None and count_bytes(wanted) < info.num_bytes:
                partly[parameter] = wanted
        return file.fetch(runs, progress=progress), partly
    except NoRangesError:
        return None, {}
