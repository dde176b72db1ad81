"""Reading from the Hugging Face Hub; :mod:`cbd_hub.hub.write` writes to it. No other module talks to the Hub.

A :class:`Location` is a folder or a repository at a revision, and each anchor of a chain has one; everything else asks
it for files by name and gets local paths: whole files through the Hub's own cache, byte ranges of a large file through
a file beside it (:mod:`cbd_hub.hub.partial_files`). Errors of the client become one line
(:mod:`cbd_hub.hub.client_errors`).
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]

from cbd_hub.errors import CbdError, ChainNotFoundError, IntegrityError
from cbd_hub.files import whole_folder
from cbd_hub.hub.client_errors import again, clear_errors
from cbd_hub.hub.partial_files import PartialFile, has_hash
from cbd_hub.interpolation.ranges import Run, count_bytes
from cbd_hub.manifest import manifest as manifests
from cbd_hub.manifest.manifest import Anchor, FileEntry, Manifest
from cbd_hub.progress import counter, progress_bar

__all__ = [
    "LIBRARY",
    "Location",
    "NoRangesError",
    "RangedFile",
    "anchor_place",
    "checked_file",
    "copy_chain",
    "dropping_damage",
]

LIBRARY: dict[str, Any] = {"library_name": "cbd_hub", "library_version": version("cbd_hub")}
"""Told to the Hub, which counts downloads by library."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class NoRangesError(CbdError, RuntimeError):
    """The server does not answer byte ranges; the file is then fetched whole."""


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
    pinned_elsewhere: bool = False
    """Named by a manifest, not by the user: a repository, whatever folder of that name there may be."""

    @classmethod
    def of(cls, place: "str | Path | Location") -> "Location":
        """Returns a location as it is, or that of a path or repository id with default settings."""
        return place if isinstance(place, Location) else cls(str(place))

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``hf_hub_download`` and transformers' ``from_pretrained``, beside :attr:`place`."""
        return {
            "revision": self.revision,
            "subfolder": self.subfolder,
            "token": self.token,
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "force_download": self.force_download,
        }

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on disk."""
        try:
            return not self.pinned_elsewhere and Path(self.place).expanduser().is_dir()
        except (OSError, RuntimeError, ValueError):  # a name too long, no such home, a NUL
            return False

    def _inner(self, name: str) -> str:
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def file(self, name: str) -> Path:
        """Returns the local path of a file, fetching it into the Hub cache where necessary.

        Raises:
            ChainNotFoundError: No such folder, repository, revision or file, no access, or not cached while offline.
        """
        filename = self._inner(name)
        if self.is_local:
            path = Path(self.place).expanduser() / filename
            if not path.is_file():
                hint = ""
                if name == manifests.MANIFEST_NAME and (path.parent / "config.json").is_file():
                    hint = (
                        ": it holds a model, of which a chain can be made (cbd-hub build --source "
                        f"{self.place} --anchors 0.75 0.5 --text FILES --output my-chain)"
                    )
                raise ChainNotFoundError(f"there is no {filename} in {self.place}{hint}")
            return path
        if self.place.startswith((".", "/", "~")) or self.place.count("/") > 1:
            raise ChainNotFoundError(f"there is no folder {self.place!r}")
        with clear_errors(self.place, filename, self.revision):
            return Path(again(lambda: hf_hub_download(self.place, name, **self.options, **LIBRARY)))

    def names(self) -> list[str]:
        """Returns the names of all files that are here, sorted; offline those of the cached snapshot alone.

        Raises:
            ChainNotFoundError: No such folder, repository or revision, or no access.
        """
        if self.is_local:
            root = Path(self.place).expanduser() / self.subfolder
            return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
        before = f"{self.subfolder}/" if self.subfolder else ""
        if not (self.local_files_only or constants.HF_HUB_OFFLINE):
            with clear_errors(self.place, "its files", self.revision):
                api = HfApi(token=self.token, **LIBRARY)
                listed = again(lambda: api.list_repo_files(self.place, revision=self.revision))
            return sorted(name.removeprefix(before) for name in listed if name.startswith(before))
        known = self.cached("config.json") or self.cached("tokenizer_config.json")
        root = known.parent if known is not None else Path()
        return [] if known is None else sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())

    def stored_shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Returns the shape of every tensor of a repository's model by its stored name, from the headers alone.

        None for a folder, and where the Hub is not to be asked.

        Raises:
            ChainNotFoundError: No such repository or revision, no access, or no safetensors files.
        """
        if self.is_local or self.subfolder or self.local_files_only or constants.HF_HUB_OFFLINE:
            return None
        with clear_errors(self.place, "its weights' headers", self.revision):
            api = HfApi(token=self.token, **LIBRARY)
            try:
                found = again(lambda: api.get_safetensors_metadata(self.place, revision=self.revision))
            except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
                raise ChainNotFoundError(f"{self.place} has no safetensors weights to read: {error}") from None
        files = found.files_metadata.values()
        return {name: tuple(info.shape) for file in files for name, info in file.tensors.items()}

    def cached(self, name: str) -> Path | None:
        """Returns the local path of a file that is there already, whole; None where it would have to be fetched."""
        if self.is_local:
            return self.file(name)
        if self.force_download:
            return None
        with clear_errors(self.place, name, self.revision):
            path = try_to_load_from_cache(self.place, self._inner(name), self.cache_dir, self.revision)
        return Path(path) if isinstance(path, str) else None

    def ranged(self, name: str, size: int, sha256: str) -> "RangedFile":
        """Returns a file of a repository, at a pinned commit, of which byte ranges are to be fetched.

        Args:
            name: The file.
            size: Its size in bytes, as the manifest says.
            sha256: Its SHA-256, as the manifest says.
        """
        # The one folder of a cache that the client's scan of it passes over.
        root = None if self.cache_dir is None else str(Path(self.cache_dir).expanduser() / ".locks" / "assets")
        folder = cached_assets_path("cbd_hub", "--".join(self.place.split("/")), str(self.revision), assets_dir=root)
        filename = self._inner(name)
        partial_file = PartialFile(folder / filename.replace("/", "--"), size)
        if self.force_download:
            partial_file.discard()
        return RangedFile(self, filename, sha256, partial_file)

    def forget(self, path: Path | None) -> None:
        """Drops a fetched copy that turned out to be damaged, so that the next call fetches it again.

        Args:
            path: The file, as :meth:`file` or :meth:`RangedFile.fetch` gave it; a file of a local folder stays.
        """
        if path is None or self.is_local:
            return
        if "snapshots" not in path.parts:
            PartialFile(path, 0).discard()
            return
        if path.is_symlink() and has_hash(path, path.readlink().name):
            return  # it is what the Hub has; the manifest is wrong
        while path.is_symlink():  # the snapshot's entry is a link to a blob, that perhaps to a store of several caches
            target = path.parent / path.readlink()
            path.unlink()
            path = target
        path.unlink(missing_ok=True)

    def verify(self, path: Path) -> None:
        """Compares a small cached file with the content hash that the Hub's cache keeps it under.

        The manifest vouches for all other files; this is how the manifest itself is vouched for. Files of local
        folders, and caches without links, are taken as they are.

        Raises:
            IntegrityError: The content is another; the copy was dropped.
        """
        if self.is_local or not path.is_symlink() or has_hash(path, path.readlink().name):
            return
        self.forget(path)
        raise IntegrityError(f"{path.name} of {self.place} was damaged on its way (its hash differs); try again")

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
        return replace(self, place=repo_id, revision=revision, subfolder="", pinned_elsewhere=True)


@dataclass(frozen=True)
class RangedFile:
    """A file of which byte ranges are fetched and kept, beside the Hub cache; the Hub is asked about it once."""

    location: Location
    filename: str
    sha256: str
    partial_file: PartialFile

    def fetch(self, wanted: Iterable[Run], *, progress: bool = True) -> Path:
        """Returns the path of a file of the right size in which at least ``wanted`` is real; holes read as zeros.

        Args:
            wanted: Byte ranges. What an earlier call fetched is not fetched again; nothing missing is no request.
            progress: Show a progress bar (HF_HUB_DISABLE_PROGRESS_BARS is obeyed).

        Cost: one HEAD the first time, then requests of at most 8 MiB, eight at a time, each retried (429, 5xx, a
            broken connection).

        Raises:
            ChainNotFoundError: As for :meth:`Location.file`.
            IntegrityError: The Hub's file is not the one that the manifest names.
            NoRangesError: The server sends whole files only.
        """
        missing = self.partial_file.missing(wanted)
        if not missing:
            return self.partial_file.path
        with clear_errors(self.location.place, self.filename, self.location.revision):
            url, headers = self._address
            label = f"{self.filename}, the rows needed"
            with counter(label, count_bytes(missing), unit="B", enabled=progress) as add:
                self.partial_file.fill(missing, partial(_get_range, url, headers, self.partial_file.size), add)
        return self.partial_file.path

    @cached_property
    def _address(self) -> tuple[str, dict[str, str]]:
        """Where the bytes are, and the headers to ask with, once the Hub's file proved to be the manifest's."""
        place, revision, size = self.location.place, self.location.revision, self.partial_file.size
        if self.location.local_files_only or constants.HF_HUB_OFFLINE:
            raise LocalEntryNotFoundError("not cached")
        url = hf_hub_url(place, self.filename, revision=revision)
        metadata = get_hf_file_metadata(url, token=self.location.token, retry_on_errors=True, **LIBRARY)
        different = metadata.etag is not None and _SHA256.fullmatch(metadata.etag) and metadata.etag != self.sha256
        if different or metadata.size != size:
            raise IntegrityError(
                f"{self.filename} of {place} at revision {revision!r} is not the file that the manifest names: it has "
                f"{metadata.size} bytes and ETag {metadata.etag}, not {size} bytes and SHA-256 {self.sha256}"
            )
        headers = build_hf_headers(token=self.location.token, **LIBRARY)
        if urlsplit(metadata.location).netloc != urlsplit(url).netloc:  # a signed address: the token stays here
            headers.pop("authorization", None)
        return metadata.location, headers


def anchor_place(chain: Location, anchor: Anchor) -> Location:
    """Returns where an anchor's files are: a repository of its own, or a folder of the chain's."""
    if anchor.repo_id:
        return chain.elsewhere(anchor.repo_id, anchor.revision).inside(anchor.subfolder)
    return chain.inside(anchor.subfolder)


@contextmanager
def dropping_damage(place: Location) -> Iterator[None]:
    """Drops a fetched file that turned out to be damaged, so that the next call fetches it again."""
    try:
        yield
    except IntegrityError as error:
        place.forget(error.path)
        raise


def checked_file(place: Location, name: str, entry: FileEntry) -> Path:
    """Returns the local path of a file whose size and SHA-256 are what the manifest says.

    Raises:
        ChainNotFoundError: There is no such file, or no access to it.
        IntegrityError: It differs.
    """
    try:
        path = place.file(name)
    except ChainNotFoundError as error:
        if place.is_local:
            raise IntegrityError(f"{error}, which the manifest names") from None
        raise
    with dropping_damage(place):
        manifests.check_file(path, entry)
    return path


def copy_chain(manifest: Manifest, chain: Location, folder: Path) -> None:
    """Copies a chain, anchors included, into an empty folder; its manifest then names that folder's own files.

    Raises:
        OutputExistsError: The folder is not empty.
        IntegrityError: A file is not what the manifest says; nothing is left behind then.
    """
    wanted = [(chain, "", name, entry) for name, entry in manifest.top_files.items()]
    anchors = []
    for anchor in manifest.anchors:
        inner = f"anchors/{anchor.name}"
        wanted += [(anchor_place(chain, anchor), inner, name, entry) for name, entry in anchor.files.items()]
        anchors.append(anchor.model_copy(update={"repo_id": None, "revision": None, "subfolder": inner}))
    with whole_folder(folder) as temporary:
        for place, inner, name, entry in progress_bar(wanted, "copying", unit="file"):
            destination = temporary / inner / name
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checked_file(place, name, entry), destination)
        manifests.write_manifest(manifest.model_copy(update={"anchors": anchors}), temporary)


def _get_range(url: str, headers: dict[str, str], size: int, start: int, stop: int) -> bytes:
    """Returns the bytes start..stop of a file of ``size`` bytes; what comes is compared with what was asked for."""
    request_headers = {**headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    response = http_backoff("GET", url, headers=request_headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(response)
    data = response.content
    if response.status_code == 200 and stop - start < size:
        raise NoRangesError(f"{urlsplit(url).netloc} does not answer byte ranges")
    content_range = response.headers.get("Content-Range", "")
    if response.status_code == 206 and content_range != f"bytes {start}-{stop - 1}/{size}":
        raise IntegrityError(f"asked for bytes {start}-{stop - 1} of {size} of {url}, got {content_range!r}")
    if len(data) != stop - start:
        raise IntegrityError(f"asked for {stop - start} bytes of {url}, got {len(data)}")
    return data
