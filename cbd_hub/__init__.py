"""Chain-based distillation: a few aligned anchors, and from them a model of any size in between.

The names below are loaded on first use, so ``import cbd_hub`` itself costs milliseconds and needs neither torch nor
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cbd_hub.axes.architectures import axis_map_for
    from cbd_hub.axes.axis_map import AxisMap
    from cbd_hub.build.build import build_chain
    from cbd_hub.build.recipe import Recipe
    from cbd_hub.chain.chain import Chain, from_chain
    from cbd_hub.errors import CbdError
    from cbd_hub.interpolation.plan import Plan

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
    "AxisMap": "axes.axis_map",
    "CbdError": "errors",
    "Chain": "chain.chain",
    "Plan": "interpolation.plan",
    "Recipe": "build.recipe",
    "axis_map_for": "axes.architectures",
    "build_chain": "build.build",
    "from_chain": "chain.chain",
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
