"""A file of which only some byte ranges were fetched: sparse on disk, with a record of what is there.

It has the size of the whole file, so that it is read as the whole file would be; the record beside it says which bytes
are real. Bytes are on disk before the record names them, so a process that is killed loses at most what it had not yet
recorded, and never leaves bytes that only look fetched. Several processes may fill one file: a lock makes them take
turns.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from cbd_hub.interpolation.ranges import Run, merge, subtract
from cbd_hub.manifest.manifest import file_entry

__all__ = ["PartialFile", "has_hash"]

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")

PART = 8 << 20
"""Most bytes of one request."""
WORKERS = 8
"""Requests at a time; together with :data:`PART` the memory that a fetch takes (64 MiB)."""
_RECORD_EVERY = 64 << 20

Fetch = Callable[[int, int], bytes]
"""Returns the bytes from a start to a stop of the whole file."""


class PartialFile:
    """One file of which some byte ranges are there."""

    def __init__(self, path: Path, size: int) -> None:
        """Opens what an earlier fetch left, if there is any.

        Args:
            path: Where the data lies or will lie; the record is ``<path>.ranges.json``.
            size: Size of the whole file in bytes; a record of another size is dropped.
        """
        self.path = path
        self.size = size
        self._record = path.with_name(path.name + ".ranges.json")

    @property
    def runs(self) -> list[Run]:
        """What is there, in order. A record that cannot be read counts as none."""
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
            runs = [(int(start), int(stop)) for start, stop in record["runs"]]
            intact = record["size"] == self.size == self.path.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return []
        return merge(runs) if intact and all(0 <= a <= b <= self.size for a, b in runs) else []

    def missing(self, wanted: Iterable[Run]) -> list[Run]:
        """Returns what of ``wanted`` is not there yet."""
        return subtract(wanted, self.runs)

    def fill(self, wanted: Iterable[Run], fetch: Fetch, done: Callable[[int], object] = lambda count: None) -> None:
        """Fetches what is missing of ``wanted``, in parts of :data:`PART` bytes, :data:`WORKERS` at a time.

        Args:
            wanted: Runs of the whole file.
            fetch: Called from several threads. If it raises, what came before is kept and recorded.
            done: Told the number of bytes of every part that is on disk.

        Raises:
            OSError: The disk is full, or the folder cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(self.path) + ".lock"):
            have = self.runs
            parts = [
                (start, min(start + PART, stop))
                for first, stop in subtract(wanted, have)
                for start in range(first, stop, PART)
            ]
            if not parts:
                return
            if not have:  # nothing of an older file shines through
                self._drop()
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                os.truncate(handle, self.size)
                self._fetch_all(handle, parts, have, fetch, done)
            finally:
                os.close(handle)

    def _fetch_all(
        self, handle: int, parts: list[Run], have: list[Run], fetch: Fetch, done: Callable[[int], object]
    ) -> None:
        new: list[Run] = []
        unrecorded = 0
        todo = iter(parts)
        running: dict[Future[bytes], Run] = {}
        with ThreadPoolExecutor(WORKERS) as pool:
            try:
                while True:
                    for part in todo:  # never more in memory than are running
                        running[pool.submit(fetch, *part)] = part
                        if len(running) == WORKERS:
                            break
                    if not running:
                        break
                    finished, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in finished:
                        start, stop = running.pop(future)
                        _write(handle, future.result(), start)
                        new.append((start, stop))
                        done(stop - start)
                        unrecorded += stop - start
                    if unrecorded >= _RECORD_EVERY:
                        self._write_record(handle, [*have, *new])
                        unrecorded = 0
            finally:
                for future in running:
                    future.cancel()
                self._write_record(handle, [*have, *new])

    def discard(self) -> None:
        """Forgets everything that was fetched."""
        if self.path.parent.is_dir():
            with FileLock(str(self.path) + ".lock"):
                self._drop()

    def _drop(self) -> None:
        for path in (self._record, self.path):  # the record first: it never names bytes that are not there
            with suppress(FileNotFoundError):
                path.unlink()

    def _write_record(self, handle: int, runs: list[Run]) -> None:
        os.fsync(handle)
        partial = self._record.with_name(self._record.name + ".partial")
        partial.write_text(json.dumps({"size": self.size, "runs": merge(runs)}), encoding="utf-8")
        partial.replace(self._record)


def _write(handle: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(handle, view, start)
        view, start = view[count:], start + count


def has_hash(content: Path | bytes, name: str) -> bool:
    """Whether content has the hash that the Hub knows it by: SHA-256 (64 digits) or git's blob hash (40).

    A name that is neither says nothing, and is true of everything. Cost: reads the content once.
    """
    if not _HASH.fullmatch(name):
        return True
    if len(name) == 64 and isinstance(content, Path):
        return file_entry(content).sha256 == name
    data = content if isinstance(content, bytes) else content.read_bytes()  # what git keeps itself is small
    if len(name) == 64:
        return hashlib.sha256(data).hexdigest() == name
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == name
