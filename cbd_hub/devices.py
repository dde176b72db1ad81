"""Where models run: on the accelerator, if there is one, for as long as a step takes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["on_accelerator", "working_device"]


def working_device(float64: bool = False) -> torch.device:
    """Returns the accelerator of this process, or the CPU where there is none.

    Args:
        float64: The work needs float64, which Metal does not have.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if found is None or (float64 and found.type == "mps") else found


@contextmanager
def on_accelerator(*models: nn.Module, float64: bool = False) -> Iterator[None]:
    """Moves models to :func:`working_device` for as long as the context lasts, and back to where they were.

    Results are those of the CPU to rounding. A model is moved in place, so its parameters stay the same objects.

    Args:
        models: Each wholly on one device.
        float64: The work needs float64.

    Cost: twice the models' bytes over the bus; nothing where they are on the device already.
    """
    device = working_device(float64)
    places = [(model, next(model.parameters()).device) for model in models]
    moved = [(model, place) for model, place in places if place.type != device.type]
    try:
        for model, _ in moved:
            model.to(device)
        yield
    finally:
        for model, place in moved:
            model.to(place)
