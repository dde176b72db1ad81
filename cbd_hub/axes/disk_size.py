"""How large a model is on disk, as bfloat16 and as llama.cpp's quantized kinds: integers only, nothing is made.

Vectors are float32 in every GGUF kind. Of the matrices,

- ``bf16`` takes 16 bits a weight,
- ``q8_0`` 8.5: 32 numbers of 8 bits and a scale of 16; rows that are no multiple of 32 stay at 16,
- ``q4_k_m`` about 4.81 in the blocks and 6.5625 in embeddings and heads: llama.cpp stores blocks as Q4_K (4.5 bits)
  but for half of the layers' attention values and ffn outputs, some 15 % of the weights, which are Q6_K (6.5625), as
  embeddings are. Rows that are no multiple of 256 fall back to kinds of 32 numbers, 5.5 bits as a rule, and those that
  are no multiple of 32 to 16.

The files' headers, kilobytes and the vocabulary's text, come on top.
"""

import re
from decimal import Decimal

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes, as_real
from cbd_hub.errors import SizeError, did_you_mean

__all__ = ["QUANTS", "disk_size", "format_bytes", "parse_bytes"]

QUANTS = ("bf16", "q8_0", "q4_k_m")
"""The kinds, the largest first."""

_BLOCKS, _EMBEDDINGS, _FALLBACK = 4.81, 6.5625, 5.5
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ki?|mi?|gi?)?b?\s*")


def disk_size(axis_map: AxisMap, sizes: Sizes, quant: str) -> int:
    """Returns the bytes of a model's weights on disk; of ``q4_k_m`` an estimate, within some 3 %.

    Args:
        axis_map: The resolved map of the family.
        sizes: Sizes of the model.
        quant: One of :data:`QUANTS`.

    Raises:
        SizeError: An unknown kind.
    """
    if quant not in QUANTS:
        raise SizeError(f"quant is {quant!r}; allowed: {', '.join(QUANTS)}.{did_you_mean(str(quant), QUANTS)}")
    bits = 0.0
    for pattern in axis_map.tensors:
        layout = axis_map.layout(pattern)
        count = layout.count(sizes) * (sizes["layers"] if "*" in pattern else 1)
        shape = layout.shape(sizes)
        if quant == "bf16":
            bits += 16 * count
        elif len(shape) < 2:
            bits += 32 * count
        else:
            bits += count * _bits(quant, shape[0] if axis_map.in_out and "*" in pattern else shape[-1], "*" in pattern)
    return round(bits / 8)


def _bits(quant: str, row: int, in_block: bool) -> float:
    """Bits a weight of a matrix with rows of so many numbers."""
    if row % 32:
        return 16
    if quant == "q8_0":
        return 8.5
    if row % 256:
        return _FALLBACK
    return _BLOCKS if in_block else _EMBEDDINGS


def parse_bytes(value: int | float | str) -> int:
    """Reads an amount of memory: bytes, or a string such as ``"512MB"``, ``"1.5 GB"`` or ``"300MiB"``.

    Raises:
        SizeError: Not a positive amount.
    """
    number = as_real(value)
    if number is None:
        match = _BYTES.fullmatch(value.lower()) if isinstance(value, str) else None
        if match is None:
            raise SizeError(f"{value!r} is no amount of memory; write a number of bytes, '512MB', '1.5GB' or '300MiB'")
        number = round(Decimal(match[1]) * _UNITS[match[2] or ""])
    if number < 1:
        raise SizeError(f"an amount of memory is above 0; got {value!r}")
    return round(number)


def format_bytes(count: int) -> str:
    """Writes an amount of memory for a person, e.g. 71700000 → ``"71.7 MB"``."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"
