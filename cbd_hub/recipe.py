"""The recipe of a chain: what a user writes in YAML, strict about names and types.

A key that is not known is refused with the nearest known name, before anything is trained.
"""

import hashlib
import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cbd_hub.data import DataConfig
from cbd_hub.distill import DistillationConfig, TokenCount
from cbd_hub.errors import CbdError, RecipeError, did_you_mean
from cbd_hub.sizing import parse_count

__all__ = [
    "AnchorSpec",
    "EvaluationConfig",
    "HubConfig",
    "Recipe",
    "Source",
    "TrainSource",
    "TrainTokenizer",
    "load_recipe",
    "step_fingerprint",
]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class _Strict(BaseModel):
    """Refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class TrainSource(_Strict):
    """A source trained from scratch."""

    architecture: str = "llama"
    """``model_type`` of the transformers config."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that config; vocabulary size and special tokens come from the tokenizer."""
    training: DistillationConfig = DistillationConfig()
    """Tokens, learning rate and so on; only the cross-entropy plays a part."""


class Source(_Strict):
    """What the chain is made from: exactly one of ``model`` and ``train``."""

    name: Name | None = None
    """Name of the largest anchor; by default the recipe's name and the size."""
    model: str | None = None
    """A folder (relative to the recipe) or a Hub repo id."""
    revision: str | None = None
    """Branch, tag or commit of ``model``."""
    train: TrainSource | None = None
    """Train a source from scratch instead."""

    @model_validator(mode="after")
    def _one(self) -> "Source":
        if (self.model is None) == (self.train is None):
            raise ValueError("give exactly one of `model` and `train`")
        return self


class TrainTokenizer(_Strict):
    """A byte-level BPE tokenizer trained on the training text."""

    vocab_size: int = Field(ge=300, le=1_000_000)
    """Entries, special tokens included."""


def _read_anchor(value: Any) -> Any:
    """A bare fraction, count or string stands for a mapping."""
    if isinstance(value, float):
        return {"fraction": value}
    if isinstance(value, int | str) and not isinstance(value, bool):
        return {"num_parameters": value}
    return value


def _read_size(value: Any) -> Any:
    return parse_count(value) if isinstance(value, str) else value


class AnchorSpec(_Strict):
    """One anchor below the source: exactly one of ``fraction``, ``num_parameters`` and ``shape``."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Size as a fraction of the larger neighbour's parameters."""
    num_parameters: Annotated[int, BeforeValidator(_read_size), Field(gt=0)] | None = None
    """Size as a parameter count, e.g. ``"117M"``."""
    shape: dict[str, Annotated[int, Field(gt=0)]] | None = None
    """Config fields; those left out are the larger neighbour's."""
    name: Name | None = None
    """By default the recipe's name and the size."""
    tokens: TokenCount | None = None
    """Training tokens of this anchor; by default those of ``distillation``."""

    @model_validator(mode="after")
    def _one(self) -> "AnchorSpec":
        if sum(v is not None for v in (self.fraction, self.num_parameters, self.shape)) != 1:
            raise ValueError("give exactly one of `fraction`, `num_parameters` and `shape`")
        return self


class EvaluationConfig(_Strict):
    """How the finished chain is measured on held-out text."""

    tokens: Annotated[int, Field(gt=0)] | None = None
    """Most predicted tokens a measurement; None takes all held-out text."""
    curve_points: int = Field(default=4, ge=0, le=100)
    """Sizes measured between every two anchors."""


class HubConfig(_Strict):
    """Where the chain is to be published."""

    repo_id: str
    """``owner/name`` of the chain's repository."""
    private: bool = False
    """Whether the repositories are private."""
    license: str | None = None
    """Licence on the cards; by default the recipe's."""


class Recipe(_Strict):
    """Everything that makes a chain."""

    name: Name
    """Name of the chain; anchors are named after it."""
    source: Source
    """What the chain is made from."""
    tokenizer: str | TrainTokenizer | None = None
    """A folder, a repo id, or ``{vocab_size: N}`` to train one; None takes the source model's."""
    data: DataConfig | None = None
    """The text; None only where nothing is trained."""
    anchors: list[Annotated[AnchorSpec, BeforeValidator(_read_anchor)]] = Field(min_length=1)
    """From large to small; an item may be a bare fraction or parameter count."""
    distillation: DistillationConfig = DistillationConfig()
    """How every anchor is trained."""
    calibration_tokens: int = Field(default=16_384, ge=0)
    """Validation tokens that importance and basis are measured on; 0 ranks by weights alone, which is much worse."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How the chain is measured."""
    hub: HubConfig | None = None
    """Where it is to be published."""
    license: str | None = None
    """Licence identifier, e.g. ``apache-2.0``."""
    axis_map: dict[str, Any] | None = None
    """An axis map for an architecture that the library does not know."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which the anchors are saved."""

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        trains = self.source.train is not None or any(
            (self.distillation.tokens if a.tokens is None else a.tokens) > 0 for a in self.anchors
        )
        if trains and self.data is None:
            raise ValueError(
                "`data` is missing: give it text, or set distillation.tokens to 0 to cut without training"
            )
        if self.source.train is not None and self.tokenizer is None:
            raise ValueError(
                "`tokenizer` is missing: a source trained from scratch needs one, e.g. {vocab_size: 4096}"
            )
        return self


class _UniqueKeys(yaml.SafeLoader):
    """YAML without repeated keys, of which plain YAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"the recipe has the key {key!r} twice (line {node.start_mark.line + 1})")
        return super().construct_mapping(node, deep)


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> tuple[Recipe, Path]:
    """Reads and checks a recipe.

    Returns:
        The recipe, and the folder that relative paths in it start from (the YAML file's, else the current one).

    Raises:
        RecipeError: No such file, not YAML, unknown keys, wrong types, or parts that do not go together.
    """
    if isinstance(recipe, Recipe):
        return recipe, Path.cwd()
    base = Path.cwd()
    data: Any = recipe
    if isinstance(recipe, str | Path):
        path = Path(recipe).expanduser()
        base = path.resolve().parent
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
        except OSError as error:
            raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe is a mapping of keys such as name, source, anchors; got {type(data).__name__}")
    if "bridge" in data:
        raise RecipeError("`bridge` is not supported yet: the source must be of the chain's own architecture")
    try:
        return Recipe.model_validate(dict(data)), base
    except ValidationError as error:
        raise RecipeError(_first_problem(error)) from None
    except CbdError as error:
        raise RecipeError(f"recipe: {error}") from None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"] if not str(part).startswith("function-")]
    where = ".".join(path) or "the recipe"
    more = f" (and {error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _fields_at(Recipe, path[:-1])
        return f"recipe: unknown key {where!r}.{did_you_mean(path[-1], known)} Known there: {', '.join(known)}{more}"
    return f"recipe: {where}: {problem['msg']} (got {problem['input']!r}){more}"[:1000]


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that are allowed at a place of the recipe."""
    for part in path:
        if part in model.model_fields:
            inner = _models_in(model.model_fields[part].annotation)
            model = inner[0] if inner else model
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


def step_fingerprint(recipe: Recipe, index: int) -> str:
    """Returns a SHA-256 over all that decides step ``index`` (0 is the source): later anchors play no part."""
    parts = recipe.model_dump(mode="json", exclude={"hub", "license", "anchors", "evaluation"})
    parts["anchors"] = [a.model_dump(mode="json") for a in recipe.anchors[:index]]
    parts["evaluation_tokens"] = recipe.evaluation.tokens
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
