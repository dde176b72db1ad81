"""Writes the tables of recipe keys in the docs from the pydantic models: ``recipe_tables.py [--check]``.

A table stands between ``<!-- table:MODEL:begin -->`` and ``<!-- table:MODEL:end -->``. A row is a field: its name, its
type, its default and its docstring.
"""

import re
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cbd_hub.build.recipe import AnchorSpec, EvaluationConfig, HubConfig, Recipe, Source, Spread, TrainSource
from cbd_hub.build.settings import BridgeConfig
from cbd_hub.text.settings import DataConfig, DatasetSource, GenerationConfig, Sampling, ServerConfig, SourceConfig
from cbd_hub.training.settings import ControlPointConfig, DistillationConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / "how-to" / name for name in ("build-a-chain.md", "bridge.md")]
MODELS: dict[str, type[BaseModel]] = {
    model.__name__: model
    for model in (
        AnchorSpec,
        BridgeConfig,
        ControlPointConfig,
        DataConfig,
        DatasetSource,
        DistillationConfig,
        EvaluationConfig,
        GenerationConfig,
        HubConfig,
        Recipe,
        Sampling,
        ServerConfig,
        Source,
        SourceConfig,
        Spread,
        TrainSource,
    )
}
_TABLE = re.compile(r"(<!-- table:(\w+):begin -->\n).*?(<!-- table:\2:end -->)", re.DOTALL)
_PLAIN = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "", Any: "any value"}


def type_name(annotation: Any) -> str:
    """A type in words: ``integer``, ``text or list of text``."""
    if get_origin(annotation) is Annotated:
        return type_name(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(type_name, get_args(annotation)))))
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {type_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "mapping"
    return _PLAIN[annotation]


def default(field: FieldInfo) -> str:
    """The default as it would be written in YAML."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "its own"
    if isinstance(value, list | dict) and len(str(value)) > 30:
        return "measured"
    if isinstance(value, float) and value == int(value):
        value = int(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def meaning(field: FieldInfo) -> str:
    """The docstring on one line, as Markdown."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join((field.description or "").split()))
    return text.replace("``", "`").replace("|", "\\|").rstrip(".")


def table(model: type[BaseModel]) -> str:
    """The table of one model."""
    rows = [
        f"| `{name}` | {type_name(field.annotation)} | {default(field)} | {meaning(field)} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(["| key | type | default | means |", "|---|---|---|---|", *rows]) + "\n"


def written(text: str) -> str:
    """A page with its tables written anew."""
    return _TABLE.sub(lambda match: match[1] + table(MODELS[match[2]]) + match[3], text)


def main(arguments: list[str]) -> int:
    """Writes the pages, or with ``--check`` returns 1 where one differs."""
    stale = [page for page in PAGES if written(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")]
    if arguments == ["--check"]:
        print(*(f"{page.relative_to(ROOT)} differs: run python .ci/recipe_tables.py" for page in stale), sep="\n")
        return int(bool(stale))
    for page in stale:
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
