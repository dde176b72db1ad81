"""The command line: argument parsing and printing only; everything else is the library's.

The commands are in :mod:`cbd_hub.cli.chains` and :mod:`cbd_hub.cli.models`. Exit 0 on success, 1 with one line on
standard error on failure (a traceback only with ``--debug``), 2 on wrong usage. ``--json`` prints one JSON document on
standard output and nothing else there.
"""

import _thread
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cbd_hub.cli import chains as cli_chains
from cbd_hub.cli import models as cli_models  # their commands join `app`, in this order
from cbd_hub.cli.options import app
from cbd_hub.errors import CbdError

__all__ = ["app", "cli_chains", "cli_models", "main"]


_INTERRUPTED = 130
_GOING_ON = ("build", "fit-curve", "push")
"""Commands whose work, where it was stopped, the next call goes on with."""

_LISTS = {"build": ("--anchors", "--text")}
"""Options that take several values in a row, by command."""


def _repeated(arguments: list[str]) -> list[str]:
    """Writes an option before each of its values: ``--anchors 0.75 0.5`` is ``--anchors 0.75 --anchors 0.5``."""
    lists = _LISTS.get(next(iter(arguments), ""), ())
    written: list[str] = []
    option: str | None = None
    for argument in arguments:
        if argument.startswith("-"):
            name, equals, _ = argument.partition("=")
            option = name if name in lists else None
            written += [] if option and not equals else [argument]
        else:
            written += [argument] if option is None else [option, argument]
    return written


_PLAIN_WARNING = warnings.formatwarning
_PACKAGE = Path(__file__).parents[1]


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning of this library as its words alone; any other with the place that it comes from."""
    if category is not UserWarning or not Path(filename).is_relative_to(_PACKAGE):
        return _PLAIN_WARNING(message, category, filename, lineno, line)
    return textwrap.fill(f"warning: {message}", 80, break_long_words=False, break_on_hyphens=False) + "\n"


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Sends a Ctrl-C again that meets a destructor, where Python prints and drops it (datasets' tables have one)."""
    previous = sys.unraisablehook

    def again(dropped: "sys.UnraisableHookArgs") -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()  # here, it would be dropped once more
        else:
            previous(dropped)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = previous


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.formatwarning = _warning
    try:
        with interrupts_kept():
            app(_repeated(arguments))
    except SystemExit as end:
        if end.code == _INTERRUPTED:  # as the command line's library ends where somebody presses Ctrl-C
            goes_on = "; the same command goes on from here" if arguments[0] in _GOING_ON else ""
            sys.stderr.write(f"cbd-hub: stopped{goes_on}\n")
        raise
    except (CbdError, OSError) as error:
        if "--debug" in arguments:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"cbd-hub: {message}\n")
        sys.exit(1)
