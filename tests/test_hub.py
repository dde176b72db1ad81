"""Where files come from: a folder, the Hub's cache, or a clear refusal. No network: the cache is laid out by hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from make_chain import edit_manifest, make_chain, variant_model

from cbd_hub.assemble import Chain, from_chain
from cbd_hub.chain import MANIFEST_NAME
from cbd_hub.errors import ChainNotFoundError
from cbd_hub.hub import Location

COMMIT, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chain(tmp_path_factory.mktemp("chains") / "c", variant_model("llama"))


def cache(folder: Path, repo_id: str, commit: str, files: Path, branch: str = "main") -> Path:
    """Lays out a repository in a Hub cache folder as huggingface_hub does; returns the snapshot."""
    repo = folder / ("models--" + repo_id.replace("/", "--"))
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / branch).write_text(commit)
    shutil.copytree(files, repo / "snapshots" / commit)
    return repo / "snapshots" / commit


# -- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder(chain: Path) -> None:
    location = Location(str(chain))
    assert location.is_local
    assert location.file(MANIFEST_NAME) == chain / MANIFEST_NAME
    assert location.inside("anchors/a0").file("config.json") == chain / "anchors" / "a0" / "config.json"
    assert location.pinned(chain / MANIFEST_NAME) is location
    with pytest.raises(ChainNotFoundError, match=f"there is no anchors/a9/config.json in {chain}"):
        location.inside("anchors/a9").file("config.json")


def test_home_and_relative_paths(chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(chain.parent))
    monkeypatch.chdir(chain.parent)
    for place in ("~/c", "./c", "c", chain):
        assert Chain.from_pretrained(place).manifest.name == "llama-chain"


@pytest.mark.parametrize("place", ["./none", "/none/at/all", "~/none", "../none", "a/b/c"])
def test_a_folder_that_is_not_there(place: str) -> None:
    with pytest.raises(ChainNotFoundError, match=f"there is no folder '{place}'"):
        Location(place).file(MANIFEST_NAME)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["own er/name", "-owner/name", "owner/na--me", "a/name.git", "ow\\ner", "x" * 97])
def test_a_malformed_repository_id(place: str, tmp_path: Path) -> None:
    with pytest.raises(ChainNotFoundError) as caught:
        from_chain(place, "1M", cache_dir=str(tmp_path), local_files_only=True)
    assert f"{place!r} is neither a folder nor a repository id" in str(caught.value)


def test_not_in_the_cache(tmp_path: Path) -> None:
    with pytest.raises(ChainNotFoundError) as caught:
        from_chain("owner/name", "1M", revision="v1", cache_dir=str(tmp_path), local_files_only=True)
    message = str(caught.value)
    assert "chain.json of owner/name at revision 'v1' is not in the cache and the Hub cannot be asked" in message
    assert "\n" not in message


def test_offline_and_not_in_the_cache(tmp_path: Path) -> None:
    """In a process of its own, since the variable is read at import."""
    code = """
from cbd_hub import CbdError, from_chain
try:
    from_chain("owner/name", "1M")
except CbdError as error:
    print(type(error).__name__, error)
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ChainNotFoundError ")
    assert "chain.json of owner/name" in done.stdout
    assert "not in the cache" in done.stdout
    assert done.stdout.count("\n") == 1


def test_a_chain_in_the_cache(tmp_path: Path, chain: Path) -> None:
    cache(tmp_path, "owner/name", COMMIT, chain)
    asked = {"cache_dir": str(tmp_path), "local_files_only": True}
    opened = Chain.from_pretrained("owner/name", **asked)  # type: ignore[arg-type]
    assert opened.location.revision == COMMIT  # whatever the branch does from now on
    for revision in (None, "main", COMMIT):
        model = from_chain("owner/name", "100k", revision=revision, **asked)  # type: ignore[arg-type]
        assert model.config.cbd_hub["chain"] == "owner/name"
        assert model.config.cbd_hub["revision"] == COMMIT
    local = from_chain(chain, "100k")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.parameters(), strict=True))
    with pytest.raises(ChainNotFoundError, match="at revision 'v2' is not in the cache"):
        from_chain("owner/name", "100k", revision="v2", **asked)  # type: ignore[arg-type]


def test_a_branch_that_moves_on_does_not_mix_revisions(tmp_path: Path, chain: Path) -> None:
    """A folder named "snapshots" above the cache does not lead astray either."""
    where = tmp_path / "snapshots" / "hub"
    cache(where, "owner/name", COMMIT, chain)
    opened = Chain.from_pretrained("owner/name", cache_dir=str(where), local_files_only=True)
    moved = make_chain(tmp_path / "moved", variant_model("llama"), seed=1)
    cache(where, "owner/name", OTHER, moved)
    model = opened.initialize(opened.plan("100k"), progress=False)
    assert model.config.cbd_hub["revision"] == COMMIT
    old = from_chain(chain, "100k")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), old.parameters(), strict=True))
    assert Chain.from_pretrained("owner/name", cache_dir=str(where), local_files_only=True).location.revision == OTHER


def test_anchors_in_repositories_of_their_own(tmp_path: Path, chain: Path) -> None:
    shutil.copytree(chain, tmp_path / "top")
    for i, anchor in enumerate(("a0", "a1", "a2")):
        shutil.move(tmp_path / "top" / "anchors" / anchor, tmp_path / anchor)
        edit_manifest(tmp_path / "top", "anchors", i, "repo_id", value=f"owner/{anchor}")
        edit_manifest(tmp_path / "top", "anchors", i, "revision", value=OTHER)
        edit_manifest(tmp_path / "top", "anchors", i, "subfolder", value=None)
        cache(tmp_path / "hub", f"owner/{anchor}", OTHER, tmp_path / anchor)
    cache(tmp_path / "hub", "owner/name", COMMIT, tmp_path / "top")
    opened = Chain.from_pretrained("owner/name", cache_dir=str(tmp_path / "hub"), local_files_only=True)
    model = opened.initialize(opened.plan("100k"), progress=False)
    local = from_chain(chain, "100k")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), local.parameters(), strict=True))
    opened.save_pretrained(tmp_path / "copy")
    copied = from_chain(tmp_path / "copy", "100k")
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), local.parameters(), strict=True))
    edit_manifest(tmp_path / "top", "anchors", 0, "revision", value=COMMIT)
    cache(tmp_path / "hub", "owner/moved", COMMIT, tmp_path / "top")
    opened = Chain.from_pretrained("owner/moved", cache_dir=str(tmp_path / "hub"), local_files_only=True)
    with pytest.raises(ChainNotFoundError, match=f"owner/a0 at revision '{COMMIT}' is not in the cache"):
        opened.initialize(opened.plan("100k"), progress=False)
