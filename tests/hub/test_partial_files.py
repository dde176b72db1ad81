"""Files of which some ranges are there: what is recorded is there, whatever happens in between."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cbd_hub.hub import partial_files
from cbd_hub.hub.partial_files import PartialFile
from cbd_hub.interpolation.ranges import Run, count_bytes, merge

SIZE = 5 << 20
WHOLE = random.Random(0).randbytes(SIZE)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial_files, "PART", 1 << 16)


def fetch(start: int, stop: int) -> bytes:
    return WHOLE[start:stop]


def check(file: PartialFile) -> None:
    """What the record says is there has the right bytes."""
    data = file.path.read_bytes()
    assert len(data) == SIZE
    for start, stop in file.runs:
        assert data[start:stop] == WHOLE[start:stop]


def test_only_what_is_missing_is_fetched(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "deep" / "f", SIZE)
    asked: list[Run] = []
    told: list[int] = []

    def counting(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        return fetch(start, stop)

    assert file.runs == []
    assert file.missing([(5, 9)]) == [(5, 9)]
    file.fill([(0, 100), (1000, 300_000)], counting, told.append)
    assert file.runs == [(0, 100), (1000, 300_000)]
    assert sum(told) == count_bytes(asked) == 299_100
    assert max(stop - start for start, stop in asked) <= 1 << 16
    check(file)
    asked.clear()
    file.fill([(50, 2000), (299_000, 300_010)], counting)
    assert merge(asked) == [(100, 1000), (300_000, 300_010)]
    asked.clear()
    PartialFile(file.path, SIZE).fill([(0, 300_010)], counting)  # as another process would
    assert asked == []
    check(file)
    assert file.path.stat().st_blocks * 512 < SIZE // 2  # holes take no room


def test_what_came_before_an_error_is_kept(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "f", SIZE)

    def failing(start: int, stop: int) -> bytes:
        if start >= 1 << 20:
            raise ConnectionError("gone")
        return fetch(start, stop)

    with pytest.raises(ConnectionError, match="gone"):
        file.fill([(0, SIZE)], failing)
    check(file)
    had = count_bytes(file.runs)
    assert 0 < had <= 1 << 20
    file.fill([(0, SIZE)], fetch)
    assert file.path.read_bytes() == WHOLE


@pytest.mark.parametrize("damage", ["size", "json", "runs", "short", "gone"])
def test_a_record_that_does_not_fit_counts_as_none(tmp_path: Path, damage: str) -> None:
    file = PartialFile(tmp_path / "f", SIZE)
    file.fill([(0, 1000)], fetch)
    record = tmp_path / "f.ranges.json"
    if damage == "size":
        record.write_text(json.dumps({"size": SIZE + 1, "runs": [[0, 1000]]}))
    elif damage == "json":
        record.write_text("{")
    elif damage == "runs":
        record.write_text(json.dumps({"size": SIZE, "runs": [[0, SIZE + 1]]}))
    elif damage == "short":
        os.truncate(file.path, SIZE - 1)
    else:
        file.path.unlink()
    assert file.runs == []
    file.fill([(10, 20)], fetch)
    assert file.runs == [(10, 20)]
    assert file.path.read_bytes()[:10] == bytes(10)  # nothing of the older file shines through
    check(file)


def test_discard(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "f", SIZE)
    file.discard()  # nothing there
    file.fill([(0, 1000)], fetch)
    PartialFile(file.path, 0).discard()
    assert file.runs == []
    assert not file.path.exists()


def test_several_fill_one_file(tmp_path: Path) -> None:
    """Threads and their locks; each asks for overlapping ranges, and no byte is fetched twice."""
    asked: list[Run] = []

    def counting(start: int, stop: int) -> bytes:
        asked.append((start, stop))
        time.sleep(0.002)
        return fetch(start, stop)

    threads = [
        threading.Thread(target=PartialFile(tmp_path / "f", SIZE).fill, args=([(k * 100_000, 1 << 20)], counting))
        for k in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(stop - start for start, stop in asked) == 1 << 20
    check(PartialFile(tmp_path / "f", SIZE))


CHILD = """
import random, sys, time
from pathlib import Path
from cbd_hub.hub import partial_files
partial_files.PART = 1 << 14
partial_files._RECORD_EVERY = 1 << 17
size = int(sys.argv[2])
whole = random.Random(0).randbytes(size)
def fetch(start, stop):
    time.sleep(0.003)
    return whole[start:stop]
print("ready", flush=True)
partial_files.PartialFile(Path(sys.argv[1]), size).fill([(0, size)], fetch)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A process that is killed leaves a record that tells the truth, and no lock."""
    generator, recorded = random.Random(1), 0
    command = [sys.executable, "-c", CHILD, str(tmp_path / "f"), str(SIZE)]
    for _ in range(4):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(generator.uniform(0.05, 0.12))
        child.send_signal(signal.SIGKILL)
        child.wait()
        file = PartialFile(tmp_path / "f", SIZE)
        if file.path.exists() and file.path.stat().st_size == SIZE:
            check(file)
        recorded = max(recorded, count_bytes(file.runs))
    assert recorded > 0
    file.fill([(0, SIZE)], fetch)
    assert file.path.read_bytes() == WHOLE


FULL = """
import errno, sys
from pathlib import Path
from cbd_hub.hub.partial_files import PartialFile
file = PartialFile(Path(sys.argv[1]) / "f", 8 << 20)
file.fill([(0, 1000)], lambda a, b: b"x" * (b - a))
try:
    file.fill([(0, 8 << 20)], lambda a, b: b"x" * (b - a))
except OSError as error:
    assert error.errno == errno.ENOSPC, error
    data = file.path.read_bytes()
    assert all(data[a:b] == b"x" * (b - a) for a, b in file.runs), file.runs
    print("full")
"""


def small_disk(folder: Path, command: list[str], megabytes: int) -> subprocess.CompletedProcess[str]:
    """Runs a command that sees a file system of a few megabytes at ``folder`` (Linux, in a namespace of its own)."""
    mount = f"mount -t tmpfs -o size={megabytes}m tmpfs '{folder}' || exit 77; exec \"$@\""
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, "sh", *command], capture_output=True, text=True, timeout=120
    )


def test_a_full_disk(tmp_path: Path) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not there")
    done = small_disk(tmp_path, [sys.executable, "-c", FULL, str(tmp_path)], 2)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no file system can be mounted here")
    assert done.stdout == "full\n", done.stderr
