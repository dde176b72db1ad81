"""The command line: arguments and printing only."""

__all__ = []
