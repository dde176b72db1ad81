"""Building chains for real: from text, from a model folder, and again after the process was killed."""

import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_models import VARIANTS, tiny_config, tiny_model
from tiny_recipe import TEXT, built_chain, digests, tiny_recipe
from trained import train, trained_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from cbd_hub.axes.architectures import AXIS_MAPS
from cbd_hub.build.build import build_chain
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import (
    AxisMapError,
    IntegrityError,
    OutputExistsError,
    RecipeError,
    SizeError,
    UnknownArchitectureError,
)
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.manifest.manifest import file_entry, read_manifest

# Shapes one step below the tiny models: shallower, with less of everything, and narrower where a family may be.
NARROWER = {
    "llama": {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2},
    "llama-tied": {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2},
    "gemma3_text": {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2},
    "olmo2": {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2},
    "gpt2": {"n_embd": 36, "n_head": 3, "n_inner": 80, "n_layer": 2},
    "gpt_neox": {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 80, "num_hidden_layers": 2},
}


def source_folder(folder: Path, variant: str, **overrides: Any) -> PreTrainedModel:
    """Saves the tiny random model of a variant, with a tokenizer, and returns it."""
    family, fields = VARIANTS[variant]
    model = tiny_model(tiny_config(family, **{**fields, "vocab_size": 300, **overrides}))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(built_chain()).save_pretrained(folder)
    return model


def cut_recipe(source: Path, *anchors: Any, **changes: Any) -> dict[str, Any]:
    """A recipe that cuts anchors out of a model without training them."""
    return {
        "name": "cut",
        "source": {"model": str(source), "name": "whole"},
        "anchors": list(anchors),
        "distillation": {"tokens": 0},
        "data": tiny_recipe()["data"],
        "calibration_tokens": 512,
        "evaluation": {"tokens": 500, "curve_points": 0},
        **changes,
    }


def load_plain(folder: Path) -> PreTrainedModel:
    """Loads a model as a stranger would, and makes sure that every parameter was found."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 35).view(2, 16)).logits


# -- from text


def test_from_text_to_a_chain_with_a_curve() -> None:
    folder = built_chain()
    manifest = read_manifest(folder / "chain.json")
    assert manifest.architecture == "llama"
    assert manifest.source == "trained from scratch"
    assert manifest.license == "apache-2.0"
    large, middle, small = manifest.anchors
    assert large.num_parameters > middle.num_parameters > small.num_parameters
    assert (large.parent, middle.parent, small.parent) == (None, large.name, middle.name)
    for anchor in manifest.anchors:
        assert anchor.aligned
        assert anchor.training is not None
        assert anchor.training.best_loss is not None and anchor.training.start_loss is not None
        assert anchor.training.best_loss <= anchor.training.start_loss
        assert anchor.evaluation is not None
        assert anchor.evaluation.loss < math.log(300)
        assert anchor.evaluation.perplexity == pytest.approx(math.exp(anchor.evaluation.loss))
        assert 0 < anchor.evaluation.num_tokens <= 1000
        plain = load_plain(folder / anchor.subfolder)
        assert plain.num_parameters() == anchor.num_parameters
        assert AutoTokenizer.from_pretrained(folder / anchor.subfolder).eos_token_id == 0
        assert (folder / anchor.subfolder / "README.md").read_text().startswith("---\n")
    assert large.training is not None and large.training.tokens == 3072
    assert manifest.curve
    for point in manifest.curve:
        assert small.num_parameters < point.num_parameters < large.num_parameters
        assert 0 < point.loss < math.log(300)
    assert "tiny" in (folder / "README.md").read_text()
    assert "no chat template: these are base models" in (folder / "README.md").read_text()
    assert (folder / "size_loss.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / ".build" / "work").exists()
    assert not list(folder.rglob("*partial*"))


def test_the_chain_gives_models_between_its_anchors() -> None:
    chain = Chain.from_pretrained(built_chain())
    size = chain.manifest.curve[0].num_parameters
    model = chain.initialize(chain.plan(size))
    assert abs(model.num_parameters() / size - 1) <= 0.01
    reference = load_plain(built_chain() / chain.manifest.anchors[1].subfolder)
    exact = chain.anchors[1].load()
    assert all(torch.equal(a, b) for a, b in zip(exact.parameters(), reference.parameters(), strict=True))


def test_nothing_of_the_machine_is_written_into_the_chain() -> None:
    for path in built_chain().rglob("*"):
        if path.is_file() and ".build" not in path.parts and path.suffix in (".json", ".md", ".safetensors"):
            data = path.read_bytes()
            assert str(built_chain()).encode() not in data, path
            assert str(Path.home()).encode() + b"/" not in data, path


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(), sort_keys=False))
    build_chain(path, tmp_path / "again", progress=False)
    assert digests(tmp_path / "again") == digests(built_chain())


def test_a_finished_chain_is_gone_on_with_when_the_recipe_gets_another_anchor(tmp_path: Path) -> None:
    chain = build_chain(tiny_recipe(anchors=[0.75]), tmp_path, progress=False)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "anchors" / chain.anchors[0].name).glob("model*")}
    build_chain(tiny_recipe(), tmp_path, progress=False)
    assert digests(tmp_path) == digests(built_chain())
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "anchors" / chain.anchors[0].name).glob("model*")}
    assert after == before  # nothing was trained twice


def test_a_narrower_anchor_is_not_added_to_a_chain_in_its_native_basis(tmp_path: Path) -> None:
    narrower = {"shape": {"hidden_size": 24}}
    build_chain(tiny_recipe(anchors=[{"fraction": 0.75, "tokens": 0}]), tmp_path, progress=False)
    before = digests(tmp_path)
    with pytest.raises(OutputExistsError, match="its basis is native, these anchors need pca"):
        build_chain(tiny_recipe(anchors=[{"fraction": 0.75, "tokens": 0}, narrower]), tmp_path, progress=False)
    assert digests(tmp_path) == before


# -- killed and gone on with


def step_recorded(index: int) -> Callable[[Path], bool]:
    return lambda folder: (folder / ".build" / f"step-{index}.json").is_file()


def ranking_saved(index: int) -> Callable[[Path], bool]:
    return lambda folder: (folder / ".build" / f"ranking-{index}.json").is_file()


def at_random(folder: Path) -> bool:
    """True at a moment that nobody knows before: within the two seconds or so that training takes."""
    if not (folder / ".build").is_dir():
        return False
    time.sleep(random.uniform(0, 2))
    return True


def start_build(recipe: Path, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [Path(sys.executable).with_name("cbd-hub"), "build", recipe, "--output", folder],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(moment: Callable[[Path], bool], folder: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not moment(folder):
        assert process.poll() is None, "the build ended by itself before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.002)


MOMENTS = {"step-0": step_recorded(0), "ranking-1": ranking_saved(1), "step-1": step_recorded(1), "random": at_random}


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=list(MOMENTS))
def test_a_killed_build_goes_on_and_ends_with_the_same_bytes(moment: Callable[[Path], bool], tmp_path: Path) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "chain"
    recipe.write_text(yaml.safe_dump(tiny_recipe(), sort_keys=False))
    started = time.monotonic()
    process = start_build(recipe, folder)
    try:
        wait_for(moment, folder, process)
    finally:
        process.kill()
        process.wait()
    if moment is not at_random:
        assert process.returncode == -signal.SIGKILL
        assert not (folder / "chain.json").exists()
    state = sorted(p.name for p in (folder / ".build").iterdir())
    build_chain(recipe, folder, progress=False)
    assert digests(folder) == digests(built_chain()), f"killed {time.monotonic() - started:.2f} s in, with {state}"
    assert records(folder) == records(built_chain())


def records(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / ".build").iterdir())


def test_a_ranking_that_was_saved_is_not_made_again(tmp_path: Path) -> None:
    recipe, folder = tmp_path / "recipe.yaml", tmp_path / "chain"
    recipe.write_text(yaml.safe_dump(tiny_recipe(), sort_keys=False))
    process = start_build(recipe, folder)
    try:
        wait_for(ranking_saved(1), folder, process)
    finally:
        process.kill()
        process.wait()
    assert not (folder / ".build" / "step-1.json").exists(), "too late: the step was through"
    record = folder / ".build" / "ranking-1.json"
    before = record.stat().st_mtime_ns, record.read_bytes()
    build_chain(recipe, folder, progress=False)
    assert (record.stat().st_mtime_ns, record.read_bytes()) == before
    assert digests(folder) == digests(built_chain())


def test_the_saved_ranking_decides_and_one_of_another_recipe_does_not(tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    recipe = cut_recipe(tmp_path / "source", {"shape": {"num_hidden_layers": 2, "intermediate_size": 56}})
    first = build_chain(recipe, tmp_path / "chain")
    kept = first.manifest.anchors[1].layer_order or []
    record = tmp_path / "chain" / ".build" / "ranking-1.json"
    saved = json.loads(record.read_text())
    assert saved["layers"] == kept
    other = [*sorted(set(range(3)) - {kept[0]}), kept[0]]  # as good an order, and not the one that was measured
    for fingerprint, wanted in ((saved["fingerprint"], other), ("0" * 64, kept)):
        (tmp_path / "chain" / ".build" / "step-1.json").unlink()
        record.write_text(json.dumps({"fingerprint": fingerprint, "layers": other}))
        again = build_chain(recipe, tmp_path / "chain")
        assert again.manifest.anchors[1].layer_order == wanted
    assert json.loads(record.read_text()) == saved
    build_chain(recipe, tmp_path / "fresh")
    assert digests(tmp_path / "chain") == digests(tmp_path / "fresh")


def test_a_ranking_outlives_another_learning_rate_and_not_another_shape(tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    folder, record = tmp_path / "chain", tmp_path / "chain" / ".build" / "ranking-1.json"
    recipe = cut_recipe(tmp_path / "source", {"shape": {"num_hidden_layers": 2, "intermediate_size": 56}})
    build_chain(recipe, folder)
    for change, kept in (({"distillation": {**recipe["distillation"], "learning_rate": 3e-3}}, True), ({}, True)):
        before = record.read_bytes(), record.stat().st_mtime_ns
        (folder / ".build" / "step-1.json").unlink()
        build_chain({**recipe, **change}, folder)
        assert ((record.read_bytes(), record.stat().st_mtime_ns) == before) is kept
    (folder / ".build" / "step-1.json").unlink()
    other = cut_recipe(tmp_path / "source", {"shape": {"num_hidden_layers": 2, "intermediate_size": 48}})
    again = build_chain(other, folder).manifest.anchors[1]
    assert (record.read_bytes(), record.stat().st_mtime_ns) != before
    assert again == build_chain(other, tmp_path / "fresh").manifest.anchors[1]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_ten_times_at_random(tmp_path: Path) -> None:
    """Whenever it is killed: anchors that are there are whole, and the chain comes out the same byte for byte."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(), sort_keys=False))
    expected, generator = digests(built_chain()), random.Random(0)
    began: Callable[[Path], bool] = lambda folder: (folder / ".build").is_dir()  # noqa: E731
    process = start_build(recipe, tmp_path / "undisturbed")
    wait_for(began, tmp_path / "undisturbed", process)
    started = time.monotonic()
    assert process.wait(600) == 0
    wall = time.monotonic() - started
    assert digests(tmp_path / "undisturbed") == expected
    killed = []
    for number in range(10):
        folder, fraction = tmp_path / str(number), generator.random()
        process = start_build(recipe, folder)
        try:
            wait_for(began, folder, process)
            time.sleep(fraction * wall)
        finally:
            process.kill()
            killed.append(process.wait() == -signal.SIGKILL)
        left = digests(folder)
        whole = {name for name in left if name == "chain.json" or (name[:8] == "anchors/" and name[-3:] != ".md")}
        what = f"killed after {fraction:.3f} of {wall:.1f} s, leaving {records(folder)}"
        assert {name: left[name] for name in whole} == {name: expected[name] for name in whole}, what
        build_chain(recipe, folder, progress=False)
        assert digests(folder) == expected, what
        assert records(folder) == records(built_chain()), what
    assert sum(killed) >= 6  # the others had ended: timings vary


# -- what a build measures and ships


def test_calibration_tokens_are_shipped_and_named_in_the_manifest() -> None:
    chain = Chain.from_pretrained(built_chain())
    wanted = BuildInputs(*load_recipe(tiny_recipe())).shipped_calibration()
    assert wanted is not None and chain.calibration is not None
    assert torch.equal(chain.calibration, wanted)
    assert chain.manifest.calibration == file_entry(built_chain() / "calibration.safetensors")


def test_a_chain_without_calibration_tokens_ships_none(tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    source_folder(tmp_path / "small", "llama", num_hidden_layers=2)
    anchor = {"init": str(tmp_path / "small"), "align": False}
    recipe = cut_recipe(tmp_path / "source", anchor, data=None, calibration_tokens=0)
    chain = build_chain(recipe, tmp_path / "chain")
    assert chain.manifest.calibration is None and chain.calibration is None
    assert not (tmp_path / "chain" / "calibration.safetensors").exists()


@pytest.mark.parametrize("knows_the_text", [True, False])
def test_a_start_is_refitted_unless_that_raises_its_loss(knows_the_text: bool, tmp_path: Path) -> None:
    """The second source was trained on other text, where following it more closely is worse than not."""
    source = trained_model("llama", vocab_size=300)
    recipe = cut_recipe(
        tmp_path / "source",
        {"shape": {"num_hidden_layers": 2, "intermediate_size": 40}, "name": "small"},
        tokenizer=str(built_chain()),
        data=tiny_recipe()["data"],
        calibration_tokens=512,
        evaluation={"tokens": 2000, "curve_points": 1},
    )
    ingredients = BuildInputs(*load_recipe(recipe))
    assert ingredients.text is not None and ingredients.validation is not None
    if knows_the_text:
        train(source, 0, blocks=torch.tensor(ingredients.text.train["input_ids"]).repeat(5, 1))
    source.save_pretrained(tmp_path / "source")
    made = {}
    for refit in (True, False):
        chain = build_chain({**recipe, "refit": refit}, tmp_path / str(refit), progress=False)
        training = chain.manifest.anchors[1].training
        assert training is not None
        made[refit] = load_plain(tmp_path / str(refit) / "anchors" / "small"), training.cut_loss
    losses = {refit: evaluate_loss(model, ingredients.validation).loss for refit, (model, _) in made.items()}
    assert made[False][1] is None
    assert made[True][1] == pytest.approx(losses[False], abs=1e-5)
    changed = {
        name.split(".", 3)[-1]
        for name, value in made[True][0].named_parameters()
        if not torch.equal(value, made[False][0].get_parameter(name))
    }
    assert changed == ({"self_attn.o_proj.weight", "mlp.down_proj.weight"} if knows_the_text else set())
    assert (losses[True] < losses[False]) is knows_the_text


def test_a_refit_never_starts_training_from_a_higher_loss() -> None:
    for anchor in read_manifest(built_chain() / "chain.json").anchors[1:]:
        assert anchor.training is not None
        assert anchor.training.cut_loss is not None and anchor.training.start_loss is not None
        assert anchor.training.start_loss <= anchor.training.cut_loss + 1e-6


def test_a_built_chain_can_be_refined() -> None:
    chain = Chain.from_pretrained(built_chain())
    model = chain.initialize(chain.plan(chain.manifest.curve[0].num_parameters), refine=True, progress=False)
    said = model.config.cbd_hub["refine"]
    assert said["calibration_loss"] <= said["planned_loss"]


# -- from a model folder


@pytest.mark.parametrize("variant", NARROWER)
def test_cuts_anchors_out_of_a_model_without_training(variant: str, tmp_path: Path) -> None:
    source = source_folder(tmp_path / "source", variant)
    chain = build_chain(cut_recipe(tmp_path / "source", {"shape": NARROWER[variant]}), tmp_path / "chain")
    manifest = read_manifest(tmp_path / "chain" / "chain.json")
    assert manifest.curve == [] and not (tmp_path / "chain" / "size_loss.png").exists()
    whole = load_plain(tmp_path / "chain" / "anchors" / "whole")
    if manifest.basis == "native":
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), source.parameters(), strict=True))
        torch.testing.assert_close(logits(whole), logits(source))  # another attention kernel
    entry = manifest.anchors[1]
    small = load_plain(tmp_path / "chain" / entry.subfolder)
    assert small.num_parameters() == entry.num_parameters < source.num_parameters()
    assert {k: v for k, v in entry.shape.items() if k in NARROWER[variant]} == NARROWER[variant]
    assert torch.isfinite(logits(small)).all()
    middle = chain.initialize(chain.plan((entry.num_parameters + source.num_parameters()) // 2, tolerance=0.2))
    assert entry.num_parameters < middle.num_parameters() < source.num_parameters()
    assert torch.isfinite(logits(middle)).all()


@pytest.mark.parametrize(("variant", "basis"), [("llama", "pca"), ("llama-tied", "pca"), ("gpt2", "native")])
def test_a_narrower_anchor_rotates_the_source_first_where_the_family_allows(
    variant: str, basis: str, tmp_path: Path
) -> None:
    source = source_folder(tmp_path / "source", variant, vocab_size=300)
    AutoTokenizer.from_pretrained(built_chain()).save_pretrained(tmp_path / "source")
    recipe = cut_recipe(
        tmp_path / "source",
        {"shape": NARROWER[variant], "name": "small"},
        data=tiny_recipe()["data"],
        calibration_tokens=512,
        evaluation={"tokens": 500, "curve_points": 1},
    )
    chain = build_chain(recipe, tmp_path / "chain", progress=False)
    assert chain.manifest.basis == basis
    whole = load_plain(tmp_path / "chain" / "anchors" / "whole")
    error = ((logits(whole) - logits(source)).norm() / logits(source).norm()).item()
    assert error < (0.1 if variant == "llama-tied" else 1e-5)  # a tied head can only nearly be rotated
    same = all(torch.equal(a, b) for a, b in zip(whole.parameters(), source.parameters(), strict=False))
    assert same is (basis == "native")
    assert whole.config.tie_word_embeddings is source.config.tie_word_embeddings
    small = load_plain(tmp_path / "chain" / "anchors" / "small")
    assert torch.isfinite(logits(small)).all()
    assert chain.manifest.anchors[1].evaluation is not None
    assert chain.tokenizer.eos_token_id == 0


def test_anchors_are_saved_in_the_dtype_of_the_recipe(tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    chain = build_chain(cut_recipe(tmp_path / "source", 0.7, dtype="bfloat16"), tmp_path / "chain")
    assert {a.dtype for a in chain.manifest.anchors} == {"bfloat16"}
    for anchor in chain.manifest.anchors:
        assert load_plain(tmp_path / "chain" / anchor.subfolder).dtype == torch.bfloat16


# -- errors


def test_an_unknown_architecture_says_how_to_pass_a_map(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    recipe["source"]["train"] = {"architecture": "bloom", "config": {"hidden_size": 32, "n_head": 4}}
    with pytest.raises(UnknownArchitectureError, match=r"'bloom'.*`axis_map` key"):
        build_chain(recipe, tmp_path, progress=False)


def test_a_recipe_brings_the_map_of_an_architecture(tmp_path: Path) -> None:
    assert "helium" not in AXIS_MAPS
    fields = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = AutoConfig.for_model("helium", **fields, num_key_value_heads=2, head_dim=12, vocab_size=300)
    tiny_model(config).save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(built_chain()).save_pretrained(tmp_path / "source")
    known = replace(AXIS_MAPS["llama"], model_type="helium").to_dict()
    recipe = cut_recipe(tmp_path / "source", 0.7, axis_map=known)
    with pytest.raises(UnknownArchitectureError):
        build_chain({k: v for k, v in recipe.items() if k != "axis_map"}, tmp_path / "refused")
    try:
        build_chain(recipe, tmp_path / "chain")
    finally:
        AXIS_MAPS.pop("helium", None)
    chain = Chain.from_pretrained(tmp_path / "chain")  # the chain carries the map itself
    assert chain.manifest.architecture == "helium"
    assert chain.initialize(chain.plan(chain.anchors[1].num_parameters)).config.model_type == "helium"


@pytest.mark.parametrize(
    ("anchor", "error", "match"),
    [
        ({"shape": {"hidden_sice": 32}}, RecipeError, "hidden_sice.*allowed: .*hidden_size"),
        ({"shape": {"num_attention_heads": 3}}, AxisMapError, "num_attention_heads|heads"),
        (
            {"shape": {"hidden_size": 96}},
            (RecipeError, SizeError, AxisMapError),
            "'hidden' is 48 and cannot become 96",
        ),
        ("900M", SizeError, "900"),
    ],
    ids=["field", "divisibility", "larger", "count"],
)
def test_an_impossible_anchor_is_refused(anchor: Any, error: Any, match: str, tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    with pytest.raises(error, match=match):
        build_chain(cut_recipe(tmp_path / "source", anchor), tmp_path / "chain")


def test_two_anchors_whose_names_come_out_the_same_are_refused(tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    recipe = cut_recipe(tmp_path / "source", {"fraction": 0.7, "name": "whole-copy"}, {"fraction": 0.7})
    names = [a.name for a in build_chain(recipe, tmp_path / "first").anchors]
    recipe["anchors"][0]["name"] = names[2]
    with pytest.raises(RecipeError, match="name"):
        build_chain(recipe, tmp_path / "second")


@pytest.mark.parametrize("model", ["missing", "empty"])
def test_a_source_that_cannot_be_loaded_is_named(model: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=f"/{model}"):
        build_chain(cut_recipe(tmp_path / model, 0.7), tmp_path / "chain")


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match=r"empty.*holds no tokenizer"):
        build_chain(tiny_recipe(tokenizer=str(tmp_path / "empty")), tmp_path / "chain")


def test_text_without_a_tokenizer_is_a_recipe_error(tmp_path: Path) -> None:
    tiny_model(tiny_config("llama")).save_pretrained(tmp_path / "source")
    with pytest.raises(RecipeError, match="no `tokenizer`"):
        build_chain(cut_recipe(tmp_path / "source", 0.7), tmp_path / "chain")


def test_no_text_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing-\*"):
        build_chain(tiny_recipe(data={"text_files": str(tmp_path / "nothing-*.txt")}), tmp_path / "chain")


# -- what is already there


def test_a_folder_that_is_no_build_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(OutputExistsError, match=r"nothing was changed"):
            build_chain(tiny_recipe(), tmp_path, resume=resume)
        with pytest.raises(OutputExistsError):
            build_chain(tiny_recipe(), tmp_path / "thesis.tex", resume=resume)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_build_of_another_recipe_is_left_alone_until_told(tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    build_chain(cut_recipe(tmp_path / "source", 0.7), tmp_path / "chain")
    before = digests(tmp_path / "chain")
    with pytest.raises(OutputExistsError, match=r"step 1 differs.*--no-resume"):
        build_chain(cut_recipe(tmp_path / "source", 0.6), tmp_path / "chain")
    assert digests(tmp_path / "chain") == before
    build_chain(cut_recipe(tmp_path / "source", 0.6), tmp_path / "chain", resume=False)
    fresh = build_chain(cut_recipe(tmp_path / "source", 0.6), tmp_path / "fresh")
    assert digests(tmp_path / "chain") == digests(tmp_path / "fresh")
    assert len(fresh.anchors) == 2


def test_a_damaged_anchor_is_noticed_when_going_on(tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    chain = build_chain(cut_recipe(tmp_path / "source", 0.7), tmp_path / "chain")
    weights = tmp_path / "chain" / chain.manifest.anchors[1].subfolder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        build_chain(cut_recipe(tmp_path / "source", 0.7), tmp_path / "chain")


def test_the_recipe_is_recorded(tmp_path: Path) -> None:
    source_folder(tmp_path / "source", "llama")
    build_chain(cut_recipe(tmp_path / "source", 0.7), tmp_path / "chain")
    text = (tmp_path / "chain" / "chain.json").read_text()
    assert json.loads(text)["recipe"]["anchors"] == [{"fraction": 0.7, "align": True}]
    assert TEXT.is_dir()


def test_the_spread_of_a_reduction_is_the_recipes(tmp_path: Path) -> None:
    """Waypoints give an anchor of one size another shape; `layers_last` stands in the manifest, where plans look."""
    fields = {"hidden_size": 32, "intermediate_size": 192, "num_hidden_layers": 8, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=300, tie_word_embeddings=True, **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    common = {"source": {"model": str(tmp_path / "model")}, "tokenizer": str(built_chain()), "anchors": [0.6]}
    common |= {"distillation": {"tokens": 0}, "evaluation": {"tokens": 200, "curve_points": 0}}

    def shape(name: str, **spread: Any) -> tuple[int, int]:
        chain = build_chain(tiny_recipe(**common, spread=spread), tmp_path / name, progress=False)
        assert chain.manifest.layers_last == spread.get("layers_last", True)
        small = chain.anchors[1].shape
        return small["num_hidden_layers"], small["intermediate_size"]

    usual, by_ffn = shape("usual"), shape("ffn", waypoints=[{"ffn": 0.3}], layers_last=False)
    assert by_ffn[0] == 8
    assert by_ffn[0] > usual[0]
    assert by_ffn[1] < usual[1]
    with pytest.raises(RecipeError, match="'width'; axes here"):
        shape("wrong", waypoints=[{"width": 0.5}])


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="the two processes are to be on the CPU")
def test_two_processes_build_what_one_does(tmp_path: Path) -> None:
    """Each trains its share of a batch; the first writes. Ranking, refit and evaluation are done by both."""
    losses = []
    for processes in (1, 2):
        recipe = tiny_recipe()
        for training in (recipe["source"]["train"]["training"], recipe["distillation"]):
            training["batch_size"] = 4 // processes
        path = tmp_path / f"{processes}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        build = ["-m", "cbd_hub", "build", str(path), "--output", str(tmp_path / str(processes))]
        config = ["--config_file", str(TEXT.parents[1] / "accelerate" / "ddp.yaml"), "--mixed_precision", "no"]
        launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0", *config]
        command = [sys.executable, *(launch if processes > 1 else []), *build]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        chain = Chain.from_pretrained(tmp_path / str(processes))
        losses.append([a.evaluation.loss for a in chain.manifest.anchors if a.evaluation])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"calibration_tokens": 256}, "calibration_tokens was 512 and is 256"),
        (
            {"distillation": {**tiny_recipe()["distillation"], "learning_rate": 5e-3}},
            "distillation.learning_rate was 0.003",
        ),
        ({"anchors": [0.8, 0.7]}, r"anchors was .*0.75.* and is .*0.8"),
    ],
)
def test_a_changed_recipe_names_the_key(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    shutil.copytree(built_chain(), tmp_path / "chain")
    with pytest.raises(OutputExistsError, match=f"another recipe .step . differs: .*{named}"):
        build_chain(tiny_recipe(**change), tmp_path / "chain", progress=False)
