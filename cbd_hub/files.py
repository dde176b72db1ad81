"""Folders that appear whole or not at all, that one process works in at a time, and files copied as they are."""

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import FileLock, Timeout

from cbd_hub.errors import DiskFullError, OutputExistsError

__all__ = ["LOCK_NAME", "clear_full_disk", "copy_files", "locked_folder", "whole_folder"]

_FULL = r"No space left on device|Disk quota exceeded|File too large|os error (28|122|27)\b"

LOCK_NAME = ".build/lock"
"""The file, inside a chain's folder, that whoever writes into it holds locked."""


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Gives a temporary folder to write into, which becomes ``folder`` at the end, or vanishes on an error.

    A killed process leaves a hidden folder beside ``folder``, never half of ``folder`` itself.

    Raises:
        OutputExistsError: ``folder`` holds something, or is a file; nothing was changed then.
    """
    target = Path(folder).expanduser().resolve()  # "." has a name of its own
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputExistsError(f"{folder} is not empty; name a new folder, or empty it first (nothing was changed)")
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if target.exists():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_files(files: Mapping[str, Path], folder: Path) -> None:
    """Copies files into a folder as they are, byte for byte, under their names, which may lie in subfolders."""
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


@contextmanager
def locked_folder(folder: Path, what: str, *, make: bool = True) -> Iterator[None]:
    """Holds a chain's folder for one writer; the system lets go of it when its process ends, however that comes.

    Args:
        folder: The folder.
        what: What the caller is about to do, for the error.
        make: Make the folder and its lock where they are not there; False needs no lock then.

    Raises:
        OutputExistsError: Another process holds it.
    """
    path = folder / LOCK_NAME
    if not make and not path.is_file():
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputExistsError(
            f"another process is building in {folder}; {what} when it is done, or name another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def clear_full_disk(folder: Path) -> Iterator[None]:
    """Turns what a full disk raises, in whatever library, into one sentence.

    Raises:
        DiskFullError: The disk of the folder is full; what was finished stays.
    """
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        place = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free
        raise DiskFullError(
            f"the disk of {place} is full ({free / 1e6:,.0f} MB are free, or a quota is used up); what was finished "
            "stays: free some space and run the same command again"
        ) from error


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is that of a full disk, a quota, or a limit of file sizes."""
    while error is not None:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or re.search(_FULL, str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
