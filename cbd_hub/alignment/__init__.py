"""Which unit of one model is which unit of another."""

__all__ = []
