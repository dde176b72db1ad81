"""The quickstart, the notebook and the other examples, run as a user runs them."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_recipe import tiny_recipe

from cbd_hub.build.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]


def test_quickstart_ends_with_a_table_a_picture_and_figures(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    source = tiny_recipe()["source"]
    source["train"]["config"]["intermediate_size"] = 240  # wide steps, so that every size in between can be had
    recipe.write_text(yaml.safe_dump(tiny_recipe(source=source, anchors=[0.8, 0.8]), sort_keys=False))
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", "--recipe", recipe, "--output", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "quickstart.json").read_text())
    assert len(report["targets"]) == 3
    for row in report["targets"]:
        assert row.keys() == {
            "num_parameters",
            "bezier",
            "interpolate",
            "prune",
            "paper",
            "random init",
            "small anchor",
        }
        assert all(math.isfinite(value) for value in row.values())
        assert f"{row['interpolate']:.3f}" in done.stdout
        assert row["interpolate"] < row["random init"]
    assert report["bit_for_bit"] is True
    assert "bit for bit: True" in done.stdout
    assert "Held-out loss in nats a token" in done.stdout
    assert "The Congress of the United States" in done.stdout
    assert (tmp_path / "out" / "size_loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "chain" / "chain.json").is_file()


def test_a_small_model_drafts_for_the_largest_anchor_and_the_text_stays_the_same() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "speculative.py", "--tokens", "24", "--proposed", "3"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the same text: True" in done.stdout and "744,672 parameters, draft of 300,000, 96 tokens" in done.stdout
    share, a_pass = re.findall(r"(\d+)% of 3 proposed tokens accepted, (\d\.\d\d) tokens a pass", done.stdout)[0]
    assert 0 < int(share) <= 100 and float(a_pass) == pytest.approx(1 + 3 * int(share) / 100, abs=0.02)


def test_the_recipes_that_are_shipped_can_be_read() -> None:
    paths = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))
    assert paths
    for path in paths:
        recipe, base = load_recipe(path)
        assert base == path.parent
        assert recipe.data is not None
        if recipe.data.dataset is not None:  # checked in tests/test_recipe_costs.py
            continue
        assert recipe.data.text_files is not None
        files = str(recipe.data.text_files)
        if ".cache" in files:  # what a script has to fetch first, which the recipe then names
            assert "python examples/smollm2.py" in path.read_text()
        else:
            assert list(base.glob(files))


def test_the_notebook_runs(tmp_path: Path) -> None:
    """Its cells, one after another in one process, as a reader would run them; it is kept without outputs."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 7 and not any(cell["outputs"] for cell in cells)
    script = "\n".join("".join(cell["source"]) for cell in cells) + "\nprint(folder)\n"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"held-out loss, nats a token: (\S+) before, (\S+) after", done.stdout)
    assert found and float(found[2]) < float(found[1]) - 0.1
    folder = Path(done.stdout.splitlines()[-1])
    assert folder.parent == tmp_path and (folder / "rhymes.gguf").read_bytes().startswith(b"GGUF")
    assert f"{(folder / 'rhymes.gguf').stat().st_size:,} bytes as q8_0" in done.stdout
    names = {place for cell in notebook["cells"] for place in re.findall(r"\]\(([^)]+)\)", "".join(cell["source"]))}
    assert len(names) == 4 and all((ROOT / "examples" / name).is_file() for name in names)
