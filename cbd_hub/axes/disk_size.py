"""How large a model is on disk, as bfloat16 and as llama.cpp's quantized kinds: integers only, nothing is made.

Vectors are float32 in every GGUF kind. Of the matrices,

- ``bf16`` takes 16 bits a weight,
- ``q8_0`` 8.5: 32 numbers of 8 bits and a scale of 16; rows that are no multiple of 32 stay at 16,
- ``q4_k_m`` is chosen tensor by tensor, as llama.cpp does: 4.5 bits (Q4_K) as a rule; 6.5625 (Q6_K) for the head, and
  in about half of the layers for the attention's values and the ffn's outputs; 5.5 (Q5_K) for queries, keys and values
  in one matrix. Rows that are no multiple of 256 fall back to kinds of 32 numbers, of 5.5, 8.5 and 6 bits, and those
  that are no multiple of 32 to 16. A head of such rows llama.cpp refuses to quantize.

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

_PLAIN, _FUSED, _MORE = (4.5, 5.5), (5.5, 6.0), (6.5625, 8.5)
"""Bits of a kind of 256 numbers, and of the kind of 32 that stands in for it."""
_VALUES, _QKV = ".v_proj.", ("qkv_proj", "c_attn", "query_key_value")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
_BYTES = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ki?|mi?|gi?)?b?\s*")


def disk_size(axis_map: AxisMap, sizes: Sizes, quant: str) -> int:
    """Returns the bytes of a model's weights on disk: for Llama, Qwen2 and Qwen3 what llama.cpp writes, to the byte.

    Of other families ``q4_k_m`` is an estimate by the same rule. So it is of 80 layers, whose values llama.cpp treats
    apart.

    Args:
        axis_map: The resolved map of the family.
        sizes: Sizes of the model.
        quant: One of :data:`QUANTS`.

    Raises:
        SizeError: An unknown kind.
    """
    if quant not in QUANTS:
        raise SizeError(f"quant is {quant!r}; allowed: {', '.join(QUANTS)}.{did_you_mean(str(quant), QUANTS)}")
    bits, layers = 0.0, sizes["layers"]
    for pattern in axis_map.tensors:
        layout = axis_map.layout(pattern)
        count, shape = layout.count(sizes), layout.shape(sizes)
        repeats = layers if "*" in pattern else 1
        if quant == "bf16":
            bits += 16 * count * repeats
        elif len(shape) < 2:
            bits += 32 * count * repeats
        else:
            row = shape[0] if axis_map.in_out and "*" in pattern else shape[-1]
            more = _in_more_bits(axis_map, pattern, layers) if quant == "q4_k_m" else 0
            plain = _FUSED if any(name in pattern for name in _QKV) else _PLAIN
            bits += count * (more * _bits(quant, row, _MORE) + (repeats - more) * _bits(quant, row, plain))
    return round(bits / 8)


def _in_more_bits(axis_map: AxisMap, pattern: str, layers: int) -> int:
    """How many of a pattern's matrices Q4_K_M stores as Q6_K: the head, and values and ffn outputs of some layers.

    The layers are the first and the last eighth, and every third of those between.
    """
    if "*" not in pattern:
        return int(any(pattern in axis_map.readers(gain) for gain in axis_map.norms))
    if _VALUES not in pattern and pattern not in axis_map.consumers("ffn"):
        return 0
    eighth = layers // 8
    return sum(i < eighth or i >= 7 * layers // 8 or (i - eighth) % 3 == 2 for i in range(layers))


def _bits(quant: str, row: int, kinds: tuple[float, float]) -> float:
    """Bits a weight of a matrix with rows of so many numbers; of `kinds` the one that they allow."""
    if row % 32:
        return 16
    return 8.5 if quant == "q8_0" else kinds[1 if row % 256 else 0]


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
