"""Training one model: its trainer, distillation, recovery."""

__all__ = []
