"""From two anchors and a size to tensors."""

__all__ = []
