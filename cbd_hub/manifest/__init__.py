"""What a chain says about itself."""

__all__ = []
