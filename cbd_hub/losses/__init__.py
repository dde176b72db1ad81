"""Divergences between distributions, and distillation losses in chunks."""

__all__ = []
