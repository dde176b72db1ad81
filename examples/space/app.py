"""A Hugging Face Space that shows one chain: the one that the variable CBD_CHAIN names."""

import os
import sys
from collections.abc import Iterator
from typing import Any

try:  # there on ZeroGPU, where a GPU is borrowed while a function runs; it must come before torch
    import spaces
except ImportError:
    spaces = None

import torch

from cbd_hub.app.page import launch
from cbd_hub.app.workbench import complete
from cbd_hub.hub.read import Location


def write(model: Any, *asked: Any) -> Iterator[str]:
    """Continues a text on the GPU, where there is one."""
    yield from complete(model.to("cuda" if torch.cuda.is_available() else "cpu"), *asked)


if not os.environ.get("CBD_CHAIN"):
    sys.exit("set the variable CBD_CHAIN to the repo id of a chain (Space settings, Variables and secrets)")
launch(
    Location(os.environ["CBD_CHAIN"], os.environ.get("CBD_REVISION")),
    browser=False,
    write=spaces.GPU(write) if spaces else write,
)
