"""Everything that crosses the network, or comes from it."""

__all__ = []
