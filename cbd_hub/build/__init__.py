"""From a recipe to a chain."""

__all__ = []
