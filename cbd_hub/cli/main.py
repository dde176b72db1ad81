"""The command line: argument parsing and printing only; everything else is the library's.

The commands are in :mod:`cbd_hub.cli.chains` and :mod:`cbd_hub.cli.models`. Exit 0 on success, 1 with one line on
standard error on failure (a traceback only with ``--debug``), 2 on wrong usage. ``--json`` prints one JSON document on
standard output and nothing else there.
"""

import sys

from cbd_hub.cli import chains as cli_chains
from cbd_hub.cli import models as cli_models  # their commands join `app`, in this order
from cbd_hub.cli.options import app
from cbd_hub.errors import CbdError

__all__ = ["app", "cli_chains", "cli_models", "main"]


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(arguments)
    except (CbdError, OSError, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        sys.stderr.write(f"cbd-hub: {message}\n")
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else 1)
