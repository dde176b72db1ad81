"""One writer at a time: a lock that the system releases, and files copied byte for byte."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cbd_hub.errors import OutputExistsError
from cbd_hub.files import LOCK_NAME, copy_files, locked_folder

HOLD = """
import sys, time
from pathlib import Path
from cbd_hub.files import locked_folder
with locked_folder(Path(sys.argv[1]), "wait"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_lock_lives_as_long_as_its_owner(tmp_path: Path, sent: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "held\n"
    expected = pytest.raises(OutputExistsError, match=r"another process is building in .*; push it when it is done")
    with expected, locked_folder(tmp_path, "push it", make=False):
        pass
    os.kill(owner.pid, sent)
    owner.wait()
    start = time.monotonic()
    with locked_folder(tmp_path, "build"):
        assert (tmp_path / LOCK_NAME).is_file()
    assert time.monotonic() - start < 5


def test_a_folder_that_nobody_built_in_needs_no_lock(tmp_path: Path) -> None:
    with locked_folder(tmp_path, "push it", make=False):
        assert not list(tmp_path.iterdir())


def test_copies_are_equal_and_may_lie_in_folders(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00\r\n")
    copy_files({"b": tmp_path / "a", "inner/c": tmp_path / "a"}, tmp_path / "to")
    assert (tmp_path / "to" / "b").read_bytes() == (tmp_path / "to" / "inner" / "c").read_bytes() == b"\x00\r\n"
