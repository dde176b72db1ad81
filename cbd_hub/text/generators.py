"""Writers of text: what they promise, and one with a model in this process.

Sequence-level distillation (Kim and Rush, "Sequence-Level Knowledge Distillation", 2016) trains a student on text that
its teacher wrote. The teacher is needed only while it writes, so it can be larger than what this machine holds: then
it stands behind a server (:mod:`cbd_hub.text.served_model`). Both kinds of generator take the same prompts and give
the same greedy text for the same model, because both read a prompt alike: as plain text with the tokenizer's own
special tokens (``/v1/completions``), or with `chat` as a user's message in the tokenizer's chat template
(``/v1/chat/completions``).

Each prompt has a number, and its random numbers come from a seed made of ``(sampling.seed, number)``. So its text does
not depend on the prompts beside it, nor on where an interrupted run goes on. What remains is rounding: a batch of
another width adds up in another order, and where two tokens are within 1e-6 of each other the other one may win.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cbd_hub.errors import RecipeError
from cbd_hub.text.settings import Sampling

__all__ = ["Continuation", "Generator", "LocalGenerator"]


class Continuation(NamedTuple):
    """What was written after one prompt."""

    text: str
    """Without the prompt and without special tokens; empty where the model ended at once."""
    tokens: int
    """Its length in tokens; in words where a server does not count."""


class Generator(Protocol):
    """Anything that writes on from a prompt."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that stands for everything but the prompts and the sampling that decides the text."""

    def generate(self, prompts: Sequence[str], sampling: Sampling, first: int = 0) -> Iterator[Continuation]:
        """Yields one continuation a prompt, in the order of the prompts; `first` is the number of the first one."""


class LocalGenerator:
    """Writes with a model in this process."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8, chat: bool = False
    ) -> None:
        """Prepares nothing yet; the model stays on its device.

        Args:
            model: a decoder with a language-model head. Its ``generation_config`` holds for what :class:`Sampling`
                does not name (a repetition penalty, tokens that end the text).
            tokenizer: the model's.
            batch_size: prompts that are continued together. Changes the speed, and the text by rounding alone.
            chat: a prompt is a user's message, and the text the answer to it.

        Raises:
            RecipeError: the model cannot generate, or there is no chat template.
        """
        if not model.can_generate() or model.config.is_encoder_decoder:
            raise RecipeError(
                f"{type(model).__name__} cannot write on from a prompt; load a decoder with AutoModelForCausalLM."
            )
        if batch_size < 1:
            raise RecipeError(f"batch_size must be 1 or more, got {batch_size}.")
        if chat and not tokenizer.chat_template:
            raise RecipeError("The tokenizer has no chat template; set its chat_template, or chat to false.")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.chat = batch_size, chat

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The kind, and SHA-256 sums of the model (configs and weights; seconds a gigabyte) and the tokenizer."""
        model, tokenizer = _model_hash(self.model), _tokenizer_hash(self.tokenizer)
        return {"kind": "local", "chat": self.chat, "model": model, "tokenizer": tokenizer}

    def generate(self, prompts: Sequence[str], sampling: Sampling, first: int = 0) -> Iterator[Continuation]:
        """Yields one continuation a prompt, in order. An empty prompt starts the text as the model does: from its
        begin-of-text token, or end-of-text where it has none.

        Prompts are padded on the left to the longest of their batch. A step costs one forward pass of `batch_size`
        tokens; the key-value cache is the memory.

        Args:
            prompts: plain text, or messages with `chat`.
            sampling: how the next token is chosen.
            first: number of the first prompt.

        Raises:
            RecipeError: a prompt and `max_new_tokens` exceed the model's context, or a prompt is empty and there is no
                token to begin with.
        """
        for start in range(0, len(prompts), self.batch_size):
            ids = [self._prompt_ids(prompt) for prompt in prompts[start : start + self.batch_size]]
            yield from self._continue(ids, sampling, first + start)

    def _prompt_ids(self, prompt: str) -> list[int]:
        if self.chat:
            message = [{"role": "user", "content": prompt}]
            encoded: Any = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
            return list(encoded["input_ids"])
        ids: list[int] = list(self.tokenizer(prompt, verbose=False)["input_ids"])
        if ids:
            return ids
        begin = [x for x in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if x is not None]
        if not begin:
            raise RecipeError(
                "A prompt is empty, and the tokenizer has neither bos_token nor eos_token to begin with."
            )
        return begin[:1]

    def _continue(self, rows: list[list[int]], sampling: Sampling, first: int) -> Iterator[Continuation]:
        width = max(map(len, rows))
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit and width + sampling.max_new_tokens > limit:
            raise RecipeError(
                f"A prompt of {width} tokens and max_new_tokens {sampling.max_new_tokens} exceed the {limit} tokens "
                "that the model reads; lower prompt_tokens or max_new_tokens."
            )
        config = copy.deepcopy(self.model.generation_config)
        eos = self.tokenizer.eos_token_id if config.eos_token_id is None else config.eos_token_id
        ends = set(eos if isinstance(eos, list) else [eos])
        known = (config.pad_token_id, self.tokenizer.pad_token_id, *ends, 0)
        pad = next(token for token in known if token is not None)
        config.update(
            max_new_tokens=sampling.max_new_tokens,
            max_length=None,
            eos_token_id=eos,
            pad_token_id=pad,
            return_dict_in_generate=False,
            **dict.fromkeys(("num_beams", "num_return_sequences"), 1),
            do_sample=False,  # _RowSampler is what samples
            **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p")),
        )
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        chain = _processors(sampling, first, len(rows), width)
        model: Any = self.model
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                written = model.generate(ids, attention_mask=mask, generation_config=config, logits_processor=chain)
        finally:
            model.train(was_training)
        for prompt, row in zip(rows, written[:, width:].tolist(), strict=True):
            length = next((place for place, token in enumerate(row) if token in ends), len(row))
            yield Continuation(self._text_after(prompt, row[:length]), length)

    def _text_after(self, prompt: list[int], new: list[int]) -> str:
        """Decoded behind the prompt, since some tokenizers drop the space that a text begins with."""
        before = str(self.tokenizer.decode(prompt, skip_special_tokens=True))
        whole = str(self.tokenizer.decode(prompt + new, skip_special_tokens=True))
        if whole.startswith(before):
            return whole[len(before) :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))


class _RowSampler(LogitsProcessor):
    """Chooses each row's token by one number of its own: the first at which the summed probability reaches it.

    All other logits become -inf, so that greedy decoding takes it.
    """

    def __init__(self, numbers: Tensor, width: int) -> None:
        self.numbers = numbers
        """(B, N) in (0, 1], one for each new token, so that no token of probability 0 is chosen."""
        self.width = width
        """Tokens before the first new one."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, tokens so far) ids and (B, V) logits to (B, V) logits of which one a row is finite."""
        summed = scores.float().softmax(-1).cumsum(-1)
        step = input_ids.shape[1] - self.width
        wanted = self.numbers[:, step : step + 1].to(summed.device) * summed[:, -1:]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.searchsorted(summed, wanted), 0.0)


def _processors(sampling: Sampling, first: int, rows: int, width: int) -> LogitsProcessorList:
    """What `generate` applies to the logits; all of it is transformers' own but the choice."""
    chain = LogitsProcessorList()
    if sampling.temperature == 0:
        return chain
    if sampling.temperature != 1:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        chain.append(TopPLogitsWarper(sampling.top_p))
    seeds = [sampling.row_seed(first + row) for row in range(rows)]
    numbers = [1 - torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
    chain.append(_RowSampler(torch.stack(numbers), width))
    return chain


def _model_hash(model: PreTrainedModel) -> str:
    """SHA-256 over class, configs and weights; equal for a model and its saved and loaded copy."""
    configs = {**model.config.to_dict(), "generation": model.generation_config.to_diff_dict()}
    for volatile in ("transformers_version", "_name_or_path", "architectures", "use_cache"):
        configs.pop(volatile, None)
        configs["generation"].pop(volatile, None)
    configs["generation"].pop("_from_model_config", None)
    digest = hashlib.sha256(f"{type(model).__name__}{json.dumps(configs, sort_keys=True, default=str)}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return digest.hexdigest()


def _tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 over vocabulary, rules, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    for set_by_calls in ("padding", "truncation"):
        rules.pop(set_by_calls, None)
    ends = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template]
    return hashlib.sha256(json.dumps([rules, ends], sort_keys=True).encode()).hexdigest()
