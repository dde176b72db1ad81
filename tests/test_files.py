"""One writer at a time: a lock that the system releases, and files copied byte for byte."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_recipe import built_chain, digests, tiny_recipe

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


LIMITED = """
import json, resource, signal, sys
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from cbd_hub import build_chain, CbdError
recipe = json.loads(Path(sys.argv[1]).read_text())
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    build_chain(recipe, sys.argv[2], progress=False)
except CbdError as error:
    print(type(error).__name__, error)
"""


def test_a_disk_that_fills_up_ends_a_build_in_one_sentence_and_loses_nothing(tmp_path: Path) -> None:
    """A limit of file sizes fails at the same calls as a full disk, in every library that writes."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(tiny_recipe()))
    command = [sys.executable, "-c", LIMITED, str(recipe), str(tmp_path / "chain")]
    done = subprocess.run([*command, "60000"], capture_output=True, text=True)
    assert done.stdout.startswith("DiskFullError the disk of "), done.stdout + done.stderr
    assert "run the same command again" in done.stdout and len(done.stdout.splitlines()) == 1
    done = subprocess.run([*command, str(1 << 30)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert digests(tmp_path / "chain") == digests(built_chain())
