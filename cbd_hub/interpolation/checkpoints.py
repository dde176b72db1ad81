"""Reading safetensors lazily: headers first, then one tensor at a time, each byte range checked before it is trusted.

The format is an 8-byte little-endian length, a JSON header ``{name: {dtype, shape, data_offsets}}`` and the data. The
header alone tells whether a checkpoint fits a plan, so nothing else is read before that is settled. Each tensor is
mapped by itself and unmapped when it is dropped, so only what is being worked on is resident (a map of whole files
stays: 1.40 GB instead of .63 for a 97M model). A file that ends early is found before its end is touched.
"""

import json
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import xxhash

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import AxisMapError, IntegrityError
from cbd_hub.interpolation.ranges import BLOCK

__all__ = [
    "DTYPES",
    "Checkpoint",
    "Digest",
    "TensorInfo",
    "checksum",
    "checksum_file",
    "find_files",
    "read_header",
]

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""safetensors dtype name → torch dtype, for the dtypes that weights are published in."""


Digest = str | list[str]
"""Of a tensor: one string where it is no larger than a block, otherwise one a block."""

_MAX_HEADER = 1 << 24
_MOST_DIMENSIONS = 8
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in a safetensors file."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte from the beginning of the file."""
    stop: int
    """Offset behind the last byte."""

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start


def _fail(path: Path, problem: str) -> IntegrityError:
    message = f"{path.name} in {path.parent} {problem}; the file is damaged or incomplete: fetch it again"
    return IntegrityError(message, path)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Reads and checks the header of a safetensors file; no tensor data is read.

    Raises:
        IntegrityError: The file is missing, truncated, has bytes left over, or its header is not a valid one.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _fail(path, f"is not a safetensors file (header of {length} bytes in a file of {size})")
            header = json.loads(file.read(length))
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {os.strerror(error.errno or 0)}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, or a number too long
        raise _fail(path, f"has an unreadable safetensors header ({error})") from None
    if not isinstance(header, dict):
        raise _fail(path, "has a safetensors header that is no JSON object")
    header.pop("__metadata__", None)
    tensors = {key: _tensor_info(path, key, entry, 8 + length) for key, entry in header.items()}
    position = 8 + length
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != position:
            raise _fail(path, f"has a gap or an overlap before tensor {info.key!r}")
        position = info.stop
    if position != size:
        raise _fail(path, f"should have {position} bytes and has {size}")
    return tensors


def _tensor_info(path: Path, key: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape[:_MOST_DIMENSIONS], start, stop]
    except (TypeError, KeyError, ValueError):
        raise _fail(path, f"has a malformed entry for tensor {key!r}") from None
    if (
        not isinstance(dtype, str)
        or len(shape) > _MOST_DIMENSIONS
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**62 for n in numbers)
    ):
        raise _fail(path, f"has a malformed entry for tensor {key!r}")
    if dtype in DTYPES and stop - start != prod(shape) * DTYPES[dtype].itemsize:
        raise _fail(path, f"says tensor {key!r} is {dtype} {shape} but gives it {stop - start} bytes")
    return TensorInfo(path, key, dtype, tuple(shape), base + start, base + stop)


def find_files(folder: Path) -> list[str]:
    """Returns the names of the safetensors files of a model folder: one file, or the shards of its index.

    Raises:
        IntegrityError: There are none, or the index is malformed or names a file outside the folder.
    """
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    index = folder / _INDEX
    if not index.is_file():
        raise IntegrityError(
            f"{folder} holds neither model.safetensors nor {_INDEX}; only safetensors weights are read "
            "(save the model with save_pretrained)"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{index} is malformed ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise IntegrityError(f"{index} names {name!r}, which is no safetensors file of this folder")
    return names


def checksum(data: bytes | memoryview) -> Digest:
    """Returns the XXH3-128 digests (hex) of a tensor's bytes: integrity at memory speed, no protection from forgery.

    (Forgery is what pinned commit hashes are for.)
    """
    digests = [xxhash.xxh3_128_hexdigest(data[i : i + BLOCK]) for i in range(0, max(len(data), 1), BLOCK)]
    return digests if len(digests) > 1 else digests[0]


def checksum_file(folder: Path, names: Iterable[str]) -> dict[str, Digest]:
    """Returns tensor key → :func:`checksum` of its bytes, for all safetensors files among ``names``.

    Cost: reads the files once, a tensor at a time.

    Raises:
        IntegrityError: A file is damaged.
    """
    sums = {}
    for name in names:
        if name.endswith(".safetensors"):
            with (folder / name).open("rb") as file:
                for key, info in read_header(folder / name).items():
                    file.seek(info.start)
                    sums[key] = checksum(file.read(info.num_bytes))
    return sums


def _intact(data: memoryview, expected: Digest | None, there: Sequence[tuple[int, int]] | None) -> bool:
    """Whether a tensor's bytes fit their digests; where only some runs of it are there, whether those blocks do."""
    if there is None:
        return checksum(data) == expected
    digests = [expected] if isinstance(expected, str) else expected or []
    if len(digests) != max(1, -(-len(data) // BLOCK)):
        return False
    blocks = [(i, i * BLOCK, min((i + 1) * BLOCK, len(data))) for i in range(len(digests))]
    return all(
        xxhash.xxh3_128_hexdigest(data[start:stop]) == digests[i]
        for i, start, stop in blocks
        if any(a <= start and stop <= b for a, b in there)
    )


class Checkpoint:
    """The parameters of one model on disk, by their transformers names, read one at a time."""

    def __init__(
        self,
        files: Iterable[Path],
        axis_map: AxisMap | None,
        checksums: Mapping[str, Digest] | None = None,
        partly: Mapping[str, Sequence[tuple[int, int]]] | None = None,
    ) -> None:
        """Opens the headers of all files.

        Args:
            files: The safetensors files: one, or all shards.
            axis_map: The resolved map of the family; says which keys are parameters, under which name. None: every
                key is a name, as in a control point's file.
            checksums: Checkpoint key → digest of the tensor's bytes (:func:`checksum`), checked at every read.
            partly: Parameters of which only these runs of bytes are there; whole blocks of them are checked.

        Raises:
            IntegrityError: A damaged file, or two files that hold the same parameter.
        """
        self.tensors: dict[str, TensorInfo] = {}
        self.bytes_read = 0
        self._checksums = checksums
        self._partly = dict(partly or {})
        self._axis_map = axis_map
        for file in files:
            for key, info in read_header(file).items():
                name = key if axis_map is None else axis_map.parameter_name(key)
                if name is None:
                    continue
                if name in self.tensors:
                    raise IntegrityError(
                        f"{name!r} is stored twice: in {self.tensors[name].file.name} and {file.name}"
                    )
                self.tensors[name] = info

    def check(self, sizes: Sizes, dtype: torch.dtype | None = None) -> None:
        """Checks that exactly the tensors of a model of these sizes are there, before any of them is read.

        Args:
            sizes: Sizes of the model.
            dtype: What every tensor must be stored as; None allows any float.

        Raises:
            IntegrityError: A missing tensor, an extra one, a wrong shape, or another dtype.
            AxisMapError: There is no axis map to tell the shapes from.
        """
        if self._axis_map is None:
            raise AxisMapError("a file without an axis map has no sizes; check its shapes")
        expected = self._axis_map.shapes(sizes)
        if missing := [name for name in expected if name not in self.tensors]:
            raise IntegrityError(f"the checkpoint lacks {_some(missing)}")
        for name, info in self.tensors.items():
            if name not in expected:
                try:
                    self._axis_map.match(name)
                    why = f"the config says {sizes['layers']} layers"
                except AxisMapError as error:
                    why = str(error)
                raise IntegrityError(
                    f"{info.file.name} holds a tensor that does not belong there, {info.key!r}: {why}"
                )
            if info.shape != expected[name]:
                raise IntegrityError(
                    f"tensor {info.key!r} in {info.file.name} has shape {list(info.shape)}; "
                    f"the manifest says {list(expected[name])}"
                )
            allowed = [name for name, value in DTYPES.items() if dtype in (None, value)]
            if info.dtype not in allowed:
                raise IntegrityError(f"tensor {info.key!r} is stored as {info.dtype}; allowed: {', '.join(allowed)}")

    def check_shapes(self, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        """Checks that exactly these tensors are there, in this dtype, before any of them is read.

        Raises:
            IntegrityError: A missing tensor, an extra one, a wrong shape, or another dtype.
        """
        if missing := [name for name in expected if name not in self.tensors]:
            raise IntegrityError(f"the file lacks {_some(missing)}")
        for name, info in self.tensors.items():
            if info.shape != expected.get(name):
                wanted = list(expected[name]) if name in expected else "nothing of that name"
                raise IntegrityError(
                    f"tensor {name!r} in {info.file.name} has shape {list(info.shape)}; the manifest says {wanted}"
                )
            if DTYPES.get(info.dtype) != dtype:
                raise IntegrityError(f"tensor {name!r} is stored as {info.dtype}; the manifest says {dtype}")

    def read(self, name: str) -> torch.Tensor:
        """Maps one parameter into memory, in its stored dtype.

        Returns:
            A tensor on private pages of the file, which writing to it would copy. Copy what is to be kept: the pages
            live as long as the tensor, and what stands in them depends on the file.

        Cost: one pass of XXH3, which brings the pages in; no copy.

        Raises:
            IntegrityError: The file ends early, cannot be read, or the bytes do not fit their checksum.
        """
        info = self.tensors[name]
        skipped = info.start % mmap.ALLOCATIONGRANULARITY
        try:
            with info.file.open("rb") as file:
                if os.fstat(file.fileno()).st_size < info.stop:
                    raise _fail(info.file, f"ends inside tensor {info.key!r}")
                first, length = info.start - skipped, skipped + info.num_bytes
                pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=first) if length else b""
        except OSError as error:
            raise IntegrityError(f"{info.file} cannot be read: {os.strerror(error.errno or 0)}") from error
        data = memoryview(pages)[skipped:]
        self.bytes_read += len(data)
        sums = self._checksums
        if sums is not None and not _intact(data, sums.get(info.key), self._partly.get(name)):
            raise _fail(info.file, f"does not hold what the manifest says of tensor {info.key!r} (checksum differs)")
        if not data:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
