"""Hooks on a running model: the inputs and outputs of its modules, and its loss with some layers bypassed."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.text.packing import token_batches

__all__ = ["LayerDrops", "bypass_layers", "observe"]


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

    with _replaced(model, axis_map, dict.fromkeys(layers, _skip)):
        yield


class LayerDrops:
    """The losses of a model without some of its layers, all over the same tokens.

    The residual stream before the first dropped layer is kept from one set to the next, so that sets that are asked
    for in the order of their first layers run, each, only the layers behind it.

    Memory: two residual streams, (tokens, hidden) each.
    """

    def __init__(self, model: PreTrainedModel, axis_map: AxisMap, blocks: Tensor, batch_size: int = 8) -> None:
        """Measures nothing yet.

        Args:
            model: Any causal language model; not changed.
            axis_map: Its resolved map.
            blocks: (N, S) token ids.
            batch_size: Blocks in a forward pass.
        """
        self.model, self.axis_map, self.blocks, self.batch_size = model, axis_map, blocks, batch_size
        self._layer = 0
        self._streams: list[Tensor] = []  # (B, S, H) a batch: what goes into layer `_layer`; of layer 0 not kept

    def loss(self, dropped: Collection[int]) -> float:
        """Returns the loss without some layers, nats a token (:func:`cbd_hub.evaluation.held_out.evaluate_loss`)."""
        self._advance(min(dropped))
        stubs = self._before() | dict.fromkeys(dropped, _skip)
        with _replaced(self.model, self.axis_map, stubs):
            return evaluate_loss(self.model, self.blocks, self.batch_size).loss

    def _before(self) -> dict[int, Callable[..., Tensor]]:
        """What stands in for the layers before the one whose input is known."""
        streams = iter(self._streams)
        known: dict[int, Callable[..., Tensor]] = {0: lambda *args, **kwargs: next(streams)} if self._layer else {}
        return known | dict.fromkeys(range(1, self._layer), _skip)

    @torch.inference_mode()
    def _advance(self, layer: int) -> None:
        """Runs the layers up to one, which is not run."""
        if layer < self._layer:
            self._layer, self._streams = 0, []
        if layer == self._layer:
            return
        streams: list[Tensor] = []

        def take(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            streams.append(hidden_states)
            return hidden_states

        count = len(list(self.model.get_submodule(self.axis_map.layers_name).children()))
        was_training = self.model.training
        self.model.eval()
        behind = dict.fromkeys(range(layer + 1, count), _skip)
        try:
            with _replaced(self.model, self.axis_map, {**self._before(), layer: take, **behind}):
                for batch in token_batches(self.blocks, self.batch_size):
                    self.model.base_model(input_ids=batch.to(self.model.device), use_cache=False)
        finally:
            self.model.train(was_training)
        self._layer, self._streams = layer, streams


def _skip(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def _replaced(
    model: PreTrainedModel, axis_map: AxisMap, forwards: Mapping[int, Callable[..., Tensor]]
) -> Iterator[None]:
    """Within the context, some layers do something else."""
    stack = model.get_submodule(axis_map.layers_name)
    modules: list[nn.Module] = [stack.get_submodule(str(layer)) for layer in forwards]
    previous = [vars(module).get("forward") for module in modules]
    try:
        for module, forward in zip(modules, forwards.values(), strict=True):
            vars(module)["forward"] = forward
        yield
    finally:
        for module, before in zip(modules, previous, strict=True):
            if before is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = before
