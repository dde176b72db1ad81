"""What a build would stop at is said before it starts, all of it at once; what it will do is shown."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import tiny_config, tiny_model
from tiny_recipe import TEXT, tiny_recipe
from transformers import AutoTokenizer

from cbd_hub.build.build import build_chain
from cbd_hub.build.check import check_recipe
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import RecipeError
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.settings import DataConfig


def source(folder: Path, family: str = "llama", **fields: Any) -> Path:
    tokenizer = train_tokenizer(load_documents(DataConfig(text_files=str(TEXT / "1790*.txt"))), 300)
    ffn = {"gpt2": "n_inner", "opt": "ffn_dim"}.get(family, "intermediate_size")
    tiny_model(tiny_config(family, **{"vocab_size": 300, ffn: 300, **fields})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(place: Path, **changes: Any) -> dict[str, Any]:
    return tiny_recipe(source={"model": str(place)}, tokenizer=None, **changes)


def problems(plan_of: dict[str, Any], output: Path) -> list[str]:
    """What the check says; a build says the same, before any work."""
    found = check_recipe(plan_of).problems
    if found:
        with pytest.raises(RecipeError) as error:
            build_chain(plan_of, output, progress=False)
        assert all(text[:80] in str(error.value) for text in found)
        assert not (output / "anchors").exists()
    return found


def test_the_quickstart_draws_the_warning_that_its_comment_speaks_of() -> None:
    place = TEXT.parents[1] / "recipes" / "quickstart.yaml"
    (line,) = [text for text in place.read_text(encoding="utf-8").splitlines() if text.startswith("anchors:")]
    assert "wide steps on purpose" in line
    plan = check_recipe(place)
    assert plan.problems == [] and str(plan).count("below 60 %") == 2
    assert plan.anchors[-1].num_parameters / plan.anchors[0].num_parameters == pytest.approx(0.4, abs=0.01)


def test_the_plan_is_what_is_built(tmp_path: Path) -> None:
    plan = check_recipe(tiny_recipe())
    assert plan.problems == []
    chain = build_chain(tiny_recipe(), tmp_path / "chain", progress=False)
    assert [a.num_parameters for a in plan.anchors] == [a.num_parameters for a in chain.anchors]
    assert [a.shape for a in plan.anchors] == [a.shape for a in chain.anchors]
    assert [a.tokens for a in plan.anchors] == [3072, 4096, 4096]
    size = sum(p.stat().st_size for p in (tmp_path / "chain" / "anchors").rglob("*.safetensors"))
    assert 0.8 < plan.disk / size < 2.5
    assert plan.seconds is not None and plan.seconds > 0
    assert "the build can start" in str(plan) and "anchor" in str(plan)
    assert json.loads(json.dumps(plan.as_dict()))["anchors"][0]["block_share"] == 1.0


@pytest.mark.parametrize("extra", [1, 8])
def test_more_tokens_than_rows(tmp_path: Path, extra: int) -> None:
    place = source(tmp_path / "src")
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(extra)])
    tokenizer.save_pretrained(place)
    (found,) = problems(recipe(place), tmp_path / "chain")
    assert f"{extra} tokens beyond the 300 rows" in found and "resize_token_embeddings" in found


@pytest.mark.parametrize(
    ("family", "field"), [("gpt2", "max_position_embeddings"), ("opt", "max_position_embeddings")]
)
def test_sequences_longer_than_learned_positions(tmp_path: Path, family: str, field: str) -> None:
    place = source(tmp_path / "src", family, **{field: 24})
    (found,) = problems(recipe(place), tmp_path / "chain")
    assert "sequence_length is 32" in found and "24" in found
    fits = recipe(place)
    fits["data"]["sequence_length"] = 24
    assert check_recipe(fits).problems == []


def damage_shape(place: Path) -> None:
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 999}))


def damage_width(place: Path) -> None:
    path = place / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 150}))


def damage_lfs(place: Path) -> None:
    (place / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def damage_cut(place: Path) -> None:
    data = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(data[: len(data) // 2])


def damage_empty(place: Path) -> None:
    (place / "model.safetensors").write_bytes(b"")


def damage_pickle(place: Path) -> None:
    (place / "model.safetensors").rename(place / "pytorch_model.bin")


def damage_shard(place: Path) -> None:
    (place / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_tokenizer(place: Path) -> None:
    (place / "tokenizer.json").write_text('{"version": "1.0", "model"')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_shape, "shape"),
        (damage_lfs, "Git LFS pointer"),
        (damage_cut, "damaged or incomplete"),
        (damage_empty, "damaged or incomplete"),
        (damage_pickle, "only safetensors weights are read"),
        (damage_shard, "cannot be read"),
        (damage_tokenizer, "tokenizer"),
    ],
)
def test_damaged_sources_are_found_before_any_work(tmp_path: Path, damage: Any, message: str) -> None:
    place = source(tmp_path / "src")
    damage(place)
    assert any(message in text for text in problems(recipe(place), tmp_path / "chain"))


def test_all_problems_are_said_at_once(tmp_path: Path) -> None:
    place = source(tmp_path / "src", "gpt2", max_position_embeddings=24)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(place)
    found = problems(recipe(place, anchors=[1_000_000_000]), tmp_path / "chain")
    assert len(found) == 3
    assert any("not smaller than its neighbor" in text for text in found)


def test_a_large_step_is_warned_about(tmp_path: Path) -> None:
    large = source(tmp_path / "src", vocab_size=3000)
    (warning,) = check_recipe(recipe(large, anchors=[0.8])).warnings
    assert "of its larger neighbor's block weights" in warning
    fraction = float(warning.split("blocks are ")[1].split(" ")[0])
    assert check_recipe(recipe(large, anchors=[fraction + 0.005])).warnings == []


def test_a_disk_that_is_too_small(tmp_path: Path) -> None:
    """A chain larger than any disk, of which nothing is made."""
    large = tiny_recipe(anchors=[{"shape": {"intermediate_size": 10**14}}])
    large["source"]["train"]["config"]["intermediate_size"] = 2 * 10**14
    (found,) = check_recipe(large, tmp_path / "chain").problems
    assert f"GB on the disk of {tmp_path}, and " in found and "are free" in found


@pytest.mark.parametrize(
    ("damage", "message"),
    [(damage_width, "config.json says"), (damage_lfs, "Git LFS pointer"), (damage_shard, "cannot be read")],
)
def test_damaged_anchors_are_found_before_the_source_is_touched(tmp_path: Path, damage: Any, message: str) -> None:
    """A ready-made anchor is the last step of a build: what its headers tell must not wait for it."""
    place = source(tmp_path / "src")
    ready = source(tmp_path / "ready", intermediate_size=200)
    both = recipe(place, anchors=[{"init": str(ready)}])
    assert check_recipe(both).problems == []
    damage(ready)
    assert any(message in text for text in problems(both, tmp_path / "chain"))


def test_the_command(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe()))
    command = [sys.executable, "-m", "cbd_hub", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "the build can start" in done.stdout
    path.write_text(yaml.safe_dump(tiny_recipe(anchors=["900M"])))
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "not smaller than its neighbor" in json.loads(done.stdout)["problems"][0]


def test_two_builds_in_one_folder(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe()))
    command = [sys.executable, "-m", "cbd_hub", "build", str(path), "--output", str(tmp_path / "chain")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 1]
    assert any("another process is building in" in text for text in said)
    assert len(Chain.from_pretrained(tmp_path / "chain").anchors) == 3


def test_a_tracker_that_is_not_installed_is_said_before_the_build(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    distillation = {**tiny_recipe()["distillation"], "report_to": "wandb"}
    told = problems(tiny_recipe(distillation=distillation), tmp_path / "chain")
    how = "pip install wandb, or set distillation.report_to to none"
    assert told == [f"distillation.report_to names 'wandb', which cannot be used here: {how}"]
