"""Hooks on a running model: the inputs and outputs of its modules, and the model with some layers bypassed."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import RecipeError
from cbd_hub.text.packing import token_batches

__all__ = ["bypass_layers", "observe"]


@torch.inference_mode()
def observe(
    model: PreTrainedModel,
    blocks: Tensor,
    batch_size: int,
    before: Mapping[str, Callable[[Tensor], None]],
    after: Mapping[str, Callable[[Tensor, Tensor], None]] | None = None,
) -> int:
    """Streams token blocks through a model (without its head) once and shows what passes through some modules.

    The model's mode and hooks are left as they were.

    Args:
        model: Any transformers causal language model, run on the device that it is on.
        blocks: (N, S) token ids.
        batch_size: Blocks in a forward pass.
        before: Module name → called with the module's input, flattened to (tokens, units).
        after: Module name → called with its input and output, both flattened.

    Returns:
        The number of tokens.

    Raises:
        RecipeError: There is no token to see.
    """
    if blocks.ndim != 2 or not blocks.numel():
        raise RecipeError(f"calibration blocks have shape {tuple(blocks.shape)}; expected (blocks, tokens), not empty")

    def flat(value: Any) -> Tensor:
        value = value[0] if isinstance(value, tuple) else value
        return value.reshape(-1, value.shape[-1])

    was_training, handles = model.training, []
    try:
        for name, look in before.items():
            hook = partial(lambda look, _, args: look(flat(args)), look)
            handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
        for name, compare in (after or {}).items():
            hook = partial(lambda compare, _, args, out: compare(flat(args), flat(out)), compare)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        model.eval()
        for batch in token_batches(blocks, batch_size):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return blocks.numel()


@contextmanager
def bypass_layers(model: PreTrainedModel, axis_map: AxisMap, layers: Collection[int]) -> Iterator[None]:
    """Within the context, some layers pass the residual stream on as it is, at no cost.

    The layers stay where they are, so every other layer keeps its own entry of ``layer_types`` and the like; the
    result is that of a model without these layers (but for a cache, which must not be used).
    """

    def skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    stack = model.get_submodule(axis_map.layers_name)
    modules: list[nn.Module] = [stack.get_submodule(str(layer)) for layer in layers]
    previous = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            vars(module)["forward"] = skip
        yield
    finally:
        for module, forward in zip(modules, previous, strict=True):
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
