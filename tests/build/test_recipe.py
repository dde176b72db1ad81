"""Recipes: what they say, what they refuse and how, and what a fingerprint depends on."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cbd_hub.build.recipe import (
    AnchorSpec,
    Recipe,
    TrainTokenizer,
    load_recipe,
)
from cbd_hub.errors import RecipeError

FULL = """
name: sotu
source:
  train:
    architecture: llama
    config: {hidden_size: 96, num_hidden_layers: 6}
    training: {tokens: 2M, batch_size: 16}
tokenizer: {vocab_size: 1024}
data:
  text_files: sotu/*.txt
  sequence_length: 128
anchors:
  - 0.7
  - 380k
  - 250_000
  - {fraction: 0.5, name: smallest, tokens: 5k}
  - {shape: {hidden_size: 48}, tokens: 0}
distillation: {tokens: 1M, learning_rate: 2e-3, report_to: [tensorboard]}
hub: {repo_id: me/sotu, license: apache-2.0}
dtype: bfloat16
"""


def small(**changes: Any) -> dict[str, Any]:
    """A recipe that trains nothing, with some keys replaced."""
    return {
        "name": "chain",
        "source": {"model": "org/model"},
        "data": {"text_files": "a.txt"},
        "anchors": [0.7, 0.5],
        "distillation": {"tokens": 0},
        **changes,
    }


def trained(**changes: Any) -> dict[str, Any]:
    return {
        **small(source={"train": {}}, tokenizer={"vocab_size": 512}, data={"text_files": "*.txt"}),
        "distillation": {"tokens": 1000},
        **changes,
    }


def test_reads_a_file_with_everything(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(FULL, encoding="utf-8")
    recipe, base = load_recipe(path)
    assert base == tmp_path
    assert recipe.tokenizer == TrainTokenizer(vocab_size=1024)
    assert recipe.data is not None and recipe.data.sequence_length == 128
    assert recipe.hub is not None and not recipe.hub.private
    assert [(a.fraction, a.num_parameters) for a in recipe.anchors] == [
        (0.7, None),
        (None, 380_000),
        (None, 250_000),
        (0.5, None),
        (None, None),
    ]
    assert recipe.anchors[4].shape == {"hidden_size": 48}
    assert [a.tokens for a in recipe.anchors] == [None, None, None, 5_000, 0]
    assert recipe.distillation.learning_rate == 2e-3 and recipe.distillation.tokens == 1_000_000
    assert recipe.source.train is not None and recipe.source.train.training.batch_size == 16
    assert load_recipe(str(path))[0] == recipe
    assert load_recipe(recipe) == (recipe, Path.cwd())
    assert load_recipe(yaml.safe_load(FULL)) == (recipe, Path.cwd())


def test_survives_a_round_trip_through_json() -> None:
    recipe, _ = load_recipe(yaml.safe_load(FULL))
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_no_text_is_needed_where_nothing_is_trained() -> None:
    recipe, _ = load_recipe(small(anchors=[{"init": "org/small"}], data=None))
    assert recipe.data is None and recipe.source.model == "org/model" and recipe.tokenizer is None


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (small(anchor=[0.5]), ["anchor is not a known key", "Did you mean 'anchors'"]),
        (small(distillation={"tokens": 0, "learning_rat": 1}), ["distillation.learning_rat", "'learning_rate'"]),
        (small(anchors=[0.5, {"fractions": 0.5}]), ["anchors[1].fractions", "Did you mean 'fraction'"]),
        (trained(tokenizer={"vocab_sise": 5}), ["tokenizer.vocab_sise", "Did you mean 'vocab_size'"]),
        (trained(source={"train": {"trainin": {}}}), ["source.train.trainin", "'training'"]),
        (small(zzz=1), ["zzz is not a known key. Known: name, source"]),
        ({"name": "x", "source": {"model": "y"}}, ["anchors is missing"]),
        (small(name="a b"), ["name is 'a b'", "pattern"]),
        (small(distillation={"batch_size": "many"}), ["distillation.batch_size is 'many'", "integer"]),
        (small(distillation={"schedule": "step"}), ["distillation.schedule is 'step'", "'cosine', 'linear'"]),
        (small(distillation={"report_to": 3}), ["distillation.report_to is 3", "string", "Or: ", "list"]),
        (small(distillation={"tokens": "many"}), ["distillation.tokens: 'many'"]),
        (small(dtype="fp8"), ["dtype is 'fp8'", "'float32', 'bfloat16' or 'float16'"]),
        (small(anchors=[]), ["anchors is []", "at least 1"]),
        (small(anchors=[1.5]), ["anchors[0]: 1.5 is no fraction", "'90M'"]),
        (small(anchors=["big"]), ["anchors[0]: 'big' is not a parameter count"]),
        (small(anchors=[True]), ["anchors holds [True], a truth value"]),
        (
            small(anchors=[{"fraction": 0.5, "num_parameters": 3}]),
            ["anchors[0]: give exactly one of", "got fraction and"],
        ),
        (small(anchors=[{}]), ["anchors[0]: give exactly one of", "got none"]),
        (small(anchors=[{"fraction": 0.5, "name": "a"}] * 2), ["two anchors have the name 'a'"]),
        (small(source={}), ["source: give exactly one of model, train and served, got none"]),
        (small(source={"model": "x", "train": {}}), ["got model and train"]),
        (small(bridge={"use": ["logit"]}), ["bridge.use"]),
        (small(distillation={}, data=None), ["`data` is missing"]),
        (small(anchors=[{"fraction": 0.5, "tokens": 5}], data=None), ["`data` is missing"]),
        (small(data={}), ["data: give exactly one of text_files and dataset"]),
        (small(tokenizer={"vocab_size": 512}), ["trained only for a bridge, or a source trained from scratch"]),
        (trained(tokenizer=None), ["`tokenizer` is missing"]),
        (small(source={"model": "x", "name": "a"}, anchors=[{"fraction": 0.5, "name": "a"}]), ["the name 'a'"]),
        (small(axis_map={"model_typ": "x"}), ["axis_map: axis map has no field 'model_typ'"]),
        (small(hub={"repo_id": "${USER}/x"}), ["hub.repo_id holds '${USER}/x'", "no variables"]),
        (small(zzz=1, dtype="x", license=1), ["(and 2 more)"]),
    ],
    ids=str,
)
def test_refuses(recipe: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "'name' is given twice"),
        ("source: {model: a, model: b}\n", "'model' is given twice"),
        ("name: [a\n", "no valid YAML"),
        ("- a\n", r"must hold keys and values .* got \['a'\]"),
        ("", "must hold keys and values .* got None"),
        ("name: !!python/object:os.system x\n", "no valid YAML"),
    ],
)
def test_refuses_a_file(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)


def test_refuses_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "latin.yaml")


def test_embeddings_by_matching_pursuit_are_refused_and_name_the_successor() -> None:
    bridged = {
        "name": "a",
        "source": {"model": "a/b"},
        "tokenizer": "c/d",
        "anchors": [0.5],
        "data": trained()["data"],
    }
    with pytest.raises(RecipeError, match=r"embeddings: omp was measured worse .* write pieces"):
        load_recipe({**bridged, "bridge": {"embeddings": "omp"}})
    recipe = load_recipe({**bridged, "bridge": {"embeddings": "pieces", "k": 4}})[0]  # k still loads
    assert recipe.bridge is not None and recipe.bridge.embeddings == "pieces"


def test_merge_keys_of_yaml_are_no_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: a\nsource: {model: org/model}\ndistillation: {tokens: 0}\nanchors: [{<<: {init: a/b}, tokens: 0}]\n"
    )
    assert load_recipe(path)[0].anchors == [AnchorSpec(init="a/b", tokens=0)]
