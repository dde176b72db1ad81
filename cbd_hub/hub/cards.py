"""Model cards: from a manifest to the README.md of a chain, of an anchor, or of a model made from a chain.

The text stands in the templates (``cards/*.md.jinja``), each rendered whole; this module prepares what they show. A
manifest is not trusted, so nothing of it reaches a card unescaped: every value that a template prints is brought
to one line and loses its meaning in Markdown, unless a filter of this module made it safe for code. A template that
names a value which does not exist is an error, not an empty place.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cbd_hub.axes.disk_size import QUANTS, disk_size, format_bytes
from cbd_hub.axes.sizing import format_count, parse_count, solve
from cbd_hub.errors import SizeError
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.manifest import Anchor, Evaluation, Manifest

__all__ = ["CURVE_PICTURE", "OWN_TEXT", "anchor_card", "chain_card", "is_generated", "model_card", "recovered_card"]

CURVE_PICTURE = "size_loss.png"
"""Picture of the size-loss curve that a chain's card shows if it lies in the chain's folder."""

OWN_TEXT = "held-out split of the chain's own text"
"""The data set's name in the results that a manifest knows."""

_TEMPLATES = (Path(__file__).parents[1] / "cards", Path(__file__).parents[2] / "cards")  # in a wheel; in a checkout
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_DATASET_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_MARKDOWN = re.compile(r"[\\`*{}\[\]<>#|!~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_TAGS = ("cbd-hub", "chain-based-distillation")


def chain_card(
    manifest: Manifest, repo_id: str | None = None, *, folder: Path | None = None, chat: bool | None = None
) -> ModelCard:
    """Returns the card of a chain.

    Args:
        manifest: The chain's manifest.
        repo_id: Where the chain is (to be) published; None writes a card that is read inside a local folder.
        folder: Folder of the chain; its :data:`CURVE_PICTURE` is shown if there is one.
        chat: Whether the tokenizer has a chat template; None says nothing of it.
    """
    results = [r for anchor in manifest.anchors for r in _results(manifest, anchor.evaluation, f" of {anchor.name}")]
    return _render(
        "chain.md.jinja",
        _metadata(manifest, _TAGS, _repo_ids([manifest.source]), manifest.name, results, library="cbd-hub"),
        manifest=manifest,
        sizes=_sizes(manifest),
        place=repo_id or ".",
        size=_example_size(manifest),
        picture=CURVE_PICTURE if folder is not None and (folder / CURVE_PICTURE).is_file() else None,
        common=_common(manifest),
        chat=chat,
    )


def anchor_card(
    manifest: Manifest, anchor: Anchor, repo_id: str | None = None, *, chain: str | None = None
) -> ModelCard:
    """Returns the card of one anchor.

    Args:
        manifest: The manifest of its chain.
        anchor: The anchor, with the place that it has or will have.
        repo_id: Repository that holds the anchor; None takes the manifest's, or a local folder where there is none.
        chain: Repository of the chain; None where it is local.
    """
    parent = next((a for a in manifest.anchors if a.name == anchor.parent), None)
    place = repo_id or anchor.repo_id
    subfolder = anchor.subfolder if place else None
    if {"tokenizer.json", "tokenizer_config.json"} & set(anchor.files):
        tokenizer = (place or ".", subfolder)
    elif manifest.tokenizer:  # the chain's, at the top of the repository or folder that holds the anchor
        up = "/".join([".."] * len(PurePosixPath(anchor.subfolder or "").parts))
        tokenizer = (place or up or ".", None)
    else:
        tokenizer = ("", None)
    return _render(
        "anchor.md.jinja",
        _metadata(
            manifest,
            (*_TAGS, "knowledge-distillation"),
            _repo_ids([parent.repo_id if parent else None]) or _repo_ids([manifest.source]),
            f"{manifest.name}-{anchor.name}",
            _results(manifest, anchor.evaluation),
            "finetune",
        ),
        manifest=manifest,
        anchor=anchor,
        parent=parent,
        place=place or ".",
        subfolder=subfolder,
        tokenizer_place=tokenizer[0],
        tokenizer_subfolder=tokenizer[1],
        chain=chain,
        size=_example_size(manifest),
    )


def model_card(
    manifest: Manifest,
    plan: Plan,
    *,
    chain: str,
    revision: str | None,
    evaluation: Evaluation | None = None,
    repo_id: str | None = None,
    refine: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Returns the card of a model that was made from a chain.

    Args:
        manifest: The chain's manifest.
        plan: How the model was made.
        chain: The chain's repo id, or its name where it is local.
        revision: Commit of the chain; None where it is local.
        evaluation: Held-out loss of this very model, if it was measured.
        repo_id: Where the model is (to be) published; None writes a card that is read inside a local folder.
        refine: What :func:`cbd_hub.chain.refine.choose` reported, where the model was refined.
    """
    names = list(dict.fromkeys([plan.large, plan.small]))
    anchors = [anchor for anchor in manifest.anchors if anchor.name in names]
    blended = plan.method in ("bezier", "interpolate", "paper")
    return _render(
        "model.md.jinja",
        _metadata(
            manifest,
            (*_TAGS, "merge") if blended else _TAGS,
            _repo_ids([anchor.repo_id or chain for anchor in anchors]) or _repo_ids([manifest.source]),
            f"{manifest.name}-{format_count(plan.num_parameters)}",
            _results(manifest, evaluation),
            "merge" if blended else None,
        ),
        manifest=manifest,
        plan=plan,
        anchors=anchors,
        blended=blended,
        chain=chain,
        published=bool(_repo_ids([chain])),
        revision=revision,
        evaluation=evaluation,
        place=repo_id or ".",
        refine=refine,
    )


def recovered_card(
    name: str,
    parameters: int,
    family: str,
    *,
    tokens: int,
    losses: tuple[float, float],
    test_tokens: int,
    chain: str | None = None,
    teacher: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> ModelCard:
    """Returns the card of a model that was trained on (:mod:`cbd_hub.training.recover`).

    Args:
        name: The model that training started from.
        parameters: How many it has.
        family: Its ``model_type``.
        tokens: Training tokens.
        losses: On the test text, before and after, nats a token.
        test_tokens: How many tokens these are the mean of.
        chain: The chain that its start was made from, if it was.
        teacher: The model that it learned from, if any.
        metadata: What stays true of the starting model's card: license, language, data sets, bases.
    """
    return _render(
        "recovered.md.jinja",
        ModelCardData(
            library_name="transformers", pipeline_tag="text-generation", tags=list(_TAGS), **dict(metadata or {})
        ),
        name=name,
        parameters=parameters,
        family=family,
        tokens=tokens,
        start_loss=losses[0],
        final_loss=losses[1],
        test_tokens=test_tokens,
        chain=chain,
        teacher=teacher,
    )


# -- metadata -----------------------------------------------------------------------------------------------------


def _metadata(
    manifest: Manifest,
    tags: Iterable[str],
    base_model: list[str],
    name: str,
    results: list[EvalResult],
    relation: str | None = None,
    library: str = "transformers",
) -> ModelCardData:
    """What the Hub reads; a repository of another library has no config.json at its top, and so no pipeline."""
    more: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    if base_model and relation:
        more["base_model_relation"] = relation
    if manifest.license:  # the Hub knows licenses by lower-case ids, and refuses others
        known = _LICENSE_ID.fullmatch(manifest.license)
        more |= (
            {"license": manifest.license} if known else {"license": "other", "license_name": _line(manifest.license)}
        )
    dataset = _dataset(manifest)
    return ModelCardData(
        library_name=library,
        pipeline_tag="text-generation" if library == "transformers" else None,
        tags=list(tags),
        base_model=base_model[0] if len(base_model) == 1 else base_model or None,
        datasets=[dataset] if dataset else None,
        **more,
    )


def _results(manifest: Manifest, evaluation: Evaluation | None, label: str = "") -> list[EvalResult]:
    """Loss and perplexity as results of the model index; values that YAML and JSON do not share are left out."""
    values = {} if evaluation is None else {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_dataset(manifest) or "text",
            dataset_name=OWN_TEXT,
            dataset_split="test",
            metric_type=kind,
            metric_name=f"held-out {kind}{label}",
            metric_value=value,
            metric_args={"num_tokens": evaluation.num_tokens if evaluation else 0},
        )
        for kind, value in values.items()
        if math.isfinite(value)
    ]


def _repo_ids(places: Iterable[str | None]) -> list[str]:
    """Those places that look like a repository of the Hub, each once."""
    return [p for p in dict.fromkeys(places) if p is not None and len(p) <= 96 and _REPO_ID.fullmatch(p)]


def _dataset(manifest: Manifest) -> str | None:
    """The Hub dataset that the recipe names, if it names one."""
    value: Any = manifest.recipe
    for key in ("data", "dataset", "name"):
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, str) and _DATASET_ID.fullmatch(value) else None


# -- what the templates show ---------------------------------------------------------------------------------------


def _example_size(manifest: Manifest) -> str | int:
    """A size for the quick start: half-way between the first neighbors that allow it, else the smallest anchor."""
    axis_map, anchors = manifest.resolved_axis_map, manifest.anchors
    for large, small in pairwise(anchors):
        size = format_count((large.num_parameters + small.num_parameters) // 2)
        try:
            solve(axis_map, parse_count(size), manifest.sizes(small), manifest.sizes(large))
        except SizeError:
            continue
        return size
    return anchors[-1].num_parameters


def _sizes(manifest: Manifest) -> list[dict[str, Any]]:
    """What can be had: anchors and the sizes that were measured between them, with their bytes on disk."""
    axis_map, anchors = manifest.resolved_axis_map, manifest.anchors
    found = [(a.num_parameters, "anchor", a.evaluation.loss if a.evaluation else None) for a in anchors]
    found += [(p.num_parameters, p.method, p.loss) for p in manifest.curve]
    found.sort(key=lambda row: row[0])
    rows: list[dict[str, Any]] = [dict(zip(("count", "made", "loss"), row, strict=True)) for row in found]
    for row in rows:
        small = next((a for a in anchors if a.num_parameters <= row["count"]), anchors[-1])
        large = next((a for a in reversed(anchors) if a.num_parameters >= row["count"]), anchors[0])
        pair = manifest.sizes(small), manifest.sizes(large)
        try:
            sizes = solve(axis_map, row["count"], *pair, tolerance=0.0, shallow=manifest.layers_last)
            row["bytes"] = [format_bytes(disk_size(axis_map, sizes, quant)) for quant in QUANTS]
        except SizeError:  # a manifest is not trusted
            row["bytes"] = []
    return rows


def _common(manifest: Manifest) -> dict[str, int]:
    """The config fields in which all anchors agree; none where there is a single anchor."""
    first = manifest.anchors[0].shape
    if len(manifest.anchors) == 1:
        return {}
    return {name: n for name, n in first.items() if all(anchor.shape[name] == n for anchor in manifest.anchors)}


class _Safe(str):
    """Text that may stand in a card as it is."""


def _line(value: Any) -> str:
    """Any value as one line of printable text."""
    return "".join(c for c in " ".join(str(value).split()) if c.isprintable())


def _escape(value: Any) -> _Safe:
    """Any value as one line of Markdown that means nothing but itself, in a table cell too."""
    return value if isinstance(value, _Safe) else _Safe(_MARKDOWN.sub(r"\\\g<0>", _line(value)))


def _code(value: Any) -> _Safe:
    """A value in a code span, where it is plain enough for one."""
    text = _line(value)
    return _Safe(f"`{text}`") if re.fullmatch(r"[\w./:@+, -]+", text) else _escape(text)


def _python(value: Any) -> _Safe:
    """A string, a number or a dict of them as a Python literal."""
    return _Safe(json.dumps(_line(value) if isinstance(value, str) else value, ensure_ascii=False))


def _yaml_block(value: Any) -> _Safe:
    """A value as YAML in a fence that nothing within can close."""
    plain = json.loads(json.dumps(value, default=str))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return _Safe(f"{fence}yaml\n{text}\n{fence}")


def _shape(shape: dict[str, int], without: Iterable[str] = ()) -> _Safe:
    return _Safe(", ".join(f"{_escape(name)} {_escape(n)}" for name, n in shape.items() if name not in set(without)))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        undefined=StrictUndefined,
        finalize=_escape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": _code,
        "python": _python,
        "yaml_block": _yaml_block,
        "count": format_count,
        "shape": _shape,
    }
    environment.globals["QUANTS"] = QUANTS
    return environment


def _render(template: str, metadata: ModelCardData, **values: Any) -> ModelCard:
    text = (
        _environment()
        .get_template(template)
        .render(metadata=_Safe(metadata.to_yaml()), library_version=version("cbd_hub"), **values)
        .rstrip()
    )
    card = ModelCard(text + "\n")
    body = card.content.rstrip()
    card.content = f"{body}\n\n<!-- {_MARK} {_digest(body)} -->\n"
    return card


_MARK = "cbd_hub wrote this card and may write it again for as long as nobody edits it:"
_RESULTS = re.compile(r"^model-index:.*\n(?:[ -].*\n)*", re.MULTILINE)


def _digest(content: str) -> str:
    """Of a card's words and metadata; of its results nothing, for measuring is not editing."""
    head, rule, text = content.replace("\r\n", "\n").lstrip().partition("\n---\n")
    metadata = sorted(_RESULTS.sub("", head + "\n").split("\n"))  # huggingface_hub may write them in another order
    return hashlib.sha256(" ".join([*metadata, rule, *text.split()]).encode()).hexdigest()[:16]


def is_generated(content: str) -> bool:
    """Returns whether a card is as this module wrote it, apart from results: rewriting it loses no text of a user."""
    body, _, mark = content.rpartition("<!--")
    return mark.strip() == f"{_MARK} {_digest(body)} -->"
