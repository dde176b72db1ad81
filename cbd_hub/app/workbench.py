"""What the page does with a chain: it is opened on first use, models are made, kept, packed, published, and write.

Models are made when they are first needed and kept, the few used last. A token that a visitor types is used for one
push and forgotten.
"""

import copy
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer

from cbd_hub.app.page_data import (
    check_token,
)
from cbd_hub.axes.sizing import format_count
from cbd_hub.chain.chain import Chain
from cbd_hub.chain.export import write_model
from cbd_hub.errors import RecipeError
from cbd_hub.hub.publish import publish_folder
from cbd_hub.hub.read import Location
from cbd_hub.hub.write import Repository
from cbd_hub.interpolation.plan import Plan

__all__ = ["NEW_TOKENS", "Workbench", "complete"]


NEW_TOKENS = (20, 40, 80, 160)
"""How many tokens the page generates at once."""


_MOST_MODELS = 4


_LONGEST_PROMPT = 10_000  # characters; a model sees the end of it that fits its context


class Workbench:
    """A chain, opened on first use, and the models made from it.

    Args:
        chain: A Hub repo id, or a folder that holds ``chain.json``; or its location, which holds a revision, a token
            and a cache.
    """

    def __init__(self, chain: str | Path | Location) -> None:
        self.location = Location.of(chain)
        self._chain: Chain | None = None
        self._models: OrderedDict[Any, PreTrainedModel] = OrderedDict()

    @cached_property
    def _packed(self) -> "tempfile.TemporaryDirectory[str]":
        return tempfile.TemporaryDirectory(prefix="cbd-hub-app-")

    @property
    def chain(self) -> Chain:
        """The chain; opened again the next time where it could not be.

        Raises:
            ChainNotFoundError: No such chain, or no access to it.
            ManifestError: The manifest is malformed.
        """
        if self._chain is None:
            self._chain = Chain.open(self.location)
        return self._chain

    def model(self, plan: Plan) -> PreTrainedModel:
        """Returns a plan's model; made once, as long as it is among the four used last.

        Cost: see :meth:`cbd_hub.chain.chain.Chain.initialize`; nothing where it is kept.

        Raises:
            IntegrityError: The chain's files are not what its manifest says.
        """
        key = (plan.method, plan.small, plan.large, plan.alpha, *plan.shape.items())
        if key not in self._models:
            self._models[key] = self.chain.initialize(plan)
        self._models.move_to_end(key)
        while len(self._models) > _MOST_MODELS:
            self._models.popitem(last=False)
        return self._models[key]

    def pack(self, plan: Plan) -> Path:
        """Returns a zip file of a model's folder; that of the call before is removed.

        Raises:
            IntegrityError: The chain's files are not what its manifest says.
        """
        for earlier in Path(self._packed.name).iterdir():
            earlier.unlink()
        name = f"{self.chain.manifest.name}-{format_count(plan.num_parameters)}"
        path = Path(self._packed.name) / f"{name}.zip"
        with tempfile.TemporaryDirectory(prefix="cbd-hub-") as folder, zipfile.ZipFile(path, "w") as packed:
            write_model(self.chain, plan, Path(folder) / name)
            for file in sorted((Path(folder) / name).iterdir()):
                packed.write(file, f"{name}/{file.name}")  # stored: weights do not compress
        return path

    def push(self, plan: Plan, repo_id: str, token: str, private: bool) -> str:
        """Publishes a model and returns where.

        Args:
            plan: The model's plan.
            repo_id: ``owner/name``.
            token: The visitor's own Hub token.
            private: Make the repository private.

        Raises:
            PublishError: No token, no permission, or a repository that holds something else.
            IntegrityError: The chain's files are not what its manifest says.
        """
        token = check_token(token)
        repository = Repository(repo_id, token)
        repository.state()  # a wrong token fails before anything is written
        message = f"{plan.num_parameters:,} parameters from the chain {self.chain.manifest.name}"
        with tempfile.TemporaryDirectory(prefix="cbd-hub-") as folder:
            write_model(self.chain, plan, folder, repo_id=repo_id)
            commit = publish_folder(Path(folder), repo_id, message, private=private or None, token=token)
        return f"{repository.url} at {commit.sha[:12]}"


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Iterator[str]:
    """Continues a text, and yields the continuation after every few tokens, the whole of it last.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompt: The text; of a long one, the end that leaves room in the model's context.
        new_tokens: At most so many; and at most half the context.
        temperature: Softens the probabilities that tokens are drawn by; 0 takes the likeliest token each time, so that
            models can be compared.
        top_p: Of the likeliest tokens, those that have this probability together are drawn from.

    Raises:
        RecipeError: The prompt holds no token.
    """
    ids = tokenizer(prompt[-_LONGEST_PROMPT:], return_tensors="pt")["input_ids"]
    if not prompt.strip() or not ids.numel():
        raise RecipeError("there is no prompt: type the beginning of a text")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * max(NEW_TOKENS)
    new_tokens = min(new_tokens, context // 2)
    ids = ids[:, -(context - new_tokens) :].to(model.device)
    config = copy.deepcopy(model.generation_config)
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    greedy = {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}
    config.update(max_new_tokens=new_tokens, max_length=None, **(drawn if temperature else greedy))
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    generator: Any = model  # transformers types generate() away
    streamer: Any = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    how = {"attention_mask": torch.ones_like(ids), "generation_config": config, "streamer": streamer}
    text = ""
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(generator.generate, ids, **how)
        writing.add_done_callback(lambda done: streamer.end() if done.exception() else None)
        for part in streamer:
            text += part
            yield text
        writing.result()  # raises what went wrong there
    yield text
