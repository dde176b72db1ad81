"""Where the files of a chain are: the place of each anchor, and files checked against the manifest."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cbd_hub.errors import ChainNotFoundError, IntegrityError
from cbd_hub.files import whole_folder
from cbd_hub.hub.read import Location
from cbd_hub.manifest import manifest as manifests
from cbd_hub.manifest.manifest import Anchor, FileEntry, Manifest
from cbd_hub.progress import progress_bar

__all__ = ["anchor_place", "checked_file", "copy_chain", "dropping_damage"]


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
