"""Reading JSON objects of a repository: small, plain, and no deeper than any reader of them copes with."""

import json
import math
import os
from pathlib import Path
from typing import Any

from cbd_hub.errors import IntegrityError

__all__ = ["read_json"]

_DEEPEST = 64


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large a number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands there twice")
    return made


def read_json(path: Path, most_bytes: int) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: The file.
        most_bytes: A larger file is refused before it is read.

    Raises:
        IntegrityError: Too large, no JSON object, a key twice, NaN or infinity, or nested too deeply.
    """
    try:
        if (size := path.stat().st_size) > most_bytes:
            raise IntegrityError(f"{path} has {size} bytes; at most {most_bytes} are read")
        text = path.read_text(encoding="utf-8")
        data = json.loads(text, parse_constant=_no_constant, parse_float=_finite, object_pairs_hook=_once)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read as JSON: {os.strerror(error.errno or 0)}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, a number too long, or too deep
        raise IntegrityError(f"{path} cannot be read as JSON: {error}", path) from None
    level: list[Any] = [data]
    for _ in range(_DEEPEST):
        level = [x for v in level if isinstance(v, dict | list) for x in (v.values() if isinstance(v, dict) else v)]
    if level:
        raise IntegrityError(f"{path} is nested more than {_DEEPEST} levels deep")
    if not isinstance(data, dict):
        raise IntegrityError(f"{path} is no JSON object", path)
    return data
