"""A chain as its user meets it: open, plan, make, refine, measure, compare, export."""

__all__ = []
