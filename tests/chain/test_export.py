"""A made model on disk: whole or not at all, and an ordinary model folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from make_chain import make_chain, variant_model
from tiny_models import FAMILIES
from tiny_recipe import built_chain
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub.chain.assemble import assemble_into
from cbd_hub.chain.chain import Chain
from cbd_hub.chain.export import write_model
from cbd_hub.errors import IntegrityError, OutputExistsError, SizeError


def test_writes_a_folder_that_equals_the_model_in_memory(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(built_chain())
    plan = chain.plan(chain.manifest.curve[0].num_parameters)
    write_model(chain, plan, tmp_path / "deep" / "model", progress=False)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "deep" / "model", output_loading_info=True)
    assert not any(info.values())
    made = chain.initialize(plan, progress=False)
    assert made.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in made.state_dict().items())
    assert loaded.num_parameters() == plan.num_parameters
    assert loaded.config.cbd_hub["anchors"] == [plan.small, plan.large]
    assert loaded.generation_config.eos_token_id == made.generation_config.eos_token_id == 0
    text = "The Congress of the United States"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "deep" / "model")
    assert tokenizer(text)["input_ids"] == chain.tokenizer(text)["input_ids"]
    card = (tmp_path / "deep" / "model" / "README.md").read_text()
    assert "tiny" in card and f"{plan.num_parameters:,}" in card
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("variant", "dtype"),
    [*((family, "auto") for family in FAMILIES), ("gpt_neox-tied", "auto"), ("llama", "bfloat16")],
)
def test_a_folder_that_is_written_tensor_by_tensor_is_what_save_pretrained_writes(
    variant: str, dtype: str, tmp_path: Path
) -> None:
    chain = Chain.from_pretrained(make_chain(tmp_path / "chain", variant_model(variant)))
    middle = (chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2
    plan, whole, streamed = chain.plan(middle, tolerance=0.2), tmp_path / "whole", tmp_path / "streamed"
    streamed.mkdir()
    chain.initialize(plan, dtype=dtype, progress=False).save_pretrained(whole)
    assemble_into(chain, plan, streamed, dtype, progress=False)
    assert sorted(p.name for p in streamed.iterdir()) == sorted(p.name for p in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (streamed / path.name).read_bytes(), path.name


def test_a_refined_model_says_what_was_chosen(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(built_chain())
    plan = chain.plan(chain.manifest.curve[0].num_parameters)
    write_model(chain, plan, tmp_path / "model", progress=False, refine=True, repo_id="org/refined")
    report = json.loads((tmp_path / "model" / "config.json").read_text())["cbd_hub"]["refine"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert (
        f"of {len(report['compared'])} ways to make a model of this size, `{report['candidate']}` was chosen" in card
    )
    assert f"({report['calibration_loss']:.4f}; as planned {report['planned_loss']:.4f})" in card
    assert "    refine=True,\n" in card
    assert 'from_pretrained("org/refined")' in card


def test_a_chain_without_a_tokenizer_gives_a_folder_without_one(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(make_chain(tmp_path / "chain", variant_model("gpt_neox")))
    write_model(chain, chain.plan(chain.anchors[1].num_parameters), tmp_path / "model", progress=False)
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


@pytest.mark.parametrize("place", [".", "./", "new/.."])
def test_the_current_folder_can_be_named(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain.from_pretrained(built_chain())
    (tmp_path / "here" / ("new" if place == "new/.." else "")).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    plan = chain.plan(chain.anchors[1].num_parameters)
    if place == "new/..":  # holds `new`
        with pytest.raises(OutputExistsError):
            write_model(chain, plan, place, progress=False)
    else:
        write_model(chain, plan, place, progress=False)
        assert (tmp_path / "here" / "model.safetensors").is_file()
    monkeypatch.chdir(tmp_path)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(built_chain())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        write_model(chain, chain.plan(chain.anchors[1].num_parameters), tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    shutil.copytree(built_chain(), tmp_path / "chain")
    chain = Chain.from_pretrained(tmp_path / "chain")
    plan = chain.plan(chain.manifest.curve[0].num_parameters)
    with pytest.raises(SizeError, match="int8"):
        write_model(chain, plan, tmp_path / "out", dtype="int8", progress=False)
    (tmp_path / "chain" / "tokenizer.json").write_text("{}")  # noticed only after the weights were written
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        write_model(chain, plan, tmp_path / "out", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["chain"]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_gives_the_same_logits(tmp_path: Path) -> None:
    chain = Chain.from_pretrained(make_chain(tmp_path / "chain", variant_model("llama")))
    large, small = (anchor.num_parameters for anchor in chain.anchors[:2])
    model = chain.initialize(chain.plan((large + small) // 2), progress=False)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model)(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_a_folder_names_what_older_readers_look_for(tmp_path: Path) -> None:
    """rope_theta at the top, a tokenizer class that transformers 4 has, and a length that means something."""
    chain = Chain.from_pretrained(built_chain())
    write_model(chain, chain.plan(chain.anchors[1].num_parameters), tmp_path / "m", progress=False)
    config, tokenizer = (
        json.loads((tmp_path / "m" / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["model_max_length"] == config["max_position_embeddings"]
    for name in chain.tokenizer_files:  # all else of the tokenizer is copied as it is
        if name != "tokenizer_config.json":
            assert (tmp_path / "m" / name).read_bytes() == chain.tokenizer_files[name].read_bytes()
