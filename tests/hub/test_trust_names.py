"""No name in a repository leads out of it: files, links, other repositories."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hostile import (
    COMMIT,
    CONFIG,
    GENERATION,
    WEIGHTS,
    Watched,
    assert_none,
    between,
    equal,
    linux_only,
    made_of,
    make,
    manifest_of,
    refusal,
    tree,
    write_manifest,
)
from make_chain import edit_manifest
from sandbox import Sandbox

from cbd_hub.chain.chain import Chain
from cbd_hub.errors import CbdError
from cbd_hub.manifest.manifest import CHECKSUMS_NAME, INDEX_MAPS_NAME, MANIFEST_NAME, file_entry

pytestmark = linux_only

# -- names stay inside the repository ---------------------------------------------------------------------------------

OUTSIDE = [
    "../secret.safetensors", "anchors/../../secret.safetensors", "a0/../../../secret.safetensors",
    "{secret}", "/{secret}", "//{secret}", "\\..\\secret.safetensors", "..\\secret.safetensors",
    "C:\\secret.safetensors", "C:/secret.safetensors", "C:secret.safetensors", "file:{secret}",
    "\0.safetensors", "model.safetensors\0.safetensors",
]  # fmt: skip
"""Names that would lead out of a repository somewhere, if they were followed."""

STRANGE = [
    "./.safetensors", "model.safetensors/x.safetensors", "x" * 300 + ".safetensors", "x/" * 3000 + "x.safetensors",
    "%2e%2e/secret.safetensors", "~/secret.safetensors", "$HOME/x.safetensors", "con.safetensors",
    "a\nb.safetensors", "a\rb.safetensors", "\x1b[2J.safetensors", " .safetensors", "\u202ebin.safetensors",
    "．．/secret.safetensors", "𝕏" * 80 + ".safetensors", "-rf.safetensors", "*.safetensors", "é.safetensors",
]  # fmt: skip
"""Names that stay inside, where there is no such file, and that a file system or a terminal may stumble over."""


@pytest.mark.parametrize("place", ["subfolder", "files", "weights", "tokenizer"])
def test_a_name_that_leads_outside_or_nowhere_is_refused(chain: Path, place: str) -> None:
    size, ordinary, secret = between(chain), manifest_of(chain), chain.parent / "secret.safetensors"
    shutil.copyfile(chain / WEIGHTS, secret)
    before, problems = tree(chain.parent), {}
    for name in OUTSIDE + STRANGE:
        manifest = json.loads(json.dumps(ordinary))
        path, anchor = name.replace("{secret}", str(secret)), manifest["anchors"][0]
        if place == "subfolder":
            anchor["subfolder"] = path
        elif place == "files":
            anchor["files"][path] = file_entry(secret).model_dump()
        elif place == "weights":
            anchor["files"][path] = anchor["files"].pop("model.safetensors")
        else:
            manifest["tokenizer"] = {path: file_entry(secret).model_dump()}
        write_manifest(chain, manifest)
        before = tree(chain.parent)
        with Watched() as outcome:
            opened = Chain.from_pretrained(chain)
            if place == "tokenizer":
                assert len(opened.tokenizer) < 0, "it was accepted"
            elif place != "files":
                opened.initialize(opened.plan(size), progress=False)
                raise AssertionError("it was accepted")
        problem = outcome.problem
        if name in OUTSIDE and "is not a path inside the repository" not in str(outcome.error):
            problem = f"only later: {outcome.error!r}"
        with Watched() as outcome:
            Chain.from_pretrained(chain).save_pretrained(chain.parent / "copy")
            raise AssertionError("it was copied")
        written = sorted(set(tree(chain.parent)) ^ set(before))
        problems[ascii(name)[:60]] = problem or outcome.problem or (f"it wrote {written}" if written else "")
    assert_none(problems)


@pytest.mark.parametrize(
    "names",
    [
        [MANIFEST_NAME],
        [CHECKSUMS_NAME, INDEX_MAPS_NAME],
        ["anchors/a0/config.json"],
        ["anchors/a1/model.safetensors"],
        ["tokenizer.json", "./tokenizer.json", "anchors/./a0/config.json"],
        [MANIFEST_NAME + ".partial/x"],
        ["tokenizer.json", "tokenizer.json/x"],
        ["anchors"],
        ["x", "x/y"],
        ["."],
    ],
    ids=lambda names: names[-1],
)
def test_names_that_collide_are_refused_or_copied_right(chain: Path, tmp_path: Path, names: list[str]) -> None:
    """A tokenizer's files share a folder with everything else: no entry takes another's place unseen."""
    size, manifest = between(chain), manifest_of(chain)
    for name in names:
        path = chain / name
        if not path.exists() and not (chain / name.split("/")[0]).is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
        lost = {"size": 1, "sha256": "0" * 64}
        manifest["tokenizer"][name] = file_entry(path).model_dump() if path.is_file() else lost
    write_manifest(chain, manifest)
    before = tree(tmp_path)
    with Watched() as outcome:
        Chain.from_pretrained(chain).save_pretrained(tmp_path / "copy")
    assert outcome.problem == ""
    if outcome.error is not None:
        assert tree(tmp_path) == before
        return
    assert equal(made_of(tmp_path / "copy", size), made_of(chain, size))
    files = [Chain.from_pretrained(place).manifest.anchors[0].files for place in (chain, tmp_path / "copy")]
    assert files[0] == files[1]


# -- links in a local folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_MAPS_NAME, CHECKSUMS_NAME, CONFIG, WEIGHTS])
def test_a_link_is_followed_and_its_content_must_fit(chain: Path, tmp_path: Path, name: str) -> None:
    """The Hub's own cache is made of links, so they are followed; what lies behind must be what the manifest says."""
    size = between(chain)
    expected = made_of(chain, size)
    shutil.move(chain / name, tmp_path / "elsewhere")
    (chain / name).symlink_to(tmp_path / "elsewhere")
    assert equal(made_of(chain, size), expected)
    (chain / name).unlink()
    (tmp_path / "secret").write_text("password: hunter2\n" * 1000)
    (chain / name).symlink_to(tmp_path / "secret")
    outcome = make(chain, size)
    assert refusal(chain, size) == ""
    assert "hunter2" not in str(outcome.error)
    assert (tmp_path / "secret").read_text() == "password: hunter2\n" * 1000


def test_what_is_no_file_is_not_waited_for(sandbox: Sandbox, chain: Path) -> None:
    size, problems = between(chain), {}
    for name in (MANIFEST_NAME, INDEX_MAPS_NAME, CHECKSUMS_NAME, CONFIG, GENERATION, WEIGHTS):
        path, ordinary = chain / name, (chain / name).read_bytes()
        for what in ("/dev/zero", "/proc/self/mem", "pipe", "loop", "folder", "nothing"):
            path.unlink()
            if what == "pipe":
                os.mkfifo(path)
            elif what == "folder":
                path.mkdir()
            elif what != "nothing":
                path.symlink_to(path if what == "loop" else what)
            problems[f"{name} {what}"] = sandbox.ask(chain, size).problem
            if what == "folder":
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            path.write_bytes(ordinary)
    assert_none(problems)


def test_a_lie_about_another_repository_does_not_drop_its_files(chain: Path, tmp_path: Path) -> None:
    """A damaged download is dropped. A file that is not what some manifest says of it is another repository's."""
    hub, size, ordinary = tmp_path / "hub", between(chain), manifest_of(chain)
    victim = hub / "models--owner--victim"
    snapshot = victim / "snapshots" / COMMIT
    for folder in (victim / "blobs", snapshot):
        folder.mkdir(parents=True)
    problems = {}
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        for path in sorted((chain / "anchors" / "a0").iterdir()):  # as the Hub's client lays them out
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, victim / "blobs" / digest)
            (snapshot / path.name).unlink(missing_ok=True)
            (snapshot / path.name).symlink_to(Path("../../blobs") / digest)
        manifest = json.loads(json.dumps(ordinary))
        anchor = manifest["anchors"][0]
        anchor |= {"repo_id": "owner/victim", "revision": COMMIT, "subfolder": None}
        anchor["files"][name] = {"size": 5, "sha256": "0" * 64}
        write_manifest(chain, manifest)
        with Watched() as outcome:
            opened = Chain.from_pretrained(chain, cache_dir=str(hub), local_files_only=True)
            opened.initialize(opened.plan(size), progress=False)
            raise AssertionError("it was accepted")
        problems[name] = outcome.problem or ("" if (snapshot / name).exists() else "the victim's file is gone")
    assert_none(problems)


# -- a repository is named by its id ----------------------------------------------------------------------------------

ADDRESSES = [
    "http://127.0.0.1:9/owner/name", "https://huggingface.co/owner/name", "file:///etc", "file://{outside}",
    "hf://owner/name", "s3:owner/name", "git@127.0.0.1:owner/name", "127.0.0.1:9/name", "localhost/owner/name",
    "owner/name/..", "../name", "owner/..", "../../etc", "./name", "/", "{outside}", "{outside}/", "~", "~/name",
    "~nobody-of-that-name/x", "owner/name?revision=main", "owner/name#x", "owner/name@main", "owner name/x",
    "owner\\name", "owner/na\nme", "owner/\0", "", " ", ".", "-owner/name", "owner/" + "x" * 300, "x" * 5000,
    "owner/%2e%2e", "datasets/owner/name", "refs/../x",
]  # fmt: skip


def test_a_repository_is_no_address_and_no_path(sandbox: Sandbox, chain: Path) -> None:
    """Refused before anybody is asked, and nothing outside the chain is read: an anchor lies there, and would fit."""
    size, manifest, outside = between(chain), manifest_of(chain), chain.parent / "outside"
    shutil.move(chain / "anchors" / "a0", outside)
    problems = {}
    for name in ADDRESSES:
        repo_id = name.replace("{outside}", str(outside))
        manifest["anchors"][0] |= {"repo_id": repo_id, "revision": COMMIT, "subfolder": None}
        write_manifest(chain, manifest)
        reply = sandbox.ask(chain, size)
        read = [path for path in reply.opened if outside in path.parents]
        problems[ascii(name)[:60]] = reply.problem or (f"it read {read}" if read else "")
    assert_none(problems)


def test_a_revision_is_a_commit(sandbox: Sandbox, chain: Path) -> None:
    problems = {}
    edit_manifest(chain, "anchors", 0, "repo_id", value="owner/name")
    for revision in (
        "main", "../" * 13 + "x", "refs/pr/1", "0" * 39 + "/", "0" * 41, "0" * 40 + "\n", "A" * 40, "", 5, None,
        [COMMIT],
    ):  # fmt: skip
        edit_manifest(chain, "anchors", 0, "revision", value=revision)
        reply = sandbox.ask(chain, between(chain))
        problems[repr(revision)] = reply.problem or ("" if "revision" in reply.message else reply.message)
    assert_none(problems)


def test_a_folder_of_the_same_name_does_not_stand_in_for_a_repository(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest pins a commit; a folder that happens to lie below the working folder is no commit."""
    size, manifest = between(chain), manifest_of(chain)
    shutil.copytree(chain / "anchors" / "a0", tmp_path / "cwd" / "owner" / "name")
    manifest["anchors"][0] |= {"repo_id": "owner/name", "revision": COMMIT, "subfolder": None}
    write_manifest(chain, manifest)
    monkeypatch.chdir(tmp_path / "cwd")
    opened = Chain.from_pretrained(chain, cache_dir=str(tmp_path / "hub"), local_files_only=True)
    with pytest.raises(CbdError, match="is not in the cache"):
        opened.initialize(opened.plan(size), progress=False)
