"""A process with little memory and an audit hook that sees every file that is opened, every unpickled name and every
connection: what could do harm is tried there.
"""

import json
import os
import select
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SANDBOX = """
import json, os, resource, signal, socket, sys, time, warnings
replies = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a question to the user is not taken for a reply
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from pathlib import Path
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import CbdError

ordinary, memory, most_seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
seen, root, own = [], None, os.environ["TMPDIR"]

def watch(event, args):
    if root is None:
        return
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path, writes = os.fsdecode(args[0]), args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes and path.startswith((own, os.devnull))):
            seen.append(("write" if writes else "open", path))
    elif event == "exec" and root in args[0].co_filename:
        seen.append(("exec", args[0].co_filename))
    elif event in ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"):
        seen.append((event, repr(args[1:])[:200]))

class Outcome:
    kind, message, known = "model", "", True
    def __enter__(self):
        return self
    def __exit__(self, kind, error, trace):
        if kind is not None:
            self.kind, self.message, self.known = kind.__name__, str(error)[:5000], issubclass(kind, CbdError)
        return kind is not None and kind is not KeyboardInterrupt

def make(folder, size, options):
    opened = Chain.from_pretrained(folder)
    model = opened.initialize(opened.plan(size, **options), progress=False)
    return {"config": model.config.to_json_string(), "attention": model.config._attn_implementation}

def tokenizer(folder, size, options):
    return {"length": len(Chain.from_pretrained(folder).tokenizer)}

def calibration(folder, size, options):
    return {"shape": list(Chain.from_pretrained(folder).calibration.shape)}

def connect(folder, size, options):
    socket.create_connection(("127.0.0.1", 9))

def write(folder, size, options):
    (Path(folder) / "written").write_text("x")

make(ordinary, None, {"shape": json.loads((Path(ordinary) / "chain.json").read_text())["anchors"][0]["shape"]})
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
sys.addaudithook(watch)
print("ready", file=replies, flush=True)
for line in sys.stdin:
    if line.strip() in ("", "y"):
        continue  # the answer to a question that was not asked
    job = json.loads(line)
    seen, root, outcome, made, start = [], job["folder"], Outcome(), {}, time.process_time()
    signal.setitimer(signal.ITIMER_PROF, most_seconds)  # ends the process, also where no Python code is run
    with outcome:
        made = globals()[job["do"]](job["folder"], job["size"], job["options"])
    seconds, root = time.process_time() - start, None
    signal.setitimer(signal.ITIMER_PROF, 0)
    print(json.dumps({"kind": outcome.kind, "message": outcome.message, "known": outcome.known, "seconds": seconds,
                      "seen": seen, "made": made}, default=str), file=replies, flush=True)
"""

MEMORY = 512 << 20
"""What the sandbox may take beyond what an ordinary chain needs."""
AT_ONCE = 3.0
"""Seconds of processor time that a refusal may take; an ordinary tiny chain takes a tenth of one."""


@dataclass
class Reply:
    """What came of one job in the sandbox."""

    kind: str
    message: str
    known: bool = False
    seconds: float = 0.0
    seen: list[list[Any]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)

    def events(self, *kinds: str) -> list[str]:
        return [" ".join(map(str, event[1:])) for event in self.seen if event[0] in kinds]

    @property
    def opened(self) -> list[Path]:
        """The files that were opened, links resolved."""
        return [Path(event[1]).resolve() for event in self.seen if event[0] == "open"]

    @property
    def harm(self) -> str:
        """What was run, unpickled, asked for or written (but for temporary files), if anything."""
        run = self.events("exec", "pickle.find_class", "subprocess.Popen", "os.system")
        asked = self.events("socket.connect", "socket.getaddrinfo")
        written = {"run": run, "asked": asked, "written": self.events("write")}
        return "; ".join(f"{what}: {found[:3]}" for what, found in written.items() if found)

    @property
    def problem(self) -> str:
        """What is wrong with a refusal: nothing where it is this package's, in one line, at once and harmless."""
        if not self.known:
            return f"{self.kind}: {self.message[:300]!r}"
        if self.kind == "model":
            return "it was accepted"
        if not self.message.isprintable():
            return f"not one line: {self.message[:300]!r}"
        return self.harm or ("" if self.seconds < AT_ONCE else f"it took {self.seconds:.1f} s")


class Sandbox:
    """A process with little memory that works on one chain after another; started again after one that it hung on."""

    def __init__(self, ordinary: Path, home: Path) -> None:
        self.arguments = [sys.executable, "-c", _SANDBOX, str(ordinary), str(MEMORY), str(3 * AT_ONCE)]
        (home / "tmp").mkdir(parents=True)
        # Whoever asks a server asks one that is not there: seen by the audit hook, and over soon.
        own = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home), "HOME": str(home)}
        self.env = os.environ | own | {"TMPDIR": str(home / "tmp")}
        self.process: subprocess.Popen[bytes] | None = None

    def _line(self, process: subprocess.Popen[bytes], limit: float) -> bytes | None:
        """One line of the process, b"" at its end, None where none comes in time."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], limit)
        return process.stdout.readline() if ready else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, folder: Path, size: int | None = None, do: str = "make", **options: Any) -> Reply:
        """Does one job; a "y" waits on the standard input for whoever asks the user a question."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self.env
            )
            assert self._line(self.process, 250) == b"ready\n"
        job = {"do": do, "folder": str(folder), "size": size, "options": options}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job).encode() + b"\ny\n")
        self.process.stdin.flush()
        line = self._line(self.process, 120)
        if not line:
            status = self.process.poll() if line is None else self.process.wait()
            self.stop()
            return Reply("no answer", "it waits" if status is None else f"ended by {signal.Signals(-status).name}")
        return Reply(**json.loads(line))
