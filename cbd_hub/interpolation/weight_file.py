"""A model's safetensors file, written one tensor at a time, so that the model is never in memory as a whole."""

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from cbd_hub.errors import IntegrityError
from cbd_hub.interpolation.checkpoints import DTYPES

__all__ = ["write_tensors"]


def write_tensors(
    path: Path, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, tensors: Iterable[tuple[str, torch.Tensor]]
) -> None:
    """Writes the file that ``safetensors.torch.save_file`` would write of the same tensors, byte for byte.

    Args:
        path: Of the file.
        shapes: Name → shape of every tensor.
        dtype: Of all tensors.
        tensors: Names and tensors, sorted by name; each is dropped once it is written.

    Cost: one pass over the bytes; memory for one tensor.

    Raises:
        IntegrityError: Other tensors came than were named, or in another order.
    """
    kind = next(name for name, value in DTYPES.items() if value == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        start, end = end, end + prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    expected = iter(sorted(shapes))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            if name != next(expected, None) or tensor.dtype != dtype or list(tensor.shape) != list(shapes[name]):
                raise IntegrityError(f"{name!r} of shape {tuple(tensor.shape)}, {tensor.dtype} was not announced")
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    if (missing := next(expected, None)) is not None:
        raise IntegrityError(f"{missing!r} was announced and not written")
