"""Held-out loss, tasks, summaries, and plots."""

__all__ = []
