"""The page: what it shows, and how."""

__all__ = []
