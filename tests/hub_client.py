"""Runs Python in processes of their own whose Hub is the loopback Hub, without paying for the imports every time.

The Hub's address is read when huggingface_hub is imported, so a test cannot talk to the loopback Hub from its own
process. One process per server is started with the right environment; it imports everything once and then forks a
child for every job, which may be killed like any other process.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Client", "Done"]

PRELUDE = "import json\nfrom pathlib import Path\nfrom cbd_hub import Chain, CbdError, from_chain\n"


@dataclass(frozen=True)
class Done:
    """How a job ended."""

    status: int
    """Exit status; minus the signal where it was killed."""
    out: str
    err: str

    @property
    def value(self) -> Any:
        """What the job printed last, read as JSON."""
        assert self.status == 0, self.err[-3000:]
        return json.loads(self.out.splitlines()[-1])


class Client:
    """A process that forks a child for every job."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._known = threading.Event()
        self._pid = 0

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    @property
    def pid(self) -> int:
        """The child that runs now; waits until it is known."""
        assert self._known.wait(30)
        return self._pid

    def run(self, code: str, **values: Any) -> Done:
        """Runs code, with ``values`` (plain JSON) as variables, in a forked child."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._known.clear()
        with tempfile.TemporaryDirectory() as folder:
            job = {"code": code, "values": {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}}
            self._process.stdin.write(json.dumps(job | {"folder": folder}) + "\n")
            self._process.stdin.flush()
            self._pid = int(self._process.stdout.readline())
            self._known.set()
            status = int(self._process.stdout.readline())
            return Done(status, Path(folder, "out").read_text(), Path(folder, "err").read_text())


def _child(job: dict[str, Any]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(job["folder"], name), os.O_WRONLY | os.O_CREAT, 0o600), number)
    status = 1
    try:
        exec(compile(PRELUDE + job["code"], "<job>", "exec"), dict(job["values"]))
        status = 0
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:  # noqa: BLE001 (this is where a process would end)
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama
    from transformers import AutoTokenizer

    import cbd_hub.chain.chain
    import cbd_hub.chain.export
    import cbd_hub.cli.main

    assert AutoTokenizer and transformers and cbd_hub
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _child(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
