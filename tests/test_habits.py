"""The files beside the code are true: versions, Pythons, the check that a workflow runs, make help."""

import configparser
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SETUP = configparser.ConfigParser(interpolation=None)
SETUP.read(ROOT / "setup.cfg")


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_names_this_version_and_license() -> None:
    citation = load("CITATION.cff")
    assert citation["version"] == SETUP["metadata"]["version"]
    assert citation["license"] == SETUP["metadata"]["license_expression"]
    assert "2605.07783" in citation["references"][0]["identifiers"][0]["value"]


def test_the_workflow_runs_the_check_on_every_declared_python() -> None:
    workflow = load(".github/workflows/ci.yml")
    job = workflow["jobs"]["check"]
    declared = re.findall(r"Python :: (3\.\d+)", SETUP["metadata"]["classifiers"])
    assert job["strategy"]["matrix"]["python"] == declared
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    assert workflow["permissions"] == {"contents": "read"}


def test_hooks_run_tools_of_the_dev_extra() -> None:
    (repository,) = load(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"  # nothing is fetched
    tools = {hook["entry"].split()[2] for hook in repository["hooks"]}
    extra = {line.split(">")[0] for line in SETUP["options.extras_require"]["dev"].split()}
    assert tools == {"ruff", "mypy"} <= extra


def test_make_help_names_every_target() -> None:
    # Under `make test` the variables of the outer make would add its "Entering directory" lines.
    environment = {
        name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}
    }
    run = subprocess.run(["make", "help"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    told = run.stdout
    phony = re.findall(r"^\.PHONY:(.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    named = {line.split()[0] for line in told.splitlines()}
    assert named == set(" ".join(phony).split())
    assert all(len(line.split()) > 2 and len(line) <= 119 for line in told.splitlines())


def test_what_is_promised_is_tested() -> None:
    """Every test that docs/reliability.md names is there."""
    named = re.findall(r"tests/[\w/]+\.py(?:::\w+)?", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 15
    for name in named:
        path, _, function = name.partition("::")
        assert (ROOT / path).is_file(), name
        assert not function or f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), name


def test_only_the_upload_may_ask_for_an_identity() -> None:
    jobs = load(".github/workflows/publish.yml")["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"] == "pypi"
    assert not any("checkout" in step["uses"] for step in jobs["publish"]["steps"])  # no code of ours runs there
    assert "permissions" not in jobs["build"] and jobs["publish"]["needs"] == "build"
