"""Where models run: on the accelerator, if there is one, for as long as a step takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["on_accelerator", "working_device"]


def working_device() -> torch.device:
    """Returns the accelerator of this process; the CPU where there is none, or none that knows float64 (Metal)."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or found.type == "mps" else found


@contextmanager
def on_accelerator(*models: nn.Module | None) -> Iterator[None]:
    """Moves models to :func:`working_device` for as long as the context lasts, and back to where they were.

    Results are those of the CPU to rounding. A model is moved in place, so its parameters stay the same objects.

    Args:
        models: Each wholly on one device; None is passed over.

    Cost: twice the models' bytes over the bus; nothing on the CPU alone.
    """
    device = working_device()
    places = [(model, next(model.parameters()).device) for model in models if model is not None]
    moved = [(model, place) for model, place in places if place.type != device.type]
    try:
        for model, _ in moved:
            model.to(device)
        yield
    finally:
        for model, place in moved:
            model.to(place)
