"""Folders that appear whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from cbd_hub.errors import OutputExistsError

__all__ = ["whole_folder"]


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
