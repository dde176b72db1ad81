"""Held-out loss, perplexity, the size-loss curve and its plot.

The measure of a language model here is its mean next-token cross-entropy on held-out text, in nats per token;
perplexity is its exponential. The *size-loss curve* of a chain is that loss at its anchors and at the sizes
between them: a chain interpolates well when the curve lies on or below the straight line between two anchors.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub.utils.tqdm import tqdm
from torch import Tensor
from transformers import PreTrainedModel

from cbd_hub.data import token_batches
from cbd_hub.errors import RecipeError
from cbd_hub.losses import distillation_loss, hidden_and_head

__all__ = ["Evaluation", "evaluate_loss", "plot_size_loss", "render_progress"]

Item = TypeVar("Item")

# Okabe and Ito's palette, told apart with every kind of colour blindness; black is kept for the anchors.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osv^Px"


@dataclass(frozen=True)
class Evaluation:
    """The loss of one model on one text."""

    loss: float
    """Mean cross-entropy, in nats per predicted token."""
    perplexity: float
    """``exp(loss)``."""
    num_tokens: int
    """Predicted tokens that the loss is the mean of."""

    def as_dict(self) -> dict[str, float]:
        """The fields by name, ready for JSON."""
        return asdict(self)


def evaluate_loss(
    model: PreTrainedModel,
    blocks: Dataset | IterableDataset | Tensor,
    batch_size: int = 8,
    progress: bool = False,
    max_tokens: int | None = None,
) -> Evaluation:
    """Mean next-token cross-entropy of a causal language model over packed blocks.

    Every token but the first of each block is predicted. Softmaxes are computed in float32, a few hundred tokens
    at a time; sums are kept in float64. The model's train or eval mode is left as it was.

    Args:
        model: any transformers causal language model, evaluated on the device that it is on.
        blocks: what :func:`cbd_hub.data.pack` returns, or token ids (N, S).
        batch_size: blocks in a forward pass; changes the speed, not the result.
        progress: show a progress bar.
        max_tokens: stop before the block that would exceed this many predicted tokens (the first one always
            counts), so that a part of a large text, or of a stream, is measured.

    Raises:
        RecipeError: there is no block, or a block has a single token, which predicts nothing.

    N blocks, S sequence length.
    """
    total, num_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in render_progress(token_batches(blocks, batch_size), "Evaluating", enabled=progress):
                predicted = batch.shape[1] - 1
                if predicted and max_tokens is not None:
                    batch = batch[: max((max_tokens - num_tokens) // predicted, 0 if num_tokens else 1)]
                if not predicted or not len(batch):
                    break
                batch = batch.to(model.device)
                terms = distillation_loss(*hidden_and_head(model, batch), None, None, batch, num_items=1)
                total += terms.ce.item()
                num_tokens += terms.num_tokens
    finally:
        model.train(was_training)
    if not num_tokens:
        raise RecipeError("There is nothing to evaluate on: pass one block of two tokens or more.")
    loss = total / num_tokens
    return Evaluation(loss, math.exp(loss) if loss < 700 else math.inf, num_tokens)


def render_progress(
    items: Iterable[Item], description: str, *, total: int | None = None, enabled: bool = True
) -> Iterable[Item]:
    """Passes items on, showing a progress bar on standard error.

    The bar is silenced by `enabled`, by ``HF_HUB_DISABLE_PROGRESS_BARS=1`` and by
    ``huggingface_hub.utils.disable_progress_bars()``.

    Args:
        items: what to loop over.
        description: shown before the bar.
        total: number of items, where it cannot be asked of `items`.
        enabled: false passes the items on silently.
    """
    return tqdm(items, desc=description, total=total, name="cbd_hub") if enabled else items


def plot_size_loss(
    series: dict[str, list[tuple[int, float]]],
    anchors: Sequence[tuple[str, int, float]],
    path: str | Path,
    title: str,
) -> None:
    """Draws held-out loss over model size, one line a method, and writes it as a PNG file.

    Sizes that span a factor of four or more are drawn on a logarithmic axis. The same data gives the same bytes.

    Args:
        series: method -> points (parameters, loss in nats per token).
        anchors: (name, parameters, loss), drawn as labelled diamonds.
        path: the PNG file to write; its folder must exist.
        title: shown above the plot.

    Raises:
        RecipeError: there is no point to draw.
    """
    from matplotlib.figure import Figure  # slow to import, and only plots need it
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    sizes = [size for line in series.values() for size, _ in line] + [size for _, size, _ in anchors]
    if not sizes:
        raise RecipeError("There is no point to plot: pass a series or anchors.")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, (method, line) in enumerate(series.items()):
        axes.plot(
            *zip(*sorted(line), strict=True),
            label=method,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle=("-", "--", ":")[index // len(_COLOURS) % 3],
            linewidth=2,
            markersize=6,
        )
    for index, (name, size, loss) in enumerate(anchors):
        axes.plot(size, loss, "D", color="black", markersize=9, zorder=5, label=None if index else "anchors")
        axes.annotate(name, (size, loss), (8, 8), textcoords="offset points", fontweight="bold", zorder=6)
    if max(sizes) >= 4 * min(sizes):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _human(size)))
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("parameters")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(title, loc="left", fontweight="bold")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png", dpi=200, metadata={"Software": None})


def _human(size: float) -> str:
    """A parameter count as people write it: 763k, 138M, 1.2B."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale:
            return f"{size / scale:.3g}{unit}"
    return f"{size:.0f}"
