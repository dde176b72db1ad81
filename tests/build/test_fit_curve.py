"""Control points for a chain that exists: its anchors stay, a killed call goes on, and nothing gets worse."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from make_chain import make_chain, variant_model
from tiny_recipe import built_chain, digests, tiny_recipe
from transformers import AutoConfig, AutoModelForCausalLM

from cbd_hub.alignment import learned
from cbd_hub.build.build import build_chain
from cbd_hub.build.fit_curve import fit_curve
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.chain.chain import Chain, from_chain
from cbd_hub.errors import CbdError, ChainNotFoundError, RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss


def plain_recipe(**changes: Any) -> dict[str, Any]:
    recipe = tiny_recipe(**changes)
    recipe["distillation"] = {**recipe["distillation"], "control_point": None}
    return recipe


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "chain"
    build_chain(plain_recipe(), folder, progress=False)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "chain")
    return tmp_path / "chain"


def test_anchors_stay_and_the_manifest_says_what_was_done(folder: Path) -> None:
    before = {k: v for k, v in digests(folder).items() if k.startswith("anchors/") and not k.endswith("README.md")}
    assert Chain.from_pretrained(folder).manifest.anchors[1].control_point is None
    chain = fit_curve(folder, tokens="4k", learning_rate=1e-2, progress=False)
    after = digests(folder)
    assert {k: after[k] for k in before} == before
    assert chain.manifest.format == 3 and chain.manifest.round_widths
    for anchor in chain.manifest.anchors[1:]:
        record = anchor.control_point
        assert record is not None and record.tokens == 4000 and not record.together
        assert len(record.sizes) == len(record.losses) == len(record.straight_losses) > 0
        mean = [sum(losses) / len(losses) for losses in (record.losses, record.straight_losses)]
        assert anchor.bent == (mean[0] < mean[1]) == (folder / f"{anchor.control_point_name}.safetensors").is_file()
    assert any(anchor.bent for anchor in chain.manifest.anchors)
    assert "bezier" in {point.method for point in chain.manifest.curve}
    small = next(a for a in chain.manifest.anchors if a.bent)
    size = small.control_point.sizes[0] if small.control_point else 0
    assert from_chain(folder, num_parameters=size).config.cbd_hub["method"] == "bezier"
    again = fit_curve(folder, tokens="4k", learning_rate=1e-2, progress=False)  # pairs that have one keep it
    assert again.manifest.anchors == chain.manifest.anchors


def test_a_public_checkpoint_gets_a_control_point(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays what it is, and a model on the curve is the one that was measured while it was fitted."""
    monkeypatch.setattr(learned, "STEPS", 5)
    public = tmp_path / "public"
    torch.manual_seed(5)
    large, small = (plain / "anchors" / anchor.name for anchor in Chain.from_pretrained(plain).anchors[:2])
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(small)).save_pretrained(public)
    source = {"model": str(large)}
    spec = {"init": str(public), "align": "learned", "tokens": 0, "name": "small"}
    recipe = plain_recipe(source=source, tokenizer=None, anchors=[spec])
    build_chain(recipe, tmp_path / "chain", progress=False)
    before = digests(tmp_path / "chain" / "anchors" / "small")
    chain = fit_curve(tmp_path / "chain", tokens="8k", learning_rate=1e-2, progress=False)
    after = digests(tmp_path / "chain" / "anchors" / "small")
    assert {k: v for k, v in after.items() if k != "README.md"} == {
        k: v for k, v in before.items() if k != "README.md"
    }
    anchor = chain.manifest.anchors[1]
    record = anchor.control_point
    assert record is not None and anchor.bent
    validation = BuildInputs(*load_recipe(recipe)).validation
    assert validation is not None
    for size, bent, straight in zip(record.sizes[1:], record.losses[1:], record.straight_losses[1:], strict=True):
        for method, wanted in (("bezier", bent), ("interpolate", straight)):
            model = from_chain(tmp_path / "chain", size, method=method)
            assert evaluate_loss(model, validation).loss == pytest.approx(wanted, abs=1e-4)


KILLED = """
import sys, os, signal
from cbd_hub.build import fit_curve as module
wanted, folder = sys.argv[1:]
work = getattr(module, wanted)
def once(*arguments):
    result = work(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(module, wanted, once)
module.fit_curve(folder, progress=False, tokens=2048, learning_rate=1e-2)
"""


@pytest.mark.parametrize("moment", ["_fit", "measure_chain"])
def test_a_killed_call_is_finished_to_the_same_bytes(plain: Path, folder: Path, tmp_path: Path, moment: str) -> None:
    shutil.copytree(plain, tmp_path / "whole")
    options = {"tokens": 2048, "learning_rate": 1e-2}
    fit_curve(tmp_path / "whole", **options, progress=False)
    done = subprocess.run([sys.executable, "-c", KILLED, moment, str(folder)], capture_output=True)
    assert done.returncode == -9
    assert len(list((folder / ".build").glob("curve-*.json"))) == (1 if moment == "_fit" else 2)
    before = Chain.from_pretrained(folder)  # the chain is as it was until all is done, and can be used
    assert before.manifest.anchors[1].control_point is None
    size = (before.anchors[0].num_parameters + before.anchors[1].num_parameters) // 2
    assert from_chain(folder, num_parameters=size, tolerance=0.1).config.cbd_hub["method"] == "interpolate"
    fit_curve(folder, **options, progress=False)
    assert digests(folder) == digests(tmp_path / "whole")


def test_the_command(folder: Path) -> None:
    command = [sys.executable, "-m", "cbd_hub", "fit-curve", str(folder), "--tokens", "1k", "--rank", "2", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    anchors = json.loads(done.stdout)["anchors"]
    assert [a.get("control_point", {}).get("rank") for a in anchors] == [None, 2, 2]


def test_a_build_trains_them_with_its_anchors() -> None:
    chain = Chain.from_pretrained(built_chain())
    records = [anchor.control_point for anchor in chain.manifest.anchors[1:]]
    assert all(record is not None and record.together and record.tokens == 2048 for record in records)
    trainings = [anchor.training for anchor in chain.manifest.anchors[1:]]
    assert all(training is not None and training.tokens == 2048 for training in trainings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "needs training tokens"),
        ({"rank": 0}, "rank"),
        ({"rank": 10**6}, r"rank is 1000000; allowed: 1 to \d+"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"tokens": "many"}, "many"),
        ({"recipe": {"name": "x"}}, "source"),
    ],
)
def test_bad_requests(plain: Path, options: dict[str, Any], message: str) -> None:
    before = digests(plain)
    with pytest.raises(CbdError, match=message):
        fit_curve(plain, **options, progress=False)
    assert digests(plain) == before


def test_a_folder_without_a_chain_or_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(ChainNotFoundError, match="holds no chain"):
        fit_curve(tmp_path)
    made = make_chain(tmp_path / "c", variant_model("llama"))
    with pytest.raises(RecipeError, match="does not say how it was built"):
        fit_curve(made)
