"""Writing to the Hugging Face Hub: one repository at a time, one commit at a time, and collections.

A commit names its parent, so that no other work is overwritten unseen, and it holds only
files whose content differs from what is there.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from cbd_hub.errors import PublishError
from cbd_hub.hub.client_errors import clear_errors
from cbd_hub.hub.partial_files import has_hash
from cbd_hub.hub.read import LIBRARY
from cbd_hub.manifest.manifest import file_entry

__all__ = ["Commit", "Content", "Repository", "State", "gather"]


@dataclass(frozen=True)
class Content:
    """What is uploaded: a file, or the bytes of one; hashed once at most."""

    source: Path | bytes
    known_sha256: str | None = None
    """Where it is known already."""

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """64 hexadecimal digits."""
        if isinstance(self.source, bytes):
            return hashlib.sha256(self.source).hexdigest()
        return self.known_sha256 or file_entry(self.source).sha256

    def equals(self, held: tuple[int, str] | None) -> bool:
        """Whether a repository holds it already, by size in bytes and SHA-256 (LFS) or git blob hash."""
        if held is None or held[0] != self.size:
            return False
        if len(held[1]) == 64:
            return self.sha256 == held[1]
        return len(held[1]) == 40 and has_hash(self.source, held[1])


@dataclass(frozen=True)
class State:
    """What a repository holds at a branch."""

    commit: str
    files: Mapping[str, tuple[int, str]]
    """Path → size in bytes, and SHA-256 (LFS) or git blob hash."""
    private: bool
    tags: tuple[str, ...]
    """Of its model card."""


@dataclass(frozen=True)
class Commit:
    """A commit that was made, or the one that already holds everything."""

    repo_id: str
    sha: str
    uploaded: tuple[str, ...]
    """Files that differed."""
    num_bytes: int
    """Their size."""
    pull_request: str | None = None
    """URL, where one was asked for."""


@dataclass(frozen=True)
class Repository:
    """A model repository of the Hub, at one of its branches."""

    repo_id: str
    token: str | bool | None = None
    branch: str | None = None
    """None for the default branch."""
    api: HfApi = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "api", HfApi(token=self.token, **LIBRARY))

    @property
    def url(self) -> str:
        """Its page."""
        return f"{self.api.endpoint}/{self.repo_id}"

    def state(self) -> State | None:
        """Returns what is there; None where there is no repository that may be seen.

        Raises:
            PublishError: The Hub cannot be asked, or there is no such branch.
        """
        with clear_errors(self.repo_id, "reading", self.branch, writing=True):
            try:
                info = self.api.model_info(self.repo_id, revision=self.branch, files_metadata=True)
            except RepositoryNotFoundError as error:
                if error.response.status_code == 401 or "Gated" in type(error).__name__:
                    raise
                return None
        files = {f.rfilename: (f.size or 0, f.lfs.sha256 if f.lfs else f.blob_id or "") for f in info.siblings or ()}
        return State(info.sha or "", files, bool(info.private), tuple(info.tags or ()))

    def create(self, private: bool | None = None) -> None:
        """Makes the repository, and its branch, where they are not there yet.

        Args:
            private: None leaves it to the Hub's (or the organization's) default.

        Raises:
            PublishError: No permission, or the id is not a valid one.
        """
        with clear_errors(self.repo_id, "making the repository", writing=True):
            self.api.create_repo(self.repo_id, private=private, exist_ok=True)
            if self.branch is not None and not self.branch.startswith("refs/"):
                self.api.create_branch(self.repo_id, branch=self.branch, exist_ok=True)

    def differing(self, files: Mapping[str, Content], state: State | None) -> list[str]:
        """Returns the names of those files whose content is not what the repository holds."""
        held = state.files if state else {}
        return [name for name, content in files.items() if not content.equals(held.get(name))]

    def commit(
        self,
        files: Mapping[str, Content],
        message: str,
        *,
        state: State,
        delete: Collection[str] = (),
        create_pr: bool = False,
    ) -> Commit:
        """Commits the files that differ, on top of ``state``, in one commit; none where nothing differs.

        Args:
            files: Path in the repository → content.
            message: Title of the commit.
            state: What was there, from :meth:`state`; if it is not any more, nothing is changed.
            delete: Files to remove, where they are there.
            create_pr: Propose the commit as a pull request.

        Raises:
            PublishError: No permission, a branch that moved on meanwhile, or a connection that broke.
        """
        changed = self.differing(files, state)
        deleted = [name for name in delete if name in state.files]
        if not changed and not deleted:
            return Commit(self.repo_id, state.commit, (), 0)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, source if isinstance(source := files[name].source, bytes) else str(source))
            for name in changed
        ]
        operations += [CommitOperationDelete(name) for name in deleted]
        with clear_errors(self.repo_id, "committing", self.branch, writing=True):
            created = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                revision=self.branch,
                create_pr=create_pr,
                parent_commit=state.commit,
            )
        size = sum(files[name].size for name in changed)
        return Commit(self.repo_id, created.oid, tuple(changed), size, created.pr_url)

    def tag(self, name: str, commit: str) -> None:
        """Tags a commit; a tag that is there already stays where it is.

        Raises:
            PublishError: No permission.
        """
        with clear_errors(self.repo_id, f"tagging {name!r}", commit, writing=True):
            self.api.create_tag(self.repo_id, tag=name, revision=commit, exist_ok=True)

    def has_tag(self, pattern: str) -> bool:
        """Returns whether the whole name of a tag is as a regular expression says.

        Raises:
            PublishError: The Hub cannot be asked.
        """
        with clear_errors(self.repo_id, "reading the tags", writing=True):
            return any(re.fullmatch(pattern, tag.name) for tag in self.api.list_repo_refs(self.repo_id).tags)

    @cached_property
    def owner(self) -> str:
        """The user or organization before the slash.

        Raises:
            PublishError: The id has no owner.
        """
        owner, _, name = self.repo_id.partition("/")
        if not name:
            raise PublishError(f"{self.repo_id!r} names no owner; write owner/name")
        return owner


def gather(
    repositories: Collection[str], title: str, description: str, *, owner: str, token: str | bool | None, private: bool
) -> str:
    """Puts repositories into a Collection, made where there is none of that title; returns its URL.

    Raises:
        PublishError: No permission.
    """
    api = HfApi(token=token, **LIBRARY)
    with clear_errors(f"{owner}'s collection {title!r}", "changing", writing=True):
        collection = api.create_collection(
            title, namespace=owner, description=description[:150], private=private, exists_ok=True
        )
        present = {item.item_id for item in api.get_collection(collection.slug).items}
        for repo_id in repositories:
            if repo_id not in present:
                api.add_collection_item(collection.slug, repo_id, "model", exists_ok=True)
    return collection.url
