"""Held-out loss, perplexity, and bits a byte.

The measure of a language model here is its mean next-token cross-entropy on held-out text, in nats per token;
perplexity is its exponential.
"""

import math
from dataclasses import asdict, dataclass
from inspect import signature

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cbd_hub.errors import RecipeError
from cbd_hub.losses.distillation import distillation_loss
from cbd_hub.losses.heads import hidden_and_head
from cbd_hub.progress import progress_bar
from cbd_hub.text.documents import Documents
from cbd_hub.text.packing import block_batches, token_batches

__all__ = ["HeldOutLoss", "bits_per_byte", "evaluate_loss", "losses_by_beginning"]


@dataclass(frozen=True)
class HeldOutLoss:
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
) -> HeldOutLoss:
    """Mean next-token cross-entropy of a causal language model over packed blocks.

    Every token but the first of each block is predicted; of blocks packed with ``boundaries``, every token but the
    first of each document, from its own document alone. Softmaxes are computed in float32, a few hundred tokens
    at a time; sums are kept in float64. The model's train or eval mode is left as it was.

    Args:
        model: any transformers causal language model, evaluated on the device that it is on.
        blocks: what :func:`cbd_hub.text.packing.pack` returns, or token ids (N, S).
        batch_size: blocks in a forward pass; changes the speed, not the result.
        progress: show a progress bar.
        max_tokens: stop before the block that would exceed this many predicted tokens (the first one always
            counts), so that a part of a large text, or of a stream, is measured.

    Raises:
        RecipeError: no block predicts a token (there is none, or each has a single token), or the blocks have document
            boundaries and the model ignores them.

    N blocks, S sequence length.
    """
    total, num_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for batch in progress_bar(block_batches(blocks, batch_size), "evaluating", unit="batch", enabled=progress):
                batch = {"labels": batch["input_ids"], **batch}
                predicted = (batch["labels"][:, 1:] != -100).sum(1).cumsum(0)
                if not predicted.any():
                    continue
                rows = len(predicted)
                if max_tokens is not None:
                    rows = max(int((predicted + num_tokens <= max_tokens).sum()), 0 if num_tokens else 1)
                if rows:
                    batch = {name: values[:rows].to(model.device) for name, values in batch.items()}
                    positions = batch.get("position_ids")
                    if positions is not None and not num_tokens:
                        _check_boundaries(model)
                    hidden, head = hidden_and_head(model, batch["input_ids"], position_ids=positions)
                    terms = distillation_loss(hidden, head, None, None, batch["labels"], num_items=1)
                    total += terms.ce.item()
                    num_tokens += terms.num_tokens
                if rows < len(predicted):
                    break
    finally:
        model.train(was_training)
    if not num_tokens:
        raise RecipeError("There is nothing to evaluate on: pass one block of two tokens or more.")
    loss = total / num_tokens
    return HeldOutLoss(loss, math.exp(loss) if loss < 700 else math.inf, num_tokens)


def losses_by_beginning(model: PreTrainedModel, text: Tensor, token: int) -> tuple[float, float]:
    """The loss with a token before every row, and the loss without it, over the same predicted tokens.

    Args:
        model: As of :func:`evaluate_loss`.
        text: (N, S) token ids, none of them a beginning; the first of each row is predicted in neither case.
        token: Begins a text.

    Returns:
        Nats a token with the token, and without it.

    N rows, S tokens. Cost: two forward passes of N * S tokens.
    """
    begun = torch.nn.functional.pad(text, (1, 0), value=token).long()
    labels = begun.clone()
    labels[:, :2] = -100
    rows = Dataset.from_dict({"input_ids": begun.numpy(), "labels": labels.numpy()})
    return evaluate_loss(model, rows).loss, evaluate_loss(model, text).loss


def bits_per_byte(result: HeldOutLoss, blocks: Documents | Tensor, tokenizer: PreTrainedTokenizerBase) -> float:
    """Bits that a model needed for a byte of the text: what compares models of different vocabularies.

    The bytes are those of the predicted tokens, special tokens none; where a block begins or ends inside a character,
    that one counts as three. Cost: decoding the blocks, some microseconds a token.

    Args:
        result: Of :func:`evaluate_loss` on `blocks`, from the first on.
        blocks: As there; without ``boundaries``.
        tokenizer: That of the blocks.

    Raises:
        RecipeError: The blocks hold no text.
    """
    size = left = 0
    for ids in token_batches(blocks, 1):
        if left >= result.num_tokens:
            break
        left += ids.shape[1] - 1
        size += len(str(tokenizer.decode(ids[0, 1:], skip_special_tokens=True)).encode())
    if not size:
        raise RecipeError("The blocks hold no text, only special tokens.")
    return result.loss * result.num_tokens / math.log(2) / size


def _check_boundaries(model: PreTrainedModel) -> None:
    """Refuses a model that lets a document see the one before it: transformers' OPT does, and any without positions.

    Two blocks whose second documents are the same, but not their first ones, must agree there.
    """
    if "position_ids" in signature(type(model.base_model).forward).parameters:
        ids = (
            torch.tensor([[1, 2, 3, 4], [5, 6, 3, 4]], device=model.device) % model.config.get_text_config().vocab_size
        )
        positions = torch.tensor([[0, 1, 0, 1]] * 2, device=model.device)
        one, other = hidden_and_head(model, ids, position_ids=positions)[0].float()
        apart = (one - other).abs().amax(1)
        if apart[2:].max() <= 1e-3 * apart[:2].max():  # 0, but for the rounding of a fused kernel
            return
    raise RecipeError(
        f"{type(model).__name__} does not keep the documents of a block apart; set document_boundaries to false."
    )
