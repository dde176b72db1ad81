"""Where sizes stood before the package had rooms: see :mod:`cbd_hub.axes.sizing`. Kept for code written then."""

from cbd_hub.axes.sizing import count_parameters, format_count, gap_free, ladder, parse_count, solve

__all__ = ["count_parameters", "format_count", "gap_free", "ladder", "parse_count", "solve"]
