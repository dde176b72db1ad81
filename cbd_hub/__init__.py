"""Chain-based distillation: a few aligned anchors, and from them a model of any size in between.

The names below are loaded on first use, so ``import cbd_hub`` itself costs milliseconds and needs neither torch nor
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbd_hub.architectures import axis_map_for
    from cbd_hub.assemble import Chain, from_chain
    from cbd_hub.axis_map import AxisMap
    from cbd_hub.build import build_chain
    from cbd_hub.errors import CbdError
    from cbd_hub.plan import Plan
    from cbd_hub.recipe import Recipe

    __version__: str

__all__ = [
    "AxisMap",
    "CbdError",
    "Chain",
    "Plan",
    "Recipe",
    "__version__",
    "axis_map_for",
    "build_chain",
    "from_chain",
]

_HOME = {
    "AxisMap": "axis_map",
    "CbdError": "errors",
    "Chain": "assemble",
    "Plan": "plan",
    "Recipe": "recipe",
    "axis_map_for": "architectures",
    "build_chain": "build",
    "from_chain": "assemble",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = import_module("importlib.metadata").version("cbd_hub")
    elif name in _HOME:
        value = getattr(import_module(f"cbd_hub.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'cbd_hub' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
