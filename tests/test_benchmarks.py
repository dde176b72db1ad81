"""The benchmarks run (at toy scale), their tables say what their figures say, and a page that does not is found."""

import importlib
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``script(name)`` imports a benchmark as its neighbors do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def run(name: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def copied(folder: Path) -> Path:
    """What the check reads of a checkout."""
    (folder / ".ci").mkdir()
    for name in ("README.md", ".ci/readme_table.py"):
        shutil.copy(ROOT / name, folder / name)
    shutil.copytree(ROOT / "docs", folder / "docs")
    return folder


def change(path: Path, *keys: Any, by: float) -> None:
    """Adds to one figure of a JSON file; a key that is not there stands for the first that ends like it."""
    place = json.loads(path.read_text())
    whole = place
    for key in keys[:-1]:
        found = isinstance(place, list) or key in place
        place = place[key if found else next(name for name in place if name.endswith(key))]
    place[keys[-1]] += by
    path.write_text(json.dumps(whole))


# -- figures and text -------------------------------------------------------------------------------------------------


def test_text_and_figures_of_the_checkout_agree(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert script("results").main(["--check"]) == 0, capsys.readouterr().out


CHANGES: dict[str, tuple[tuple[Any, ...], float, set[str]]] = {
    "quickstart": (("targets", 0, "prune"), 1, {"docs/results.md", "README.md"}),
    "smollm2": ((" interpolate", "in domain", 0), 1, {"docs/results.md", "docs/results/smollm2.md"}),
    "rules": (("own_weight", 0, "1 - alpha^2 (ours)"), 1, {"docs/results.md", "docs/results/rules.md"}),
    "align": (("pairs", "GPT-2, narrower", "loss", "masked averaging, aligned", "0.25"), 1, {"docs/results.md"}),
    "losses": (("rows", 0, "time_against_plain"), 1, {"docs/results.md"}),
    "train": (("student",), 10**7, {"docs/results.md", "docs/results/train.md", "docs/scaling.md"}),
    "train_scaling": (
        ("vocabulary", 0, "tokens_per_second"),
        10**6,
        {"docs/results.md", "docs/results/train_scaling.md"},
    ),
    "speed": (("rows", 0, "bytes_made"), 10**12, {"docs/results.md", "docs/results/speed.md"}),
    "growth": (
        ("from_chain", -1, "parameters"),
        10**9,
        {"docs/results.md", "docs/results/growth.md", "docs/scaling.md"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_figure_is_found_wherever_it_stands(script: Any, tmp_path: Path, name: str) -> None:
    keys, by, named = CHANGES[name]
    if not (ROOT / "docs" / "results" / f"{name}.json").is_file():
        pytest.skip(f"{name}.py was not run here")
    root = copied(tmp_path)
    (root / "docs" / "results" / "quality.json").unlink(missing_ok=True)  # drawn anew at every check
    before = set(script("results").differences(root))
    change(root / "docs" / "results" / f"{name}.json", *keys, by=by)
    found = set(script("results").differences(root)) - before
    assert {line.split(":")[0] for line in found} >= named


def test_a_changed_text_is_found_and_the_status_says_so(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = copied(tmp_path)
    (root / "docs" / "results" / "quality.json").unlink(missing_ok=True)
    loss = json.loads((root / "docs" / "results" / "quickstart.json").read_text())["targets"][0]["interpolate"]
    cell = f"{loss:.3f} ({math.exp(loss):.1f})"
    for name in ("README.md", "docs/results.md"):
        text = (root / name).read_text()
        assert cell in text
        (root / name).write_text(text.replace(cell, "0.001 (1.0)"))
    assert script("results").main(["--check", "--root", str(root)]) == 1
    printed = capsys.readouterr().out
    assert "README.md: has no line" in printed
    assert "docs/results.md:" in printed and "0.001 (1.0)" in printed
    assert script("results").main(["--root", str(root)]) == 0
    assert not [line for line in script("results").differences(root) if line.startswith("docs/results.md")]


def test_files_that_are_not_there_are_passed_over(script: Any, tmp_path: Path) -> None:
    root = copied(tmp_path)
    for path in (root / "docs" / "results").iterdir():
        if path.name != "quickstart.json":
            path.unlink()
    assert script("results").main(["--root", str(root)]) == 0
    assert script("results").differences(root) == []
    page = (root / "docs" / "results.md").read_text()
    assert "## Quickstart" in page and "SmolLM2" not in page


def test_rows_that_were_lost_are_named(script: Any) -> None:
    row = {"num_parameters": 1000, "interpolate": 3.0, "prune": 2.9, "paper": 3.1, "small anchor": 3.0}
    lost = script("figures").lost("quickstart", {"targets": [row]})
    assert lost == [("quickstart", "1,000", "3.000", "prune", "2.900")]
    rows = [{"vocabulary": 10, "peak_against_plain": 0.25, "time_against_plain": 1.2}]
    way = {"peak_bytes": 1, "seconds": 1.0}
    rows[0] |= {"batch": 1, "length": 1, "plain": way, "chunked": way}  # type: ignore[dict-item]
    lost = script("figures").lost("losses", {"rows": rows})
    assert lost == [("chunked loss", "vocabulary 10", "1.20", "goal: time_against_plain", "1.1")]


# -- speed ------------------------------------------------------------------------------------------------------------


def speed_row(cache: str, **ways: tuple[float, float, float]) -> dict[str, Any]:
    """A row whose ways took (CPU seconds, wall seconds, peak bytes)."""
    names = {"ours": "from_chain", "saved": "from_chain + save", "hand": "by hand"}
    runs = {names.get(k, k): [{"cpu": c, "wall": w, "peak": p, "cached": 1.0}] for k, (c, w, p) in ways.items()}
    return {"cache": cache, "runs": runs, "bytes_made": 4.0, "largest_pair": 1.0}


def test_goals_are_met_at_their_bounds_and_missed_beyond(script: Any) -> None:
    goals = script("figures").goals
    kept = {"hand": (2.0, 9.0, 10.0), "mergekit": (3.0, 1.0, 1.0)}
    row = speed_row("warm", ours=(1.0, 9.0, 6.0), saved=(3.0, 9.0, 6.0), copy=(1.0 / 1.5, 1.0, 1.0), **kept)
    found = goals(row)
    assert [met for _, met, _ in found.values()] == [True] * 5
    assert found["by hand / time"][0] == 2.0 and found["peak / by hand"][0] == 0.6
    row = speed_row("warm", ours=(1.01, 1.0, 6.1), saved=(3.1, 0.1, 6.1), copy=(1.0 / 1.5, 9.0, 1.0), **kept)
    assert [met for _, met, _ in goals(row).values()] == [False] * 5
    row = speed_row("cold", ours=(1.01, 1.0, 6.0), copy=(0.1, 0.1, 1.0), **kept)
    assert {name: met for name, (_, met, _) in goals(row).items()} == {
        "time / copy": None,  # counts where the files are in the page cache
        "by hand / time": True,  # wall time decides where they are not
        "peak / by hand": True,
        "peak / allowed": True,
    }


def test_speed_writes_its_figures_and_tables(script: Any, tmp_path: Path) -> None:
    run("speed", "--profile", "smoke", "--mergekit", str(tmp_path), "--output", str(tmp_path), "--note", "A note.")
    result = json.loads((tmp_path / "speed.json").read_text())
    assert result["note"] == "A note." and result["machine"] and result["versions"]["torch"]
    assert [row["cache"] for row in result["rows"]] == ["warm", "cold"]
    for row in result["rows"]:
        assert row["failed"] == {"mergekit": "it was not installed"}
        assert set(row["runs"]) == {"from_chain", "from_chain + save", "by hand", "copy"}
        assert row["files"] > 2 and row["bytes_made"] == 4 * row["parameters"] < row["bytes_read"]
        for runs in row["runs"].values():
            assert all(run["wall"] > 0 and run["cpu"] >= 0 and run["peak"] >= 0 for run in runs)
    text = (tmp_path / "speed.md").read_text()
    assert text == script("results").page("speed", result)
    assert "A note." in text and ("pass" in text or "FAIL" in text) and "it was not installed" in text


def test_the_copy_bound_reads_every_byte_that_is_planned_and_no_other(script: Any, tmp_path: Path) -> None:
    import torch

    speed, chains = script("speed"), script("models")
    chains.make_chain(tmp_path / "chain", chains.SHAPES["toy"], torch.float32, "100kB")
    case = speed.case_of(tmp_path)
    read = b"".join(path.read_bytes()[start:stop] for path, start, stop in case.runs)
    assert speed.copy(case).numpy().tobytes() == read[: case.target_bytes]
    model = speed.run_way("from_chain", case)
    assert model.num_parameters() == case.target == case.target_bytes // 4
    assert speed.by_hand(case).num_parameters() > case.target


# -- growth -----------------------------------------------------------------------------------------------------------


def test_exponents_and_the_cost_of_an_anchor_are_recovered(script: Any) -> None:
    growth = script("figures")
    rows = [{"parameters": n, "runs": [{"cpu": 3 * n**0.8, "peak": 2.0 * n}]} for n in (10, 100, 10_000)]
    assert growth.slope(rows, "cpu") == pytest.approx(0.8)
    assert growth.slope(rows, "peak") == pytest.approx(1)
    builds = [{"anchors": n, "runs": [{"cpu": 5 + 2 * n}, {"cpu": 900}, {"cpu": 0}]} for n in (1, 2, 6)]
    assert growth.line(builds) == pytest.approx((5, 2, 0))


@pytest.mark.slow
def test_growth_writes_its_figures_tables_and_picture(script: Any, tmp_path: Path) -> None:
    run("growth", "--quick", "--output", str(tmp_path))
    result = json.loads((tmp_path / "growth.json").read_text())
    assert [row["anchors"] for row in result["builds"]] == [1, 2]
    small, large = (row["parameters"] for row in result["from_chain"])
    assert small < large
    assert (tmp_path / "growth.md").read_text() == script("results").page("growth", result)
    assert f"| {large:,} |" in (tmp_path / "growth.md").read_text()
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_train_scaling_writes_its_figures_and_tables(script: Any, tmp_path: Path) -> None:
    run("train_scaling", "--quick", "--rounds", "1", "--steps", "1", "--output", str(tmp_path))
    result = json.loads((tmp_path / "train_scaling.json").read_text())
    assert [row["processes"] for row in result["processes"]] == [1, 2]
    rows = [row for name in ("vocabulary", "length", "processes") for row in result[name]]
    assert len(rows) == 6 and all(row["tokens_per_second"] > 0 and row["peak_bytes"] > 0 for row in rows)
    text = (tmp_path / "train_scaling.md").read_text()
    assert text == script("results").page("train_scaling", result)
    assert text.count("\n| 64 |") == text.count("\n| 2 |") == 1


# -- chains and quality, at toy scale ---------------------------------------------------------------------------------

VIEWS: dict[str, Any] = {  # script → what of its figures says that all arms were measured
    "rules": lambda data: (len(data["own_weight"]), len(data["layers"]), len(data["own_weight"][0])),
    "losses": lambda data: [(row["vocabulary"], row["batch"], row["length"]) for row in data["rows"]],
    "train": lambda data: (data["batch"], data["length"], "plain loop" in data["ways"]),
    "fetch": lambda data: [(row["method"], row["planned_bytes"] < row["pair_bytes"]) for row in data["rows"]],
    "align": lambda data: [(name, len(found["loss"]), len(found["middle"])) for name, found in data["pairs"].items()],
    "smollm2": lambda data: [
        len(data[key]["prune"]["in domain"]) for key in data if key.startswith("control: teacher")
    ],
    "curve": lambda data: [len(arms) for seeds in data["pairs"].values() for arms in seeds.values()],
    "bridge": lambda data: [sum(key.startswith(f"{name} | ") for key in data) for name in ("GPT-2", "Llama")],
    "quality": lambda data: sorted({figure["seed"] for figure in data["figures"].values()}),
}
WHOLE: dict[str, Any] = {
    "rules": (14, 14, 8),
    "losses": [(4096, 2, 64)],
    "train": (4, 32, True),
    "fetch": [("interpolate", True), ("prune", True)] * 2,
    "align": [("Llama, narrower", 3, 6)],
    "smollm2": [2],
    "curve": [14],
    "bridge": [4, 4],
    "quality": [0, 1],
}


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("name", WHOLE)
def test_a_benchmark_measures_all_its_arms_at_toy_scale(script: Any, tmp_path: Path, name: str) -> None:
    """In the smoke profile, which is the same code at another scale."""
    own = {"align": ["--cache", str(tmp_path / "models")], "quality": ["--work", str(tmp_path / "work")]}
    run(name, "--profile", "smoke", "--results", str(tmp_path), *own.get(name, []))
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert VIEWS[name](result) == WHOLE[name]
    if name in script("results").PAGES:
        assert (tmp_path / f"{name}.md").read_text() == script("results").page(name, result)


def test_a_figure_is_measured_once_and_kept(script: Any, tmp_path: Path) -> None:
    """A second run reads the file, and one with other settings is refused."""
    figures = script("harness").Figures(tmp_path, "kept", settings={"limit": 3})
    assert figures.keep("a", lambda: 1) == 1 and figures.keep("a", lambda: 2) == 1
    assert figures.keep("b", lambda: 3, figures.found.setdefault("part", {})) == 3
    again = script("harness").Figures(tmp_path, "kept", settings={"limit": 3})
    assert again.found == {"settings": {"limit": 3}, "a": 1, "part": {"b": 3}}
    with pytest.raises(SystemExit, match="another settings"):
        script("harness").Figures(tmp_path, "kept", settings={"limit": 4})


def test_work_in_a_process_returns_its_value_and_failure_is_none(script: Any) -> None:
    harness = script("harness")
    assert harness.forked(lambda a, b: a + b, 2, 3) == 5
    assert harness.forked(lambda: (int(os.environ["RANK"]), os.environ["WORLD_SIZE"]), processes=2) == (0, "2")
    assert harness.forked(lambda: sys.exit(3)) is None
    assert list(harness.turns("ab", 3)) == ["a", "b", "b", "a", "a", "b"]


# -- every script -----------------------------------------------------------------------------------------------------

SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_starts_and_says_what_it_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: its imports are paid for once."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0 and "usage: " in capsys.readouterr().out
