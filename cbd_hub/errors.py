"""Every error this library raises on purpose.

All derive from :class:`CbdError`, so one ``except`` clause catches them, and each child is also the builtin a
Python programmer would expect (a bad argument *is* a ``ValueError``, a missing file *is* a ``FileNotFoundError``).
A message says what was got, what is allowed and what to do next.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "AxisMapError",
    "CbdError",
    "ChainNotFoundError",
    "DiskFullError",
    "IntegrityError",
    "ManifestError",
    "OutputExistsError",
    "PrecisionError",
    "PublishError",
    "RecipeError",
    "SizeError",
    "UnknownArchitectureError",
    "did_you_mean",
]


_LONGEST = 2000


class CbdError(Exception):
    """Base class of every error raised on purpose by cbd_hub.

    Its message is one line of printable text, whatever of a repository it quotes, and not endlessly long.
    """

    def __init__(self, message: str = "") -> None:
        text = "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in str(message))
        text = re.sub(r" {2,}", " ", text).strip()
        half = _LONGEST // 2
        super().__init__(text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}")


class AxisMapError(CbdError, ValueError):
    """An axis map is malformed, or does not describe the config or checkpoint it is used with."""


class UnknownArchitectureError(CbdError, KeyError):
    """No axis map is known for a model type."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0]) if self.args else ""


class DiskFullError(CbdError, OSError):
    """The disk, or the share of it that is allowed, is full."""


class PrecisionError(CbdError, OverflowError):
    """A weight is larger than the dtype that was asked for can hold."""


class SizeError(CbdError, ValueError):
    """A parameter count or shape that cannot be parsed, or that the chain cannot reach."""


class ChainNotFoundError(CbdError, FileNotFoundError):
    """No chain (or no file of it) at the place that was named."""


class ManifestError(CbdError, ValueError):
    """``chain.json`` is malformed, of an unknown format, or contradicts itself."""


class IntegrityError(CbdError, ValueError):
    """A file does not hold what the manifest says it holds (truncated, altered, missing or extra tensors).

    Args:
        message: What was got, what is expected.
        path: The damaged file, where one file is to blame: a downloaded copy is then dropped, so that it is fetched
            again the next time.
    """

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


class OutputExistsError(CbdError, FileExistsError):
    """The output folder already holds something that must not be overwritten."""


class PublishError(CbdError, RuntimeError):
    """A chain or model could not be published; what was published before is as it was."""


class RecipeError(CbdError, ValueError):
    """A build recipe is malformed or cannot be carried out."""


def did_you_mean(got: str, allowed: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the nearest allowed name, or an empty string when none is near."""
    near = difflib.get_close_matches(got, list(allowed), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
