"""Publishing against a real server: what lands where, what is sent twice (nothing), and what a killed push leaves."""

import copy
import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import Client, Done
from hub_server import Fault, HubServer
from make_chain import add_calibration, add_tokenizer, make_chain, refresh, variant_model
from safetensors.torch import load_file, save_file

from cbd_hub.chain.chain import Chain, from_chain
from cbd_hub.hub.card_results import update_card
from cbd_hub.hub.cards import CURVE_PICTURE, chain_card, is_generated
from cbd_hub.manifest.manifest import MANIFEST_NAME

REPOSITORIES = ["org/demo", "org/llama-chain-a0", "org/llama-chain-a1"]
"""The chain's and its anchors'."""

PUSH = """
try:
    published = Chain.from_pretrained(folder).push_to_hub(repo, **options)
    print(json.dumps(published.as_dict()))
except CbdError as error:
    print(type(error).__name__, error)
    raise SystemExit(1)
"""

LOAD = """
import hashlib
model = from_chain(repo, "100k", cache_dir=cache, **options)
digest = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
print(json.dumps([digest, model.config.cbd_hub["revision"]]))
"""


def digest(folder: Path) -> str:
    import hashlib

    model = from_chain(folder, "100k")
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_user("owner", "hf_owner", orgs=("org",))
        server.add_user("reader", "hf_reader", write=False)
        server.add_user("other", "hf_other")
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with Client(hub.environment(tmp_path_factory.mktemp("home"), "hf_owner")) as made:
        yield made


@pytest.fixture(autouse=True)
def empty(hub: HubServer) -> None:
    hub.reset()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chains") / "c"
    make_chain(folder, variant_model("llama", vocab_size=320))
    data = json.loads((folder / MANIFEST_NAME).read_text())
    data["anchors"].pop()  # two anchors are enough, and half the requests
    shutil.rmtree(folder / "anchors" / "a2")
    (folder / MANIFEST_NAME).write_text(json.dumps(data))
    maps = load_file(folder / "index_maps.safetensors")
    save_file({k: v for k, v in maps.items() if k.startswith("a1/")}, folder / "index_maps.safetensors")
    refresh(folder)
    add_tokenizer(folder)
    add_calibration(folder, torch.randint(0, 300, (4, 16), dtype=torch.int32))
    (folder / CURVE_PICTURE).write_bytes(b"\x89PNG\r\n")
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "c")


def change_anchor(folder: Path, name: str = "a0") -> None:
    """Another version of one anchor's weights."""
    path = folder / "anchors" / name / "model.safetensors"
    weights = load_file(path)
    key = next(iter(weights))
    weights[key] = weights[key] + 1
    save_file(weights, path, {"format": "pt"})
    refresh(folder)


def push(client: Client, folder: Path, repo: str = "org/demo", **options: Any) -> Done:
    return client.run(PUSH, folder=folder, repo=repo, options=options)


def load(client: Client, cache: Path, repo: str = "org/demo", **options: Any) -> Any:
    return client.run(LOAD, repo=repo, cache=cache, options=options).value


# -- what lands where -------------------------------------------------------------------------------------------------


def test_everything_is_there(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    told = push(client, folder).value
    assert sorted(hub.repos) == REPOSITORIES
    chain = hub.files("org/demo")
    manifest = json.loads(chain[MANIFEST_NAME])
    top = Chain.from_pretrained(folder).manifest.top_files
    assert {*top, MANIFEST_NAME, "README.md", CURVE_PICTURE} <= set(chain)
    assert "calibration.safetensors" in top
    for anchor, repo in zip(manifest["anchors"], REPOSITORIES[1:], strict=True):
        (commit, *earlier) = hub.commits(repo)
        assert [c.title for c in earlier] == ["initial commit"]  # one commit an anchor
        assert (anchor["repo_id"], anchor["revision"]) == (repo, commit.oid)
        assert "subfolder" not in anchor
        for name in anchor["files"]:
            assert hub.files(repo)[name] == (folder / "anchors" / anchor["name"] / name).read_bytes()
        assert [ref for ref, oid in hub.repos[repo].refs.items() if "cbd-" in ref and oid == commit.oid]
    (collection,) = hub.collections.values()
    assert {item["id"] for item in collection.items} == set(REPOSITORIES)
    assert told["collection"].endswith(collection.slug)
    assert told["chain"]["sha"] == hub.commits("org/demo")[0].oid
    assert load(client, tmp_path / "cache") == [digest(folder), told["chain"]["sha"]]
    # Every anchor loads with plain transformers, tokenizer included.
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(repo, cache_dir=cache)
tokenizer = AutoTokenizer.from_pretrained(repo, cache_dir=cache)
print(json.dumps([model.num_parameters(), len(tokenizer("word 7")["input_ids"])]))
"""
    for anchor in manifest["anchors"]:
        count, tokens = client.run(code, repo=anchor["repo_id"], cache=tmp_path / "cache").value
        assert count == anchor["num_parameters"]
        assert tokens > 1


def test_cards_run_as_printed(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    push(client, folder)
    for repo in REPOSITORIES:
        text = hub.files(repo)["README.md"].decode()
        assert is_generated(text)
        assert f"library_name: {'cbd-hub' if repo == REPOSITORIES[0] else 'transformers'}" in text
        assert ("has no chat template" in text) == (repo == REPOSITORIES[0])
        blocks = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            done = client.run(block)
            assert done.status == 0, done.err
    assert "base_model: org/llama-chain-a0" in hub.files("org/llama-chain-a1")["README.md"].decode()
    assert f"]({CURVE_PICTURE})" in hub.files("org/demo")["README.md"].decode()
    assert 'from_chain("org/demo"' in hub.files("org/llama-chain-a1")["README.md"].decode()


def test_pushing_again_sends_nothing(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder)
    before = {repo: hub.commits(repo)[0].oid for repo in REPOSITORIES}
    hub.clear()
    told = push(client, folder).value
    assert told["chain"]["uploaded"] == [] == told["anchors"][0]["uploaded"]
    assert not [r for r in hub.requests if "/commit/" in r.path or "/preupload/" in r.path or r.method == "PUT"]
    assert {repo: hub.commits(repo)[0].oid for repo in REPOSITORIES} == before
    assert len(hub.collections) == 1


def test_only_what_changed_is_sent(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    push(client, folder)
    before, old = {repo: hub.commits(repo)[0].oid for repo in REPOSITORIES}, digest(folder)
    revision = hub.commits("org/demo")[0].oid
    change_anchor(folder)
    hub.clear()
    told = push(client, folder).value
    assert told["anchors"][0]["uploaded"] == ["model.safetensors"]
    assert told["anchors"][1]["uploaded"] == []
    assert set(told["chain"]["uploaded"]) == {MANIFEST_NAME, "checksums.json"}
    assert len(hub.uploads) == 1
    assert hub.commits(REPOSITORIES[2])[0].oid == before[REPOSITORIES[2]]
    assert load(client, tmp_path / "new")[0] == digest(folder) != old
    assert load(client, tmp_path / "old", revision=revision)[0] == old  # the version before stays what it was


def test_shards_that_are_no_more_are_removed(hub: HubServer, client: Client, tmp_path: Path) -> None:
    model = variant_model("llama")
    push(client, make_chain(tmp_path / "sharded", model, max_shard_size="100KB"))
    assert len([name for name in hub.files(REPOSITORIES[1]) if name.endswith(".safetensors")]) > 1
    push(client, make_chain(tmp_path / "whole", model))
    assert [name for name in hub.files(REPOSITORIES[1]) if "safetensors" in name] == ["model.safetensors"]
    load(client, tmp_path / "cache")


def test_a_card_that_somebody_edited_stays(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder)
    edit = """
from huggingface_hub import upload_file
upload_file(path_or_fileobj=b"---\\ntags: [cbd-hub]\\n---\\nMy words", path_in_repo="README.md", repo_id=repo)
"""
    assert client.run(edit, repo="org/demo").status == 0
    change_anchor(folder)
    push(client, folder)
    assert hub.files("org/demo")["README.md"].decode().endswith("My words")
    (folder / "README.md").write_text("---\ntags: [cbd-hub]\n---\nOther words")  # the local one, on purpose
    push(client, folder)
    assert hub.files("org/demo")["README.md"].decode().endswith("Other words")
    chain_card(Chain.from_pretrained(folder).manifest, folder=folder).save(folder / "README.md")
    push(client, folder)
    assert hub.files("org/demo")["README.md"].decode().endswith("Other words")


def test_cards_that_do_not_name_the_library_are_no_reason_to_refuse(
    hub: HubServer, client: Client, folder: Path
) -> None:
    for place in (folder, folder / "anchors" / "a0"):
        (place / "README.md").write_text("My words")
    assert push(client, folder).status == 0
    change_anchor(folder)
    assert push(client, folder).status == 0
    assert hub.files("org/demo")["README.md"] == hub.files(REPOSITORIES[1])["README.md"] == b"My words"


def test_results_stay_in_a_card_that_is_written_again(hub: HubServer, client: Client, folder: Path) -> None:
    row = {"name": "m", "task": "piqa", "metric": "acc", "value": 0.515, "stderr": 0.1, "items": 9}
    chain_card(Chain.from_pretrained(folder).manifest, folder=folder).save(folder / "README.md")
    update_card(folder, [row])
    push(client, folder)
    card = hub.files("org/demo")["README.md"].decode()
    assert "value: 0.515" in card and 'from_chain("org/demo"' in card and is_generated(card)
    add = """
from huggingface_hub import metadata_eval_result, metadata_update
more = metadata_eval_result(
    model_pretty_name="m", task_pretty_name="Text", task_id="text-generation", metrics_pretty_name="acc",
    metrics_id="acc", metrics_value=0.625, dataset_pretty_name="boolq", dataset_id="boolq",
)
metadata_update(repo, more)
"""
    assert client.run(add, repo="org/demo").status == 0
    update_card(folder, [{**row, "value": 0.717}])
    push(client, folder)
    card = hub.files("org/demo")["README.md"].decode()
    assert "value: 0.717" in card and "value: 0.625" in card and "value: 0.515" not in card
    hub.clear()
    push(client, folder)
    assert not hub.uploads  # the same again, results of the Hub's own and all
    change_anchor(folder)
    push(client, folder)
    card = hub.files("org/demo")["README.md"].decode()
    assert "value: 0.625" not in card  # of other weights
    assert "value: 0.717" in card  # of this folder, as far as can be known


def test_results_are_dropped_where_the_manifest_alone_tells_of_weights(
    hub: HubServer, client: Client, folder: Path
) -> None:
    data = json.loads((folder / MANIFEST_NAME).read_text())
    chain_card(Chain.from_pretrained(folder).manifest, folder=folder).save(folder / "README.md")
    (folder / MANIFEST_NAME).write_text(json.dumps({**data, "checksums": None}))
    (folder / "checksums.json").unlink()
    update_card(folder, [{"name": "m", "task": "piqa", "metric": "acc", "value": 0.515, "items": 9}])
    assert push(client, folder).status == 0
    assert "checksums.json" not in hub.files("org/demo") and b"value: 0.515" in hub.files("org/demo")["README.md"]
    chain_card(Chain.from_pretrained(folder).manifest, folder=folder).save(folder / "README.md")
    change_anchor(folder)
    assert push(client, folder).status == 0
    assert "checksums.json" not in hub.files("org/demo")
    assert b"value: 0.515" not in hub.files("org/demo")["README.md"]


def test_what_lies_elsewhere_already_is_not_sent_again(
    hub: HubServer, client: Client, folder: Path, tmp_path: Path
) -> None:
    """A chain whose anchors are published, pushed under another name: only the chain's own repository is new."""
    push(client, folder)
    hub.clear()
    told = push(client, Path("org/demo"), "owner/mine", collection=False).value  # from the Hub, by its id
    assert [anchor["repo_id"] for anchor in told["anchors"]] == REPOSITORIES[1:]
    assert sorted(hub.repos) == [*REPOSITORIES, "owner/mine"]
    assert load(client, tmp_path / "cache", "owner/mine")[0] == digest(folder)
    assert len(hub.collections) == 1


# -- options ----------------------------------------------------------------------------------------------------------


def test_private(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    assert push(client, folder, private=True).status == 0
    assert all(hub.repos[repo].private for repo in REPOSITORIES)
    assert all(collection.private for collection in hub.collections.values())
    assert load(client, tmp_path / "cache")[0] == digest(folder)
    code = "try:\n    from_chain(repo, '100k', token='hf_other', cache_dir=cache)\nexcept CbdError as e:\n    print(e)"
    said = client.run(code, repo="org/demo", cache=tmp_path / "none").out
    assert "there is no repository 'org/demo' that you may read" in said
    assert said.count("\n") == 1


def test_never_public_by_mistake(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder)
    change_anchor(folder)
    hub.clear()
    done = push(client, folder, private=True)
    assert done.status == 1
    assert "org/demo exists and is public" in done.out
    assert not hub.uploads


def test_a_dry_run_changes_nothing(hub: HubServer, client: Client, folder: Path) -> None:
    told = push(client, folder, dry_run=True).value
    assert not hub.repos
    assert not [r for r in hub.requests if r.method != "GET"]
    sizes = [path.stat().st_size for path in (folder / "anchors" / "a0").iterdir()]
    assert told["anchors"][0]["num_bytes"] > sum(sizes)
    push(client, folder)
    assert push(client, folder, dry_run=True).value["chain"]["uploaded"] == []


def test_a_branch(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    push(client, folder)
    old = digest(folder)
    change_anchor(folder)
    push(client, folder, branch="next")
    assert load(client, tmp_path / "main")[0] == old
    assert load(client, tmp_path / "next", revision="next")[0] == digest(folder)
    assert hub.commits(REPOSITORIES[1], "next")[0].oid != hub.commits(REPOSITORIES[1])[0].oid


def test_pull_requests(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    push(client, folder)
    old = digest(folder)
    change_anchor(folder)
    told = push(client, folder, create_pr=True).value
    assert told["chain"]["pull_request"] and told["anchors"][0]["pull_request"]
    assert told["anchors"][1]["pull_request"] is None
    assert load(client, tmp_path / "main")[0] == old
    assert load(client, tmp_path / "pr", revision="refs/pr/1")[0] == digest(folder)


def test_a_license(hub: HubServer, client: Client, folder: Path) -> None:
    push(client, folder, license="mit")
    assert all("license: mit" in hub.files(repo)["README.md"].decode() for repo in REPOSITORIES)
    assert json.loads(hub.files("org/demo")[MANIFEST_NAME])["license"] == "mit"


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(client: Client, hub: HubServer, folder: Path, *words: str, repo: str = "org/demo", **options: Any) -> None:
    done = push(client, folder, repo, **options)
    assert done.status == 1, done.err
    assert done.out.count("\n") == 1, done.out
    for word in words:
        assert word in done.out
    assert not hub.uploads


def test_no_permission(hub: HubServer, client: Client, folder: Path) -> None:
    refused(client, hub, folder, "PublishError", "no permission", "write access", token="hf_reader", repo="reader/x")
    refused(client, hub, folder, "PublishError", "no permission", token="hf_other")  # not a member of org
    refused(client, hub, folder, "PublishError", "does not accept the token", token="hf_nobody")
    assert not hub.repos


def test_bad_names(hub: HubServer, client: Client, folder: Path) -> None:
    refused(client, hub, folder, "names no owner", repo="demo")
    refused(client, hub, folder, "neither a folder nor a repository id", repo="org/de mo")
    refused(client, hub, folder, "two parts of the chain would be org/llama-chain-a0", repo="org/llama-chain-a0")


def test_somebody_elses_repository(hub: HubServer, client: Client, folder: Path) -> None:
    make = """
from huggingface_hub import create_repo, create_tag, upload_file
create_repo(repo)
upload_file(path_or_fileobj=b"theirs", path_in_repo="model.bin", repo_id=repo)
create_tag(repo, tag="cbd-mine")
"""
    assert client.run(make, repo=REPOSITORIES[2]).status == 0
    hub.clear()
    refused(client, hub, folder, "org/llama-chain-a1 exists and holds something else (model.bin)")
    assert list(hub.repos) == [REPOSITORIES[2]]


def test_a_damaged_chain_is_not_published(hub: HubServer, client: Client, folder: Path) -> None:
    path = folder / "anchors" / "a1" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(client, hub, folder, "IntegrityError", "model.safetensors is not the file that the manifest names")
    path.unlink()
    refused(client, hub, folder, "IntegrityError", "model.safetensors")
    assert not hub.requests


def test_somebody_else_pushes_meanwhile(hub: HubServer, client: Client, folder: Path, tmp_path: Path) -> None:
    push(client, folder)
    old = digest(folder)
    change_anchor(folder)

    def meddle() -> None:
        repository = hub.repos["org/demo"]
        now = repository.resolve("main")
        repository.commit("refs/heads/main", now.files, now.oid, "theirs", "", "other")

    hub.clear()
    hub.inject(Fault.call(meddle, after=False, drop=False), path="org/demo/commit/")
    done = push(client, folder)
    assert done.status == 1
    assert "org/demo was changed by another commit meanwhile; nothing was overwritten: run this again" in done.out
    assert load(client, tmp_path / "cache")[0] == old
    assert push(client, folder).status == 0
    assert load(client, tmp_path / "new")[0] == digest(folder)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_hub_that_fails(hub: HubServer, client: Client, folder: Path, status: int) -> None:
    hub.inject(Fault.status(status), path="/api/repos/create")
    done = push(client, folder)
    if done.status:  # what the client does not try again
        assert done.out.startswith("PublishError ")
        assert push(client, folder).status == 0
    assert sorted(hub.repos) == REPOSITORIES


# -- killed -----------------------------------------------------------------------------------------------------------


def requests_of_a_push(hub: HubServer, client: Client, folder: Path) -> int:
    hub.clear()
    assert push(client, folder).status == 0
    return len(hub.requests)


@pytest.mark.parametrize(
    ("first", "after", "step"),
    [
        pytest.param(True, False, 1, id="first-before", marks=pytest.mark.slow),
        pytest.param(True, True, 1, id="first-after", marks=pytest.mark.slow),
        pytest.param(False, False, 1, id="again-before", marks=pytest.mark.slow),
        pytest.param(False, True, 1, id="again-after", marks=pytest.mark.slow),
        pytest.param(False, True, 4, id="again-after-every-fourth"),
    ],
)
def test_killed_at_every_request(
    hub: HubServer, client: Client, folder: Path, tmp_path: Path, first: bool, after: bool, step: int
) -> None:
    """The process dies as the n-th request arrives, or when it was carried out and not answered, for every n."""
    old = digest(folder)
    if not first:
        assert push(client, folder).status == 0
        change_anchor(folder)
    new = digest(folder)
    base = copy.deepcopy(hub.repos)
    count = requests_of_a_push(hub, client, folder)
    expected = {repo: (len(hub.commits(repo)), set(hub.files(repo))) for repo in REPOSITORIES}
    weights = {repo: hub.files(repo)["model.safetensors"] for repo in REPOSITORIES[1:]}
    assert count > 15
    seen = set()
    for n in range(0, count, step):
        hub.reset()
        hub.repos.update(copy.deepcopy(base))
        hub.inject(Fault.call(lambda: os.kill(client.pid, signal.SIGKILL), after=after), at=n)
        assert push(client, folder).status == -signal.SIGKILL
        assert hub.faults_hit == 1
        if MANIFEST_NAME in (hub.files("org/demo") if "org/demo" in hub.repos else {}):
            found = load(client, tmp_path / f"cache-{n}")[0]
            seen.add(found)
            assert found == new if first else found in (old, new)
        else:
            assert first
            seen.add(None)
        done = push(client, folder)
        assert done.status == 0, f"request {n}: {done.out}{done.err[-500:]}"
        # No anchor was committed twice, no weights were sent twice, and everything is there.
        assert {repo: (len(hub.commits(repo)), set(hub.files(repo))) for repo in REPOSITORIES} == expected
        assert len(hub.uploads) == len(set(hub.uploads))
        manifest = json.loads(hub.files("org/demo")[MANIFEST_NAME])
        for anchor in manifest["anchors"]:
            assert hub.files(anchor["repo_id"], anchor["revision"])["model.safetensors"] == weights[anchor["repo_id"]]
        (collection,) = hub.collections.values()
        assert {item["id"] for item in collection.items} == set(REPOSITORIES)
    assert load(client, tmp_path / "last")[0] == new
    assert seen >= ({None} if first else {old, new})
