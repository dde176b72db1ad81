"""One repository at a time: what is there, what differs, and commits on top of what was seen."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_client import Client
from hub_server import HubServer

from cbd_hub.hub.write import Content

SETUP = """
from cbd_hub.errors import PublishError
from cbd_hub.hub.write import Content, Repository, gather
def files_of(**files):
    return {name.replace("_", "."): Content(data) for name, data in files.items()}
def attempt(work):
    try:
        return work()
    except PublishError as error:
        assert "\\n" not in str(error)
        return f"PublishError {error}"
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_user("owner", "hf_owner", orgs=("org",))
        server.add_user("reader", "hf_reader", write=False)
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.environment(tmp_path_factory.mktemp("home"), "hf_owner")) as made:
        yield made


@pytest.fixture(autouse=True)
def empty(hub: HubServer) -> None:
    hub.reset()


def run(client: Client, code: str) -> object:
    return client.run(SETUP + code).value


def test_states(client: Client, hub: HubServer) -> None:
    code = """
it = Repository("org/x")
before = it.state()
it.create(private=True)
it.create(private=True)  # again is nothing
state = it.state()
print(json.dumps([before, state.private, list(state.files), it.url, it.owner]))
"""
    assert run(client, code) == [None, True, [".gitattributes"], f"{hub.endpoint}/org/x", "org"]


def test_only_what_differs_is_committed(client: Client, hub: HubServer) -> None:
    code = """
it = Repository("org/x")
it.create()
files = files_of(small_txt=b"text", big_bin=bytes(20_000)) | {"deep/file.json": Content(b"{}")}
first = it.commit(files, "first", state=it.state())
again = it.commit(files, "again", state=it.state())
other = {**files, **files_of(small_txt=b"texT")}  # of the same size
third = it.commit(other, "third", state=it.state(), delete=["deep/file.json", "not there"])
print(json.dumps([it.differing(other, it.state()), sorted(first.uploaded), first.num_bytes, again.uploaded,
                  again.sha == first.sha, third.uploaded]))
"""
    uploaded = ["big.bin", "deep/file.json", "small.txt"]
    # What was deleted differs again, since it is still among the files that were given.
    assert run(client, code) == [["deep/file.json"], uploaded, 20_006, [], True, ["small.txt"]]
    assert [c.title for c in hub.commits("org/x")] == ["third", "first", "initial commit"]
    assert hub.files("org/x")["small.txt"] == b"texT"
    assert len(hub.uploads) == 1


def test_a_branch_that_moved_on(client: Client, hub: HubServer) -> None:
    code = """
it = Repository("org/x")
it.create()
state = it.state()
it.commit(files_of(a=b"1"), "first", state=state)
print(json.dumps(attempt(lambda: it.commit(files_of(a=b"2"), "late", state=state).sha)))
"""
    said = run(client, code)
    assert "org/x was changed by another commit meanwhile; nothing was overwritten: run this again" in str(said)
    assert hub.files("org/x")["a"] == b"1"


def test_tags_stay_where_they_are(client: Client, hub: HubServer) -> None:
    code = """
it = Repository("org/x")
it.create()
one = it.commit(files_of(a=b"1"), "one", state=it.state())
two = it.commit(files_of(a=b"2"), "two", state=it.state())
it.tag("v", one.sha)
it.tag("v", two.sha)
print(json.dumps(one.sha))
"""
    assert run(client, code) == hub.repos["org/x"].refs["refs/tags/v"]


def test_refusals(client: Client) -> None:
    code = """
print(json.dumps([
    attempt(lambda: Repository("org/x", "hf_reader").create()),
    attempt(lambda: Repository("org/x", "hf_nobody").create()),
    attempt(lambda: Repository("org/bad name").create()),
    attempt(lambda: Repository("nobody").owner),
    attempt(lambda: gather(["org/x"], "t", "d", owner="org", token="hf_reader", private=False)),
    attempt(lambda: [Repository("org/y").create(), Repository("org/y", branch="no").state()]),
]))
"""
    reader, nobody, name, owner, collection, branch = run(client, code)  # type: ignore[misc]
    assert "no permission" in reader and "write access" in reader
    assert "does not accept the token" in nobody
    assert "neither a folder nor a repository id" in name
    assert "names no owner; write owner/name" in owner
    assert "no permission" in collection
    assert "org/y has no revision 'no'" in branch


def test_collections_grow(client: Client, hub: HubServer) -> None:
    code = """
for name in ("org/x", "org/y"):
    Repository(name).create()
options = dict(title="t", description="d" * 200, owner="org", token=None, private=False)
print(json.dumps([gather(["org/x"], **options), gather(["org/x", "org/y"], **options)]))
"""
    one, two = run(client, code)  # type: ignore[misc]
    assert one == two
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection.items] == ["org/x", "org/y"]
    assert len(collection.description or "") <= 150


def test_content_is_hashed_once_at_most(tmp_path: Path) -> None:
    """Its hash is known after the first time, or from the start; the file could be gone by then."""
    path = tmp_path / "f"
    path.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    content, known = Content(path), Content(path, digest)
    assert content.size == known.size == 7
    assert content.sha256 == digest
    path.unlink()
    for one in (content, known):
        assert one.equals((7, digest))
        assert not one.equals((8, digest))
        assert not one.equals((7, "0" * 64))
    assert not content.equals(None)
    git = hashlib.sha1(b"blob 7\0weights", usedforsecurity=False).hexdigest()
    assert Content(b"weights").equals((7, git))
    assert Content(b"weights").equals((7, digest))
    assert not Content(b"weightS").equals((7, git))
