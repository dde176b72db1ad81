"""The chain that strangers' chains are made from, and the process that they are opened in."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostile import tiny_chain
from sandbox import Sandbox


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chain that no test alters."""
    return tiny_chain(tmp_path_factory.mktemp("pristine") / "chain")


@pytest.fixture
def chain(pristine: Path, tmp_path: Path) -> Path:
    """A tiny chain that a test may alter."""
    return Path(shutil.copytree(pristine, tmp_path / "chain"))


@pytest.fixture(scope="session")
def sandbox(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    made = Sandbox(pristine, tmp_path_factory.mktemp("sandbox") / "home")
    yield made
    made.stop()
