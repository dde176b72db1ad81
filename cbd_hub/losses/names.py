"""The names of the divergences, for settings that load no torch."""

from typing import Literal

__all__ = ["DivergenceName"]

DivergenceName = Literal["forward_kl", "reverse_kl", "js", "skewed_kl", "skewed_reverse_kl"]
"""The divergences there are: :meth:`Divergence.named` says what each is."""
