"""The recipe of a chain: what a user writes in YAML, strict about names and types.

A key that is not known is refused with the nearest known name, before anything is trained.
"""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator, model_validator

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import WAYPOINTS, parse_count
from cbd_hub.build.settings import BridgeSetting
from cbd_hub.errors import RecipeError, did_you_mean
from cbd_hub.settings import Settings
from cbd_hub.text.settings import DataConfig
from cbd_hub.training.settings import AnchorDistillation, DistillationConfig, TokenCount

__all__ = [
    "AnchorSpec",
    "EvaluationConfig",
    "HubConfig",
    "Recipe",
    "Source",
    "Spread",
    "TrainSource",
    "TrainTokenizer",
    "load_recipe",
    "short_recipe",
]

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class TrainSource(Settings):
    """A source trained from scratch."""

    architecture: str = "llama"
    """``model_type`` of the transformers config."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of that config; vocabulary size and special tokens come from the tokenizer."""
    training: DistillationConfig = DistillationConfig()
    """Tokens, learning rate and so on; only the cross-entropy plays a part."""


class Source(Settings):
    """What the chain is made from: exactly one of ``model``, ``train`` and ``served``."""

    name: Name | None = None
    """Name of the largest anchor; by default the recipe's name and the size."""
    model: str | None = None
    """A folder (relative to the recipe) or a Hub repo id; weights are read from safetensors alone."""
    revision: str | None = None
    """Branch, tag or commit of ``model``."""
    train: TrainSource | None = None
    """Train a source from scratch instead."""
    served: str | None = None
    """Name of a model behind the server of ``bridge.generation``, which only writes text."""

    @model_validator(mode="after")
    def _one(self) -> "Source":
        named = [name for name in ("model", "train", "served") if getattr(self, name) is not None]
        if len(named) != 1:
            got = " and ".join(named) or "none"
            raise ValueError(f"give exactly one of model, train and served, got {got}")
        if self.model is None and self.revision is not None:
            raise ValueError("revision belongs to model, and there is none")
        return self


class TrainTokenizer(Settings):
    """A byte-level BPE tokenizer trained on the training text."""

    vocab_size: int = Field(ge=300, le=1_000_000)
    """Entries, special tokens included."""


def _read_anchor(value: Any) -> Any:
    """A bare fraction, count or string stands for a mapping."""
    if isinstance(value, float) and not 0 < value < 1:
        raise ValueError(f"{value} is no fraction between 0 and 1; write a parameter count as 90000000 or '90M'")
    if isinstance(value, float):
        return {"fraction": value}
    return {"num_parameters": value} if isinstance(value, int | str) else value


def _read_size(value: Any) -> Any:
    return parse_count(value) if isinstance(value, int | str) else value  # refuses true and false


class AnchorSpec(Settings):
    """One anchor below the source: exactly one of ``fraction``, ``num_parameters``, ``shape`` and ``init``."""

    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Size as a fraction of the larger neighbor's parameters."""
    num_parameters: Annotated[int, BeforeValidator(_read_size), Field(gt=0)] | None = None
    """Size as a parameter count, e.g. ``"117M"``."""
    shape: dict[str, Annotated[int, Field(gt=0)]] | None = None
    """Config fields; those left out are the larger neighbor's."""
    init: str | None = None
    """A checkpoint (folder or repo id) to start from instead of a subset of the larger neighbor."""
    revision: str | None = None
    """Branch, tag or commit of ``init``."""
    align: bool | Literal["learned"] = True
    """Write ``init`` in its neighbor's units first (:mod:`cbd_hub.alignment.align`), with ``learned`` maps on top
    (:mod:`cbd_hub.alignment.learned`); False takes it as it is."""
    name: Name | None = None
    """By default the recipe's name and the size."""
    tokens: TokenCount | None = None
    """Training tokens of this anchor; by default those of ``distillation``."""

    @model_validator(mode="after")
    def _one(self) -> "AnchorSpec":
        ways = ("fraction", "num_parameters", "shape", "init")
        named = [name for name in ways if getattr(self, name) is not None]
        if len(named) != 1:
            got = " and ".join(named) or "none"
            raise ValueError(f"give exactly one of fraction, num_parameters, shape and init, got {got}")
        if self.init is None and self.revision is not None:
            raise ValueError("revision belongs to init, and there is none")
        return self


class Spread(Settings):
    """How a reduction is spread over depth, width, heads and ffn units; the defaults follow measurements."""

    waypoints: list[dict[str, Annotated[float, Field(gt=0, le=1)]]] = Field(
        default=[dict(point) for point in WAYPOINTS], min_length=1
    )
    """For anchors: axis → fraction of the larger neighbor, each point below the one before; see
    :data:`cbd_hub.axes.sizing.WAYPOINTS`. An anchor's own ``shape`` overrides them."""
    layers_last: bool = True
    """For models between two anchors: add ffn units before layers; False moves every axis along the straight line."""
    round_widths: bool = True
    """For both: widths that are multiples of 256, 64 or 32 wherever the size may be had with them."""


class EvaluationConfig(Settings):
    """How the finished chain is measured on held-out text."""

    tokens: Annotated[TokenCount, Field(gt=0)] | None = None
    """Most predicted tokens a measurement, on validation text (which chooses checkpoints) and on test text; None takes
    all."""
    curve_points: int = Field(default=4, ge=0, le=100)
    """Sizes measured between every two anchors."""


class HubConfig(Settings):
    """Where the finished chain is published."""

    repo_id: str
    """``owner/name`` of the chain's repository."""
    private: bool | None = None
    """Whether repositories that are made are private; None is the Hub's default."""
    license: str | None = None
    """License on the cards; by default the recipe's."""


class Recipe(Settings):
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
    bridge: BridgeSetting | None = None
    """How the largest anchor is made where the source is of another architecture or vocabulary: ``auto``, a list of
    ways, or a mapping (:mod:`cbd_hub.build.bridge`)."""
    distillation: AnchorDistillation = AnchorDistillation()
    """How every anchor is trained."""
    calibration_tokens: int = Field(default=16_384, ge=0)
    """Validation tokens that importance and basis are measured on; 0 ranks by weights alone, which is much worse."""
    spread: Spread = Spread()
    """Which axes shrink first."""
    refit: bool = True
    """Fit a cut anchor's output projections to its neighbor by least squares before it is distilled; the fit is kept
    only where it lowers the validation loss."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """How the chain is measured."""
    hub: HubConfig | None = None
    """Where it is published once it is finished."""
    license: str | None = None
    """License identifier for the manifest and the cards, e.g. ``apache-2.0``."""
    axis_map: dict[str, Any] | None = None
    """An axis map for an architecture that the library does not know."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """In which the anchors are saved."""

    @field_validator("axis_map")
    @classmethod
    def _reads(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            AxisMap.from_dict(value)
        return value

    @model_validator(mode="after")
    def _complete(self) -> "Recipe":
        names = [name for name in (self.source.name, *(a.name for a in self.anchors)) if name is not None]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two anchors have the name {repeated[0]!r}; names must differ")
        if self.bridge is None:
            if self.source.served is not None:
                raise ValueError("`bridge` is missing: a served source only writes text for one")
            if self.source.train is None and isinstance(self.tokenizer, TrainTokenizer):
                raise ValueError("a tokenizer can be trained only for a bridge, or a source trained from scratch")
        elif self.source.train is not None:
            raise ValueError("`bridge` needs a source that exists; this one is trained from scratch for the chain")
        elif self.source.served is not None:
            if self.bridge.generation.server is None:
                raise ValueError("`bridge.generation.server` is missing: it says where the served source is")
            if self.tokenizer is None:
                raise ValueError("`tokenizer` is missing: a served source has none to take over")
        trains = (
            self.source.train is not None
            or self.bridge is not None
            or any((self.distillation.tokens if a.tokens is None else a.tokens) > 0 for a in self.anchors)
        )
        if trains and self.data is None:
            raise ValueError("`data` is missing: give it text, or set distillation.tokens to 0 to train nothing")
        if self.source.train is not None and self.tokenizer is None:
            raise ValueError(
                "`tokenizer` is missing: a source trained from scratch needs one, e.g. {vocab_size: 4096}"
            )
        return self


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


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe) -> tuple[Recipe, Path]:
    """Reads and checks a recipe.

    Returns:
        The recipe, and the folder that relative paths in it start from (the YAML file's, else the current one).

    Raises:
        RecipeError: No such file, not YAML, a key that is unknown or given twice, a value of the wrong type or out of
            range, or parts that do not go together. The message names the first problem and counts the others.
    """
    if isinstance(recipe, Recipe):
        return recipe, Path.cwd()
    if not isinstance(recipe, str | Path):
        return _check(recipe, "the recipe"), Path.cwd()
    path = Path(recipe).expanduser()
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RecipeError(f"the recipe {path} is not UTF-8; convert it to UTF-8") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"the recipe {path} is no valid YAML: {' '.join(str(error).split())}") from None
    return _check(data, str(path)), path.resolve().parent


def short_recipe(
    source: str, anchors: Sequence[str], text: Sequence[str], dataset: str | None, tokens: str | None, name: str | None
) -> dict[str, Any]:
    """Returns a recipe made of what a command line says; everything else is a recipe's default.

    Sizes of anchors are fractions of the source's parameters (0.75) or counts (100M), the largest first; tokens are an
    anchor's; the name is by default the source's.

    Raises:
        RecipeError: No anchor, or fractions that do not fall.
    """
    if not anchors:
        raise RecipeError("name the sizes of the anchors, e.g. --anchors 0.75 0.5 (fractions of the source)")
    before = 1.0
    specs: list[dict[str, Any]] = []
    for size in anchors:
        fraction = float(size) if re.fullmatch(r"0?\.\d+", size) else None
        if fraction is None:
            specs.append({"num_parameters": size})
            continue
        if not 0 < fraction < before:
            raise RecipeError(f"anchor sizes are {', '.join(anchors)}; each must be smaller than the one before it")
        specs.append({"fraction": round(fraction / before, 6)})  # recipes say it of the larger neighbor
        before = fraction
    return {
        "name": name or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name).strip("-.")[:48] or "chain",
        "source": {"model": str(Path(source).absolute()) if Path(source).exists() else source},
        "data": {"dataset": {"name": dataset}} if dataset else {"text_files": [str(Path(t).absolute()) for t in text]},
        "anchors": specs,
        **({} if tokens is None else {"distillation": {"tokens": tokens}}),
    }


def _check(data: Any, where: str) -> Recipe:
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where} must hold keys and values (name, source, anchors, ...); got {_short(data)}")
    for path, text in _strings(data, ()):
        if "${" in text:
            raise RecipeError(f"{where}: {_dotted(path)} holds {_short(text)}; a recipe knows no variables")
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error, data)}") from None


def _strings(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, str):
        yield path, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
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
        if (isinstance(data, Mapping) and part in data) or (isinstance(data, list) and isinstance(part, int)):
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
