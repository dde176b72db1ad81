"""The loopback Hub answers the real clients as the Hub does, and goes wrong as it is told to."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Fault, HubServer
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    RepoFolder,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, httpx
from huggingface_hub.utils.sha import git_hash
from safetensors import numpy as safetensors

# Of the library that huggingface_hub uploads with.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")

WEIGHTS = safetensors.save({"a": np.arange(4000, dtype=np.float32), "b": np.ones((3, 5), np.float16)})
CARD = b"""---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
tags: [cbd-hub, distillation]
base_model: [owner/large, owner/small]
base_model_relation: merge
---
# A model
"""


@pytest.fixture(scope="module")
def running() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_user("owner", "hf_owner", orgs=["lab"])
        server.add_user("owner", "hf_read", write=False)
        server.add_user("other", "hf_other")
        yield server


@pytest.fixture
def hub(running: HubServer) -> HubServer:
    running.clear()
    running.repos.clear()
    running.collections.clear()
    return running


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    """The owner's client, who has a repository ``owner/m``."""
    client = as_user(hub, "hf_owner")
    client.create_repo("owner/m")
    return client


def as_user(hub: HubServer, token: str | bool) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=token)


def push(api: HfApi, files: dict[str, bytes], repo_id: str = "owner/m", **options: Any) -> CommitInfo:
    """One commit. File objects keep LFS files away from Xet, which this process's client has enabled."""
    operations = [CommitOperationAdd(path, io.BytesIO(data)) for path, data in files.items()]
    return api.create_commit(repo_id, operations, **{"commit_message": "push", **options})


def fetch(hub: HubServer, cache: Path, name: str, **options: Any) -> Path:
    options = {"endpoint": hub.endpoint, "token": "hf_owner", "cache_dir": cache, **options}
    return Path(hf_hub_download("owner/m", name, **options))


def calls(hub: HubServer) -> list[str]:
    return [f"{r.method} {r.path} {r.status}" for r in hub.requests]


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


# -- commits ----------------------------------------------------------------------------------------------------------


def test_a_commit_of_regular_and_lfs_files(hub: HubServer, api: HfApi) -> None:
    hub.clear()
    large = bytes(10_000)
    pushed = push(api, {"a/config.json": b"{}", "w.safetensors": b"few", "large.bin": large}, commit_message="first")
    assert hub.files("owner/m").keys() == {".gitattributes", "a/config.json", "w.safetensors", "large.bin"}
    assert hub.files("owner/m")["w.safetensors"] == b"few"
    blobs = hub.commits("owner/m")[0].files
    assert {path for path, blob in blobs.items() if blob.lfs} == {"w.safetensors", "large.bin"}
    assert sorted(hub.uploads) == sorted(blobs[path].sha256 for path in ("w.safetensors", "large.bin"))
    first, start = hub.commits("owner/m")
    assert (first.oid, first.title, first.author, first.parent) == (pushed.oid, "first", "owner", start.oid)
    assert start.title == "initial commit"
    assert start.parent is None
    assert pushed.repo_url.repo_id == "owner/m"
    methods = [r.method for r in hub.requests]
    assert methods.count("PUT") == 2
    assert calls(hub)[0] == "POST /api/models/owner/m/preupload/main 200"
    assert calls(hub)[1] == "POST /owner/m.git/info/lfs/objects/batch 200"
    assert calls(hub)[-1] == "POST /api/models/owner/m/commit/main 200"


def test_what_the_hub_has_is_not_sent_again(hub: HubServer, api: HfApi) -> None:
    pushed = push(api, {"w.safetensors": WEIGHTS, "a": b"1"})
    again = push(api, {"w.safetensors": WEIGHTS, "a": b"1"})
    assert again.oid == pushed.oid  # the client compares what preupload tells it, and makes no empty commit
    hub.clear()
    push(api, {"copy.safetensors": WEIGHTS})
    assert hub.files("owner/m")["copy.safetensors"] == WEIGHTS
    assert hub.uploads == []
    assert not any(r.method == "PUT" for r in hub.requests)


def test_deleting(hub: HubServer, api: HfApi) -> None:
    push(api, {"a/1": b"1", "a/b/2": b"2", "ab": b"3", "c": b"4"})
    api.create_commit("owner/m", [CommitOperationDelete("a/"), CommitOperationDelete("c")], commit_message="less")
    assert hub.files("owner/m").keys() == {".gitattributes", "ab"}
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist: none"):
        api.create_commit("owner/m", [CommitOperationDelete("none")], commit_message="less")
    assert [c.title for c in hub.commits("owner/m")] == ["less", "push", "initial commit"]


def test_a_commit_on_a_parent_that_is_not_the_head(hub: HubServer, api: HfApi) -> None:
    start = hub.commits("owner/m")[0].oid
    first = push(api, {"a": b"1"}, parent_commit=start)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        push(api, {"a": b"2"}, parent_commit=start)
    assert status_of(refused) == 412
    assert [c.oid for c in hub.commits("owner/m")] == [first.oid, start]
    second = push(api, {"a": b"2"}, parent_commit=first.oid[:7])
    assert hub.commits("owner/m")[0].oid == second.oid


def test_content_that_is_not_what_it_claims(hub: HubServer, api: HfApi) -> None:
    url = f"{hub.storage}/storage/owner/m/{'0' * 64}"
    assert get_session().put(url, content=b"something").status_code == 400
    assert hub.uploads == []
    lines = [
        {"key": "header", "value": {"summary": "s", "description": ""}},
        {"key": "lfsFile", "value": {"path": "w", "algo": "sha256", "oid": "0" * 64, "size": 9}},
    ]
    answer = get_session().post(
        f"{hub.endpoint}/api/models/owner/m/commit/main",
        content="\n".join(map(json.dumps, lines)),
        headers=build_hf_headers(token="hf_owner"),
    )
    assert answer.status_code == 400
    assert "LFS pointer pointed to a file that does not exist: w" in answer.headers["X-Error-Message"]
    assert len(hub.commits("owner/m")) == 1


def test_branches_and_tags(hub: HubServer, api: HfApi) -> None:
    first = push(api, {"a": b"1"})
    api.create_tag("owner/m", tag="v1", tag_message="the first")
    api.create_branch("owner/m", branch="dev/x", revision="v1")
    second = push(api, {"a": b"2"}, revision="dev/x")
    refs = api.list_repo_refs("owner/m")
    assert [(ref.name, ref.ref, ref.target_commit) for ref in refs.branches] == [
        ("main", "refs/heads/main", first.oid),
        ("dev/x", "refs/heads/dev/x", second.oid),
    ]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", first.oid)]
    contents = [hub.files("owner/m", r)["a"] for r in ("main", "v1", "dev/x", first.oid, second.oid, second.oid[:7])]
    assert contents == [b"1", b"1", b"2", b"1", b"2", b"2"]
    api.create_branch("owner/m", branch="dev/x", exist_ok=True)
    api.create_tag("owner/m", tag="v1", revision="dev/x", exist_ok=True)
    assert hub.files("owner/m", "v1")["a"] == b"1"
    for again in (lambda: api.create_branch("owner/m", branch="dev/x"), lambda: api.create_tag("owner/m", tag="v1")):
        with pytest.raises(HfHubHTTPError, match="Reference already exists") as refused:
            again()
        assert status_of(refused) == 409
    for revision in ("v1", first.oid, "none"):  # what is no branch takes no commit
        with pytest.raises(RevisionNotFoundError):
            push(api, {"a": b"3"}, revision=revision)
    api.delete_branch("owner/m", branch="dev/x")
    api.delete_tag("owner/m", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag("owner/m", tag="v1")
    with pytest.raises(HfHubHTTPError, match="cannot be deleted"):
        api.delete_branch("owner/m", branch="main")
    assert [ref.name for ref in api.list_repo_refs("owner/m").branches] == ["main"]
    assert [c.commit_id for c in api.list_repo_commits("owner/m", revision=second.oid)][:2] == [second.oid, first.oid]


def test_a_pull_request(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    push(api, {"a": b"1"})
    other = as_user(hub, "hf_other")
    opened = push(other, {"a": b"2", "w.safetensors": WEIGHTS}, create_pr=True)
    assert (opened.pr_num, opened.pr_revision) == (1, "refs/pr/1")
    added = push(other, {"b.safetensors": WEIGHTS[::-1]}, revision="refs/pr/1", parent_commit=opened.oid)
    assert hub.files("owner/m")["a"] == b"1"
    assert hub.files("owner/m", "refs/pr/1")["a"] == b"2"
    assert [c.oid for c in hub.commits("owner/m", "refs/pr/1")][:2] == [added.oid, opened.oid]
    assert fetch(hub, tmp_path, "a", revision="refs/pr/1").read_bytes() == b"2"
    assert calls(hub)[-1] == "GET /owner/m/resolve/refs%2Fpr%2F1/a 200"
    assert push(other, {"a": b"3"}, create_pr=True).pr_num == 2
    pulls = api.list_repo_refs("owner/m", include_pull_requests=True).pull_requests
    assert pulls is not None
    assert [pull.ref for pull in pulls] == ["refs/pr/1", "refs/pr/2"]
    with pytest.raises(HfHubHTTPError) as refused:
        push(other, {"a": b"2"})
    assert status_of(refused) == 403


# -- reading ----------------------------------------------------------------------------------------------------------


def test_a_download_and_what_the_cache_saves(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    commit = push(api, {"w.safetensors": WEIGHTS})
    hub.clear()
    path = fetch(hub, tmp_path, "w.safetensors")
    assert path.read_bytes() == WEIGHTS
    assert path.parent.name == commit.oid
    assert path.resolve().name == hub.commits("owner/m")[0].files["w.safetensors"].sha256
    assert [(r.method, r.sent) for r in hub.requests] == [("HEAD", 0), ("GET", len(WEIGHTS))]
    hub.clear()
    assert fetch(hub, tmp_path, "w.safetensors", revision=commit.oid) == path
    assert hub.requests == []
    fetch(hub, tmp_path, "w.safetensors")
    assert calls(hub) == ["HEAD /owner/m/resolve/main/w.safetensors 200"]


def test_what_is_not_there(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    commit = hub.commits("owner/m")[0].oid
    with pytest.raises(RemoteEntryNotFoundError):
        fetch(hub, tmp_path, "none.json")
    # The answer named the commit, so the client remembers which one lacks the file.
    assert [p.relative_to(tmp_path) for p in tmp_path.rglob("none.json")] == [
        Path(f"models--owner--m/.no_exist/{commit}/none.json")
    ]
    with pytest.raises(RevisionNotFoundError):
        fetch(hub, tmp_path, "none.json", revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("owner/none")
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree("owner/m", "none"))
    assert not api.file_exists("owner/m", "none.json")
    assert api.file_exists("owner/m", ".gitattributes")


def test_metadata_of_a_file(hub: HubServer, api: HfApi) -> None:
    commit = push(api, {"config.json": b"{}", "w.safetensors": WEIGHTS})
    blobs = hub.commits("owner/m")[0].files
    for name, etag in (("config.json", git_hash(b"{}")), ("w.safetensors", blobs["w.safetensors"].sha256)):
        url = hf_hub_url("owner/m", name, endpoint=hub.endpoint)
        found = get_hf_file_metadata(url, token="hf_owner", endpoint=hub.endpoint)
        assert (found.commit_hash, found.etag, found.location) == (commit.oid, etag, url)
        assert found.size == len(blobs[name].data)


def test_ranges(hub: HubServer, api: HfApi) -> None:
    push(api, {"w.safetensors": WEIGHTS})
    url = hf_hub_url("owner/m", "w.safetensors", endpoint=hub.endpoint)
    total = len(WEIGHTS)
    for wanted, start, stop in (("0-9", 0, 10), ("100-", 100, total), ("-7", total - 7, total), ("5-99999", 5, total)):
        answer = get_session().get(url, headers={"Range": f"bytes={wanted}"})
        assert answer.status_code == 206
        assert answer.content == WEIGHTS[start:stop]
        assert answer.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{total}"
    assert (hub.requests[-1].range, hub.requests[-1].sent) == ("bytes=5-99999", total - 5)
    beyond = get_session().get(url, headers={"Range": f"bytes={total}-"})
    assert beyond.status_code == 416
    assert beyond.headers["Content-Range"] == f"bytes */{total}"
    whole = get_session().get(url)
    assert (whole.status_code, whole.headers["Accept-Ranges"]) == (200, "bytes")


def test_one_tensor_through_its_header(hub: HubServer, api: HfApi) -> None:
    push(api, {"w.safetensors": WEIGHTS})
    hub.clear()
    tensors = api.parse_safetensors_file_metadata("owner/m", "w.safetensors").tensors
    assert (tensors["b"].dtype, tensors["b"].shape) == ("F16", [3, 5])
    begin, end = tensors["b"].data_offsets
    first = 8 + struct.unpack("<Q", WEIGHTS[:8])[0]
    url = hf_hub_url("owner/m", "w.safetensors", endpoint=hub.endpoint)
    read = get_session().get(url, headers={"Range": f"bytes={first + begin}-{first + end - 1}"}).content
    assert np.array_equal(np.frombuffer(read, np.float16), np.ones(15, np.float16))
    assert [r.sent for r in hub.requests] == [len(WEIGHTS), 30]


def test_lfs_files_behind_a_redirect(tmp_path: Path) -> None:
    with HubServer(redirect=True) as hub:
        hub.add_user("owner", "hf_owner")
        api = as_user(hub, "hf_owner")
        api.create_repo("owner/m", private=True)
        commit = push(api, {"config.json": b"{}", "w.safetensors": WEIGHTS})
        hub.clear()
        path = fetch(hub, tmp_path, "w.safetensors")
        assert path.read_bytes() == WEIGHTS
        assert path.parent.name == commit.oid
        sha256 = hub.commits("owner/m")[0].files["w.safetensors"].sha256
        assert path.resolve().name == sha256
        # The storage refuses whoever sends it a token, so the client did not.
        assert calls(hub) == [
            "HEAD /owner/m/resolve/main/w.safetensors 302",
            f"GET /storage/owner/m/{sha256} 200",
        ]
        url = hf_hub_url("owner/m", "w.safetensors", endpoint=hub.endpoint)
        found = get_hf_file_metadata(url, token="hf_owner", endpoint=hub.endpoint)
        assert (found.size, found.location) == (len(WEIGHTS), f"{hub.storage}/storage/owner/m/{sha256}")
        headers = {**build_hf_headers(token="hf_owner"), "Range": "bytes=8-15"}
        assert get_session().get(url, headers=headers).content == WEIGHTS[8:16]
        assert fetch(hub, tmp_path, "config.json").read_bytes() == b"{}"


def test_a_snapshot(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    commit = push(api, {"config.json": b"{}", "a/b/w.safetensors": WEIGHTS})
    options = {"endpoint": hub.endpoint, "token": "hf_owner", "cache_dir": tmp_path}
    folder = Path(snapshot_download("owner/m", **options))
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert found == hub.files("owner/m")
    assert folder.name == commit.oid
    hub.clear()
    assert snapshot_download("owner/m", revision=commit.oid, **options) == str(folder)
    assert hub.requests == []


def test_what_a_repository_holds(hub: HubServer, api: HfApi) -> None:
    pushed = push(api, {"README.md": CARD, "a/b/w.safetensors": WEIGHTS, "a/c": b"3"})
    info = api.model_info("owner/m", files_metadata=True)
    assert (info.sha, info.author, info.private, info.gated) == (pushed.oid, "owner", False, False)
    assert (info.library_name, info.pipeline_tag) == ("transformers", "text-generation")
    assert info.card_data is not None
    assert info.card_data.base_model == ["owner/large", "owner/small"]
    expected = {"cbd-hub", "distillation", "license:apache-2.0", "base_model:merge:owner/small"}
    assert expected <= set(info.tags or [])
    weights = hub.commits("owner/m")[0].files["a/b/w.safetensors"]
    siblings = {s.rfilename: s for s in info.siblings or []}
    assert siblings.keys() == hub.files("owner/m").keys()
    assert (siblings["README.md"].size, siblings["README.md"].blob_id) == (len(CARD), git_hash(CARD))
    assert siblings["README.md"].lfs is None
    lfs = {"sha256": weights.sha256, "size": len(WEIGHTS), "pointer_size": len(weights.pointer)}
    assert siblings["a/b/w.safetensors"].lfs == lfs
    assert siblings["a/b/w.safetensors"].blob_id == git_hash(weights.pointer)
    assert (api.model_info("owner/m").siblings or [])[0].size is None
    assert api.model_info("owner/m", revision=hub.commits("owner/m")[1].oid).card_data is None

    assert [e.path for e in api.list_repo_tree("owner/m")] == [".gitattributes", "README.md", "a"]
    assert [e.path for e in api.list_repo_tree("owner/m", "a")] == ["a/b", "a/c"]
    everything = list(api.list_repo_tree("owner/m", recursive=True, revision=pushed.oid))
    assert [e.path for e in everything if isinstance(e, RepoFolder)] == ["a", "a/b"]
    assert {e.path for e in everything if isinstance(e, RepoFile)} == hub.files("owner/m").keys()
    some = api.get_paths_info("owner/m", ["a/b", "a/b/w.safetensors", "none"])
    assert [type(e) for e in some] == [RepoFolder, RepoFile]
    assert isinstance(some[1], RepoFile)
    assert some[1].lfs == lfs


def test_a_card_is_checked(hub: HubServer, api: HfApi) -> None:
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push(api, {"README.md": b"# A model"})
    for card in (b"---\ntags: [a\n---\n", b"---\njust text\n---\n"):
        with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
            push(api, {"README.md": card})
    assert hub.files("owner/m")["README.md"] == b"# A model"


# -- who may do what --------------------------------------------------------------------------------------------------


def test_repositories_come_and_go(hub: HubServer, api: HfApi) -> None:
    push(api, {"a": b"1"})
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo("owner/m")
    assert status_of(refused) == 409
    assert api.create_repo("owner/m", exist_ok=True).repo_id == "owner/m"
    assert api.create_repo("mine").repo_id == "owner/mine"
    assert api.create_repo("lab/m", private=True).repo_id == "lab/m"
    assert hub.repos["lab/m"].private
    api.move_repo("owner/m", "lab/moved")
    assert hub.files("lab/moved")["a"] == b"1"
    api.delete_repo("owner/mine")
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("owner/mine")
    assert hub.repos.keys() == {"lab/m", "lab/moved"}
    api.update_repo_settings("lab/moved", private=True, gated="auto")
    assert (hub.repos["lab/moved"].private, hub.repos["lab/moved"].gated) == (True, "auto")
    assert api.whoami()["orgs"][0]["name"] == "lab"


def test_a_private_repository(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    push(api, {"a": b"1"})
    hub.set_private("owner/m", True)
    for token, status in ((False, 401), ("hf_other", 404)):
        with pytest.raises(RepositoryNotFoundError) as refused:
            as_user(hub, token).model_info("owner/m")
        assert status_of(refused) == status
        assert not isinstance(refused.value, GatedRepoError)
        with pytest.raises(RepositoryNotFoundError):
            fetch(hub, tmp_path, "a", token=token)
    assert fetch(hub, tmp_path, "a", token="hf_read").read_bytes() == b"1"
    hub.set_private("owner/m", False)
    assert as_user(hub, False).model_info("owner/m").private is False


def test_a_gated_repository(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    push(api, {"a": b"1"})
    hub.set_gated("owner/m")
    for token, status in ((False, 401), ("hf_other", 403)):
        with pytest.raises(GatedRepoError) as refused:
            fetch(hub, tmp_path, "a", token=token)
        assert status_of(refused) == status
        assert as_user(hub, token).model_info("owner/m").gated == "manual"  # what it holds may be seen
    assert fetch(hub, tmp_path / "owner", "a").read_bytes() == b"1"
    hub.set_gated("owner/m", granted=["other"])
    assert fetch(hub, tmp_path / "other", "a", token="hf_other").read_bytes() == b"1"


def test_who_may_not_write(hub: HubServer, api: HfApi) -> None:
    for token, status in (("hf_other", 403), ("hf_read", 403), (False, 401), ("hf_unknown", 401)):
        client = as_user(hub, token)
        attempts = [
            lambda client=client: push(client, {"a": b"1"}),
            lambda client=client: client.create_repo("lab/new"),
            lambda client=client: client.create_tag("owner/m", tag="v1"),
            lambda client=client: client.delete_repo("owner/m"),
        ]
        for attempt in attempts:
            with pytest.raises(HfHubHTTPError) as refused:
                attempt()
            assert status_of(refused) == status, token
    assert hub.repos.keys() == {"owner/m"}
    assert hub.repos["owner/m"].refs.keys() == {"refs/heads/main"}
    assert len(hub.commits("owner/m")) == 1


def test_collections(hub: HubServer, api: HfApi) -> None:
    made = api.create_collection("My models: 1st", namespace="lab", description="All sizes")
    assert made.slug.startswith("lab/my-models-1st-")
    assert made.slug in hub.collections
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_collection("My models: 1st", namespace="lab")
    assert status_of(refused) == 409
    assert api.create_collection("My models: 1st", namespace="lab", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, "owner/m", "model", note="the largest")
    with pytest.raises(HfHubHTTPError) as refused:
        api.add_collection_item(made.slug, "owner/m", "model")
    assert status_of(refused) == 409
    again = api.add_collection_item(made.slug, "owner/m", "model", exists_ok=True)
    assert [(item.item_id, item.item_type, item.note) for item in again.items] == [("owner/m", "model", "the largest")]
    with pytest.raises(HfHubHTTPError) as refused:
        api.add_collection_item(made.slug, "owner/none", "model")
    assert status_of(refused) == 404
    with pytest.raises(HfHubHTTPError) as refused:
        as_user(hub, "hf_other").add_collection_item(made.slug, "owner/m", "model")
    assert status_of(refused) == 403
    assert [c.slug for c in api.list_collections(owner="lab", item="models/owner/m")] == [made.slug]
    assert list(api.list_collections(owner="owner")) == []
    hidden = api.create_collection("Hidden", private=True)
    assert api.get_collection(hidden.slug).description is None
    with pytest.raises(HfHubHTTPError):
        as_user(hub, "hf_other").get_collection(hidden.slug)


# -- faults -----------------------------------------------------------------------------------------------------------


def test_a_busy_hub_is_asked_again(hub: HubServer, api: HfApi) -> None:
    """The client waits for Retry-After and one second more."""
    hub.clear()
    hub.inject(Fault.status(429, retry_after=1))
    start = time.monotonic()
    assert [e.path for e in api.list_repo_tree("owner/m")] == [".gitattributes"]
    assert time.monotonic() - start >= 2
    assert [r.status for r in hub.requests] == [429, 200]
    assert hub.faults_hit == 1


def test_a_server_error_changes_nothing(hub: HubServer, api: HfApi) -> None:
    """The client does not repeat a commit, which may have happened."""
    hub.inject(Fault.status(500), method="POST", path="/commit/")
    with pytest.raises(HfHubHTTPError) as failed:
        push(api, {"a": b"1"})
    assert status_of(failed) == 500
    assert len(hub.commits("owner/m")) == 1
    push(api, {"a": b"1"})
    assert len(hub.commits("owner/m")) == 2


def test_which_requests_a_fault_hits(hub: HubServer, api: HfApi) -> None:
    push(api, {"a.json": b"1", "b.bin": b"2"})

    def statuses(*names: str) -> list[int]:
        urls = [hf_hub_url("owner/m", name, endpoint=hub.endpoint) for name in names]
        return [get_session().get(url).status_code for url in urls]

    hub.inject(Fault.status(502), at=1, path=r"\.json$")
    assert statuses("a.json", "b.bin", "a.json", "a.json") == [200, 200, 502, 200]
    hub.clear()
    hub.inject(Fault.status(503), at=1, method="GET", every=True)
    assert statuses("a.json", "b.bin", "a.json") == [200, 503, 503]
    assert hub.faults_hit == 2
    hub.clear()
    hub.inject(Fault.status(503), method="POST")
    assert statuses("a.json") == [200]
    assert hub.faults_hit == 0


def test_a_connection_dropped_before_the_commit(hub: HubServer, api: HfApi) -> None:
    hub.inject(Fault.drop(), method="POST", path="/commit/")
    with pytest.raises(httpx.RemoteProtocolError):
        push(api, {"a": b"1"})
    assert len(hub.commits("owner/m")) == 1
    assert calls(hub)[-1] == "POST /api/models/owner/m/commit/main 0"


def test_an_upload_dropped_once_is_sent_again(hub: HubServer, api: HfApi) -> None:
    hub.inject(Fault.drop(), method="PUT")
    push(api, {"w.safetensors": WEIGHTS})
    assert [r.status for r in hub.requests if r.method == "PUT"] == [0, 200]
    assert len(hub.uploads) == 1
    assert hub.files("owner/m")["w.safetensors"] == WEIGHTS


def test_a_truncated_download_goes_on(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """The client writes chunks of 10 MiB, and asks again for what it had not written."""
    chunk, large = 10 * 2**20, bytes(range(256)) * 43_000
    push(api, {"w.safetensors": WEIGHTS, "large.bin": large})
    for name, data, fraction, written in (("w.safetensors", WEIGHTS, 0.25, 0), ("large.bin", large, 0.99, chunk)):
        hub.clear()
        hub.inject(Fault.truncate(fraction), method="GET")
        assert fetch(hub, tmp_path, name).read_bytes() == data
        assert [(r.status, r.range, r.sent) for r in hub.requests if r.method == "GET"] == [
            (200, None, int(len(data) * fraction)),
            (206 if written else 200, f"bytes={written}-" if written else None, len(data) - written),
        ]


def test_a_slow_body(hub: HubServer, api: HfApi) -> None:
    push(api, {"w.safetensors": WEIGHTS})
    url = hf_hub_url("owner/m", "w.safetensors", endpoint=hub.endpoint)
    hub.inject(Fault.slow(0.5))
    start = time.monotonic()
    assert get_session().get(url, timeout=0.4).content == WEIGHTS  # the time limit is for each read
    assert 0.45 < time.monotonic() - start < 5
    hub.inject(Fault.slow(20))
    with pytest.raises(httpx.ReadTimeout):
        get_session().get(url, timeout=0.2)
    assert hub.faults_hit == 2


def test_a_wrong_etag(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """The client names its copy so and cannot tell."""
    push(api, {"w.safetensors": WEIGHTS})
    hub.inject(Fault.etag("0" * 64), method="HEAD")
    path = fetch(hub, tmp_path, "w.safetensors")
    assert path.resolve().name == "0" * 64
    assert path.read_bytes() == WEIGHTS


def test_a_corrupt_body(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    """The client compares nothing but the size."""
    push(api, {"w.safetensors": WEIGHTS})
    hub.inject(Fault.corrupt(), method="GET")
    read = fetch(hub, tmp_path, "w.safetensors").read_bytes()
    assert read[:-16] == WEIGHTS[:-16]
    assert read[-16:] == bytes(255 - byte for byte in WEIGHTS[-16:])


def test_something_happens_before_a_request(hub: HubServer, api: HfApi) -> None:
    """Someone else commits between what the client saw and its own commit."""
    head = hub.commits("owner/m")[0].oid
    hub.inject(Fault.call(lambda: push(api, {"b": b"2"}), after=False, drop=False), method="POST", path="/commit/")
    with pytest.raises(HfHubHTTPError) as refused:
        push(api, {"a": b"1"}, parent_commit=head)
    assert status_of(refused) == 412
    assert hub.files("owner/m").keys() == {".gitattributes", "b"}
    called: list[int] = []
    hub.inject(Fault.call(lambda: called.append(1), after=False), method="POST", path="/commit/")
    with pytest.raises(httpx.RemoteProtocolError):
        push(api, {"a": b"1"})
    assert called == [1]
    assert "a" not in hub.files("owner/m")


# -- processes of their own -------------------------------------------------------------------------------------------


def test_a_client_killed_when_its_commit_was_made(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    code = """
from huggingface_hub import HfApi
api = HfApi()
api.upload_file(path_or_fileobj="w.safetensors", path_in_repo="w.safetensors", repo_id="owner/m")
"""
    (tmp_path / "w.safetensors").write_bytes(WEIGHTS)
    clients: list[subprocess.Popen[bytes]] = []

    def kill() -> None:
        os.kill(clients[0].pid, signal.SIGKILL)

    hub.inject(Fault.call(kill, after=True), method="POST", path="/commit/")
    environment = hub.environment(tmp_path / "home", "hf_owner")
    clients.append(subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path))
    assert clients[0].wait(timeout=60) == -signal.SIGKILL
    assert hub.files("owner/m")["w.safetensors"] == WEIGHTS
    assert len(hub.uploads) == 1  # a path on disk: not a word to Xet
    assert calls(hub)[-1] == "POST /api/models/owner/m/commit/main 0"


def test_the_environment_of_a_client(hub: HubServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    environment = hub.environment(tmp_path, None)
    assert "mine" not in environment.values()
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["HF_HUB_DISABLE_XET"] == "1"
    assert environment["HF_ENDPOINT"] == hub.endpoint
    assert hub.environment(tmp_path, "t")["HF_TOKEN"] == "t"


def test_a_model_pushed_and_loaded_by_transformers(hub: HubServer, tmp_path: Path) -> None:
    code = """
import json
import torch
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM
model = tiny_model(tiny_config("llama"))
pushed = model.push_to_hub("owner/tiny", private=True, commit_message="a model")
again = AutoModelForCausalLM.from_pretrained("owner/tiny", revision=pushed.oid)
same = all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
print(json.dumps([pushed.oid, same]))
"""
    environment = hub.environment(tmp_path, "hf_owner") | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    head = hub.commits("owner/tiny")[0]
    assert json.loads(done.stdout.splitlines()[-1]) == [head.oid, True]
    assert hub.repos["owner/tiny"].private
    assert head.title == "a model"
    assert head.files.keys() >= {"config.json", "generation_config.json", "model.safetensors", "README.md"}
    assert hub.uploads == [head.files["model.safetensors"].sha256]
    pushing, loading = "\n".join(calls(hub)).split("POST /api/models/owner/tiny/commit/main 200\n")
    assert "HEAD /owner/tiny/resolve/main/README.md 404" in pushing  # a look that must not end in an error
    for name in ("config.json", "model.safetensors"):
        assert f"GET /owner/tiny/resolve/{head.oid}/{name} 200" in loading
    assert "/main/" not in loading
