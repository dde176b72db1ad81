"""The documentation is true: README's Python runs, its ``make`` targets and ``cbd-hub`` commands exist."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = {"bash", "sh", "shell", "console"}


def blocks(path: Path) -> list[tuple[str, str]]:
    """The fenced code blocks of a page as (info string, text); none if the page is missing."""
    return BLOCK.findall(path.read_text(encoding="utf-8")) if path.exists() else []


def shell_commands(path: Path, program: str) -> list[list[str]]:
    """The calls of a program in the shell blocks of a page, each as its words without the program."""
    text = "\n".join(code for info, code in blocks(path) if info.split()[:1] and info.split()[0] in SHELL)
    lines = re.split(r"\n|&&|;|\|", re.sub(r"\\\n", " ", text))
    words = (line.split("#")[0].removeprefix("$ ").split() for line in lines)
    return [call[1:] for call in words if call[:1] == [program]]


def inline_commands(path: Path) -> list[list[str]]:
    """The ``cbd-hub COMMAND ...`` of a page's code spans."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8")) if path.exists() else ""
    return [code.split()[1:] for code in re.findall(r"`(cbd-hub [^`\n]+)`", text)]


PYTHON = [code for info, code in blocks(README) if info.split() == ["python", "run"]]


def test_readme_exists() -> None:
    assert README.is_file(), "README.md is missing: the first page a user reads"
    assert PYTHON, "README.md has no block that opens with ```python run"
    assert shell_commands(README, "make"), "README.md names no make target"


@pytest.mark.parametrize("code", PYTHON, ids=[f"block{i}" for i in range(len(PYTHON))])
def test_python_block_runs(code: str) -> None:
    result = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, f"this block of README.md failed:\n{code}\n{result.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page: Path) -> None:
    phony = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    targets = set(" ".join(phony).split())
    named = {word for call in shell_commands(page, "make") for word in call if "=" not in word and word[0] != "-"}
    assert named <= targets, f"{page.name} names make targets that do not exist: {sorted(named - targets)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    from cbd_hub.cli.main import app

    commands = typer.main.get_command(app).commands
    for name, *words in [*shell_commands(page, "cbd-hub"), *inline_commands(page)]:
        if name.startswith("-"):
            continue
        assert name in commands, f"{page.name}: there is no command `cbd-hub {name}`"
        known = {
            option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        used = {option for word in words for option in re.findall(r"--[a-z][a-z-]*", word)}
        assert used <= known | {"--help"}, f"{page.name}: `cbd-hub {name}` has no {sorted(used - known)}"


def test_figures_are_those_of_the_committed_run() -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "readme_table.py"))
    assert script["table"]() in README.read_text(encoding="utf-8"), "run python .ci/readme_table.py"


def test_the_tree_is_that_of_the_package() -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "tree.py"))
    for page in script["PAGES"]:
        assert script["written"](page) == (ROOT / page).read_text(encoding="utf-8"), "run python .ci/tree.py"
        assert script["tree"](page == "CONTRIBUTING.md") in (ROOT / page).read_text(encoding="utf-8")


def test_tables_of_recipe_keys_are_those_of_the_models() -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "recipe_tables.py"))
    for page in script["PAGES"]:
        assert script["written"](page.read_text(encoding="utf-8")) == page.read_text(encoding="utf-8"), (
            "run python .ci/recipe_tables.py"
        )
    assert script["table"](script["MODELS"]["Recipe"]) in PAGES_TEXT


PAGES_TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
RECIPES = [(page, code) for page in PAGES for info, code in blocks(page) if info.split()[:1] == ["yaml"]]


@pytest.mark.parametrize(("page", "code"), RECIPES, ids=[f"{page.stem}{i}" for i, (page, _) in enumerate(RECIPES)])
def test_recipes_of_the_pages_load(page: Path, code: str, tmp_path: Path) -> None:
    """A block with a source is a whole recipe and loads as it stands; a part of one loads once the rest is added."""
    from cbd_hub.build.recipe import load_recipe

    whole = {"name": "part", "source": {"model": "org/m"}, "anchors": [0.7], "data": {"text_files": "a.txt"}}
    given = yaml.safe_load(code)
    added = {} if "source" in given else {key: value for key, value in whole.items() if key not in given}
    path = tmp_path / "recipe.yaml"
    path.write_text(code + (yaml.safe_dump(added) if added else ""), encoding="utf-8")
    assert load_recipe(path)[0].name == given.get("name", "part"), page


def test_some_recipes_are_whole() -> None:
    assert sum("source" in yaml.safe_load(code) for _, code in RECIPES) >= 3


def test_every_model_of_recipe_keys_has_a_table() -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "recipe_tables.py"))
    assert set(re.findall(r"<!-- table:(\w+):begin -->", PAGES_TEXT)) == set(script["MODELS"])
