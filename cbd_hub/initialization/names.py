"""The names of the ways to write an embedding for another vocabulary, for settings that load no torch."""

from typing import Literal

__all__ = ["Method"]

Method = Literal["omp", "pieces", "random"]
"""How rows are made that cannot be copied: sparse combinations, means of pieces, or at random."""
