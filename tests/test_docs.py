"""The pages of docs/ are true: their Python runs, their links lead somewhere, their commands are the program's.

``my-chain`` of the pages is a random Llama of the quickstart's size, with two anchors cut out of it, and
``my-name/my-chain`` the same chain on the loopback Hub. The blocks of one page run in one process, as a reader would
run them. A block that opens with ```` ```python no-run ```` is not run.
"""

import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from hub_client import Client
from hub_server import HubServer
from make_chain import add_calibration, add_tokenizer, make_chain
from test_readme import PAGES, README, ROOT, blocks, inline_commands, shell_commands
from tiny_models import tiny_model
from torch import Generator, randint
from transformers import LlamaConfig
from typer.testing import CliRunner

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import count_parameters, ladder
from cbd_hub.cli.main import app

DOCS = ROOT / "docs"
COMMAND = typer.main.get_command(app)


def python(page: Path) -> list[str]:
    """The Python blocks of a page that are to run."""
    return [code for info, code in blocks(page) if info.split() in (["python"], ["python", "run"])]


PYTHON = [page for page in PAGES if page != README and python(page)]
PAGE_IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
ITEMS = {
    "boolq": {"question": "is it so", "title": "A title", "passage": "It is so.", "answer": "True"},
    "piqa": {"goal": "to sit", "sol1": "take a chair", "sol2": "take a pen", "label": 0},
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of the quickstart's shapes, with random weights, a tokenizer and calibration tokens."""
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    axis_map = axis_map_for(config)
    sizes = [axis_map.sizes(config)]
    for share in (0.62, 0.65):
        sizes.append(ladder(axis_map, sizes[-1], round(share * count_parameters(axis_map, sizes[-1]))))
    folder = make_chain(tmp_path_factory.mktemp("docs") / "my-chain", tiny_model(config), sizes[1:])
    add_tokenizer(folder)
    return add_calibration(folder, randint(300, (8, 32), generator=Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def reader(chain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A process whose Hub has the chain as ``my-name/my-chain``."""
    with HubServer() as hub:
        hub.add_user("my-name", "hf_mine")
        with Client(hub.environment(tmp_path_factory.mktemp("home"), "hf_mine")) as client:
            push = "print(json.dumps(Chain.from_pretrained(place).push_to_hub('my-name/my-chain').as_dict()))"
            assert client.run(push, place=chain).value["chain"]
            yield client


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, chain: Path, reader: Client, tmp_path: Path) -> None:
    code = "\n".join(python(page))
    if "cbd_hub.evaluation.tasks" in code and find_spec("lm_eval") is None:
        pytest.skip("needs lm-evaluation-harness: pip install 'cbd_hub[eval]'")
    shutil.copytree(chain, tmp_path / "my-chain")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "eval-items").mkdir()
    for name, item in ITEMS.items():
        (tmp_path / "eval-items" / f"{name}.jsonl").write_text(json.dumps(item) + "\n", encoding="utf-8")
    place = "import os; os.chdir(place)\ndel Chain, CbdError, from_chain, Path, json, os\n"
    done = reader.run(place + code, place=tmp_path)
    assert done.status == 0, f"the Python of {page.name} failed:\n{code}\n{done.err[-3000:]}"


def test_most_of_the_python_runs() -> None:
    """A page cannot escape by calling its Python something else: blocks that do not run are few, and say so."""
    told = [(page.name, info) for page in PAGES if page != README for info, _ in blocks(page) if "py" in info.lower()]
    assert {info for _, info in told} <= {"python", "python run", "python no-run"}
    assert len(PYTHON) >= 7
    assert [name for name, info in told if info == "python no-run"] == ["evaluate.md"]


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_and_their_headings_exist(page: Path) -> None:
    check = runpy.run_path(str(ROOT / ".ci" / "check_links.py"))
    assert list(check["broken"](page)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    check = runpy.run_path(str(ROOT / ".ci" / "check_links.py"))
    page = tmp_path / "page.md"
    page.write_text("# One\n[a](#one) [b](#two) [c](other.md)\n", encoding="utf-8")
    assert len(list(check["broken"](page))) == 2


def told_options(name: str) -> set[str]:
    """The options that ``cbd-hub NAME --help`` prints."""
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", result.output.partition("Options:")[2]))


def parse(name: str, *words: str) -> None:
    """Parses a call without carrying it out, as the shell would hand it over; raises what wrong usage raises."""
    assert name in COMMAND.commands, f"No such command: {name}"
    COMMAND.commands[name].make_context(name, list(words))


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_commands_parse(page: Path) -> None:
    """Whole calls in shell blocks parse, required arguments and types included; code spans name what is there."""
    for words in shell_commands(page, "cbd-hub"):
        if "--help" not in words and words[0] != "--debug":
            parse(*(word.strip("'\"") for word in words))
    for name, *words in inline_commands(page):
        if not name.startswith("-"):
            used = {option for word in words for option in re.findall(r"^--[a-z][a-z-]*", word)}
            assert used <= told_options(name), f"{page.name}: `cbd-hub {name}` has no {used - told_options(name)}"


WRONG = ["nothing my-chain", "plan", "plan my-chain --sise 3", "plan my-chain --alpha x", "plan my-chain another"]


@pytest.mark.parametrize("call", WRONG)
def test_wrong_calls_do_not_parse(call: str) -> None:
    with pytest.raises(Exception, match=r"(?i)no such|missing|valid (number|float)|unexpected extra"):
        parse(*call.split())


def test_pictures_are_drawn_the_same_twice(tmp_path: Path) -> None:
    script: dict[str, Any] = runpy.run_path(str(DOCS / "pictures.py"))
    for folder in ("one", "two"):
        script["main"](tmp_path / folder)
    assert set(script["PICTURES"]) <= {path.name for path in (DOCS / "img").iterdir()}
    for name in script["PICTURES"]:
        drawn = (tmp_path / "one" / name).read_bytes()
        assert drawn.startswith(b"\x89PNG") and drawn == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs docs/requirements.txt")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    reference = (tmp_path / "site" / "reference" / "chain" / "index.html").read_text(encoding="utf-8")
    assert 'id="cbd_hub.chain.chain.from_chain"' in reference
    assert ":func:`" not in reference
    contributing = (tmp_path / "site" / "repository" / "CONTRIBUTING" / "index.html").read_text(encoding="utf-8")
    assert 'href="../../how-to/add-an-architecture/"' in contributing
