"""The recipe: everything that decides what a chain will be, in one YAML file.

A recipe names a source, the text, the sizes of the anchors and how they are distilled. It is checked as a whole
before anything is downloaded or computed, and every part that decides the outcome of a step goes into that step's
*fingerprint*: a build resumes where the fingerprints of its finished steps still hold.
"""

import hashlib
import json
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cbd_hub.architectures import AXIS_MAPS
from cbd_hub.axis_map import AxisMap
from cbd_hub.data import DataConfig
from cbd_hub.distill import DistillationConfig, TokenCount
from cbd_hub.errors import RecipeError, did_you_mean
from cbd_hub.sizing import parse_count

__all__ = [
    "AnchorSpec",
    "EvaluationConfig",
    "HubConfig",
    "Recipe",
    "Source",
    "SourceTraining",
    "TrainSource",
    "TrainTokenizer",
    "fingerprint",
    "load_recipe",
    "step_fingerprint",
]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$")]
"""Letters, digits, ``.``, ``_`` and ``-``: fit for a folder and for the Hub."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SourceTraining(DistillationConfig, frozen=True):
    """How a source is trained from scratch: as an anchor is, with cross-entropy alone."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW."""
    kl: float = Field(default=0.0, ge=0, le=0)
    """There is no teacher."""
    hidden: float = Field(default=0.0, ge=0, le=0)
    """There is no teacher."""


class TrainSource(_Part):
    """A source trained from scratch."""

    architecture: str = "llama"
    """``model_type`` of the transformers config."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that config (sizes and the like); the vocabulary follows from the tokenizer."""
    training: SourceTraining = SourceTraining()
    """Tokens, learning rate and so on."""


class Source(_Part):
    """The largest model of the chain: exactly one of `model` and `train`."""

    model: str | None = None
    """Repo id on the Hub, or a folder relative to the recipe."""
    revision: str | None = None
    """Branch, tag or commit of `model`; a commit makes the build repeatable."""
    train: TrainSource | None = None
    """Train one from scratch instead."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> "Source":
        if (self.model is None) == (self.train is None):
            given = "neither" if self.train is None else "both"
            raise ValueError(f"give exactly one of model and train, got {given}")
        if self.train is not None and self.revision is not None:
            raise ValueError("revision belongs to model, and there is none")
        return self


class TrainTokenizer(_Part):
    """A tokenizer trained on the training text, for a source that is trained too."""

    vocab_size: int = Field(ge=257)
    """Number of tokens, at most; 256 bytes and the end of text are always among them."""


class AnchorSpec(_Part):
    """One anchor: exactly one of `fraction`, `num_parameters` and `shape`.

    In a recipe a number between 0 and 1 stands for a fraction, and a count such as ``90_000_000`` or ``90M`` for
    `num_parameters`.
    """

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Parameters, as a fraction of the next larger anchor's."""
    num_parameters: int | None = None
    """Parameters, tied weights counted once."""
    shape: dict[str, Annotated[int, Field(ge=1)]] | None = None
    """Sizes, in the architecture's own config fields; those not given are the neighbour's."""
    name: Name | None = None
    """Name in the manifest; None makes one from the size."""
    init: str | None = None
    """Checkpoint (repo id, or folder relative to the recipe) to start from instead of the neighbour's weights. Its
    units do not correspond to the neighbour's, so models between the two will be poor."""
    tokens: TokenCount | None = None
    """Training tokens of this anchor; None takes those of `distillation`."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of this anchor; None takes that of `distillation`."""

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        if isinstance(value, float) and not 0 < value < 1:
            raise ValueError(f"{value} is no fraction between 0 and 1; write a parameter count as 90000000 or '90M'")
        if isinstance(value, float):
            return {"fraction": value}
        return {"num_parameters": value} if isinstance(value, int | str) else value

    @field_validator("num_parameters", mode="before")
    @classmethod
    def _count(cls, value: Any) -> Any:
        return parse_count(value) if isinstance(value, int | str) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> "AnchorSpec":
        given = [name for name in ("fraction", "num_parameters", "shape") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of fraction, num_parameters and shape, got {' and '.join(given) or 'none'}"
            )
        return self


class EvaluationConfig(_Part):
    """What is measured once the anchors are built, on text that took no part in building them."""

    tokens: TokenCount | None = None
    """Predicted tokens that a loss is measured on, at most; None takes all of the test text."""
    curve_points: int = Field(default=4, ge=0)
    """Sizes measured between each pair of neighbours."""


class HubConfig(_Part):
    """Where a chain is published."""

    repo_id: str
    """``user/name`` of the repository."""
    private: bool | None = None
    """Whether it is private; None takes the account's default."""
    license: str | None = None
    """Licence on the model cards, as the Hub spells it (``apache-2.0``)."""


class Recipe(_Part):
    """What :func:`cbd_hub.build_chain` builds."""

    name: Name
    """Name of the chain."""
    source: Source
    """The largest model."""
    tokenizer: str | TrainTokenizer | None = None
    """Repo id or folder of a tokenizer, or one to train; None takes the source's own."""
    data: DataConfig | None = None
    """The text; needed unless every `tokens` is 0."""
    anchors: Annotated[list[AnchorSpec], Field(min_length=1)]
    """The anchors below the source, largest first."""
    distillation: DistillationConfig = DistillationConfig()
    """How every anchor is trained."""
    calibration_tokens: TokenCount = 16_384
    """Tokens that importance and activation statistics are measured on."""
    bridge: None = None
    """Reserved: sources of another architecture or vocabulary are not supported yet."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What is measured."""
    hub: HubConfig | None = None
    """Where the chain is published; None keeps it local."""
    license: str | None = None
    """Licence of the chain, as the Hub spells it; None takes the source's."""
    axis_map: dict[str, Any] | None = None
    """Axis map of an architecture that this library does not know (:class:`cbd_hub.axis_map.AxisMap`)."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the build; added to the seed of each training (``data.seed``, which splits the text, stands alone)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision in which anchors are saved."""

    @field_validator("bridge", mode="before")
    @classmethod
    def _no_bridge(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("bridge distillation is not supported yet; leave bridge out")

    @field_validator("axis_map")
    @classmethod
    def _reads(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            AxisMap.from_dict(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        train = self.source.train
        names = [anchor.name for anchor in self.anchors if anchor.name is not None]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two anchors have the name {repeated[0]!r}; names must differ")
        if train is not None:
            if self.axis_map is None and train.architecture not in AXIS_MAPS:
                known = ", ".join(sorted(AXIS_MAPS))
                hint = did_you_mean(train.architecture, AXIS_MAPS)
                raise ValueError(f"source.train.architecture {train.architecture!r} is none of {known}.{hint}")
            if self.tokenizer is None:
                raise ValueError("a source trained from scratch needs a tokenizer: a name, or {vocab_size: N}")
        elif isinstance(self.tokenizer, TrainTokenizer):
            raise ValueError("a tokenizer can be trained only for a source that is trained from scratch")
        needed = isinstance(self.tokenizer, TrainTokenizer) or any(self.training(i).tokens for i in self.steps)
        if needed and self.data is None:
            raise ValueError("data is missing: give text_files or dataset (or set every `tokens` to 0)")
        return self

    @property
    def steps(self) -> range:
        """The steps of the build: 0 makes the source ready, i makes ``anchors[i - 1]``."""
        return range(len(self.anchors) + 1)

    def training(self, index: int) -> DistillationConfig:
        """Returns how step `index` trains, with the anchor's own settings; a ready-made source trains 0 tokens."""
        train, own, config = self.source.train, {}, self.distillation
        if index == 0:
            config = SourceTraining(tokens=0) if train is None else train.training
        else:
            own = self.anchors[index - 1].model_dump(include={"tokens", "learning_rate"}, exclude_none=True)
        return config.model_copy(update={**own, "seed": (self.seed + config.seed) % 2**32})


def load_recipe(recipe: str | Path | dict[str, Any] | Recipe) -> tuple[Recipe, Path]:
    """Reads and checks a recipe.

    Args:
        recipe: Path to a YAML file, its content as a dict, or a recipe (returned as it is).

    Returns:
        the recipe, and the folder that its relative paths start from: the file's, else the working directory.

    Raises:
        RecipeError: The file is missing or no YAML, a key is unknown or given twice, a value is of the wrong type or
            out of range, or parts contradict each other. The message names the first problem and counts the others.
    """
    if isinstance(recipe, Recipe):
        return recipe, Path.cwd()
    if isinstance(recipe, dict):
        return _check(recipe, "The recipe"), Path.cwd()
    path = Path(recipe)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise RecipeError(f"The recipe {path} is not UTF-8; convert it to UTF-8.") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is no valid YAML: {' '.join(str(error).split())}") from None
    return _check(data, str(path)), path.resolve().parent


def fingerprint(recipe: Recipe) -> str:
    """Returns the SHA-256 (hex) of everything that decides what is built and measured; `hub` does not."""
    return _sha256(
        {"steps": step_fingerprint(recipe, len(recipe.anchors)), **_dump(recipe, {"name", "evaluation", "license"})}
    )


def step_fingerprint(recipe: Recipe, index: int) -> str:
    """Returns the SHA-256 (hex) of everything that decides the outcome of step `index` (:attr:`Recipe.steps`).

    That is the source, the text's description (not its content), the tokenizer, the seeds, and the anchors up to
    this one with their training, but neither later anchors nor names, evaluation, licence and hub.

    Raises:
        RecipeError: There is no such step.
    """
    if index not in recipe.steps:
        raise RecipeError(f"The recipe has the steps 0 to {len(recipe.anchors)}; there is no step {index}.")
    common = {"source", "tokenizer", "data", "calibration_tokens", "axis_map", "seed", "dtype"}
    anchors = [anchor.model_dump(mode="json", exclude={"name"}) for anchor in recipe.anchors[:index]]
    training = [recipe.training(i).model_dump(mode="json", exclude={"report_to"}) for i in range(index + 1)]
    return _sha256({**_dump(recipe, common), "anchors": anchors, "training": training})


def _dump(recipe: Recipe, include: set[str]) -> dict[str, Any]:
    dumped = recipe.model_dump(mode="json", include=include)
    if train := (dumped.get("source") or {}).get("train"):
        del train["training"]  # stands among the trainings of all steps
    return dumped


def _sha256(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, of which YAML itself would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key_node.value!r} is given twice", key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _check(data: Any, where: str) -> Recipe:
    if not isinstance(data, dict):
        raise RecipeError(f"{where} must hold keys and values (name, source, anchors, ...), got {_short(data)}.")
    for path, text in _strings(data, ()):
        if "${" in text:
            raise RecipeError(f"{where}: {_dotted(path)} holds {_short(text)}; a recipe knows no variables.")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, data)}") from None


def _strings(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _strings(item, (*path, key))


def _explain(error: ValidationError, data: Any) -> str:
    """The first problem in words, and how many there are beside it."""
    problems: dict[tuple[Any, ...], list[str]] = {}
    for detail in sorted(error.errors(), key=lambda d: d["type"] != "extra_forbidden"):  # a typo explains a gap
        path, message = _place(detail["loc"], data), detail["msg"].removeprefix("Value error, ")
        if detail["type"] == "extra_forbidden":
            known = _known_keys(path)
            message = f"is not a known key.{did_you_mean(str(path[-1]), known) or ' Known: ' + ', '.join(known) + '.'}"
        elif detail["type"] == "missing":
            path, message = (*path, detail["loc"][-1]), "is missing."
        elif detail["type"] == "value_error":
            message = f": {message}." if path else f"{message}."
        else:
            message = f"is {_short(detail['input'])}. {message}."
        problems.setdefault(path, []).append(message)
    # Where several types are allowed, each that does not fit complains: only the closest one is worth a word.
    places = [p for p in problems if not any(q != p and q[: len(p)] == p for q in problems)]
    others = "" if len(places) == 1 else f" (and {len(places) - 1} more)"
    first = " Or: ".join(dict.fromkeys(problems[places[0]]))
    return f"{_dotted(places[0])} {first}".strip().replace(" :", ":") + others


def _place(loc: tuple[Any, ...], data: Any) -> tuple[Any, ...]:
    """The keys that lead to a problem; pydantic's location also holds names of types."""
    path = []
    for part in loc:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            path.append(part)
            data = data[part]
    return tuple(path)


def _known_keys(path: tuple[Any, ...]) -> list[str]:
    """The keys allowed where a path ends."""
    models: list[type[BaseModel]] = [Recipe]
    for part in path[:-1]:
        if isinstance(part, str):
            models = [m for model in models for m in _models(model.model_fields[part].annotation)]
    return [name for model in models for name in model.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _dotted(path: tuple[Any, ...]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
