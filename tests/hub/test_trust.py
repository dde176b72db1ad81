"""Chains of strangers: whatever a repository holds, it is refused in one line or gives what its manifest says.

Nothing is unpickled, no code of a repository runs, no name leads out of it, and no claim takes memory or time before
it is checked. What could do harm is tried in a process of its own, with little memory and an audit hook that sees
every file that is opened, every unpickled name and every connection. A fuzz test then alters every file that a chain
has, with the hashes as they were and with hashes that fit, as a forger would write them.

``TRUST_SEED=llama:17`` runs one case of the fuzz test and prints it.
"""

import ast
import hashlib
import itertools
import json
import os
import pickle
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import pytest
import torch
from make_chain import add_calibration, edit_manifest, make_chain, refresh, variant_model
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

import cbd_hub
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import CbdError
from cbd_hub.interpolation.checkpoints import checksum
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.manifest import CALIBRATION_NAME, CHECKSUMS_NAME, INDEX_MAPS_NAME, MANIFEST_NAME, file_entry

resource = pytest.importorskip("resource", reason="memory is limited as POSIX does")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and is ended by SIGPROF")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "anchors/a0/model.safetensors"
CONFIG = "anchors/a0/config.json"
GENERATION = "anchors/a0/generation_config.json"

# Widths as small as the families allow; the ffn is wide enough that every size in between can be had.
_TINY: dict[str, Any] = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 60,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
}


def tiny_chain(folder: Path, variant: str = "llama") -> Path:
    """A chain of three anchors with everything that a chain can have, in about 100 KB."""
    own = {"head_dim": 4} if variant == "llama" else {}
    made = make_chain(folder, variant_model(variant, **{**_TINY, **own}), energy=True)
    wanted = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=2, pad_token_id=0)
    wanted.save_pretrained(made / "anchors" / "a0")
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(13)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(made)
    names = [p.name for p in made.glob("*token*")]
    edit_manifest(made, "tokenizer", value={n: file_entry(made / n).model_dump() for n in names})
    return add_calibration(made, torch.randint(3, 13, (4, 8), generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chain that no test alters."""
    return tiny_chain(tmp_path_factory.mktemp("pristine") / "chain")


@pytest.fixture
def chain(pristine: Path, tmp_path: Path) -> Path:
    """A tiny chain that a test may alter."""
    return Path(shutil.copytree(pristine, tmp_path / "chain"))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")


def between(folder: Path, pair: int = 0, share: float = 0.6) -> int:
    """A size between two anchors; at 0.6 of the way both are read."""
    counts = [a["num_parameters"] for a in manifest_of(folder)["anchors"]]
    return round(counts[pair + 1] + share * (counts[pair] - counts[pair + 1]))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def vouch(manifest: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
    """Lets a manifest state a size and a hash for one file of its chain."""
    top = {INDEX_MAPS_NAME: "index_maps", CHECKSUMS_NAME: "checksums", CALIBRATION_NAME: "calibration"}
    if name in top:
        manifest[top[name]] = entry
    elif name.startswith("anchors/"):
        _, anchor, file = name.split("/", 2)
        manifest["anchors"][int(anchor[1:])]["files"][file] = entry
    else:
        manifest["tokenizer"][name] = entry


def forge(folder: Path, *names: str) -> None:
    """Makes a manifest's sizes and hashes of some files fit; digests of tensors stay as they are."""
    manifest = manifest_of(folder)
    for name in names:
        vouch(manifest, name, file_entry(folder / name).model_dump())
    write_manifest(folder, manifest)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def made_of(folder: Path, size: int) -> dict[str, torch.Tensor]:
    """The parameters of a model of a size."""
    opened = Chain.from_pretrained(folder)
    return dict(opened.initialize(opened.plan(size), progress=False).named_parameters())


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below a folder: size and time of change of files, and inodes."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)
            stat = os.lstat(path)
            found[path] = (0, 0, stat.st_ino) if name in folders else (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


# -- what may come of it ----------------------------------------------------------------------------------------------


class HungError(BaseException):
    """A case took too much processor time. Not an Exception, so that nothing on the way swallows it."""


class Watched:
    """Keeps whatever its body raises, and ends it after some seconds of processor time.

    Assertions of this module and interrupts pass. Processor time, since a busy machine makes no case slow, and since
    the alarm belongs to pytest's own timeout.
    """

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds = seconds
        self.error: BaseException | None = None

    @staticmethod
    def _late(signum: int, frame: FrameType | None) -> None:
        raise HungError("too slow")

    def __enter__(self) -> "Watched":
        self.previous = signal.signal(signal.SIGPROF, self._late)
        signal.setitimer(signal.ITIMER_PROF, self.seconds, 1.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, self.previous)
        self.error = error
        own = isinstance(error, AssertionError) and traceback.extract_tb(trace)[-1].filename == __file__
        return error is not None and not own and not isinstance(error, KeyboardInterrupt)

    @property
    def where(self) -> str:
        """The last place in this package that an error came through, and the place where it was raised."""
        frames = traceback.extract_tb(self.error.__traceback__) if self.error else []
        own = [f for f in frames if Path(f.filename).is_relative_to(Path(cbd_hub.__file__).parent)]
        return " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in [*own[-1:], *frames[-1:]])

    @property
    def problem(self) -> str:
        """What is wrong with an outcome: nothing where there was no error, or one of this package in one line."""
        if self.error is None:
            return ""
        if not isinstance(self.error, CbdError):
            return f"{type(self.error).__name__} at {self.where}: {str(self.error)[:300]!r}"
        return "" if str(self.error).isprintable() else f"not one line, at {self.where}: {str(self.error)[:300]!r}"


def make(folder: Path, size: int) -> Watched:
    """What comes of one size."""
    with Watched() as outcome:
        made_of(folder, size)
    return outcome


def refusal(folder: Path, size: int) -> str:
    """What is wrong with the refusal of one size: nothing where it was refused as it should be."""
    outcome = make(folder, size)
    return outcome.problem or ("" if outcome.error else "it was accepted")


def assert_none(problems: dict[str, str]) -> None:
    """Tells all problems at once."""
    found = {what: problem for what, problem in problems.items() if problem}
    assert not found, "\n".join([f"{len(found)} of {len(problems)}:", *(f"{k}: {v}" for k, v in found.items())])


# -- a process of its own ---------------------------------------------------------------------------------------------

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

_MEMORY = 512 << 20
"""What the sandbox may take beyond what an ordinary chain needs."""
_AT_ONCE = 3.0
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
        return self.harm or ("" if self.seconds < _AT_ONCE else f"it took {self.seconds:.1f} s")


class Sandbox:
    """A process with little memory that works on one chain after another; started again after one that it hung on."""

    def __init__(self, ordinary: Path, home: Path) -> None:
        self.arguments = [sys.executable, "-c", _SANDBOX, str(ordinary), str(_MEMORY), str(3 * _AT_ONCE)]
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


@pytest.fixture(scope="module")
def sandbox(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    made = Sandbox(pristine, tmp_path_factory.mktemp("sandbox") / "home")
    yield made
    made.stop()


def test_the_sandbox_sees_what_it_is_there_for(sandbox: Sandbox, pristine: Path, chain: Path) -> None:
    """An ordinary chain does no harm, and the reports are not empty where there is something to be seen."""
    reply = sandbox.ask(pristine, between(pristine))
    assert (reply.kind, reply.harm) == ("model", "")
    assert pristine / WEIGHTS in reply.opened
    assert all(pristine in path.parents for path in reply.opened if path.suffix == ".safetensors")
    assert reply.problem == "it was accepted"
    assert "127.0.0.1" in sandbox.ask(pristine, do="connect").harm
    assert str(chain / "written") in sandbox.ask(chain, do="write").harm


# -- nothing is unpickled ---------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "unpickled")


def payload(marker: Path) -> bytes:
    data = pickle.dumps(Payload(marker))
    pickle.loads(data)  # it works
    assert marker.read_text() == "unpickled"
    marker.unlink()
    return data


def test_a_pickle_beside_safetensors_is_ignored(sandbox: Sandbox, chain: Path, tmp_path: Path) -> None:
    data = payload(tmp_path / "marker")
    for anchor in ("a0", "a1", "a2"):
        for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "adapter_model.bin", "optimizer.pkl"):
            (chain / "anchors" / anchor / name).write_bytes(data)
        index = {"metadata": {}, "weight_map": {"model.norm.weight": "pytorch_model.bin"}}
        (chain / "anchors" / anchor / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    refresh(chain)
    assert "pytorch_model.bin" in manifest_of(chain)["anchors"][0]["files"]
    for pair in (0, 1):
        reply = sandbox.ask(chain, between(chain, pair))
        assert (reply.kind, reply.harm) == ("model", ""), reply.message
        assert {p.suffix for p in reply.opened}.isdisjoint({".bin", ".pt", ".pkl"})
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.safetensors.bin", "model.SAFETENSORS", "model.safetensors"]
)
def test_a_repository_of_pickles_is_refused(sandbox: Sandbox, chain: Path, tmp_path: Path, name: str) -> None:
    """Also where the pickle carries the name of a safetensors file."""
    data, size = payload(tmp_path / "marker"), between(chain)
    (chain / WEIGHTS).unlink()
    (chain / "anchors" / "a0" / name).write_bytes(data)
    manifest = manifest_of(chain)
    del manifest["anchors"][0]["files"]["model.safetensors"]
    write_manifest(chain, manifest)
    forge(chain, f"anchors/a0/{name}")
    reply = sandbox.ask(chain, size)
    assert reply.problem == ""
    assert "is not a safetensors file" in reply.message or "no other weights are read" in reply.message
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", [INDEX_MAPS_NAME, CALIBRATION_NAME, CHECKSUMS_NAME, CONFIG, GENERATION])
def test_a_pickle_in_place_of_another_file_is_refused(
    sandbox: Sandbox, chain: Path, tmp_path: Path, name: str
) -> None:
    size = between(chain)
    (chain / name).write_bytes(payload(tmp_path / "marker"))
    forge(chain, name)
    assert sandbox.ask(chain, size, do="calibration" if name == CALIBRATION_NAME else "make").problem == ""
    assert not (tmp_path / "marker").exists()


_PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
_RUNS = {"torch.load", "np.load", "numpy.load", "eval", "exec", "compile", "__import__"}
_NEVER = {"trust_remote_code": "False", "allow_pickle": "False", "allow_all_kernels": "False", "weights_only": "True"}


def test_no_module_unpickles_or_trusts_code() -> None:
    for path in sorted(Path(cbd_hub.__file__).parent.rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
        imported |= {str(n.module).split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
        assert not imported & _PICKLES, path
        calls = [n for n in nodes if isinstance(n, ast.Call)]
        assert not {ast.unparse(call.func) for call in calls} & _RUNS, path
        for keyword in (k for call in calls for k in call.keywords if k.arg in _NEVER):
            assert ast.unparse(keyword.value) == _NEVER[str(keyword.arg)], path


# -- no code of a repository runs -------------------------------------------------------------------------------------


def plant(folder: Path, marker: Path) -> None:
    """Writes a module that says so when it is run, under the names that transformers looks for."""
    code = (
        f"open({str(marker)!r}, 'w').write('run')\n"
        "from transformers import *\n"
        "class Config(LlamaConfig):\n    model_type = 'evil'\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
        "class Words(PreTrainedTokenizerFast):\n    pass\n"
        "def generate(model, **kwargs):\n    pass\n"
    )
    for name in ("evil.py", "configuration_evil.py", "modeling_evil.py", "custom_generate/generate.py", "__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)


_AUTO_MAP = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"auto_map": _AUTO_MAP}, False),
        ({"auto_map": {k: f"owner/name--{v}" for k, v in _AUTO_MAP.items()}}, False),
        ({"auto_map": _AUTO_MAP, "architectures": ["Model"]}, False),
        ({"auto_map": _AUTO_MAP, "model_type": "evil"}, True),
        ({"auto_map": _AUTO_MAP, "model_type": None}, True),
        ({"attn_implementation": "owner/kernel"}, False),
        ({"_attn_implementation": "owner/kernel"}, False),
        ({"_attn_implementation_internal": "owner/kernel"}, False),
        ({"_attn_implementation": "kernels-community/flash-attn"}, False),
        ({"_attn_implementation": "flash_attention_2"}, False),
        ({"_experts_implementation": "owner/kernel"}, False),
    ],
)
def test_code_that_a_config_names_is_not_run(
    sandbox: Sandbox, chain: Path, tmp_path: Path, change: dict[str, Any], refused: bool
) -> None:
    """Neither modules of the repository nor kernels of another; and the made model does not name them either."""
    ordinary = sandbox.ask(chain, between(chain))
    for anchor in ("a0", "a1"):
        edit_json(chain / "anchors" / anchor / "config.json", **change)
        plant(chain / "anchors" / anchor, tmp_path / "marker")
        forge(chain, f"anchors/{anchor}/config.json", f"anchors/{anchor}/evil.py")
    for size in (between(chain), manifest_of(chain)["anchors"][0]["num_parameters"]):
        reply = sandbox.ask(chain, size)
        assert not (tmp_path / "marker").exists()
        if refused:
            assert reply.problem == ""
            continue
        assert (reply.kind, reply.harm) == ("model", ""), reply.message
        assert "auto_map" not in json.loads(reply.made["config"])
        assert "evil" not in reply.made["config"]
        assert "owner/" not in reply.made["config"]
        assert reply.made["attention"] == ordinary.made["attention"]


@pytest.mark.parametrize("at_top", [False, True], ids=["tokenizer_config", "config_at_the_top"])
def test_code_that_a_tokenizer_names_is_not_run(sandbox: Sandbox, chain: Path, tmp_path: Path, at_top: bool) -> None:
    """Not even where the user would answer yes: the user is not asked."""
    plant(chain, tmp_path / "marker")
    name = "config.json" if at_top else "tokenizer_config.json"
    if at_top:
        (chain / name).write_text(json.dumps({"model_type": "evil", "auto_map": _AUTO_MAP}))
    else:
        edit_json(chain / name, auto_map={"AutoTokenizer": ["evil.Words", "evil.Words"]}, tokenizer_class="Words")
    forge(chain, name, "evil.py")
    reply = sandbox.ask(chain, do="tokenizer")
    assert not (tmp_path / "marker").exists(), "the code was run"
    assert reply.known, reply.problem  # a tokenizer without that code, or a refusal
    assert reply.harm == ""


def test_a_malformed_tokenizer_is_refused_or_harmless(chain: Path) -> None:
    problems = {}
    for name, contents in {
        "tokenizer.json": [
            "{", "[]", "{}", "null", "[" * 100_000, '{"version": "1.0", "model": {"type": "Evil"}}', "\xff",
        ],
        "tokenizer_config.json": [
            "{", "[]", "null", "[" * 100_000, "\xff", '{"tokenizer_class": 5}', '{"tokenizer_class": "Nonesuch"}',
            '{"model_max_length": "long"}', '{"added_tokens_decoder": {"x": 5}}', '{"auto_map": 5}',
            '{"chat_template": 5}', '{"extra_special_tokens": 7}',
        ],
    }.items():  # fmt: skip
        ordinary = (chain / name).read_bytes()
        for content in contents:
            (chain / name).write_bytes(content.encode("latin-1"))
            forge(chain, name)
            with Watched() as outcome:
                assert len(Chain.from_pretrained(chain).tokenizer) == 13
            problems[f"{name} {content[:50]}"] = outcome.problem
        (chain / name).write_bytes(ordinary)
        forge(chain, name)
    assert_none(problems)


def test_a_file_that_the_manifest_does_not_name_has_no_say(chain: Path) -> None:
    """What no hash vouches for changes neither the tokenizer nor the model."""
    ordinary = Chain.from_pretrained(chain)
    model, words = ordinary.initialize(ordinary.plan(between(chain)), progress=False), ordinary.tokenizer
    for anchor in ("a0", "a1"):
        (chain / "anchors" / anchor / "config.1.0.0.json").write_text(json.dumps({"rms_norm_eps": 0.5}))
    (chain / "config.json").write_text(json.dumps({"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}))
    (chain / "special_tokens_map.json").write_text(json.dumps({"eos_token": "w7", "pad_token": "w8"}))
    (chain / "added_tokens.json").write_text(json.dumps({"evil": 13}))
    (chain / "chat_template.jinja").write_text("evil")
    opened = Chain.from_pretrained(chain)
    again = opened.initialize(opened.plan(between(chain)), progress=False)
    assert again.config.to_dict() == model.config.to_dict()
    found = opened.tokenizer
    assert (len(found), type(found), found.eos_token) == (len(words), type(words), words.eos_token)
    assert found.chat_template is None


def test_a_config_that_names_another_file_is_read_alone(chain: Path) -> None:
    """``configuration_files`` sends transformers to a file that no hash vouches for."""
    size = between(chain)
    for anchor in ("a0", "a1"):
        folder = chain / "anchors" / anchor
        other = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.5}
        (folder / "config.1.0.0.json").write_text(json.dumps(other))
        edit_json(folder / "config.json", configuration_files=["config.1.0.0.json"])
        forge(chain, f"anchors/{anchor}/config.json")
    with Watched() as outcome:
        opened = Chain.from_pretrained(chain)
        model = opened.initialize(opened.plan(size), progress=False)
        assert model.config.rms_norm_eps != 0.5, "a file was read that the manifest does not name"
    assert outcome.problem == ""


def test_a_family_that_is_not_known_is_no_way_around(chain: Path) -> None:
    """Granite has Llama's tensors and no map of its own here: the manifest's map is taken, whatever its config."""
    size, names = between(chain), [f"anchors/{anchor}/config.json" for anchor in ("a0", "a1", "a2")]
    edit_manifest(chain, "architecture", value="granite")
    edit_manifest(chain, "axis_map", "model_type", value="granite")
    for name in names:
        edit_json(chain / name, model_type="granite", architectures=["GraniteForCausalLM"])
    forge(chain, *names)
    assert made_of(chain, size)  # such a chain can be read
    problems, ordinary = {}, {name: (chain / name).read_text() for name in names}
    for change in (
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        {"quantization_config": {"quant_method": "nonesuch"}},
        {"quantization_config": 5},
        {"fusion_config": {"evil": True}},
        {"hidden_act": "nonesuch"},
        {"pad_token_id": 10**6},
        {"rope_parameters": {"rope_type": "nonesuch", "rope_theta": 1.0}},
        {"_attn_implementation": "owner/kernel"},
        {"embedding_multiplier": "x"},
        {"per_layer_config": {"9": {}}},
        {"to_dict": 5},
    ):
        for name in names:
            (chain / name).write_text(json.dumps(json.loads(ordinary[name]) | change))
        forge(chain, *names)
        problems[str(change)] = make(chain, size).problem
    assert_none(problems)


# -- names stay inside the repository ---------------------------------------------------------------------------------

OUTSIDE = [
    "../secret.safetensors", "anchors/../../secret.safetensors", "a0/../../../secret.safetensors",
    "{secret}", "/{secret}", "//{secret}", "\\..\\secret.safetensors", "..\\secret.safetensors",
    "C:\\secret.safetensors", "C:/secret.safetensors", "C:secret.safetensors", "file:{secret}",
    "\0.safetensors", "model.safetensors\0.safetensors",
]  # fmt: skip
"""Names that would lead out of a repository somewhere, if they were followed."""

STRANGE = [
    "./.safetensors", "model.safetensors/x.safetensors", "x" * 300 + ".safetensors", "x/" * 3000 + "x.safetensors",
    "%2e%2e/secret.safetensors", "~/secret.safetensors", "$HOME/x.safetensors", "con.safetensors",
    "a\nb.safetensors", "a\rb.safetensors", "\x1b[2J.safetensors", " .safetensors", "\u202ebin.safetensors",
    "．．/secret.safetensors", "𝕏" * 80 + ".safetensors", "-rf.safetensors", "*.safetensors", "é.safetensors",
]  # fmt: skip
"""Names that stay inside, where there is no such file, and that a file system or a terminal may stumble over."""


@pytest.mark.parametrize("place", ["subfolder", "files", "weights", "tokenizer"])
def test_a_name_that_leads_outside_or_nowhere_is_refused(chain: Path, place: str) -> None:
    size, ordinary, secret = between(chain), manifest_of(chain), chain.parent / "secret.safetensors"
    shutil.copyfile(chain / WEIGHTS, secret)
    before, problems = tree(chain.parent), {}
    for name in OUTSIDE + STRANGE:
        manifest = json.loads(json.dumps(ordinary))
        path, anchor = name.replace("{secret}", str(secret)), manifest["anchors"][0]
        if place == "subfolder":
            anchor["subfolder"] = path
        elif place == "files":
            anchor["files"][path] = file_entry(secret).model_dump()
        elif place == "weights":
            anchor["files"][path] = anchor["files"].pop("model.safetensors")
        else:
            manifest["tokenizer"] = {path: file_entry(secret).model_dump()}
        write_manifest(chain, manifest)
        before = tree(chain.parent)
        with Watched() as outcome:
            opened = Chain.from_pretrained(chain)
            if place == "tokenizer":
                assert len(opened.tokenizer) < 0, "it was accepted"
            elif place != "files":
                opened.initialize(opened.plan(size), progress=False)
                raise AssertionError("it was accepted")
        problem = outcome.problem
        if name in OUTSIDE and "is not a path inside the repository" not in str(outcome.error):
            problem = f"only later: {outcome.error!r}"
        with Watched() as outcome:
            Chain.from_pretrained(chain).save_pretrained(chain.parent / "copy")
            raise AssertionError("it was copied")
        written = sorted(set(tree(chain.parent)) ^ set(before))
        problems[ascii(name)[:60]] = problem or outcome.problem or (f"it wrote {written}" if written else "")
    assert_none(problems)


@pytest.mark.parametrize(
    "names",
    [
        [MANIFEST_NAME],
        [CHECKSUMS_NAME, INDEX_MAPS_NAME],
        ["anchors/a0/config.json"],
        ["anchors/a1/model.safetensors"],
        ["tokenizer.json", "./tokenizer.json", "anchors/./a0/config.json"],
        [MANIFEST_NAME + ".partial/x"],
        ["tokenizer.json", "tokenizer.json/x"],
        ["anchors"],
        ["x", "x/y"],
        ["."],
    ],
    ids=lambda names: names[-1],
)
def test_names_that_collide_are_refused_or_copied_right(chain: Path, tmp_path: Path, names: list[str]) -> None:
    """A tokenizer's files share a folder with everything else: no entry takes another's place unseen."""
    size, manifest = between(chain), manifest_of(chain)
    for name in names:
        path = chain / name
        if not path.exists() and not (chain / name.split("/")[0]).is_file():
            path.parent.mkdir(exist_ok=True)
            path.write_text("x")
        lost = {"size": 1, "sha256": "0" * 64}
        manifest["tokenizer"][name] = file_entry(path).model_dump() if path.is_file() else lost
    write_manifest(chain, manifest)
    before = tree(tmp_path)
    with Watched() as outcome:
        Chain.from_pretrained(chain).save_pretrained(tmp_path / "copy")
    assert outcome.problem == ""
    if outcome.error is not None:
        assert tree(tmp_path) == before
        return
    assert equal(made_of(tmp_path / "copy", size), made_of(chain, size))
    files = [Chain.from_pretrained(place).manifest.anchors[0].files for place in (chain, tmp_path / "copy")]
    assert files[0] == files[1]


# -- links in a local folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_MAPS_NAME, CHECKSUMS_NAME, CONFIG, WEIGHTS])
def test_a_link_is_followed_and_its_content_must_fit(chain: Path, tmp_path: Path, name: str) -> None:
    """The Hub's own cache is made of links, so they are followed; what lies behind must be what the manifest says."""
    size = between(chain)
    expected = made_of(chain, size)
    shutil.move(chain / name, tmp_path / "elsewhere")
    (chain / name).symlink_to(tmp_path / "elsewhere")
    assert equal(made_of(chain, size), expected)
    (chain / name).unlink()
    (tmp_path / "secret").write_text("password: hunter2\n" * 1000)
    (chain / name).symlink_to(tmp_path / "secret")
    outcome = make(chain, size)
    assert refusal(chain, size) == ""
    assert "hunter2" not in str(outcome.error)
    assert (tmp_path / "secret").read_text() == "password: hunter2\n" * 1000


def test_what_is_no_file_is_not_waited_for(sandbox: Sandbox, chain: Path) -> None:
    size, problems = between(chain), {}
    for name in (MANIFEST_NAME, INDEX_MAPS_NAME, CHECKSUMS_NAME, CONFIG, GENERATION, WEIGHTS):
        path, ordinary = chain / name, (chain / name).read_bytes()
        for what in ("/dev/zero", "/proc/self/mem", "pipe", "loop", "folder", "nothing"):
            path.unlink()
            if what == "pipe":
                os.mkfifo(path)
            elif what == "folder":
                path.mkdir()
            elif what != "nothing":
                path.symlink_to(path if what == "loop" else what)
            problems[f"{name} {what}"] = sandbox.ask(chain, size).problem
            if what == "folder":
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
            path.write_bytes(ordinary)
    assert_none(problems)


def test_a_lie_about_another_repository_does_not_drop_its_files(chain: Path, tmp_path: Path) -> None:
    """A damaged download is dropped. A file that is not what some manifest says of it is another repository's."""
    hub, size, ordinary = tmp_path / "hub", between(chain), manifest_of(chain)
    victim = hub / "models--owner--victim"
    snapshot = victim / "snapshots" / COMMIT
    for folder in (victim / "blobs", snapshot):
        folder.mkdir(parents=True)
    problems = {}
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        for path in sorted((chain / "anchors" / "a0").iterdir()):  # as the Hub's client lays them out
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, victim / "blobs" / digest)
            (snapshot / path.name).unlink(missing_ok=True)
            (snapshot / path.name).symlink_to(Path("../../blobs") / digest)
        manifest = json.loads(json.dumps(ordinary))
        anchor = manifest["anchors"][0]
        anchor |= {"repo_id": "owner/victim", "revision": COMMIT, "subfolder": None}
        anchor["files"][name] = {"size": 5, "sha256": "0" * 64}
        write_manifest(chain, manifest)
        with Watched() as outcome:
            opened = Chain.from_pretrained(chain, cache_dir=str(hub), local_files_only=True)
            opened.initialize(opened.plan(size), progress=False)
            raise AssertionError("it was accepted")
        problems[name] = outcome.problem or ("" if (snapshot / name).exists() else "the victim's file is gone")
    assert_none(problems)


# -- a repository is named by its id ----------------------------------------------------------------------------------

ADDRESSES = [
    "http://127.0.0.1:9/owner/name", "https://huggingface.co/owner/name", "file:///etc", "file://{outside}",
    "hf://owner/name", "s3:owner/name", "git@127.0.0.1:owner/name", "127.0.0.1:9/name", "localhost/owner/name",
    "owner/name/..", "../name", "owner/..", "../../etc", "./name", "/", "{outside}", "{outside}/", "~", "~/name",
    "~nobody-of-that-name/x", "owner/name?revision=main", "owner/name#x", "owner/name@main", "owner name/x",
    "owner\\name", "owner/na\nme", "owner/\0", "", " ", ".", "-owner/name", "owner/" + "x" * 300, "x" * 5000,
    "owner/%2e%2e", "datasets/owner/name", "refs/../x",
]  # fmt: skip


def test_a_repository_is_no_address_and_no_path(sandbox: Sandbox, chain: Path) -> None:
    """Refused before anybody is asked, and nothing outside the chain is read: an anchor lies there, and would fit."""
    size, manifest, outside = between(chain), manifest_of(chain), chain.parent / "outside"
    shutil.move(chain / "anchors" / "a0", outside)
    problems = {}
    for name in ADDRESSES:
        repo_id = name.replace("{outside}", str(outside))
        manifest["anchors"][0] |= {"repo_id": repo_id, "revision": COMMIT, "subfolder": None}
        write_manifest(chain, manifest)
        reply = sandbox.ask(chain, size)
        read = [path for path in reply.opened if outside in path.parents]
        problems[ascii(name)[:60]] = reply.problem or (f"it read {read}" if read else "")
    assert_none(problems)


def test_a_revision_is_a_commit(sandbox: Sandbox, chain: Path) -> None:
    problems = {}
    edit_manifest(chain, "anchors", 0, "repo_id", value="owner/name")
    for revision in (
        "main", "../" * 13 + "x", "refs/pr/1", "0" * 39 + "/", "0" * 41, "0" * 40 + "\n", "A" * 40, "", 5, None,
        [COMMIT],
    ):  # fmt: skip
        edit_manifest(chain, "anchors", 0, "revision", value=revision)
        reply = sandbox.ask(chain, between(chain))
        problems[repr(revision)] = reply.problem or ("" if "revision" in reply.message else reply.message)
    assert_none(problems)


def test_a_folder_of_the_same_name_does_not_stand_in_for_a_repository(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest pins a commit; a folder that happens to lie below the working folder is no commit."""
    size, manifest = between(chain), manifest_of(chain)
    shutil.copytree(chain / "anchors" / "a0", tmp_path / "cwd" / "owner" / "name")
    manifest["anchors"][0] |= {"repo_id": "owner/name", "revision": COMMIT, "subfolder": None}
    write_manifest(chain, manifest)
    monkeypatch.chdir(tmp_path / "cwd")
    opened = Chain.from_pretrained(chain, cache_dir=str(tmp_path / "hub"), local_files_only=True)
    with pytest.raises(CbdError, match="is not in the cache"):
        opened.initialize(opened.plan(size), progress=False)


# -- nothing is taken before it is checked ----------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["native", "pca"])
@pytest.mark.parametrize(
    ("name", "value", "anchors"),
    [
        ("vocab_size", 2**36, (0, 1, 2)),
        ("head_dim", 2**36, (0, 1, 2)),
        ("intermediate_size", 2**38, (0,)),
        ("intermediate_size", 2**38, (0, 1)),
        ("hidden_size", 2**36, (0,)),
        ("hidden_size", 2**36, (0, 1)),
    ],
)
def test_terabytes_that_a_manifest_claims_are_refused(
    sandbox: Sandbox, chain: Path, name: str, value: int, anchors: tuple[int, ...], basis: str
) -> None:
    """Manifest, configs and index maps agree on them; only the weights do not, whose headers are read first."""
    manifest = manifest_of(chain) | {"basis": basis}
    axis_map = AxisMap.from_dict(manifest["axis_map"])
    for i in anchors:
        anchor = manifest["anchors"][i]
        anchor["shape"] |= {name: value}
        anchor["num_parameters"] = count_parameters(axis_map, axis_map.sizes(anchor["shape"]))
        edit_json(chain / "anchors" / f"a{i}" / "config.json", **{name: value})
    write_manifest(chain, manifest)
    maps = load_file(chain / INDEX_MAPS_NAME)
    maps = {k: v for k, v in maps.items() if "/energy/" not in k}  # which have the size of what they are for
    if basis == "pca":  # its hidden units are in order, which is not stored
        maps = {k: v for k, v in maps.items() if not k.endswith("/hidden")}
    save_file(maps, chain / INDEX_MAPS_NAME)
    forge(chain, INDEX_MAPS_NAME, *(f"anchors/a{i}/config.json" for i in anchors))
    shapes = [dict(anchor["shape"]) for anchor in manifest["anchors"]]
    problems = {}
    for large, small in itertools.pairwise(shapes):
        half = (large["intermediate_size"] + small["intermediate_size"]) // 2
        for shape in (large, small, {**large, "intermediate_size": half}, {**small, "intermediate_size": half}):
            reply = sandbox.ask(chain, shape=shape, method="interpolate")
            if reply.kind == "model":  # made from those alone that tell the truth
                used = json.loads(reply.made["config"])["cbd_hub"]["anchors"]
                lying = {f"a{i}" for i in anchors} & set(used)
                problems[f"{shape}"] = reply.harm or (f"made from {lying}" if lying else "")
            else:
                problems[f"{shape}"] = reply.problem
    assert_none(problems)


@pytest.mark.parametrize(
    ("name", "key", "entry"),
    [
        (WEIGHTS, "model.norm.weight", {"shape": [2**40]}),
        (WEIGHTS, "model.norm.weight", {"shape": [2**40], "data_offsets": [0, 2**42]}),
        (WEIGHTS, "x", {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
        (WEIGHTS, "x", {"dtype": "F32", "shape": [0, 2**61], "data_offsets": [0, 0]}),
        (INDEX_MAPS_NAME, "a1/order/ffn", {"shape": [3, 2**40]}),
        (INDEX_MAPS_NAME, "a1/order/ffn", {"shape": [3, 2**40], "data_offsets": [0, 3 * 2**42]}),
        (INDEX_MAPS_NAME, "x", {"dtype": "I32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}),
        (CALIBRATION_NAME, "input_ids", {"shape": [2**40, 8]}),
        (CALIBRATION_NAME, "input_ids", {"shape": [2**40, 8], "data_offsets": [0, 2**45]}),
    ],
)
def test_terabytes_that_a_header_claims_are_refused(
    sandbox: Sandbox, chain: Path, name: str, key: str, entry: dict[str, Any]
) -> None:
    size = between(chain)
    header, data = split((chain / name).read_bytes())
    header[key] = header.get(key, {}) | entry
    (chain / name).write_bytes(joined(header, data))
    forge(chain, name)
    assert sandbox.ask(chain, size, do="calibration" if name == CALIBRATION_NAME else "make").problem == ""


def test_a_header_is_checked_before_anything_else_of_its_file(sandbox: Sandbox, chain: Path) -> None:
    """Its length before it is read; all of it before a terabyte (of holes) is hashed, where digests are missing."""
    size, path, problems = between(chain), chain / WEIGHTS, {}
    ordinary = path.read_bytes()
    for length in (2**64 - 1, 2**62, 2**40, 10**8, 10**8 - 1):
        path.write_bytes(struct.pack("<Q", length) + ordinary[8:])
        forge(chain, WEIGHTS)
        problems[f"a header of {length} bytes"] = sandbox.ask(chain, size).problem
        with path.open("r+b") as file:
            file.truncate(2**40)
        edit_manifest(chain, "anchors", 0, "files", "model.safetensors", "size", value=2**40)
        problems[f"a header of {length} bytes in a terabyte"] = sandbox.ask(chain, size).problem
    edit_manifest(chain, "checksums", value=None)
    problems["a terabyte without digests"] = sandbox.ask(chain, size).problem
    path.write_bytes(joined(b"[" + b"[]," * 33_000_000 + b"[]]", b""))  # two gigabytes of lists
    edit_manifest(chain, "anchors", 0, "files", "model.safetensors", "size", value=path.stat().st_size)
    problems["a header of 99 megabytes"] = sandbox.ask(chain, size).problem
    assert_none(problems)


@pytest.mark.parametrize(
    "what", ["dimensions", "factors", "stored dimensions", "tensors of many layers", "9 more axes", "40 more axes"]
)
def test_small_files_that_ask_for_endless_work_are_refused(sandbox: Sandbox, chain: Path, what: str) -> None:
    """Kilobytes (the first three: megabytes) that would keep a trusting reader busy for minutes to years."""
    size, manifest = between(chain), manifest_of(chain)
    axis_map, anchors = manifest["axis_map"], manifest["anchors"]
    if what == "dimensions":  # of one tensor in a header; their product has millions of digits
        header, data = split((chain / WEIGHTS).read_bytes())
        header["model.norm.weight"]["shape"] = [2**61] * 300_000
        (chain / WEIGHTS).write_bytes(joined(header, data))
        vouch(manifest, WEIGHTS, file_entry(chain / WEIGHTS).model_dump())
    elif what == "factors":  # of one dimension, in an axis string
        axis_map["tensors"]["model.norm.weight"] = "(" + "999999999 " * 500_000 + "hidden)"
    elif what == "stored dimensions":
        axis_map["tensors"]["model.norm.weight"] = "999999999 " * 500_000 + "hidden"
    elif what == "tensors of many layers":  # twenty million operations
        axis_map["tensors"] |= {f"x{i}.*": "1" for i in range(2_000)}
        anchors[0]["shape"]["num_hidden_layers"] = 10_000
        read = AxisMap.from_dict(axis_map)
        anchors[0]["num_parameters"] = size = count_parameters(read, read.sizes(anchors[0]["shape"]))
        manifest |= {"anchors": anchors[:1], "index_maps": None}
    else:  # that all differ, so that every combination could be tried, of three values an axis
        names = [f"x{i}" for i in range(int(what.split()[0]))]
        axis_map["tensors"] |= {name: name for name in names}
        axis_map["fields"] |= {f"num_{name}": name for name in names}
        read = AxisMap.from_dict(axis_map)
        for i, anchor in enumerate(anchors):
            anchor["shape"] |= {f"num_{name}": 9 - 3 * i for name in names}
            anchor["num_parameters"] = count_parameters(read, read.sizes(anchor["shape"]))
        maps = load_file(chain / INDEX_MAPS_NAME)
        for i, small in enumerate(("a1", "a2")):
            order = np.arange(9 - 3 * i, dtype=np.int32)
            rows = np.tile(order, (anchors[i]["shape"]["num_hidden_layers"], 1))
            maps |= {f"{small}/order/{name}": rows for name in names}
        save_file(maps, chain / INDEX_MAPS_NAME)
        vouch(manifest, INDEX_MAPS_NAME, file_entry(chain / INDEX_MAPS_NAME).model_dump())
        size = (anchors[0]["num_parameters"] + anchors[1]["num_parameters"]) // 2
    write_manifest(chain, manifest)
    assert sandbox.ask(chain, size).problem == ""


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("llama", {"num_labels": 2**40}),
        ("llama", {"num_labels": 10**8}),
        ("llama", {"num_hidden_layers": 2**40}),
        ("llama", {"vocab_size": 2**60, "hidden_size": 2**60}),
        ("llama", {"per_layer_config": {str(i): {} for i in range(100_000)}}),
        ("smollm3", {"num_hidden_layers": 2**40, "layer_types": None, "no_rope_layers": None}),
        ("qwen2", {"num_hidden_layers": 2**40, "layer_types": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_config_claims_takes_no_memory(
    sandbox: Sandbox, tmp_path: Path, chain: Path, variant: str, change: dict[str, Any]
) -> None:
    """transformers makes lists as long as a config says: it must not see the config before the sizes are right."""
    folder = chain if variant == "llama" else tiny_chain(tmp_path / variant, variant)
    size = between(folder)
    edit_json(folder / CONFIG, **change)
    forge(folder, CONFIG)
    assert sandbox.ask(folder, size).problem == ""


@pytest.mark.parametrize("name", [MANIFEST_NAME, CHECKSUMS_NAME, CONFIG, GENERATION])
def test_a_huge_json_file_is_refused(sandbox: Sandbox, chain: Path, name: str) -> None:
    """A gigabyte (of holes) in place of kilobytes."""
    size = between(chain)
    with (chain / name).open("r+b") as file:
        file.truncate(2**40 if name == MANIFEST_NAME else 2**30)
    if name != MANIFEST_NAME:
        forge(chain, name)
    assert sandbox.ask(chain, size).problem == ""


# -- JSON -------------------------------------------------------------------------------------------------------------

JSON_FILES = [MANIFEST_NAME, CHECKSUMS_NAME, CONFIG, "anchors/a1/config.json", GENERATION]


@pytest.mark.parametrize("name", JSON_FILES)
def test_what_is_no_json_object_is_refused(chain: Path, name: str) -> None:
    size, problems = between(chain), {}
    for content in (
        b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}\0", b'{"a": 1,}', b"{'a': 1}",
        b"[" * 200, b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\x80", "{}".encode("utf-16"),
        b'{"a": 9' + b"9" * 5000 + b"}",
    ):  # fmt: skip
        (chain / name).write_bytes(content)
        if name != MANIFEST_NAME:
            forge(chain, name)
        problems[ascii(content)[:30]] = refusal(chain, size)
    assert_none(problems)


@pytest.mark.parametrize("name", JSON_FILES)
def test_deeply_nested_json_is_refused_or_harmless(chain: Path, name: str) -> None:
    """At every depth: readers differ in how deep they go, and one may read what the next cannot copy or write."""
    size, problems = between(chain), {}
    text = (chain / name).read_text(encoding="utf-8").rstrip()
    for depth in (100, 200, 300, 450, 600, 800, 950, 990, 2000, 100_000):
        for opening, closing in ("[]", ('{"a":', "}")):
            key, value = "recipe" if name == MANIFEST_NAME else "extra", opening * depth + "0" + closing * depth
            (chain / name).write_text(f'{text[:-1]}, "{key}": {{"a": {value}}}}}', encoding="utf-8")
            if name != MANIFEST_NAME:
                forge(chain, name)
            problems[f"{depth} times {opening}"] = make(chain, size).problem
    assert_none(problems)


@pytest.mark.parametrize(
    ("path", "template"),
    [
        (("anchors", 0, "num_parameters"), "{}"),
        (("anchors", 0, "shape", "hidden_size"), "{}"),
        (("anchors", 1, "layer_order", 0), "{}"),
        (("anchors", 0, "evaluation"), '{{"loss": {}, "perplexity": 1.0, "num_tokens": 5}}'),
        (("anchors", 0, "evaluation"), '{{"loss": 1.0, "perplexity": {}, "num_tokens": 5}}'),
        (("anchors", 0, "training"), '{{"tokens": 5, "seed": 1, "best_loss": {}}}'),
        (("anchors", 1, "barrier"), '{{"num_parameters": 5, "alphas": [{}], "losses": [1.0], "height": 0.0}}'),
        (("anchors", 1, "barrier"), '{{"num_parameters": 5, "alphas": [0.5], "losses": [{}], "height": 0.0}}'),
        (("curve",), '[{{"num_parameters": 5, "loss": {}, "method": "auto"}}]'),
        (("recipe",), '{{"a": {}}}'),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else value[2:20],
)
def test_what_is_no_number_is_refused(chain: Path, path: tuple[str | int, ...], template: str) -> None:
    """JSON has no NaN and no infinity, and a loss of NaN would be compared as if it were one."""
    edit_manifest(chain, *path, value="<here>")
    text, problems = (chain / MANIFEST_NAME).read_text(encoding="utf-8"), {}
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
        changed = text.replace('"<here>"', template.format(number))
        (chain / MANIFEST_NAME).write_text(changed, encoding="utf-8")
        with Watched() as outcome:
            Chain.from_pretrained(chain)
        problems[number] = outcome.problem or ("" if outcome.error else "it was accepted")
    assert_none(problems)


def test_of_a_key_that_stands_twice_one_value_counts_everywhere(chain: Path) -> None:
    """What is checked is what is used: either it is refused, or the last one counts, as in Python's reader."""
    size, problems = between(chain), {}
    expected, text = made_of(chain, size), (chain / MANIFEST_NAME).read_text(encoding="utf-8").strip()
    for other in ('"format": 2', '"anchors": []', '"architecture": "gpt2"', '"axis_map": {}', '"index_maps": null'):
        (chain / MANIFEST_NAME).write_text("{" + other + ", " + text[1:], encoding="utf-8")
        with Watched() as outcome:
            assert equal(made_of(chain, size), expected)
        problems[f"{other} first"] = outcome.problem
        (chain / MANIFEST_NAME).write_text(text[:-1] + ", " + other + "}", encoding="utf-8")
        problems[f"{other} last"] = refusal(chain, size)
    assert_none(problems)


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b", "\x1b[2J\x1b[31mred"], ids=ascii)
def test_a_refusal_is_one_line_whatever_it_quotes(chain: Path, text: str) -> None:
    """A message that moves the cursor or starts a new line could be taken for another program's."""
    size, ordinary, problems = between(chain), (chain / MANIFEST_NAME).read_bytes(), {}
    entry = {"size": 1, "sha256": "0" * 64}
    for path, value in [
        ((text,), 5), (("anchors", 0, text), 5), (("anchors", 0, "shape", text), 5),
        (("anchors", 0, "files", text + ".safetensors"), entry), (("anchors", 0, "files", text), {}),
        (("anchors", 0, "subfolder"), text), (("anchors", 0, "name"), text), (("anchors", 0, "dtype"), text),
        (("anchors", 0, "repo_id"), text), (("anchors", 1, "parent"), text), (("axis_map", text), 5),
        (("axis_map", "model_type"), text), (("axis_map", "tensors", text), "(("),
        (("axis_map", "tensors", "a"), text),
        (("axis_map", "tensors", text), text), (("axis_map", "fields", text), text), (("axis_map", "norms", text), []),
        (("axis_map", "norm"), text), (("architecture",), text), (("format",), text), (("basis",), text),
    ]:  # fmt: skip
        (chain / MANIFEST_NAME).write_bytes(ordinary)
        edit_manifest(chain, *path, value=value)
        problems[ascii(path)] = refusal(chain, size)
    (chain / MANIFEST_NAME).write_bytes(ordinary)
    config = (chain / CONFIG).read_text()
    for change in ({text: 5}, {"hidden_act": text}, {"hidden_size": text}, {"model_type": text}, {"dtype": text}):
        (chain / CONFIG).write_text(config)
        edit_json(chain / CONFIG, **change)
        forge(chain, CONFIG)
        problems[f"config.json {change!a}"] = refusal(chain, size)
    (chain / CONFIG).write_text(config)
    forge(chain, CONFIG)
    header, data = split((chain / WEIGHTS).read_bytes())
    for change in ({text: header["model.norm.weight"]}, {text: 5}, {"model.norm.weight": {"dtype": text}}):
        (chain / WEIGHTS).write_bytes(joined(header | change, data))
        forge(chain, WEIGHTS)
        problems[f"header {ascii(change)[:40]}"] = refusal(chain, size)
    assert_none(problems)


# -- fuzz -------------------------------------------------------------------------------------------------------------

KINDS = (
    "manifest", "manifest", "axis map", "claims", "config", "config", "header", "header", "data", "index maps",
    "index maps", "checksums", "generation config", "calibration", "manifest",
)  # fmt: skip
"""What is altered, in turn."""

DEEP = ("@100@", "@300@", "@450@", "@700@", "@950@", "@5000@")
"""Stand for lists within lists, of that depth: Python's own writer could not write them all."""

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 127, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**30,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), "", "a", "0", "1", "\n", "a\nb", "\0", "é",
    "\ud800", "../x", "/etc/passwd", "..", ".", "http://127.0.0.1:9/x", "x" * 300, "x" * 5000, "0" * 64, COMMIT,
    "float16", "F32", "load", "hidden", "hidden 2", "(2 hidden)", "(hidden + ffn)", "0 hidden", "heads",
    "vocab hidden", "model.norm.weight", "a0", "a1", "owner/name", [], [[]], [0], [0, 1, 2], [None], ["a"],
    [1.5, "x"], {}, {"a": 1}, {"": {}}, [0] * 300, *DEEP,
]  # fmt: skip
"""Values of every type that nobody expects."""

KEYS = [
    "auto_map", "quantization_config", "configuration_files", "attn_implementation", "_attn_implementation",
    "num_labels", "id2label", "dtype", "torch_dtype", "per_layer_config", "layer_types", "no_rope_layers",
    "attribute_map", "sub_configs", "to_dict", "__class__", "__dict__", "self", "cls", "kwargs", "model_type",
    "architectures", "is_encoder_decoder", "rope_parameters", "rope_scaling", "pad_token_id", "head_dim", "hidden_act",
    "use_cache", "_name_or_path", "cbd_hub", "tie_word_embeddings", "num_experts", "pruned_heads", "fusion_config",
    "transformers_weights", "__metadata__", "sliding_window", "mlp_bias", "pretraining_tp", "base_model_tp_plan",
    "distributed_config", "__float__", "output_attentions", "problem_type", "rms_norm_eps", "max_position_embeddings",
    "revision", "repo_id", "subfolder", "parent", "format", "a0", "a9", "", "a\nb", "é",
]  # fmt: skip
"""Keys that mean something to somebody."""

DTYPES = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F4 I64 I32 I8 U8 U64 BOOL C64 f32 X".split()

LEGITIMATE = {"aligned", "training", "layer_order", "layers_last"}
"""Fields that a manifest may state otherwise, and then means another model."""


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path of a JSON value but the empty one."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from paths_of(child, (*path, key))


def parent_of(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def differences(one: Any, other: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths at which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            yield from differences(one.get(key), other.get(key), (*path, key))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for i, pair in enumerate(zip(one, other, strict=True)):
            yield from differences(*pair, (*path, i))
    elif one != other:
        yield path


def dumped(value: Any) -> bytes:
    """JSON, with the lists that Python could not write."""
    text = json.dumps(value)
    for deep in DEEP:
        text = text.replace(f'"{deep}"', "[" * int(deep[1:-1]) + "]" * int(deep[1:-1]))
    return text.encode()


def alter_json(data: Any, draw: random.Random) -> tuple[str, bytes]:
    """Alters one place of a JSON value, in place; returns what was done, and the new text."""
    path = draw.choice(list(paths_of(data)))
    parent, last = parent_of(data, path), path[-1]
    value, where = parent[last], ".".join(map(str, path))
    action = draw.choice("replace replace delete rename twice swap number number insert string".split())
    if action == "number" and isinstance(value, int):
        parent[last] = draw.choice([value - 1, value + 1, value * 2, value * 8, 2**31, 2**62, -1, 0, -value])
    elif action == "string" and isinstance(value, str):
        options = [
            value + "x",
            value[:-1],
            value.upper(),
            "\n" + value,
            value + "\0",
            value.replace("*", "0"),
            2 * value,
        ]
        parent[last] = draw.choice(options)
    elif action == "delete":
        del parent[last]
        return f"{where} deleted", dumped(data)
    elif action == "rename" and isinstance(parent, dict):
        name = draw.choice([str(last) + "_", str(last).upper(), "x", *draw.sample(KEYS, 2), draw.choice(list(parent))])
        parent[name] = parent.pop(last)
        return f"{where} renamed to {name!a}", dumped(data)
    elif action == "insert" and isinstance(parent, dict):
        name = draw.choice(KEYS)
        parent[name] = draw.choice(HOSTILE)
        return f"beside {where}: {name!r} as {ascii(parent[name])[:80]}", dumped(data)
    elif action == "twice" and isinstance(parent, dict):
        other, first, rest = draw.choice(HOSTILE), draw.random() < 0.5, dict(parent)
        parent.clear()
        parent.update({"@twice@": other, **rest} if first else {**rest, "@twice@": other})
        text = dumped(data).replace(b'"@twice@"', json.dumps(str(last)).encode())
        return f"{where} {'preceded' if first else 'followed'} by itself as {ascii(other)[:80]}", text
    elif action == "swap" and (others := [p for p in paths_of(data) if p[: len(path)] != path[: len(p)]]):
        alike = [p for p in others if type(parent_of(data, p)[p[-1]]) is type(value)]
        other_path = draw.choice(alike if alike and draw.random() < 0.8 else others)
        other_parent = parent_of(data, other_path)
        parent[last], other_parent[other_path[-1]] = other_parent[other_path[-1]], value
        return f"{where} swapped with {'.'.join(map(str, other_path))}", dumped(data)
    else:
        parent[last] = draw.choice(HOSTILE)
    return f"{where}: {ascii(value)[:80]} becomes {ascii(parent[last])[:80]}", dumped(data)


def alter_bytes(data: bytes, draw: random.Random, start: int = 0, stop: int | None = None) -> tuple[str, bytes]:
    """Flips, deletes, inserts or cuts some bytes between two offsets."""
    changed, done = bytearray(data), []
    for _ in range(draw.randint(1, 3)):
        end = min(len(data) if stop is None else stop, len(changed))
        if start >= end:
            break
        place, action = draw.randrange(start, end), draw.choice("flip set set delete insert cut extend".split())
        if action == "flip":
            changed[place] ^= 1 << draw.randrange(8)
        elif action == "set":
            changed[place] = draw.choice([draw.randrange(256), *b'0123456789{}[],:"- '])
        elif action == "delete":
            del changed[place : place + draw.choice([1, 1, 8])]
        elif action == "insert":
            changed[place:place] = draw.randbytes(draw.choice([1, 4, 8]))
        elif action == "cut":
            del changed[place:end]
        else:
            changed += draw.randbytes(draw.choice([1, 4, 100]))
        done.append(f"{action} at {place}")
    return ", ".join(done), bytes(changed)


def alter_header(data: bytes, draw: random.Random) -> tuple[str, bytes]:
    """Alters the header of a safetensors file, or the file around it."""
    header, body = split(data)
    length = len(data) - len(body) - 8
    names = [name for name in header if name != "__metadata__"]
    one, other = draw.choice(names), draw.choice(names)
    entry: Any = header[one]
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    action = draw.choice([
        "dtype", "shape", "offsets", "swap entries", "swap offsets", "swap alike", "remove", "add", "metadata", "json",
        "bytes", "length", "append", "truncate", "rename", "order",
    ])  # fmt: skip
    match action:
        case "dtype":
            entry["dtype"] = draw.choice(DTYPES)
        case "shape":
            entry["shape"] = draw.choice([
                shape[::-1], [*shape, 1], shape[:-1], [2 * n for n in shape], [*shape, 0], [-n for n in shape],
                [n + draw.choice([-1, 1]) for n in shape], [float(n) for n in shape], [True], "12", 5, {}, [2**62],
                [*shape, 2**31], [str(n) for n in shape], [[n] for n in shape], [int(np.prod(shape))], [1] * 100,
            ])  # fmt: skip
        case "offsets":
            entry["data_offsets"] = draw.choice([
                [start + 4, stop], [start, stop + 4], [start, stop - 4], [start + 4, stop + 4], [stop, start], {},
                [-4, stop], [start], [start, stop, stop], [2**63, 2**63 + 4], [float(start), stop], None, [0, 2**62],
                [start - 1, stop - 1], [start, start], [[start], stop], "12",
            ])  # fmt: skip
        case "swap entries":
            header[one], header[other] = header[other], header[one]
        case "swap offsets":
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], [start, stop]
        case "swap alike":  # tensors of one shape, where there are such
            other = draw.choice([name for name in names if header[name]["shape"] == shape])
            header[one], header[other] = header[other], header[one]
        case "remove":
            del header[one]
        case "add":
            size = draw.choice([0, 4, 2**31, 2**62])
            added = {"dtype": draw.choice(DTYPES), "shape": [size // 4], "data_offsets": [len(body), len(body) + size]}
            header[draw.choice([one + "x", "lm_head.weight", "a1/order/layers", "x/y/z", "\ud800", *KEYS])] = added
            body += bytes(size if size < 100 else 0)
        case "metadata":
            header["__metadata__"] = draw.choice(HOSTILE)
        case "json":
            what, text = alter_json(header, draw)
            return what, joined(text, body)
        case "bytes":
            return alter_bytes(data, draw, 8, 8 + length)
        case "length":
            new = draw.choice([0, 1, length - 1, length + 1, 2 * length, len(data), 2**31, 2**62, 2**63, 2**64 - 1])
            return f"length {length} becomes {new}", struct.pack("<Q", new) + data[8:]
        case "append":
            return "bytes appended", data + draw.randbytes(draw.choice([1, 4, 8, 1000]))
        case "truncate":
            end = draw.choice([0, 7, 8, 9, 8 + length, len(data) - 4, len(data) - 1, draw.randrange(len(data))])
            return f"cut to {end} bytes", data[:end]
        case "rename":
            options = [one + "x", one.upper(), other + ".", one.replace("0", "00"), one.replace("1", "9"), ""]
            header[draw.choice(options)] = header.pop(one)
        case "order":
            header = dict(draw.sample(sorted(header.items()), len(header)))
    text = dumped(header)
    if draw.random() < 0.5:  # as long as it was, so that the size of the file says nothing
        text += b" " * (length - len(text))
    return f"{action} of {one!r}" + (f" and {other!r}" if "swap" in action else ""), joined(text, body)


@dataclass
class Case:
    """One altered chain: the files that differ from the original, and what may come of it."""

    kind: str
    forged: bool
    """Whether the manifest vouches for what was altered."""
    size: int
    what: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    may_differ: bool = False
    """Whether another model is what the altered chain says."""
    finite: bool = True
    """Whether every parameter must be finite: not where a forger rewrote the weights themselves."""


class Original:
    """A chain, its files, and what it gives."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        opened = Chain.from_pretrained(folder)
        sizes = [between(folder, pair, share) for pair, share in ((0, 0.6), (1, 0.3), (1, 0.7))]
        self.plans = {size: opened.plan(size, tolerance=0.2) for size in sizes}
        assert {plan.method for plan in self.plans.values()} == {"interpolate", "expand"}
        assert {(plan.small, plan.large) for plan in self.plans.values()} == {("a1", "a0"), ("a2", "a1")}
        self.models = {size: opened.initialize(plan, progress=False) for size, plan in self.plans.items()}
        self.calibration = opened.calibration
        assert self.calibration is not None

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads(self.files[MANIFEST_NAME])

    def case(self, variant: str, number: int) -> Case:
        """The altered chain of one number."""
        draw, kind = random.Random(f"{variant}:{number}"), KINDS[number % len(KINDS)]
        forged = number // len(KINDS) % 2 == 1 and kind != "manifest"  # which nothing vouches for
        case = Case(kind, forged, draw.choice(list(self.plans)))
        if kind in ("manifest", "axis map"):
            self._alter_manifest(case, draw)
            return case
        if kind == "claims":
            self._alter_claims(case, draw)
            return case
        plan = self.plans[case.size]
        anchor = "anchors/" + draw.choice([plan.small, plan.small if plan.method == "expand" else plan.large])
        name = {
            "config": f"anchors/{draw.choice([plan.small, plan.large])}/config.json",
            "header": f"{anchor}/model.safetensors",
            "data": f"{anchor}/model.safetensors",
            "index maps": INDEX_MAPS_NAME,
            "checksums": CHECKSUMS_NAME,
            "generation config": GENERATION,
            "calibration": CALIBRATION_NAME,
        }[kind]
        data = self.files[name]
        if name.endswith(".json"):
            what, data = alter_bytes(data, draw) if draw.random() < 0.15 else alter_json(json.loads(data), draw)
        elif kind == "data" or (kind != "header" and draw.random() < 0.2):
            what, data = alter_bytes(data, draw, 8 + int.from_bytes(data[:8], "little"))
            case.finite = False
        else:
            what, data = alter_header(data, draw)
        case.what, case.files[name] = f"{name}: {what}", data
        if case.forged:
            case.may_differ = name.endswith(".safetensors")
            self._forge(case, name, without_digests=draw.random() < 0.3)
        return case

    def _alter_manifest(self, case: Case, draw: random.Random) -> None:
        manifest = self.manifest
        if draw.random() < 0.1:
            case.what, case.files[MANIFEST_NAME] = alter_bytes(self.files[MANIFEST_NAME], draw)
        elif case.kind == "manifest":
            told, text = alter_json(manifest, draw)
            if draw.random() < 0.3 and isinstance(manifest.get("anchors"), list):
                more, text = alter_json(manifest, draw)
                told = f"{told}; {more}"
            case.what, case.files[MANIFEST_NAME] = told, text
        else:
            case.what, text = alter_json(manifest["axis_map"], draw)
            if case.forged:
                self._recount(manifest)
            whole = dumped({**manifest, "axis_map": "@map@"})
            case.files[MANIFEST_NAME] = whole.replace(b'"@map@"', text)
        with Watched():  # what is no JSON differs in nothing that matters
            changed = list(differences(self.manifest, json.loads(case.files[MANIFEST_NAME])))
            case.may_differ = any(LEGITIMATE & set(path) or path == ("anchors",) for path in changed)

    @staticmethod
    def _recount(manifest: dict[str, Any]) -> None:
        """Makes the parameter counts fit the axis map, where that has any."""
        with Watched():
            axis_map = AxisMap.from_dict(manifest["axis_map"])
            for anchor in manifest["anchors"]:
                anchor["num_parameters"] = count_parameters(axis_map, axis_map.sizes(anchor["shape"]))

    def _alter_claims(self, case: Case, draw: random.Random) -> None:
        """Lets the manifest and the configs agree on another size."""
        manifest = self.manifest
        name = draw.choice(list(manifest["anchors"][0]["shape"]))
        numbers = (
            (0, 1, 2) if name in ("vocab_size", "head_dim") else draw.choice([(0,), (0,), (0, 1), (2,), (0, 1, 2)])
        )
        factor, more = draw.choice([(1, 1), (1, -1), (2, 0), (2, 0), (3, 0), (1000, 0), (2**31, 0), (2**36, 0)])
        case.what, case.may_differ, case.forged = f"{name} of {numbers} times {factor} plus {more}", True, True
        for i in numbers:
            anchor, config = manifest["anchors"][i], f"anchors/a{i}/config.json"
            anchor["shape"][name] = anchor["shape"][name] * factor + more
            data = json.dumps(json.loads(self.files[config]) | {name: anchor["shape"][name]}).encode()
            vouch(manifest, config, {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
            case.files[config] = data
        if name == "num_hidden_layers":
            for i in (1, 2):
                layers = min(manifest["anchors"][i - 1]["shape"][name], 20_000)
                manifest["anchors"][i]["layer_order"] = list(range(layers))
        self._recount(manifest)
        case.files[MANIFEST_NAME] = json.dumps(manifest).encode()

    def _forge(self, case: Case, name: str, without_digests: bool) -> None:
        """Makes hashes, and digests of tensors, fit what was altered."""
        manifest, data = self.manifest, case.files[name]
        vouch(manifest, name, {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        if name.endswith("model.safetensors") and without_digests:
            manifest.pop("checksums")
        elif name.endswith("model.safetensors"):
            digests = json.loads(self.files[CHECKSUMS_NAME])
            with Watched():  # a header that cannot be read has no digests
                header, body = split(data)
                entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
                digests[name.split("/")[1]] = {
                    k: checksum(body[slice(*e["data_offsets"])]) for k, e in entries.items()
                }
            text = case.files[CHECKSUMS_NAME] = dumped(digests)
            vouch(manifest, CHECKSUMS_NAME, {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()})
        case.files[MANIFEST_NAME] = json.dumps(manifest).encode()


@dataclass
class Made:
    """How far a case got, and what came of it."""

    stage: str = "manifest"
    plan: Plan | None = None
    model: PreTrainedModel | None = None
    calibration: torch.Tensor | None = None


def carry_out(original: Original, case: Case, made: Made) -> None:
    """What :func:`cbd_hub.from_chain` does, step by step."""
    hub = str(original.folder.parent / "hub")
    opened = Chain.from_pretrained(original.folder, cache_dir=hub, local_files_only=True)
    made.stage = "plan"
    made.plan = opened.plan(case.size, tolerance=0.2)
    made.stage = "weights"
    if case.kind == "calibration":
        made.calibration = opened.calibration
    made.model = opened.initialize(made.plan, progress=False)


def comparable(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("cbd_hub", "_name_or_path")}


def judge(original: Original, case: Case, made: Made, outcome: Watched) -> tuple[str, str]:
    """What came of a case in a word, and what is wrong with it, if anything."""
    if outcome.problem:
        return "failed", outcome.problem
    if made.model is None or made.plan is None:
        return made.stage, ""
    if "auto_map" in made.model.config.to_json_string():
        return "failed", "its config names code"
    values, ordinary = dict(made.model.named_parameters()), original.models[case.size]
    if {k: tuple(v.shape) for k, v in values.items()} != {op.name: op.shape for op in made.plan.operations}:
        return "failed", "its shapes are not those of the plan"
    if made.calibration is not None and not torch.equal(made.calibration, original.calibration):  # type: ignore[arg-type]
        ids = made.calibration
        if not (case.forged and ids.ndim == 2 and 0 <= int(ids.min()) <= int(ids.max()) < 13):
            return "failed", "it gives token ids of nobody"
    if not equal(values, dict(ordinary.named_parameters())):
        if not case.may_differ:
            return "failed", "its tensors silently differ"
        if case.finite and not all(bool(torch.isfinite(value).all()) for value in values.values()):
            return "failed", "a parameter is not finite"
        return "other", ""
    if not (case.forged and case.kind in ("config", "claims")):
        if comparable(made.model.config) != comparable(ordinary.config):
            return "failed", "its config silently differs"
        generation = made.model.generation_config.to_dict(), ordinary.generation_config.to_dict()
        if generation[0] != generation[1] and not (
            case.kind == "manifest" or (case.forged and case.kind == "generation config")
        ):
            return "failed", "its generation config silently differs"
    return "same", ""


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two gigabytes more than are in use: a claim that is believed fails, and fails soon."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


COUNTS = [
    ("llama", 400),
    pytest.param("llama", 1500, marks=pytest.mark.slow),
    pytest.param("smollm3-nope-sliding", 750, marks=pytest.mark.slow),
]
"""Cases of each family; the last one has lists of one entry a layer in its configs."""

COLUMNS = ("manifest", "plan", "weights", "same", "other", "failed")
"""Where a case was refused, or what model it gave."""


@pytest.mark.timeout(900)  # a minute of processor time, on a machine that may be busy
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(("variant", "count"), COUNTS)
def test_whatever_is_altered_is_refused_or_harmless(
    tmp_path: Path, variant: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CbdError in one line, the very same model, or the other one that a forger's chain says it is. Nothing else."""
    original = Original(tiny_chain(tmp_path / "work" / "chain", variant))
    (tmp_path / "work" / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "cwd")
    only = os.environ.get("TRUST_SEED", "")
    numbers = [int(only.rpartition(":")[2])] if only.startswith(f"{variant}:") else range(0 if only else count)
    table: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    failures: dict[str, list[str]] = defaultdict(list)
    for number in numbers:
        case, made = original.case(variant, number), Made()
        for name, data in case.files.items():
            (original.folder / name).write_bytes(data)
        before = tree(tmp_path)
        with Watched() as outcome:
            carry_out(original, case, made)
        label, problem = judge(original, case, made, outcome)
        if written := sorted(set(tree(tmp_path).items()) ^ set(before.items())):
            problem = f"it wrote {written[:3]}; {problem}"
        if torch.get_default_dtype() != torch.float32:
            problem = f"it left another default dtype; {problem}"
            torch.set_default_dtype(torch.float32)
        table[case.kind, case.forged]["failed" if problem else label] += 1
        if problem:
            told = f"TRUST_SEED={variant}:{number} ({case.kind}, {'forged' if case.forged else 'hashes kept'})"
            failures[problem.split(": ")[0]].append(f"{told}: {case.what[:200]}: {problem}")
        if only:
            print(case, label, outcome.error, sep="\n")
        for name in case.files:
            (original.folder / name).write_bytes(original.files[name])
    print(f"\n{variant:<26}" + "".join(f"{column:>10}" for column in COLUMNS))
    for (kind, forged), found in sorted(table.items()):
        print(f"{kind + (', forged' if forged else ''):<26}" + "".join(f"{found[column]:>10}" for column in COLUMNS))
    report = [f"{len(cases)} x {what}\n    {cases[0]}" for what, cases in failures.items()]
    assert not failures, "\n".join([f"{sum(map(len, failures.values()))} of {count} cases:", *sorted(report)])
    if not only:
        assert_every_stage_was_reached(table, count)


def assert_every_stage_was_reached(table: dict[tuple[str, bool], Counter[str]], count: int) -> None:
    """So that no case is refused for another reason than the one that it is there for."""
    total = sum(table.values(), Counter())
    assert total.total() == count
    for outcome, share in {"manifest": 0.1, "plan": 0.05, "weights": 0.2, "same": 0.05, "other": 0.005}.items():
        assert total[outcome] >= share * count, (outcome, total)
    for kind in set(KINDS) - {"manifest", "axis map", "claims"}:
        kept, forged = table[kind, False], table[kind, True]
        assert kept["other"] == 0
        if kind != "generation config":  # which `expand` and the second pair do not read
            assert kept["plan"] + kept["weights"] >= 0.9 * kept.total(), (kind, kept)
        assert forged["same"] + forged["other"] >= 0.05 * forged.total(), (kind, forged)
