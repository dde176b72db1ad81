"""Tiny models that are really trained, in seconds, on text whose next token hangs on the two before it.

A random model has no loss to lose. These reach about 0.95 nats a token where guessing costs 2.1 and the text's own
entropy is 0.8, so a cut, a barrier or a refit shows.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from make_chain import add_calibration, make_chain, refresh
from tiny_models import tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for

__all__ = ["text", "train", "trained_chain", "trained_model"]

_TOKENS = 8
_FIRST = 3
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def text(rows: int, length: int = 32, seed: int = 0) -> Tensor:
    """(rows, length) token ids 3 to 10, drawn given the two before from one table, the same for every seed."""
    table = torch.randn(_TOKENS, _TOKENS, _TOKENS, generator=torch.Generator().manual_seed(99)).mul(3).softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(_TOKENS, (rows, length), generator=generator)
    for place in range(2, length):
        ids[:, place] = torch.multinomial(table[ids[:, place - 2], ids[:, place - 1]], 1, generator=generator)[:, 0]
    return ids + _FIRST


def train(
    model: PreTrainedModel, steps: int, seed: int = 0, learning_rate: float = 3e-3, blocks: Tensor | None = None
) -> PreTrainedModel:
    """Trains in place on fresh text, or once over blocks (N, S), and returns the model in ``eval()`` mode."""
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate)
    blocks = text(16 * steps, seed=1000 + seed) if blocks is None else blocks
    model.train()
    for batch in blocks.split(16):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def trained_model(family: str, steps: int = 300, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of :data:`tiny_models.FAMILIES`, trained from a start of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides), dtype=torch.float32)
        return train(model, steps, seed)


@cache
def _large() -> PreTrainedModel:
    return trained_model("llama", num_hidden_layers=5)


@cache
def trained_chain(aligned: bool = True, layers: int = 4) -> Path:
    """A Llama chain of two anchors, the large one of 5 layers, that ships calibration tokens; never write to it.

    Args:
        aligned: Whether the small anchor was cut out of the large one and trained on, or trained from a start of its
            own, which the manifest does not say.
        layers: Of the small anchor.
    """
    _KEPT.append(tempfile.TemporaryDirectory(prefix="cbd-hub-test-"))
    model = _large()
    sizes = {**axis_map_for(model.config).sizes(model.config), "ffn": 40, "layers": layers}
    folder = make_chain(Path(_KEPT[-1].name) / "chain", model, [sizes], noise=0.0)
    small = folder / "anchors" / "a1"
    if aligned:
        student = train(AutoModelForCausalLM.from_pretrained(small), 100, seed=1, learning_rate=1e-3)
    else:
        student = trained_model("llama", seed=1, num_hidden_layers=layers, intermediate_size=40)
    student.save_pretrained(small)
    refresh(folder)
    return add_calibration(folder, text(64, seed=50))
