"""Where files come from: a folder, the Hub's cache (laid out by hand), a real server, or a clear refusal."""

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from hub_client import Client
from hub_server import Fault, HubServer
from make_chain import edit_manifest, make_chain, variant_model
from transformers import AutoConfig

from cbd_hub.chain.chain import Chain, from_chain
from cbd_hub.errors import ChainNotFoundError
from cbd_hub.hub.read import Location
from cbd_hub.manifest.manifest import MANIFEST_NAME

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


def test_a_location_is_made_of_a_path_and_stays_one(chain: Path) -> None:
    location = Location(str(chain), revision="v1", cache_dir="elsewhere")
    assert Location.of(location) is location
    assert Location.of(chain) == Location.of(str(chain)) == Location(str(chain))


def test_transformers_loads_what_a_location_names(chain: Path, tmp_path: Path) -> None:
    """Revision, subfolder, cache and offline mode all reach transformers: only the second commit is there to load."""
    for commit, model_type in ((COMMIT, None), (OTHER, "llama")):
        snapshot = cache(tmp_path, "org/m", commit, chain, branch=f"branch-{commit[0]}")
        if model_type is None:
            (snapshot / "anchors" / "a0" / "config.json").write_text("{}")
    location = Location("org/m", "branch-f", "anchors/a0", cache_dir=str(tmp_path), local_files_only=True)
    config = AutoConfig.from_pretrained(location.place, **location.options)
    assert config.model_type == "llama"
    with pytest.raises((OSError, ValueError)):
        AutoConfig.from_pretrained(location.place, **{**location.options, "revision": "branch-0"})
    assert Location.of(chain).inside("anchors/a0").options["subfolder"] == "anchors/a0"


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


# -- a server ---------------------------------------------------------------------------------------------------------

OPEN = """
try:
    chain = Chain.from_pretrained(place, cache_dir=cache, **options)
    if size:
        chain.initialize(chain.plan(size), progress=False)
    print("opened", chain.location.revision)
except CbdError as error:
    print(type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_user("owner", "hf_owner")
        server.add_user("other", "hf_other")
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory, chain: Path) -> Iterator[Client]:
    """As a user who is nobody in particular; the chain is published with its anchors in subfolders."""
    with Client(hub.environment(tmp_path_factory.mktemp("home"), "hf_other")) as made:
        upload = """
from huggingface_hub import HfApi
api = HfApi(token="hf_owner")
api.create_repo("owner/chain")
api.upload_folder(repo_id="owner/chain", folder_path=folder)
api.create_tag("owner/chain", tag="v1")
"""
        assert made.run(upload, folder=chain).status == 0
        yield made


def said(client: Client, cache: Path, place: str = "owner/chain", size: str | None = None, **options: object) -> str:
    done = client.run(OPEN, place=place, cache=cache, size=size, options=options)
    assert done.status == 0, done.err
    assert done.out.count("\n") == 1, done.out
    return done.out


def test_anchors_in_subfolders_of_one_repository(hub: HubServer, client: Client, chain: Path, tmp_path: Path) -> None:
    commit = hub.commits("owner/chain")[0].oid
    for revision in (None, "main", "v1", commit):
        assert said(client, tmp_path, revision=revision) == f"opened {commit}\n"
    code = """
import hashlib
model = from_chain("owner/chain", "100k", cache_dir=cache)
print(json.dumps(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()))
"""
    import hashlib

    local = from_chain(chain, "100k")
    expected = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in local.parameters())).hexdigest()
    assert client.run(code, cache=tmp_path).value == expected


@pytest.mark.skipif(sys.platform != "linux", reason="gives up rights as Linux has them")
@pytest.mark.parametrize("whole", [True, False], ids=["whole files", "ranges"])
def test_a_cache_that_cannot_be_written_is_used(chain: Path, client: Client, tmp_path: Path, whole: bool) -> None:
    """A cache that somebody else filled, as on a cluster: nothing is written into it, and nothing is asked again."""
    fill = """
if whole:
    from huggingface_hub import snapshot_download
    snapshot_download("owner/chain", cache_dir=cache)
from_chain("owner/chain", "100k", cache_dir=cache)
print(json.dumps(1))
"""
    cache_dir = tmp_path / "cache"
    try:
        assert client.run(fill, cache=cache_dir, whole=whole).value == 1
        for path in (cache_dir, *cache_dir.rglob("*")):
            if not path.is_symlink():
                path.chmod(0o555 if path.is_dir() else 0o444)
        before = {path: path.lstat().st_mtime_ns for path in cache_dir.rglob("*")}
        use = """
import ctypes, os
if os.geteuid() == 0:  # without the right to write what may not be written (CAP_DAC_OVERRIDE)
    head, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    assert libc.capget(head, sets) == 0
    sets[0] &= ~2
    assert libc.capset(head, sets) == 0
try:
    (Path(cache) / "probe").write_text("")
except PermissionError:
    model = from_chain("owner/chain", "100k", cache_dir=cache)
    print(json.dumps(sum(p.numel() for p in model.parameters())))
"""
        assert client.run(use, cache=cache_dir).value == from_chain(chain, "100k").num_parameters()
        if not whole:  # another size needs bytes that are not there
            more = client.run(use.replace("100k", "130k"), cache=cache_dir)
            last = more.err.strip().splitlines()[-1]
            assert last.startswith("cbd_hub.errors.ChainNotFoundError: ") and "where you may not write" in last
            assert "HF_HOME or cache_dir=" in last
        assert {path: path.lstat().st_mtime_ns for path in cache_dir.rglob("*")} == before
    finally:
        for path in (cache_dir, *cache_dir.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)


def test_what_the_hub_refuses(hub: HubServer, client: Client, tmp_path: Path) -> None:
    assert "there is no repository 'owner/none' that you may read" in said(client, tmp_path, "owner/none")
    assert "owner/chain has no revision 'v9'; see its branches, tags and commits" in said(
        client, tmp_path, revision="v9"
    )
    assert "neither a folder nor a repository id" in said(client, tmp_path, "own er/chain")
    hub.set_private("owner/chain", True)
    try:
        assert "there is no repository 'owner/chain' that you may read" in said(client, tmp_path)
        assert said(client, tmp_path / "own", token="hf_owner").startswith("opened")
        assert "hf auth login" in said(client, tmp_path, token="hf_nobody")
    finally:
        hub.set_private("owner/chain", False)
    hub.set_gated("owner/chain")
    try:
        assert "owner/chain is gated: ask for access on its page at the Hub, then log in" in said(client, tmp_path)
    finally:
        hub.repos["owner/chain"].gated = False
    assert said(client, tmp_path).startswith("opened")


def test_a_file_that_the_manifest_names_and_the_repository_lacks(
    hub: HubServer, client: Client, tmp_path: Path
) -> None:
    remove = """
from huggingface_hub import HfApi
HfApi(token="hf_owner").delete_file("anchors/a1/config.json", "owner/chain", revision=branch)
"""
    branch = """
from huggingface_hub import HfApi
HfApi(token="hf_owner").create_branch("owner/chain", branch="broken")
"""
    assert client.run(branch).status == 0
    assert client.run(remove, branch="broken").status == 0
    message = said(client, tmp_path, size="100k", revision="broken")
    assert message.startswith("ChainNotFoundError owner/chain at revision ")
    assert "has no file 'anchors/a1/config.json'" in message


def test_a_repository_that_is_no_chain(hub: HubServer, client: Client, tmp_path: Path) -> None:
    make = "from huggingface_hub import HfApi\nHfApi(token='hf_other').create_repo('other/plain')"
    assert client.run(make).status == 0
    assert "other/plain has no file 'chain.json'; is it a chain?" in said(client, tmp_path, "other/plain")


@pytest.mark.parametrize("status", [pytest.param(n, marks=pytest.mark.slow) for n in (429, 500, 503)])
def test_a_hub_that_fails(hub: HubServer, client: Client, tmp_path: Path, status: int) -> None:
    """Whatever the status, one line; and what is cached is still used."""
    assert said(client, tmp_path / "warm").startswith("opened")
    hub.inject(Fault.status(status), path="/resolve/", every=True)
    try:
        assert said(client, tmp_path / "warm").startswith("opened")
        assert said(client, tmp_path / "cold").startswith("ChainNotFoundError ")
    finally:
        hub.clear()


def test_a_manifest_that_was_damaged_on_its_way(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """Its own hash is the Hub's content address; the copy is dropped, and the next call fetches it again."""
    hub.inject(Fault.corrupt(), method="GET", path="chain.json")
    assert "chain.json of owner/chain was damaged on its way" in said(client, tmp_path)
    assert said(client, tmp_path).startswith("opened")


@pytest.mark.slow  # half a minute of the client's own patience
def test_no_hub_at_all(hub: HubServer, tmp_path: Path) -> None:
    environment = hub.environment(tmp_path, None) | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    with Client(environment) as client:
        message = said(client, tmp_path)
        assert message.startswith(
            "ChainNotFoundError chain.json of owner/chain is not in the cache and the Hub cannot"
        )


def test_downloads_are_counted_for_the_library(hub: HubServer, client: Client, tmp_path: Path) -> None:
    """config.json is what the Hub counts downloads by, and the client says who asks."""
    hub.clear()
    said(client, tmp_path, size="100k")
    assert [r for r in hub.requests if r.method == "GET" and r.path.endswith("config.json")]
    code = "from cbd_hub.hub.read import LIBRARY\nprint(json.dumps(LIBRARY))"
    assert client.run(code).value == {"library_name": "cbd_hub", "library_version": version("cbd_hub")}


@pytest.mark.parametrize(
    "fault", [Fault.status(503), Fault.status(429, retry_after=0), Fault.status(500), Fault.drop()], ids=str
)
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_one_hiccup_of_a_whole_file_is_waited_out(
    hub: HubServer, client: Client, tmp_path: Path, method: str, fault: Fault
) -> None:
    hub.clear()
    hub.inject(copy.copy(fault), method=method, path="chain.json")
    try:
        assert said(client, tmp_path).startswith("opened")
        assert hub.faults_hit == 1
    finally:
        hub.clear()
