"""What a build is made from: the text in three splits, the tokenizer, and the source model.

Everything here is a function of the recipe alone, so that a build that is resumed has the same inputs.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from tokenizers import Tokenizer as FileTokenizer
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.alignment.ready_made import READING_SAMPLE, check_tokenizers
from cbd_hub.build.bridge import BridgeInputs
from cbd_hub.build.recipe import Recipe, TrainTokenizer
from cbd_hub.build.settings import BridgeConfig
from cbd_hub.devices import on_accelerator
from cbd_hub.errors import ManifestError, RecipeError
from cbd_hub.evaluation.held_out import losses_by_beginning
from cbd_hub.files import copy_files
from cbd_hub.hub.load import check_headers, load_config, load_model
from cbd_hub.hub.read import Location
from cbd_hub.hub.untrusted import guarded, is_tokenizer_file
from cbd_hub.initialization.fresh import fresh_config, fresh_model
from cbd_hub.manifest.manifest import Training
from cbd_hub.text.documents import Documents
from cbd_hub.text.packing import mix, pack_as, token_batches, train_tokenizer
from cbd_hub.text.splits import Splits, load_splits
from cbd_hub.text.text_ends import TextEnds, find_ends
from cbd_hub.training.distill import distill

__all__ = ["BuildInputs", "Text"]

_WORSE = 0.05
"""Nats a token, from which on another beginning of text is worth a word."""


@dataclass(frozen=True)
class Text:
    """Packed blocks of the three splits."""

    train: Documents
    validation: Documents
    test: Documents


class BuildInputs:
    """Text, tokenizer and source model of one recipe, each made when it is first needed."""

    def __init__(self, recipe: Recipe, base: Path) -> None:
        self.recipe = recipe
        self.base = base

    @cached_property
    def splits(self) -> list[Splits]:
        """Documents to train on, to choose by, and to report on, of each source of text.

        Raises:
            RecipeError: The recipe has no data, or its text cannot be read or split.
        """
        data = self.recipe.data
        if data is None:
            raise RecipeError("the recipe has no `data`, and something in it needs text")
        trained = isinstance(self.recipe.tokenizer, TrainTokenizer)  # on these very splits, so not there yet
        return load_splits(data, self.base, None if trained else self.tokenizer)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Named by the recipe, trained on the training text, or the source model's; None where there is none.

        Raises:
            RecipeError: It cannot be loaded.
        """
        wanted = self.recipe.tokenizer
        if isinstance(wanted, TrainTokenizer):
            return train_tokenizer(chain.from_iterable(s.train for s in self.splits), wanted.vocab_size)
        location = self._tokenizer_location
        loaded = None if location is None else _load_tokenizer(location)
        if loaded is not None:
            self._warn_of_another_reading(loaded)
        elif wanted is not None:  # a bare model can be cut without a tokenizer
            raise RecipeError(f"{wanted!r} holds no tokenizer; name a folder or a repo id with one")
        return loaded

    @cached_property
    def _tokenizer_location(self) -> Location | None:
        """Where the tokenizer's files are; None for one that is trained, and where there is none."""
        wanted = self.recipe.tokenizer
        if wanted is None:
            return self._source() if self.recipe.source.model else None
        return self._location(wanted) if isinstance(wanted, str) else None

    @cached_property
    def _tokenizer_files(self) -> dict[str, Path]:
        """Name → local path of the tokenizer's files, asked for once; none of one that is trained."""
        location = self._tokenizer_location
        names = [] if location is None else location.names()
        return {name: location.file(name) for name in names if location is not None and is_tokenizer_file(name)}

    def save_tokenizer(self, folder: Path) -> list[str]:
        """Writes the tokenizer into a folder and returns the names of its files; nothing where there is none.

        Files are copied as the source has them, never read and saved again: transformers reads some otherwise than
        they are written, and would write what it read.
        """
        if self.tokenizer is None:
            return []
        if self._tokenizer_files:
            copy_files(self._tokenizer_files, folder)
            return sorted(self._tokenizer_files)
        self.tokenizer.save_pretrained(folder)
        return sorted(name for name in Location(str(folder)).names() if is_tokenizer_file(name))

    def _warn_of_another_reading(self, tokenizer: Tokenizer) -> None:
        """Says so where transformers reads tokenizer.json otherwise than the file itself does."""
        if (path := self._tokenizer_files.get("tokenizer.json")) is None:
            return
        own = FileTokenizer.from_file(str(path)).encode(READING_SAMPLE, add_special_tokens=False).ids
        if own != tokenizer.encode(READING_SAMPLE, add_special_tokens=False):
            warnings.warn(
                f"transformers reads this tokenizer as a {type(tokenizer).__name__}, which splits text otherwise than "
                f"its tokenizer.json does ({path}); the chain keeps the files as they are, and trains on what "
                "transformers reads",
                stacklevel=2,
            )

    @cached_property
    def text(self) -> Text | None:
        """Packed blocks of the splits; None for a recipe without data.

        Raises:
            RecipeError: There is no tokenizer, or too little text for one block.
        """
        data, tokenizer = self.recipe.data, self.tokenizer
        if data is None:
            return None
        if tokenizer is None:
            raise RecipeError("the recipe has `data` but no `tokenizer`; name one, or train one: {vocab_size: 4096}")

        def blocks(name: str) -> Documents:
            documents = [getattr(splits, name) for splits in self.splits]
            return mix(
                [pack_as(data, d, tokenizer) for d in documents], data.shares, data.seed, repeat=name == "train"
            )

        return Text(blocks("train"), blocks("validation"), blocks("test"))

    @cached_property
    def ends(self) -> TextEnds | None:
        """The tokens around a text; None for a recipe without text or tokenizer."""
        data, tokenizer = self.recipe.data, self.tokenizer
        return (
            None if data is None or tokenizer is None else find_ends(tokenizer, data.begin_of_text, data.end_of_text)
        )

    def recorded_recipe(self) -> dict[str, Any]:
        """The recipe as a manifest keeps it, with the tokens that text began and ended with."""
        recipe = self.recipe.model_dump(mode="json", exclude_none=True, exclude={"axis_map", "hub"})
        if self.ends is not None and self.tokenizer is not None:
            for key, token in (("begin_of_text", self.ends.begin), ("end_of_text", self.ends.end)):
                if key in recipe["data"]:  # what an earlier version began has no such key
                    name = "none" if token is None else self.tokenizer.convert_ids_to_tokens(token)
                    recipe["data"][key] = name
        return recipe

    @cached_property
    def validation(self) -> Documents | None:
        """The validation blocks that checkpoints are chosen by: all, or as many as ``evaluation.tokens`` allows."""
        if self.text is None or self.recipe.evaluation.tokens is None or self.recipe.data is None:
            return None if self.text is None else self.text.validation
        rows = max(1, self.recipe.evaluation.tokens // (self.recipe.data.sequence_length - 1))
        blocks = self.text.validation
        return (
            blocks.take(rows) if isinstance(blocks, IterableDataset) else blocks.select(range(min(rows, len(blocks))))
        )

    def calibration(self) -> torch.Tensor | None:
        """Token ids (N, S) of the validation text, for importance, basis and refit; None without text."""
        return self._validation_tokens(self.recipe.calibration_tokens)

    def shipped_calibration(self) -> torch.Tensor | None:
        """Token ids (N, S) that the chain ships for ``refine``: 32,768, or what calibration has if that is more."""
        return self._validation_tokens(self.recipe.calibration_tokens and max(32_768, self.recipe.calibration_tokens))

    def _validation_tokens(self, most: int) -> torch.Tensor | None:
        if self.text is None or self.recipe.data is None or not most:
            return None
        rows = max(1, most // self.recipe.data.sequence_length)
        return torch.cat(list(islice(token_batches(self.text.validation, 1), rows)))

    def training_blocks(self, tokens: int) -> torch.Tensor | None:
        """Token ids (N, S) of the first training text, for a refit or a learned alignment: never those that
        checkpoints are chosen by, which a fit would overfit unseen. None without text."""
        if self.text is None or self.recipe.data is None:
            return None
        rows = max(1, tokens // self.recipe.data.sequence_length)
        return torch.cat(list(islice(token_batches(self.text.train, 1), rows)))

    @property
    def source_name(self) -> str:
        """What a chain may say of its source: a repo id, the name of a folder without its path, or how it was made."""
        source = self.recipe.source
        if source.model is not None:
            location = self._source()
            return Path(location.place).name if location.is_local else location.place
        return source.served or "trained from scratch"

    def _location(self, place: str, revision: str | None = None) -> Location:
        path = (self.base / Path(place).expanduser()).resolve()
        return Location(str(path) if path.exists() else place, revision)

    def _source(self) -> Location:
        return self._location(str(self.recipe.source.model), self.recipe.source.revision)

    def checkpoint(self, place: str, revision: str | None) -> PreTrainedModel:
        """Loads a model in float32 from a folder or the Hub.

        Raises:
            RecipeError: It cannot be loaded whole and finite: see :func:`cbd_hub.hub.load.load_model`.
        """
        return load_model(self._location(place, revision))

    def check_tokenizer(self, place: str, revision: str | None) -> None:
        """Refuses a checkpoint with a tokenizer other than the chain's; one that ships none is taken as it is.

        Raises:
            RecipeError: See :func:`cbd_hub.alignment.ready_made.check_tokenizers`.
        """
        own = _load_tokenizer(self._location(place, revision))
        if own is not None and self.tokenizer is not None:
            check_tokenizers(own, self.tokenizer, place)

    def check_headers(self, place: str, revision: str | None, config: PreTrainedConfig) -> None:
        """Compares the weights of a checkpoint with its config, without reading any.

        Raises:
            RecipeError: See :func:`cbd_hub.hub.load.check_headers`.
        """
        check_headers(self._location(place, revision), config)

    def checkpoint_config(self, place: str, revision: str | None) -> PreTrainedConfig:
        """Loads a model's config alone.

        Raises:
            RecipeError: It cannot be loaded.
        """
        return load_config(self._location(place, revision))

    def bridge_inputs(self, bridge: BridgeConfig) -> BridgeInputs:
        """What anchor zero is founded on: the source and its tokenizer, and the chain's tokenizer and text.

        Raises:
            RecipeError: The source, a tokenizer or the text is missing or cannot be loaded.
        """
        source, data, text, tokenizer = self.recipe.source, self.recipe.data, self.text, self.tokenizer
        if data is None or text is None or tokenizer is None:
            raise RecipeError("a bridge needs `data` and a tokenizer")

        def documents() -> Iterator[Mapping[str, str]]:
            return chain.from_iterable(s.train for s in self.splits)

        own = None if source.model is None else _load_tokenizer(self._source())
        return BridgeInputs(
            tokenizer=tokenizer,
            train=text.train,
            validation=self.validation,
            calibration=self.calibration(),
            documents=documents,
            source_name=str(source.model or source.served),
            source=None if source.model is None else load_model(self._source()),
            source_tokenizer=own,
            source_revision=source.revision,
            data=data,
            base=self.base,
        )

    def _warn_of_another_beginning(self, source: PreTrainedModel) -> None:
        """Measures the source with and without a begin-of-text token, and says so where the recipe's way is worse."""
        ids, tokenizer, ends = self.calibration(), self.tokenizer, self.ends
        if ids is None or tokenizer is None or ends is None:
            return
        token = tokenizer.bos_token_id if ends.begin is None else ends.begin
        if token is None:
            return
        text = ids[:16] if ends.begin is None else ids[:16, 1:]
        with on_accelerator(source):
            began, bare = losses_by_beginning(source, text, token)
        own, other = (bare, began) if ends.begin is None else (began, bare)
        if own > other + _WORSE:
            name = tokenizer.convert_ids_to_tokens(token)
            has, has_not = ("without", "with") if ends.begin is None else ("with", "without")
            warnings.warn(
                f"the source reads the calibration text at {own:.2f} nats a token {has} {name!r} before it, as its "
                f"tokenizer begins a text, and at {other:.2f} {has_not} it; set data.begin_of_text to "
                f"{name if ends.begin is None else 'none'!r} if that is how it was trained",
                stacklevel=2,
            )

    def source(self, work_dir: Path, progress: bool) -> tuple[PreTrainedModel, Training | None]:
        """Loads the source model in float32, or trains it from scratch.

        Raises:
            RecipeError: It cannot be loaded, or its config is none of the architecture's.
        """
        source = self.recipe.source
        if source.model is not None:
            model = load_model(self._source())
            self._warn_of_another_beginning(model)
            return model, None
        train = source.train
        if train is None or self.tokenizer is None or self.text is None:
            raise RecipeError("a source trained from scratch needs `source.train`, `tokenizer` and `data`")
        config = fresh_config(train.architecture, self.tokenizer, train.config, key="source.train.config")
        model = fresh_model(config, train.training.seed)
        training = distill(
            model,
            None,
            self.text.train,
            self.validation,
            train.training,
            work_dir=work_dir,
            progress=progress,
        )
        return model.eval(), training


def _load_tokenizer(location: Location) -> Tokenizer | None:
    """Loads a tokenizer; None where a model ships none (transformers may then make an empty one up)."""
    place = location.place
    if not any("token" in name or "vocab" in name for name in location.names()):
        return None
    load = partial(AutoTokenizer.from_pretrained, place, trust_remote_code=False, **location.options)
    try:
        tokenizer: Tokenizer = guarded("one of its files", load)
    except ManifestError as error:
        raise RecipeError(f"the tokenizer of {place!r} cannot be loaded: {error}") from error
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_ids) else None
