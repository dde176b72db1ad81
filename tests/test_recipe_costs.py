"""The recipes for one machine pass `cbd-hub check` against public configs, and docs/scaling.md has what they cost."""

import json
import runpy
import shutil
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cbd_hub.build.check import check_recipe
from cbd_hub.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {  # parameters of the public models, as transformers counts them
    "gpt2": [774_030_080, 354_823_168, 124_439_808],
    "pythia": [1_011_781_632],
    "qwen3": [1_720_574_976, 596_049_920],
    "smollm2-1.7b": [1_711_376_384],
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    room = namedtuple("room", "total used free")(10**13, 0, 10**13)  # what such a machine has
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    return runpy.run_path(str(ROOT / ".ci" / "recipe_costs.py"))


@pytest.mark.parametrize("name", PUBLIC)
def test_the_recipe_passes_the_check(script: dict[str, Any], name: str, tmp_path: Path) -> None:
    recipe = script["lay_out"](ROOT / "examples" / "recipes" / f"{name}.yaml", tmp_path)
    done = CliRunner().invoke(app, ["check", str(recipe), "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    counts = [anchor["num_parameters"] for anchor in plan["anchors"]]
    assert plan["problems"] == [] and counts[: len(PUBLIC[name])] == PUBLIC[name]
    assert [anchor["tokens"] for anchor in plan["anchors"][1:]] == [500_000_000] * (len(counts) - 1)
    text = recipe.read_text(encoding="utf-8")
    assert f"fsdp2.yaml --num_processes 8 \\\n#         -m cbd_hub build examples/recipes/{name}.yaml" in text


def test_a_config_that_is_not_the_weights_is_found(script: dict[str, Any], tmp_path: Path) -> None:
    """The stand-ins are looked at: one that is wrong stops the check."""
    recipe = script["lay_out"](ROOT / "examples" / "recipes" / "gpt2.yaml", tmp_path)
    path = tmp_path / "openai-community" / "gpt2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_layer": 11}))
    assert any("openai-community/gpt2" in problem for problem in check_recipe(recipe).problems)


def test_why_pythia_is_cut(script: dict[str, Any], tmp_path: Path) -> None:
    recipe = script["lay_out"](ROOT / "examples" / "recipes" / "pythia.yaml", tmp_path)
    place = tmp_path / "EleutherAI" / "pythia-410m"
    shutil.copytree(tmp_path / "EleutherAI" / "pythia-1b", place)
    config = json.loads((place / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    (place / "config.json").write_text(json.dumps({**config, **sizes}))
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(text.replace("[405M, 162M, 66.3M]", "[{init: EleutherAI/pythia-410m}]"), encoding="utf-8")
    (found,) = check_recipe(recipe).problems
    assert "layers 24 (more than its larger neighbor's 16)" in found and "head_dim 64" in found


def test_the_table_is_that_of_the_script(script: dict[str, Any]) -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert script["written"](page, 3.0) == page, "run python .ci/recipe_costs.py"
    dear, plans = script["table"](30.0), script["plans"]()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in dear.splitlines() if line.startswith("| [")]
    for row, counts in zip(rows, PUBLIC.values(), strict=True):
        plan = plans[row[0][1:].split("]")[0]]
        assert plan.anchors[0].num_parameters == counts[0]
        work = sum(500e6 * (6 * b.num_parameters + 2 * a.num_parameters) for a, b in pairwise(plan.anchors))
        hours = work / (135_000 * (6 * 103_102_272 + 2 * 134_515_008)) / 3600
        assert (row[4], row[-1]) == (f"{hours:.1f}", f"{30 * hours:,.0f}")
