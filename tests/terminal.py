"""A process on a pseudo terminal of 80 columns, to see what a person would."""

import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from contextlib import suppress

__all__ = ["on_a_terminal"]


def on_a_terminal(command: Sequence[str], environment: Mapping[str, str], stdout: int | None = None) -> str:
    """What a command, which must succeed, shows there: its errors, and its output unless that goes elsewhere."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(command, stdout=child if stdout is None else stdout, stderr=child, env=environment)
    os.close(child)
    shown = b""
    with suppress(OSError):  # how Linux says that the other end is closed
        while part := os.read(parent, 4096):
            shown += part
    os.close(parent)
    assert process.wait() == 0, shown
    return shown.decode()
