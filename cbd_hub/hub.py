"""The only module that talks to the Hugging Face Hub.

A :class:`Location` is a folder or a repository at a revision; everything else asks it for files by name and gets local
paths. Errors of the client become one line that says what to do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from cbd_hub.errors import ChainNotFoundError

__all__ = ["Location"]


@contextmanager
def _clear_errors(repo_id: str, filename: str, revision: str | None) -> Iterator[None]:
    """Turns the client's errors into one line each. GatedRepoError is a RepositoryNotFoundError: it comes first."""
    at = f" at revision {revision!r}" if revision else ""
    try:
        yield
    except GatedRepoError:
        raise ChainNotFoundError(
            f"{repo_id} is gated: ask for access on its page at the Hub, then log in (`hf auth login`) or pass token="
        ) from None
    except RepositoryNotFoundError:
        raise ChainNotFoundError(
            f"there is no repository {repo_id!r} that you may read. Check the spelling; a private one needs "
            "`hf auth login`, HF_TOKEN or token="
        ) from None
    except RevisionNotFoundError:
        raise ChainNotFoundError(
            f"{repo_id} has no revision {revision!r}; see its branches, tags and commits"
        ) from None
    except LocalEntryNotFoundError:
        raise ChainNotFoundError(
            f"{filename} of {repo_id}{at} is not in the cache and the Hub cannot be asked (offline, or "
            "local_files_only=True). Connect once to fetch it"
        ) from None
    except EntryNotFoundError:
        raise ChainNotFoundError(f"{repo_id}{at} has no file {filename!r}; is it a chain?") from None
    except HFValidationError as error:
        raise ChainNotFoundError(f"{repo_id!r} is neither a folder nor a repository id: {error}") from None
    except OfflineModeIsEnabled:
        raise ChainNotFoundError(f"HF_HUB_OFFLINE is set and {filename} of {repo_id} is not in the cache") from None
    except HfHubHTTPError as error:
        raise ChainNotFoundError(f"the Hub refused {filename} of {repo_id}{at}: {error}") from None


@dataclass(frozen=True)
class Location:
    """A folder, or a repository of the Hub at a revision, from which files are asked by name."""

    place: str
    """Path of a folder, or ``owner/name``."""
    revision: str | None = None
    """Branch, tag or commit; None for the default branch."""
    subfolder: str = ""
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    force_download: bool = False

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on disk."""
        return Path(self.place).expanduser().is_dir()

    def file(self, name: str) -> Path:
        """Returns the local path of a file, fetching it into the Hub cache where necessary.

        Raises:
            ChainNotFoundError: No such folder, repository, revision or file, no access, or not cached while offline.
        """
        filename = f"{self.subfolder}/{name}" if self.subfolder else name
        if self.is_local:
            path = Path(self.place).expanduser() / filename
            if not path.is_file():
                raise ChainNotFoundError(f"there is no {filename} in {self.place}")
            return path
        if self.place.startswith((".", "/", "~")) or self.place.count("/") > 1:
            raise ChainNotFoundError(f"there is no folder {self.place!r}")
        with _clear_errors(self.place, filename, self.revision):
            return Path(
                hf_hub_download(
                    self.place,
                    filename,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    force_download=self.force_download,
                    library_name="cbd_hub",
                )
            )

    def pinned(self, known: Path) -> "Location":
        """Returns this location pinned to the commit that ``known``, a file it gave, came from.

        A pinned file that is cached is served without asking the Hub.
        """
        if self.is_local:
            return self
        commit = known.parent.name if known.parent.parent.name == "snapshots" else self.revision
        return replace(self, revision=commit)

    def inside(self, subfolder: str | None) -> "Location":
        """Returns the location of a subfolder."""
        return replace(self, subfolder=subfolder or "")

    def elsewhere(self, repo_id: str, revision: str | None) -> "Location":
        """Returns another repository, asked in the same way (token, cache, offline)."""
        return replace(self, place=repo_id, revision=revision, subfolder="")
