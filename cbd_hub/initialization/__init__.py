"""How a student's weights start where they are not simply cut."""

__all__ = []
