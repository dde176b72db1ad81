"""The names of the ways to write an embedding for another vocabulary, for settings that load no torch."""

from typing import Literal

__all__ = ["Method"]

Method = Literal["pieces", "random"]
"""How rows that cannot be copied are made: means of pieces, or at random."""
