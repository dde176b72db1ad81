"""Documents, tokens, vocabularies, and writers of text."""

__all__ = []
