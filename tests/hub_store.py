"""What a Hub keeps, in memory: repositories with a history as in git, users and collections.

A commit is an immutable snapshot of all files. Branches, tags and pull requests are nothing but names of commits, kept
under git's full names: ``refs/heads/main``, ``refs/tags/v1``, ``refs/pr/1``.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import yaml

__all__ = ["Blob", "Collection", "Commit", "HubError", "Repository", "User", "front_matter", "timestamp"]

_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
"""``.gitattributes``, which the Hub puts into every new repository."""


class HubError(Exception):
    """A request that the Hub refuses: the status, the code that clients map to exceptions, and a message."""

    def __init__(self, status: int, code: str | None, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.fields = fields
        """Further fields of the JSON answer."""
        self.headers: dict[str, str] = {}
        """Further headers of the answer."""


def timestamp() -> str:
    """The time as the Hub writes it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def front_matter(text: str) -> dict[str, Any]:
    """The YAML block that a card opens with; empty where there is none.

    Raises:
        HubError: The block is no YAML mapping.
    """
    block = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        metadata = str(error)
    if not isinstance(metadata, dict | None):
        message = f"Invalid YAML metadata: {metadata}"
        raise HubError(400, None, message, errors=[{"message": message}], warnings=[])
    return metadata or {}


def _tags(card: Mapping[str, Any]) -> list[str]:
    """The tags that the Hub makes from a card's metadata."""

    def values(key: str) -> list[str]:
        value = card.get(key) or []
        return [value] if isinstance(value, str) else value

    tags = [tag for key in ("library_name", "pipeline_tag", "tags", "language") for tag in values(key)]
    tags += [f"{kind}:{value}" for kind in ("license", "base_model") for value in values(kind)]
    tags += [f"base_model:{card.get('base_model_relation', 'finetune')}:{base}" for base in values("base_model")]
    return list(dict.fromkeys([*tags, *(f"dataset:{name}" for name in values("datasets"))]))


@dataclass(frozen=True)
class Blob:
    """The content of a file, kept by git itself or, through a pointer, by LFS."""

    data: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git stores in place of an LFS file."""
        head = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return head.encode()

    @cached_property
    def oid(self) -> str:
        """Git's id, that of the pointer for an LFS file."""
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A snapshot of all files."""

    oid: str
    """40 hexadecimal digits."""
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]
    """By path."""


@dataclass(frozen=True)
class User:
    name: str
    write: bool = True
    """Whether the token may write."""
    orgs: tuple[str, ...] = ()

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.orgs)


@dataclass
class Collection:
    slug: str
    title: str
    owner: str
    description: str | None = None
    private: bool = False
    items: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        kept = {key: value for key, value in vars(self).items() if value is not None}
        return {**kept, "lastUpdated": timestamp(), "theme": "green", "upvotes": 0, "position": 0}


class Repository:
    """A repository and its history, which begins with one commit of ``.gitattributes``, as on the Hub."""

    def __init__(self, owner: str, private: bool = False) -> None:
        self.owner = owner
        self.private = private
        self.gated: bool | str = False
        self.granted: set[str] = set()
        """Names of the users who may read a gated repository; its owner always may."""
        self.history: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        """Commits by the full names of what points to them."""
        self.authors: dict[str, str] = {}
        """Who opened a pull request, by its name."""
        self.objects: dict[str, bytes] = {}
        """Contents of LFS files by sha256, committed or only uploaded."""
        self.created = timestamp()
        self.commit("refs/heads/main", {".gitattributes": Blob(_ATTRIBUTES)}, None, "initial commit", "", owner)

    def visible_to(self, user: User | None) -> bool:
        return not self.private or (user is not None and self.owner in user.namespaces)

    def open_to(self, user: User | None) -> bool:
        """Whether a user passes the gate."""
        return not self.gated or (
            user is not None and (self.owner in user.namespaces or not self.granted.isdisjoint(user.namespaces))
        )

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, a tag, a pull request or (the first 7 digits or more of) a commit id stands for.

        Raises:
            HubError: There is none.
        """
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.history[self.refs[name]]
        for oid, commit in self.history.items():
            if len(revision) >= 7 and oid.startswith(revision):
                return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def head(self, revision: str) -> str:
        """The full name of what a commit may be put on: a branch or a pull request.

        Raises:
            HubError: There is none, or the revision is a tag or a commit.
        """
        for name in (f"refs/heads/{revision}", revision):
            if name in self.refs and not name.startswith("refs/tags/"):
                return name
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def file(self, revision: str, path: str) -> tuple[Commit, Blob]:
        """A file and the commit it was found in.

        Raises:
            HubError: No such revision or file.
        """
        commit = self.resolve(revision)
        if path not in commit.files:
            error = HubError(404, "EntryNotFound", f"Entry not found: {path}")
            error.headers["X-Repo-Commit"] = commit.oid  # clients remember that this commit lacks the file
            raise error
        return commit, commit.files[path]

    def log(self, revision: str) -> list[Commit]:
        """The commits that led to a revision, newest first."""
        commits = [self.resolve(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.history[parent])
        return commits

    def commit(
        self, ref: str, files: Mapping[str, Blob], parent: str | None, title: str, message: str, by: str
    ) -> Commit:
        """Puts a snapshot on top of ``parent`` and lets ``ref`` point to it."""
        content = [len(self.history), self.owner, parent, title, sorted((path, b.oid) for path, b in files.items())]
        oid = hashlib.sha1(repr(content).encode()).hexdigest()
        self.history[oid] = Commit(oid, parent, title, message, by, timestamp(), dict(files))
        self.refs[ref] = oid
        return self.history[oid]

    def push(self, revision: str, lines: Iterable[bytes], by: str, create_pr: bool = False) -> tuple[str, Commit]:
        """Carries out a commit request, one JSON object a line; returns the ref it went to and the commit.

        Raises:
            HubError: The revision moved on, is none to commit to, or the operations do not fit its files.
        """
        head, *operations = map(json.loads, lines)
        expected = head["value"].get("parentCommit")
        ref = self.head(revision)
        parent = self.refs[ref]
        if create_pr:
            ref = f"refs/pr/{len(self.authors) + 1}"
            parent = self.resolve(expected).oid if expected else parent
        elif expected and not parent.startswith(expected):
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        files = self.changed(self.history[parent].files, operations)
        if "README.md" in files:
            front_matter(files["README.md"].data.decode())
        if create_pr:
            self.authors[ref] = by
        return ref, self.commit(ref, files, parent, head["value"]["summary"], head["value"]["description"], by)

    def point(self, ref: str, revision: str) -> None:
        """Makes a branch or a tag.

        Raises:
            HubError: It is there already, or the revision is not.
        """
        if ref in self.refs:
            raise HubError(409, None, f"Reference already exists: {ref}")
        self.refs[ref] = self.resolve(revision).oid

    def unpoint(self, ref: str) -> None:
        """Deletes a branch or a tag.

        Raises:
            HubError: It is not there, or it is the main branch.
        """
        if ref == "refs/heads/main":
            raise HubError(403, None, "The main branch cannot be deleted")
        if self.refs.pop(ref, None) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {ref}")

    def changed(self, files: Mapping[str, Blob], operations: Iterable[Mapping[str, Any]]) -> dict[str, Blob]:
        """The files after the operations of a commit, each a line of the request.

        Raises:
            HubError: What is to be deleted is not there, or an LFS file was never uploaded.
        """
        after = dict(files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                after[path] = Blob(base64.b64decode(value["content"]))
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    raise HubError(400, None, f"An LFS pointer pointed to a file that does not exist: {path}")
                after[path] = Blob(self.objects[value["oid"]], lfs=True)
            elif kind in ("deletedFile", "deletedFolder"):
                folder = path.rstrip("/") + "/" if kind == "deletedFolder" else None
                gone = [name for name in after if (name.startswith(folder) if folder else name == path)]
                if not gone:
                    raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
                for name in gone:
                    del after[name]
            else:
                raise HubError(400, None, f"Unknown operation {kind!r}")
        return after

    def tree(self, commit: Commit, folder: str = "", recursive: bool = True) -> list[dict[str, Any]]:
        """The entries below a folder, sorted by path, in the form of the Hub.

        Raises:
            HubError: No such folder.
        """
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = [path for path in commit.files if path.startswith(prefix)]
        if prefix and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {commit.oid}")
        entries: dict[str, dict[str, Any]] = {}
        for path in inside:
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                oid = hashlib.sha1(f"{commit.oid}:{name}".encode()).hexdigest()
                entries[name] = {"type": "directory", "oid": oid, "size": 0, "path": name}
            if recursive or len(parts) == 1:
                entries[path] = self.entry(path, commit.files[path])
        return [entries[name] for name in sorted(entries)]

    @staticmethod
    def entry(path: str, blob: Blob) -> dict[str, Any]:
        """A file as the Hub lists it."""
        entry: dict[str, Any] = {"type": "file", "oid": blob.oid, "size": len(blob.data), "path": path}
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        return entry

    def info(self, repo_id: str, revision: str, blobs: bool) -> dict[str, Any]:
        """What the Hub tells about a repository at a revision, the sizes and ids of its files where wanted."""
        commit = self.resolve(revision)
        card = front_matter(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
        siblings = []
        for path, blob in sorted(commit.files.items()):
            siblings.append({"rfilename": path})
            if blobs:
                siblings[-1] |= {"size": len(blob.data), "blobId": blob.oid}
            if blobs and blob.lfs:
                lfs = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
                siblings[-1] |= {"lfs": lfs}
        return {
            "id": repo_id,
            "author": self.owner,
            "sha": commit.oid,
            "createdAt": self.created,
            "lastModified": commit.date,
            "private": self.private,
            "gated": self.gated,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "library_name": card.get("library_name"),
            "pipeline_tag": card.get("pipeline_tag"),
            "tags": _tags(card),
            "cardData": card,
            "siblings": siblings,
        }

    def named(self, prefix: str) -> list[dict[str, str]]:
        """The refs whose full names begin so, in the form of the Hub."""
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in self.refs.items()
            if ref.startswith(prefix)
        ]
