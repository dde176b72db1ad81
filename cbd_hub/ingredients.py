"""What a build is made from: the text in three splits, the tokenizer, and the source model.

Everything here is a function of the recipe alone, so that a build that is gone on with finds the same ingredients.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.architectures import axis_map_for
from cbd_hub.chain import Training
from cbd_hub.data import Documents, Splits, load_documents, pack, split_documents, token_batches, train_tokenizer
from cbd_hub.distill import distill
from cbd_hub.errors import RecipeError
from cbd_hub.recipe import Recipe

__all__ = ["Ingredients", "Text"]


@dataclass(frozen=True)
class Text:
    """Packed blocks of the three splits."""

    train: Documents
    validation: Documents
    test: Documents


class Ingredients:
    """Text, tokenizer and source model of one recipe, each made when it is first needed."""

    def __init__(self, recipe: Recipe, base: Path) -> None:
        self.recipe = recipe
        self.base = base

    @cached_property
    def splits(self) -> Splits:
        """Documents to train on, to choose by, and to report on.

        Raises:
            RecipeError: The recipe has no data, or its text cannot be read or split.
        """
        data = self.recipe.data
        if data is None:
            raise RecipeError("the recipe has no `data`, and something in it needs text")
        return split_documents(load_documents(data, self.base), data.held_out_fraction, data.seed)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """Named by the recipe, trained on the training text, or the source model's; None where there is none.

        Raises:
            RecipeError: It cannot be loaded.
        """
        wanted, source = self.recipe.tokenizer, self.recipe.source
        if wanted is None:  # a bare model can be cut without a tokenizer
            return _load_tokenizer(self._model_place(), source.revision) if source.model else None
        if isinstance(wanted, str):
            if (found := _load_tokenizer(self._local(wanted))) is None:
                raise RecipeError(f"{wanted!r} holds no tokenizer; name a folder or a repo id with one")
            return found
        return train_tokenizer(self.splits.train, wanted.vocab_size)

    @cached_property
    def text(self) -> Text | None:
        """Packed blocks of the splits; None for a recipe without data.

        Raises:
            RecipeError: There is no tokenizer, or too little text for one block.
        """
        if self.recipe.data is None:
            return None
        if self.tokenizer is None:
            raise RecipeError("the recipe has `data` but no `tokenizer`; name one, or train one: {vocab_size: 4096}")
        length = self.recipe.data.sequence_length
        return Text(
            *(pack(s, self.tokenizer, length) for s in (self.splits.train, self.splits.validation, self.splits.test))
        )

    def calibration(self) -> torch.Tensor | None:
        """Token ids (N, S) of the validation text, for importance and basis; None without text."""
        if self.text is None or self.recipe.calibration_tokens == 0:
            return None
        rows = max(1, self.recipe.calibration_tokens // self.recipe.data.sequence_length)  # type: ignore[union-attr]
        return torch.cat(list(islice(token_batches(self.text.validation, 1), rows)))

    def _local(self, place: str) -> str:
        path = (self.base / Path(place).expanduser()).resolve()
        return str(path) if path.exists() else place

    def _model_place(self) -> str:
        return self._local(str(self.recipe.source.model))

    def source(self, work_dir: Path, progress: bool) -> tuple[PreTrainedModel, Training | None]:
        """Loads the source model in float32, or trains it from scratch.

        Raises:
            RecipeError: It cannot be loaded, or its config is none of the architecture's.
        """
        source = self.recipe.source
        if source.model is not None:
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    self._model_place(), revision=source.revision, dtype=torch.float32, use_safetensors=True
                )
            except (OSError, ValueError) as error:
                raise RecipeError(f"the source {source.model!r} cannot be loaded: {error}") from error
            return model.eval(), None
        train = source.train
        if train is None or self.tokenizer is None or self.text is None:
            raise RecipeError("a source trained from scratch needs `source.train`, `tokenizer` and `data`")
        ids = {k: getattr(self.tokenizer, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
        values = {"vocab_size": len(self.tokenizer), **ids, **train.config}
        try:
            config = AutoConfig.for_model(train.architecture, **values)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise RecipeError(f"source.train.config is no {train.architecture} config: {error}") from error
        axis_map_for(config)  # refuses an unknown family before hours are spent
        torch.manual_seed(train.training.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        training = distill(
            model,
            None,
            self.text.train,
            self.text.validation,
            train.training,
            work_dir=work_dir,
            progress=progress,
        )
        return model.eval(), training


def _load_tokenizer(place: str, revision: str | None = None) -> Tokenizer | None:
    """Loads a tokenizer; None where a model ships none (transformers may then make an empty one up)."""
    folder = Path(place)
    if folder.is_dir() and not any("token" in p.name or "vocab" in p.name for p in folder.iterdir()):
        return None
    try:
        found: Tokenizer = AutoTokenizer.from_pretrained(place, revision=revision)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the tokenizer of {place!r} cannot be loaded: {error}") from error
    return found if len(found) > len(found.all_special_ids) else None
