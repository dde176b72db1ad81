"""What is known of a model family, as data: integers and strings only."""

__all__ = []
