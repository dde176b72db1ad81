"""Chains of strangers: whatever a repository holds, it is refused in one line or gives what its manifest says.

Nothing is unpickled, no code of a repository runs, no name leads out of it, and no claim takes memory or time before
it is checked. What could do harm is tried in a process of its own, with little memory and an audit hook that sees
every file that is opened, every unpickled name and every connection. A fuzz test then alters every file that a chain
has, with the hashes as they were and with hashes that fit, as a forger would write them.

``TRUST_SEED=llama:17`` runs one case of the fuzz test and prints it.
"""

import ast
import hashlib
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
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
from cbd_hub.assemble import Chain
from cbd_hub.axis_map import AxisMap
from cbd_hub.chain import (
    CALIBRATION_NAME,
    CHECKSUMS_NAME,
    INDEX_MAPS_NAME,
    MANIFEST_NAME,
    file_entry,
)
from cbd_hub.checkpoints import checksum
from cbd_hub.errors import CbdError
from cbd_hub.plan import Plan
from cbd_hub.sizing import count_parameters

COMMIT = "0123456789abcdef0123456789abcdef01234567"
GENERATION = "generation_config.json"
WEIGHTS = "model.safetensors"

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
    """A chain with everything that a chain can have, in about 100 KB."""
    own = {"head_dim": 4} if variant == "llama" else {}
    made = make_chain(folder, variant_model(variant, **{**_TINY, **own}), energy=True)
    GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=2, pad_token_id=0).save_pretrained(
        made / "anchors" / "a0"
    )
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(13)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(made)
    names = [p.name for p in made.glob("*token*")]
    edit_manifest(made, "tokenizer", value={n: file_entry(made / n).model_dump() for n in names})
    blocks = torch.randint(3, 13, (4, 8), generator=torch.Generator().manual_seed(0))
    return add_calibration(made, blocks)


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


def between(folder: Path, pair: int = 0, share: float = 0.6) -> int:
    """A size between two anchors; at 0.6 of the way both are read."""
    counts = [a["num_parameters"] for a in manifest_of(folder)["anchors"]]
    return round(counts[pair + 1] + share * (counts[pair] - counts[pair + 1]))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below a folder, with size, time of change and inode."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)
            stat = os.lstat(path)
            folder_or_size = -1 if name in folders else stat.st_size
            found[path] = (folder_or_size, 0 if name in folders else stat.st_mtime_ns, stat.st_ino)
    return found


# -- a process of its own ---------------------------------------------------------------------------------------------

_SANDBOX = """
import json, os, resource, sys, time, warnings
replies = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # a question to the user is not taken for a reply
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from pathlib import Path
from cbd_hub.assemble import Chain
from cbd_hub.chain import read_manifest
from cbd_hub.checkpoints import read_header
from cbd_hub.errors import CbdError

ordinary, memory = sys.argv[1], int(sys.argv[2])
seen, root = [], None

def watch(event, args):
    if root is None:
        return
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        seen.append(("open", os.fsdecode(args[0]), args[1]))
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
            self.kind, self.message, self.known = kind.__name__, str(error)[:2000], issubclass(kind, CbdError)
        return kind is not None and kind is not KeyboardInterrupt

def make(folder, size, options):
    opened = Chain.from_pretrained(folder, cache_dir=options.pop("cache_dir", None))
    model = opened.initialize(opened.plan(size, **options), progress=False)
    return {"config": model.config.to_json_string(), "attention": model.config._attn_implementation,
            "total": sum(p.double().abs().sum().item() for p in model.parameters())}

def tokenizer(folder, size, options):
    return {"length": len(Chain.from_pretrained(folder).tokenizer)}

def save(folder, size, options):
    Chain.from_pretrained(folder).save_pretrained(options["to"])
    return {}

def calibration(folder, size, options):
    return {"shape": list(Chain.from_pretrained(folder).calibration.shape)}

def header(folder, size, options):
    return {"tensors": len(read_header(Path(folder) / options["file"]))}

make(ordinary, None, {"shape": json.loads((Path(ordinary) / "chain.json").read_text())["anchors"][0]["shape"]})
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
sys.addaudithook(watch)
print("ready", file=replies, flush=True)
for line in sys.stdin:
    if line.strip() in ("", "y"):
        continue  # the answer to a question that was not asked
    job = json.loads(line)
    seen, root, outcome, made, start = [], job["folder"], Outcome(), {}, time.monotonic()
    with outcome:
        made = globals()[job["do"]](job["folder"], job["size"], job["options"])
    seconds, root = time.monotonic() - start, None
    print(json.dumps({**vars(Outcome), **vars(outcome), **made, "seconds": seconds, "seen": seen}, default=str),
          file=replies, flush=True)
"""

_MEMORY = 512 << 20
"""What the sandbox may take beyond what an ordinary chain needs."""
_AT_ONCE = 5.0
"""Seconds that a refusal may take; an ordinary tiny chain takes a tenth of one."""


@dataclass
class Reply:
    """What came of one job in the sandbox."""

    kind: str
    message: str = ""
    known: bool = False
    seconds: float = 0.0
    seen: list[list[Any]] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)

    def events(self, *kinds: str) -> list[str]:
        return [" ".join(map(str, event[1:])) for event in self.seen if event[0] in kinds]

    def opened(self) -> list[Path]:
        """The files that were opened, links resolved."""
        return [Path(event[1]).resolve() for event in self.seen if event[0] == "open"]

    def assert_harmless(self, folder: Path) -> None:
        """Nothing was run, unpickled or written, nobody was connected to."""
        assert self.events("exec", "pickle.find_class", "subprocess.Popen", "os.system") == []
        assert self.events("socket.connect", "socket.getaddrinfo") == []
        written = [event[1] for event in self.seen if event[0] == "open" and event[2] not in ("r", "rb", None)]
        assert [path for path in written if folder.resolve() in Path(path).resolve().parents] == []

    def assert_refused(self, folder: Path) -> None:
        """A CbdError in one line, at once, and harmless."""
        assert self.known, f"{self.kind}: {self.message[:300]}"
        assert self.kind != "model", "a model was made"
        assert "\n" not in self.message, self.message
        assert self.seconds < _AT_ONCE
        self.assert_harmless(folder)


class Sandbox:
    """A process with little memory that works on one chain after another; started again after one that it hung on."""

    def __init__(self, ordinary: Path, home: Path) -> None:
        self.arguments = [sys.executable, "-c", _SANDBOX, str(ordinary), str(_MEMORY)]
        home.mkdir()
        # Whoever asks a server asks one that is not there: seen by the audit hook, and over at once.
        self.env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home), "HOME": str(home)}
        self.process: subprocess.Popen[bytes] | None = None

    def _line(self, limit: float) -> bytes | None:
        """One line of the process, b"" at its end, None where none comes in time."""
        assert self.process is not None
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        return self.process.stdout.readline() if ready else None

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, folder: Path, size: int | None = None, do: str = "make", limit: float = 25, **options: Any) -> Reply:
        """Does one job; "y" waits on the standard input for whoever asks the user a question."""
        if self.process is None:
            self.process = subprocess.Popen(
                self.arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=self.env
            )
            assert self._line(120) == b"ready\n"
        assert self.process.stdin is not None
        job = {"do": do, "folder": str(folder), "size": size, "options": options}
        self.process.stdin.write(json.dumps(job).encode() + b"\ny\n")
        self.process.stdin.flush()
        line = self._line(limit)
        if not line:
            self.stop()
            return Reply("hang" if line is None else "crash", f"no answer within {limit} s" if line is None else "")
        answer = json.loads(line)
        common = {name: answer.pop(name) for name in ("kind", "message", "known", "seconds", "seen")}
        return Reply(**common, made=answer)


@pytest.fixture(scope="module")
def sandbox(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    made = Sandbox(pristine, tmp_path_factory.mktemp("sandbox") / "home")
    yield made
    made.stop()


def test_the_sandbox_sees_what_it_is_there_for(sandbox: Sandbox, pristine: Path, chain: Path) -> None:
    """An ordinary chain is harmless, and the same reports are not empty where something is to be seen."""
    reply = sandbox.ask(pristine, between(pristine))
    assert reply.kind == "model"
    reply.assert_harmless(pristine)
    assert reply.seconds < _AT_ONCE
    assert pristine / "anchors" / "a0" / WEIGHTS in reply.opened()
    assert all(pristine in path.parents for path in reply.opened() if path.suffix == ".safetensors")
    saved = sandbox.ask(pristine, do="save", to=str(chain.parent / "copy"))
    assert saved.kind == "model"
    assert (chain.parent / "copy" / MANIFEST_NAME).exists()
    edit_manifest(chain, "anchors", 0, "repo_id", value="owner/name")
    edit_manifest(chain, "anchors", 0, "revision", value=COMMIT)
    asked = sandbox.ask(chain, between(chain))
    assert asked.kind == "ChainNotFoundError"
    assert asked.events("socket.connect")  # an ordinary repository id is what is asked for


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
        assert reply.kind == "model", reply.message
        reply.assert_harmless(chain)
        assert {p.suffix for p in reply.opened()}.isdisjoint({".bin", ".pt", ".pkl"})
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.safetensors.bin", "model.SAFETENSORS", WEIGHTS]
)
def test_a_repository_of_pickles_is_refused(sandbox: Sandbox, chain: Path, tmp_path: Path, name: str) -> None:
    """Also where the pickle carries the name of a safetensors file."""
    data, size = payload(tmp_path / "marker"), between(chain)
    (chain / "anchors" / "a0" / WEIGHTS).unlink()
    place = chain / "anchors" / "a0" / name
    place.write_bytes(data)
    manifest = manifest_of(chain)
    files = {n: e for n, e in manifest["anchors"][0]["files"].items() if n != WEIGHTS}
    manifest["anchors"][0]["files"] = files | {name: file_entry(place).model_dump()}
    manifest.pop("checksums")
    (chain / MANIFEST_NAME).write_text(json.dumps(manifest))
    reply = sandbox.ask(chain, size)
    reply.assert_refused(chain)
    assert "is not a safetensors file" in reply.message or "no other weights are read" in reply.message
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", [INDEX_MAPS_NAME, CALIBRATION_NAME, CHECKSUMS_NAME, "anchors/a0/config.json"])
def test_a_pickle_in_place_of_another_file_is_refused(
    sandbox: Sandbox, chain: Path, tmp_path: Path, name: str
) -> None:
    size = between(chain)
    (chain / name).write_bytes(payload(tmp_path / "marker"))
    attest(chain, name)
    reply = sandbox.ask(chain, size, do="calibration" if name == CALIBRATION_NAME else "make")
    reply.assert_refused(chain)
    assert not (tmp_path / "marker").exists()


_PICKLES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
_UNPICKLING = {"torch.load", "np.load", "numpy.load", "load_pickle"}


@pytest.mark.parametrize("path", sorted(Path(cbd_hub.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_no_module_unpickles_or_trusts_code(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    imported = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    imported |= {str(n.module).split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
    assert not imported & _PICKLES
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    assert not {ast.unparse(call.func) for call in calls} & (_UNPICKLING | {"eval", "exec", "compile", "__import__"})
    for call in calls:
        for keyword in call.keywords:
            if keyword.arg in ("trust_remote_code", "weights_only", "allow_pickle", "allow_all_kernels"):
                assert ast.unparse(keyword.value) == {"weights_only": "True"}.get(keyword.arg, "False"), path


# -- no code of a repository runs -------------------------------------------------------------------------------------


def plant(folder: Path, marker: Path) -> None:
    """Writes a module that says so when it is run, under every name that transformers looks for."""
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
        ({"_attn_implementation": "colour"}, False),
    ],
)  # fmt: skip
def test_code_that_a_config_names_is_not_run(
    sandbox: Sandbox, chain: Path, tmp_path: Path, change: dict[str, Any], refused: bool
) -> None:
    """Neither modules of the repository nor kernels of another; and the made model does not name them either."""
    ordinary = sandbox.ask(chain, between(chain))
    for anchor in ("a0", "a1"):
        edit_json(chain / "anchors" / anchor / "config.json", **change)
        plant(chain / "anchors" / anchor, tmp_path / "marker")
    manifest = manifest_of(chain)
    for i, anchor in enumerate(("a0", "a1")):
        for name in ("config.json", "evil.py"):
            manifest["anchors"][i]["files"][name] = file_entry(chain / "anchors" / anchor / name).model_dump()
    (chain / MANIFEST_NAME).write_text(json.dumps(manifest))
    for size in (between(chain), manifest["anchors"][0]["num_parameters"]):
        reply = sandbox.ask(chain, size)
        assert not (tmp_path / "marker").exists()
        if refused:
            reply.assert_refused(chain)
            continue
        assert reply.kind == "model", f"{reply.kind}: {reply.message}"
        reply.assert_harmless(chain)
        config = json.loads(reply.made["config"])
        assert "auto_map" not in config
        assert "evil" not in reply.made["config"]
        assert "owner/" not in reply.made["config"]
        assert reply.made["attention"] == ordinary.made["attention"]


@pytest.mark.parametrize("at_top", [False, True], ids=["tokenizer_config", "config_at_the_top"])
def test_code_that_a_tokenizer_names_is_not_run(sandbox: Sandbox, chain: Path, tmp_path: Path, at_top: bool) -> None:
    """Not even where the user would answer yes: a file that asks for its own code is no reason to ask the user."""
    plant(chain, tmp_path / "marker")
    shutil.rmtree(chain / "custom_generate")
    if at_top:
        (chain / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": _AUTO_MAP}))
        names = ["config.json", "evil.py"]
    else:
        auto_map = {"AutoTokenizer": ["evil.Words", "evil.Words"]}
        edit_json(chain / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Words")
        names = ["tokenizer_config.json", "evil.py"]
    files = manifest_of(chain)["tokenizer"] | {n: file_entry(chain / n).model_dump() for n in names}
    edit_manifest(chain, "tokenizer", value=files)
    reply = sandbox.ask(chain, do="tokenizer")
    assert not (tmp_path / "marker").exists(), "the code was run"
    assert reply.known, f"{reply.kind}: {reply.message[:300]}"  # a tokenizer without that code, or a refusal
    reply.assert_harmless(chain)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", '{"version": "1.0", "model": {"type": "Evil"}}'),
        ("tokenizer.json", "\xff"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": "Nonesuch"}'),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 5}}'),
        ("tokenizer_config.json", '{"auto_map": 5}'),
        ("tokenizer_config.json", '{"chat_template": 5, "extra_special_tokens": 7}'),
    ],
)
def test_a_malformed_tokenizer_is_refused_or_harmless(chain: Path, name: str, content: str) -> None:
    (chain / name).write_bytes(content.encode("latin-1"))
    attest(chain, name)
    with Watched() as outcome:
        assert len(Chain.from_pretrained(chain).tokenizer) == 13
    assert outcome.error is None or isinstance(outcome.error, CbdError), outcome.told()
    assert outcome.error is None or "\n" not in str(outcome.error)


def test_a_file_that_the_manifest_does_not_name_is_not_read(chain: Path) -> None:
    """What no hash vouches for has no say: neither in the tokenizer nor in a config."""
    ordinary = Chain.from_pretrained(chain)
    model = ordinary.initialize(ordinary.plan(between(chain)), progress=False)
    words = ordinary.tokenizer
    (chain / "special_tokens_map.json").write_text(json.dumps({"eos_token": "w7", "pad_token": "w8"}))
    (chain / "added_tokens.json").write_text(json.dumps({"evil": 13}))
    (chain / "chat_template.jinja").write_text("evil")
    (chain / "config.json").write_text(json.dumps({"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}))
    for anchor in ("a0", "a1"):
        (chain / "anchors" / anchor / "config.1.0.0.json").write_text(json.dumps({"rms_norm_eps": 0.5}))
        (chain / "anchors" / anchor / "chat_template.jinja").write_text("evil")
    opened = Chain.from_pretrained(chain)
    again = opened.initialize(opened.plan(between(chain)), progress=False)
    assert again.config.to_dict() == model.config.to_dict()
    found = opened.tokenizer
    assert (len(found), type(found)) == (len(words), type(words))
    assert (found.eos_token, found.pad_token, found.chat_template) == (words.eos_token, words.pad_token, None)


def test_a_config_that_names_another_file_is_read_alone(chain: Path) -> None:
    """``configuration_files`` sends transformers to a file that no hash vouches for."""
    size = between(chain)
    for anchor in ("a0", "a1"):
        folder = chain / "anchors" / anchor
        other = json.loads((folder / "config.json").read_text()) | {"rms_norm_eps": 0.5}
        (folder / "config.1.0.0.json").write_text(json.dumps(other))
        edit_json(folder / "config.json", configuration_files=["config.1.0.0.json"])
        attest(chain, f"anchors/{anchor}/config.json")
    with Watched() as outcome:
        opened = Chain.from_pretrained(chain)
        model = opened.initialize(opened.plan(size), progress=False)
        assert model.config.rms_norm_eps != 0.5, "a file was read that the manifest does not name"
    assert outcome.error is None or isinstance(outcome.error, CbdError), outcome.told()


@pytest.mark.parametrize("change", [{"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
                                    {"quantization_config": {"quant_method": "nonesuch"}},
                                    {"fusion_config": {"evil": True}}, {}])  # fmt: skip
def test_a_family_that_is_not_known_is_no_way_around(chain: Path, change: dict[str, Any]) -> None:
    """Granite has Llama's tensors and no map of its own here: the manifest's map is taken, whatever its config."""
    size = between(chain)
    for anchor in ("a0", "a1", "a2"):
        path = chain / "anchors" / anchor / "config.json"
        edit_json(path, model_type="granite", architectures=["GraniteForCausalLM"], **change)
    edit_manifest(chain, "architecture", value="granite")
    edit_manifest(chain, "axis_map", "model_type", value="granite")
    refresh(chain)
    with Watched() as outcome:
        opened = Chain.from_pretrained(chain)
        assert opened.initialize(opened.plan(size), progress=False).config.model_type == "granite"
    assert outcome.error is None or isinstance(outcome.error, CbdError), outcome.told()
    assert outcome.error is None or "\n" not in str(outcome.error)
    assert (outcome.error is not None) == bool(change)


# -- names stay inside the repository ---------------------------------------------------------------------------------

OUTSIDE = [
    "../secret.safetensors", "anchors/../../secret.safetensors", "a0/../../../secret.safetensors", "..",
    "{secret}", "/{secret}", "//{secret}", "\\..\\secret.safetensors", "..\\secret.safetensors",
    "C:\\secret.safetensors", "C:/secret.safetensors", "C:secret.safetensors", "file:{secret}",
    "model.safetensors\0.bin", "\0", "",
]  # fmt: skip
"""Names that would lead out of a repository somewhere, if they were followed."""

STRANGE = [
    ".", "./", "./.", "model.safetensors/", "model.safetensors/.", "model.safetensors/x", "x" * 300, "x/" * 3000 + "x",
    "%2e%2e/secret.safetensors", "~/secret.safetensors", "$HOME/x", "con", "nul.safetensors", "a\nb", "a\rb", "\x1b[2J",
    " ", "\u202esrotnesnetfas.txt", "．．/secret.safetensors", "𝕏" * 80, "-rf", "*", "é",
]  # fmt: skip
"""Names that stay inside, and that a file system or a terminal may stumble over."""


@pytest.mark.parametrize("place", ["subfolder", "files", "weights", "tokenizer"])
@pytest.mark.parametrize("name", OUTSIDE + STRANGE, ids=lambda name: ascii(name)[1:-1][:24])
def test_a_name_that_leads_outside_or_nowhere_is_refused(chain: Path, place: str, name: str) -> None:
    size = between(chain)
    secret = chain.parent / "secret.safetensors"
    shutil.copyfile(chain / "anchors" / "a0" / WEIGHTS, secret)
    leads_outside = name in OUTSIDE
    name = name.replace("{secret}", str(secret))
    manifest = manifest_of(chain)
    entry = file_entry(secret).model_dump()
    anchor = manifest["anchors"][0]
    if place == "subfolder":
        anchor["subfolder"] = name
    elif place == "files":
        anchor["files"][name] = entry
    elif place == "weights":
        name = name if name.endswith(".safetensors") else name + ".safetensors"
        anchor["files"] = {n: e for n, e in anchor["files"].items() if n != WEIGHTS} | {name: entry}
        if leads_outside and name == ".safetensors":
            return  # an ordinary name now
    else:
        manifest["tokenizer"] = {name: entry}
    (chain / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    before = tree(chain.parent)
    for act in (
        lambda opened: opened.initialize(opened.plan(size), progress=False),
        lambda opened: opened.save_pretrained(chain.parent / "copy"),
        lambda opened: opened.tokenizer,
    ):
        with Watched() as outcome:
            act(Chain.from_pretrained(chain))
        assert outcome.error is None or isinstance(outcome.error, CbdError), outcome.told()
        assert outcome.error is None or "\n" not in str(outcome.error), str(outcome.error)
        if leads_outside:
            assert "is not a path inside the repository" in str(outcome.error)
        if act is not None and not isinstance(outcome.error, CbdError):
            shutil.rmtree(chain.parent / "copy", ignore_errors=True)
    assert tree(chain.parent) == before


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
    ],
    ids=lambda names: names[-1],
)
def test_names_that_collide_are_refused_or_copied_right(chain: Path, tmp_path: Path, names: list[str]) -> None:
    """A tokenizer's files share a folder with everything else: no entry may take another's place unseen."""
    manifest = manifest_of(chain)
    for name in names:
        if not (chain / name).exists() and not (chain / name.split("/")[0]).is_file():
            (chain / name).parent.mkdir(exist_ok=True)
            (chain / name).write_text("x")
        path = chain / name
        manifest["tokenizer"][name] = (
            file_entry(path).model_dump() if path.is_file() else {"size": 1, "sha256": "0" * 64}
        )
    (chain / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    before = tree(tmp_path)
    size = between(chain)
    with Watched() as outcome:
        Chain.from_pretrained(chain).save_pretrained(tmp_path / "copy")
    if outcome.error is not None:
        assert isinstance(outcome.error, CbdError), outcome.told()
        assert tree(tmp_path) == before
        return
    assert {path for path in tree(tmp_path) if not path.startswith(str(tmp_path / "copy"))} == set(before)
    opened, copied = Chain.from_pretrained(chain), Chain.from_pretrained(tmp_path / "copy")
    made = [c.initialize(c.plan(size), progress=False).state_dict() for c in (opened, copied)]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert copied.manifest.anchors[0].files == opened.manifest.anchors[0].files


# -- links in a local folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANIFEST_NAME, INDEX_MAPS_NAME, "anchors/a0/config.json", f"anchors/a0/{WEIGHTS}"])
def test_a_link_is_followed_and_its_content_must_fit(chain: Path, tmp_path: Path, name: str) -> None:
    """The Hub's own cache is made of links, so they are followed; what lies behind must be what the manifest says."""
    size = between(chain)
    expected = parameters_of(chain, size)
    shutil.move(chain / name, tmp_path / "elsewhere")
    (chain / name).symlink_to(tmp_path / "elsewhere")
    made = parameters_of(chain, size)
    assert all(torch.equal(made[k], expected[k]) for k in expected)
    (chain / name).unlink()
    (tmp_path / "secret").write_text("password: hunter2\n" * 1000)
    (chain / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CbdError) as caught:
        parameters_of(chain, size)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "secret").read_text() == "password: hunter2\n" * 1000


@pytest.mark.parametrize("name", [MANIFEST_NAME, CHECKSUMS_NAME, "anchors/a0/config.json", f"anchors/a0/{WEIGHTS}"])
@pytest.mark.parametrize("what", ["/dev/zero", "pipe", "loop", "folder", "nothing"])
def test_what_is_no_file_is_not_waited_for(sandbox: Sandbox, chain: Path, name: str, what: str) -> None:
    size, path = between(chain), chain / name
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "loop":
        path.symlink_to(path)
    elif what != "nothing":
        path.symlink_to(what)
    sandbox.ask(chain, size).assert_refused(chain)


def test_a_lie_about_another_repository_does_not_drop_its_files(chain: Path, tmp_path: Path) -> None:
    """A damaged download is dropped; a file that is just not what some manifest says of it belongs to somebody else."""
    hub, size = tmp_path / "hub", between(chain)
    victim = hub / "models--owner--victim"
    (victim / "blobs").mkdir(parents=True)
    (victim / "snapshots" / COMMIT).mkdir(parents=True)
    for path in sorted((chain / "anchors" / "a0").iterdir()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, victim / "blobs" / digest)
        (victim / "snapshots" / COMMIT / path.name).symlink_to(Path("../../blobs") / digest)
    before = tree(hub)
    pristine_manifest = (chain / MANIFEST_NAME).read_text()
    for name, lie in (
        ("config.json", {"size": 5, "sha256": "0" * 64}),
        (WEIGHTS, {"size": 5, "sha256": "0" * 64}),
        (GENERATION, {"size": 5, "sha256": "0" * 64}),
    ):
        (chain / MANIFEST_NAME).write_text(pristine_manifest)
        manifest = manifest_of(chain)
        manifest["anchors"][0] |= {"repo_id": "owner/victim", "revision": COMMIT}
        manifest["anchors"][0].pop("subfolder")
        manifest["anchors"][0]["files"][name] = lie
        (chain / MANIFEST_NAME).write_text(json.dumps(manifest))
        opened = Chain.from_pretrained(chain, cache_dir=str(hub), local_files_only=True)
        with pytest.raises(CbdError):
            opened.initialize(opened.plan(size), progress=False)
        gone = sorted(Path(p).name for p in set(before) - set(tree(hub)) if ".locks" not in p)
        assert gone == [], f"the manifest lies about {name}"


# -- a repository is named by its id ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo_id",
    [
        "http://127.0.0.1:9/owner/name", "https://huggingface.co/owner/name", "file:///etc", "file://{outside}",
        "hf://owner/name", "s3:owner/name", "git@127.0.0.1:owner/name", "127.0.0.1:9/name", "127.0.0.1/owner/name",
        "owner/name/..", "../name", "owner/..", "../../etc", "./name", "/", "{outside}", "{outside}/", "~", "~/name",
        "~nobody-of-that-name/x", "owner/name?revision=main", "owner/name#x", "owner/name@main", "owner name/x",
        "owner\\name", "owner/na\nme", "owner/\0", "", " ", ".", "-owner/name", "owner/" + "x" * 300, "x" * 5000,
        "owner/%2e%2e", "datasets/owner/name", "refs/../x",
    ],
    ids=lambda name: ascii(name)[1:-1][:32],
)  # fmt: skip
def test_a_repository_is_no_address_and_no_path(sandbox: Sandbox, chain: Path, repo_id: str) -> None:
    """Refused before anybody is asked, and nothing outside the chain is read: the anchor lies there, and would fit."""
    size, outside = between(chain), chain.parent / "outside"
    shutil.move(chain / "anchors" / "a0", outside)
    manifest = manifest_of(chain)
    manifest["anchors"][0] |= {"repo_id": repo_id.replace("{outside}", str(outside)), "revision": COMMIT}
    manifest["anchors"][0].pop("subfolder")
    (chain / MANIFEST_NAME).write_text(json.dumps(manifest))
    reply = sandbox.ask(chain, size)
    reply.assert_refused(chain)
    assert [path for path in reply.opened() if outside in path.parents] == []


@pytest.mark.parametrize("revision", ["main", "../" * 10 + "x" * 10, "refs/pr/1", "0" * 39 + "/", "0" * 41, "0" * 40 + "\n",
                                      "A" * 40, 5, None])  # fmt: skip
def test_a_revision_is_a_commit(sandbox: Sandbox, chain: Path, revision: Any) -> None:
    edit_manifest(chain, "anchors", 0, "repo_id", value="owner/name")
    edit_manifest(chain, "anchors", 0, "revision", value=revision)
    reply = sandbox.ask(chain, between(chain))
    reply.assert_refused(chain)
    assert "revision" in reply.message


def test_a_folder_of_the_same_name_does_not_stand_in_for_a_repository(
    chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A manifest pins a commit; a folder that happens to lie below the working folder is no commit."""
    size = between(chain)
    shutil.copytree(chain / "anchors" / "a0", tmp_path / "cwd" / "owner" / "name")
    manifest = manifest_of(chain)
    manifest["anchors"][0] |= {"repo_id": "owner/name", "revision": COMMIT}
    manifest["anchors"][0].pop("subfolder")
    (chain / MANIFEST_NAME).write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path / "cwd")
    opened = Chain.from_pretrained(chain, cache_dir=str(tmp_path / "hub"), local_files_only=True)
    with pytest.raises(CbdError, match="is not in the cache"):
        opened.initialize(opened.plan(size), progress=False)


# -- nothing is taken before it is checked ----------------------------------------------------------------------------


def claim(folder: Path, field_name: str, value: int, anchors: tuple[int, ...] = (0, 1, 2), **more: Any) -> None:
    """Lets manifest and configs agree on a size that the weights do not have, and on the parameter counts."""
    manifest = manifest_of(folder)
    axis_map = AxisMap.from_dict(manifest["axis_map"])
    for i in anchors:
        anchor = manifest["anchors"][i]
        anchor["shape"] |= {field_name: value}
        anchor["num_parameters"] = count_parameters(axis_map, axis_map.sizes(anchor["shape"]))
        edit_json(folder / anchor["subfolder"] / "config.json", **{field_name: value})
        path = folder / anchor["subfolder"] / "config.json"
        anchor["files"]["config.json"] = file_entry(path).model_dump()
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | more), encoding="utf-8")


@pytest.mark.parametrize(
    ("field_name", "value", "anchors"),
    [
        ("vocab_size", 2**40, (0, 1, 2)),
        ("head_dim", 2**36, (0, 1, 2)),
        ("intermediate_size", 2**38, (0,)),
        ("hidden_size", 2**36, (0,)),
        ("hidden_size", 2**36, (0, 1)),
        ("num_hidden_layers", 10_000, (0,)),
    ],
)
@pytest.mark.parametrize("basis", ["native", "pca"])
def test_terabytes_that_a_manifest_claims_are_refused(
    sandbox: Sandbox, chain: Path, field_name: str, value: int, anchors: tuple[int, ...], basis: str
) -> None:
    more: dict[str, Any] = {"basis": basis}
    if basis == "pca":  # then the order of hidden units need not be stored
        maps = {k: v for k, v in load_file(chain / INDEX_MAPS_NAME).items() if not k.endswith("/hidden")}
        save_file({k: v for k, v in maps.items() if "/energy/" not in k}, chain / INDEX_MAPS_NAME)
        more["index_maps"] = file_entry(chain / INDEX_MAPS_NAME).model_dump()
    claim(chain, field_name, value, anchors, **more)
    if field_name == "num_hidden_layers":
        edit_manifest(chain, "anchors", 1, "layer_order", value=list(range(value)))
    counts = [a["num_parameters"] for a in manifest_of(chain)["anchors"]]
    for size in (counts[0], (counts[0] * 6 + counts[1] * 4) // 10, (counts[1] * 6 + counts[2] * 4) // 10, counts[2]):
        reply = sandbox.ask(chain, size)
        if reply.kind == "model":  # the pair that tells the truth
            assert size < counts[1]
            assert 2 not in anchors
        else:
            reply.assert_refused(chain)


@pytest.mark.parametrize(
    ("name", "key", "entry"),
    [
        (f"anchors/a0/{WEIGHTS}", "model.norm.weight", {"shape": [2**40]}),
        (f"anchors/a0/{WEIGHTS}", "model.norm.weight", {"shape": [2**40], "data_offsets": [0, 2**42]}),
        (f"anchors/a0/{WEIGHTS}", "x", {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
        (f"anchors/a0/{WEIGHTS}", "x", {"dtype": "F32", "shape": [0, 2**61], "data_offsets": [0, 0]}),
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
    attest(chain, name)
    sandbox.ask(chain, size, do="calibration" if name == CALIBRATION_NAME else "make").assert_refused(chain)


@pytest.mark.parametrize("length", [2**63, 2**62, 2**40, 10**8, 10**8 - 1])
def test_a_header_s_length_is_checked_first(sandbox: Sandbox, chain: Path, length: int) -> None:
    size, path = between(chain), chain / "anchors" / "a0" / WEIGHTS
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    attest(chain, f"anchors/a0/{WEIGHTS}")
    sandbox.ask(chain, size).assert_refused(chain)
    with path.open("r+b") as file:
        file.truncate(2**40)  # no bytes on disk, a terabyte in the file
    attest_size(chain, 0, WEIGHTS, 2**40)
    sandbox.ask(chain, size).assert_refused(chain)


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("a tensor of many dimensions", f"anchors/a0/{WEIGHTS}"),
        ("a layout of many factors", MANIFEST_NAME),
        ("a tensor of many stored dimensions", MANIFEST_NAME),
        ("many tensors of many layers", MANIFEST_NAME),
        ("many axes that vary", MANIFEST_NAME),
    ],
)
def test_small_files_that_ask_for_endless_work_are_refused(
    sandbox: Sandbox, chain: Path, what: str, name: str
) -> None:
    """Every one of these is at most a few megabytes, and would keep a trusting reader busy for hours."""
    size, manifest = between(chain), manifest_of(chain)
    axis_map = manifest["axis_map"]
    if what == "a tensor of many dimensions":  # their product has millions of digits
        header, data = split((chain / name).read_bytes())
        header["model.norm.weight"]["shape"] = [2**61] * 300_000
        (chain / name).write_bytes(joined(header, data))
        attest_size(chain, 0, WEIGHTS, (chain / name).stat().st_size)
        sandbox.ask(chain, size).assert_refused(chain)
        return
    if what == "a layout of many factors":
        axis_map["tensors"]["model.norm.weight"] = "(" + "999999999 " * 500_000 + "hidden)"
    elif what == "a tensor of many stored dimensions":
        axis_map["tensors"]["model.norm.weight"] = "999999999 " * 500_000 + "hidden"
    elif what == "many tensors of many layers":
        layers = 10_000
        axis_map["tensors"] |= {f"x{i}.*": "1" for i in range(2_000)}
        manifest["anchors"] = manifest["anchors"][:1]
        anchor = manifest["anchors"][0]
        anchor["shape"]["num_hidden_layers"] = layers
        read = AxisMap.from_dict(axis_map)
        anchor["num_parameters"] = size = count_parameters(read, read.sizes(anchor["shape"]))
        manifest.pop("index_maps")
    else:
        names = [f"x{i}" for i in range(40)]
        axis_map["tensors"] |= {name: name for name in names}
        axis_map["fields"] |= {f"num_{name}": name for name in names}
        read = AxisMap.from_dict(axis_map)
        for i, anchor in enumerate(manifest["anchors"]):
            anchor["shape"] |= {f"num_{name}": 9 - 3 * i for name in names}
            anchor["num_parameters"] = count_parameters(read, read.sizes(anchor["shape"]))
        maps = load_file(chain / INDEX_MAPS_NAME)
        for small, units in (("a1", 9), ("a2", 6)):
            layers = manifest["anchors"][0 if small == "a1" else 1]["shape"]["num_hidden_layers"]
            row = np.arange(units, dtype=np.int32)
            maps |= {f"{small}/order/{name}": np.tile(row, (layers, 1)) for name in names}
        save_file(maps, chain / INDEX_MAPS_NAME)
        manifest["index_maps"] = file_entry(chain / INDEX_MAPS_NAME).model_dump()
        size = (manifest["anchors"][0]["num_parameters"] + manifest["anchors"][1]["num_parameters"]) // 2
    (chain / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")
    sandbox.ask(chain, size).assert_refused(chain)


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("llama", {"num_labels": 2**40}),
        ("llama", {"num_labels": 10**8}),
        ("llama", {"num_hidden_layers": 2**40}),
        ("llama", {"vocab_size": 2**60, "hidden_size": 2**60}),
        ("llama", {"max_position_embeddings": 2**60}),
        ("llama", {"per_layer_config": {str(i): {} for i in range(100_000)}}),
        ("smollm3", {"num_hidden_layers": 2**40, "layer_types": None, "no_rope_layers": None}),
        ("qwen2", {"num_hidden_layers": 2**40, "layer_types": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_config_claims_takes_no_memory(
    sandbox: Sandbox, tmp_path: Path, chain: Path, variant: str, change: dict[str, Any]
) -> None:
    """transformers makes lists as long as a config says; it is asked only once the sizes are known to be right."""
    folder = chain if variant == "llama" else tiny_chain(tmp_path / variant, variant)
    size = between(folder)
    edit_json(folder / "anchors" / "a0" / "config.json", **change)
    attest(folder, "anchors/a0/config.json")
    reply = sandbox.ask(folder, size, limit=15)
    if "max_position_embeddings" in change and reply.kind == "model":
        reply.assert_harmless(folder)  # a number that nothing is made from
    else:
        reply.assert_refused(folder)


@pytest.mark.parametrize("name", [MANIFEST_NAME, CHECKSUMS_NAME, "anchors/a0/config.json", f"anchors/a0/{GENERATION}"])
def test_a_huge_json_file_is_refused(sandbox: Sandbox, chain: Path, name: str) -> None:
    """A gigabyte of nothing, which takes no place on disk and none on the Hub (it compresses well)."""
    size = between(chain)
    with (chain / name).open("r+b") as file:
        file.truncate(1 << 30)
    if name != MANIFEST_NAME:
        attest(chain, name)
    reply = sandbox.ask(chain, size)
    reply.assert_refused(chain)


def test_a_terabyte_of_manifest_is_refused(sandbox: Sandbox, chain: Path) -> None:
    with (chain / MANIFEST_NAME).open("r+b") as file:
        file.truncate(2**40)
    sandbox.ask(chain, 10_000).assert_refused(chain)


# -- JSON -------------------------------------------------------------------------------------------------------------


def refusal(folder: Path, act: Callable[[Chain], object] | None = None) -> str:
    """The one line in which a chain is refused."""
    with Watched() as outcome:
        opened = Chain.from_pretrained(folder)
        (act or (lambda c: c.initialize(c.plan(between(folder)), progress=False)))(opened)
    assert isinstance(outcome.error, CbdError), outcome.told() if outcome.error else "it was accepted"
    assert "\n" not in str(outcome.error), str(outcome.error)
    return str(outcome.error)


JSON_FILES = [
    MANIFEST_NAME,
    CHECKSUMS_NAME,
    "anchors/a0/config.json",
    "anchors/a1/config.json",
    f"anchors/a0/{GENERATION}",
]


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}\0", b'{"a": 1,}', b"{'a': 1}",
     b"[" * 200, b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\x80", "{}".encode("utf-16")],
    ids=lambda content: ascii(content)[2:-1][:16],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(chain: Path, name: str, content: bytes) -> None:
    size = between(chain)
    (chain / name).write_bytes(content)
    if name != MANIFEST_NAME:
        attest(chain, name)
    assert refusal(chain, lambda opened: opened.initialize(opened.plan(size), progress=False))


@pytest.mark.parametrize("depth", [100, 200, 300, 450, 600, 800, 900, 960, 990, 2000, 100_000])
@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("brackets", ["[]", "{}"])
def test_deeply_nested_json_is_refused_or_harmless(chain: Path, name: str, depth: int, brackets: str) -> None:
    """At every depth: readers differ in how deep they go, and one may read what the next cannot write."""
    size = between(chain)
    opening, closing = ("[", "]") if brackets == "[]" else ('{"a":', "}")
    value = opening * depth + "0" + closing * depth
    text = (chain / name).read_text(encoding="utf-8").rstrip()
    key = "recipe" if name == MANIFEST_NAME else "extra"
    fragment = f', "{key}": {{"a": {value}}}}}'
    (chain / name).write_text(text[:-1] + fragment, encoding="utf-8")
    if name != MANIFEST_NAME:
        attest(chain, name)
    with Watched() as outcome:
        opened = Chain.from_pretrained(chain)
        opened.initialize(opened.plan(size), progress=False)
    assert outcome.error is None or isinstance(outcome.error, CbdError), outcome.told()
    assert outcome.error is None or "\n" not in str(outcome.error)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
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
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else value[:32],
)
def test_what_is_no_number_is_refused(chain: Path, number: str, path: tuple[str | int, ...], template: str) -> None:
    """JSON has no NaN and no infinity; a loss of NaN would also be compared as if it were one."""
    edit_manifest(chain, *path, value="<here>")
    text = (chain / MANIFEST_NAME).read_text(encoding="utf-8").replace('"<here>"', template.format(number))
    (chain / MANIFEST_NAME).write_text(text, encoding="utf-8")
    assert refusal(chain, lambda opened: None)


def test_of_a_key_that_stands_twice_one_value_counts_everywhere(chain: Path) -> None:
    """The last one, as in Python's reader: what is checked is what is used."""
    size = between(chain)
    expected = parameters_of(chain, size)
    text = (chain / MANIFEST_NAME).read_text(encoding="utf-8")
    for first in ('"format": 2', '"anchors": []', '"architecture": "gpt2"', '"axis_map": {}', '"checksums": null'):
        (chain / MANIFEST_NAME).write_text("{" + first + ", " + text.lstrip()[1:], encoding="utf-8")
        with Watched() as outcome:
            made = parameters_of(chain, size)
            assert all(torch.equal(made[k], expected[k]) for k in expected)
        assert outcome.error is None or isinstance(outcome.error, CbdError), outcome.told()
    for last in ('"format": 2', '"anchors": []', '"architecture": "gpt2"', '"axis_map": {}', '"index_maps": null'):
        (chain / MANIFEST_NAME).write_text(text.rstrip()[:-1] + ", " + last + "}", encoding="utf-8")
        assert refusal(chain, lambda opened: opened.initialize(opened.plan(size), progress=False))


@pytest.mark.parametrize("text", ["a\nb", "a\r\nb", "a\u2028b", "a\x85b", "\x1b[2J\x1b[31mred", "\b" * 50])
def test_a_refusal_is_one_line_whatever_it_quotes(chain: Path, text: str) -> None:
    """A message that moves the cursor or starts a new line could look like another program's."""
    size = between(chain)
    original = (chain / MANIFEST_NAME).read_bytes()
    manifest = manifest_of(chain)
    entry = {"size": 1, "sha256": "0" * 64}
    for path, value in [
        ((text,), 5),
        (("anchors", 0, text), 5),
        (("anchors", 0, "shape", text), 5),
        (("anchors", 0, "files", text), entry),
        (("anchors", 0, "files", text + ".safetensors"), entry),
        (("anchors", 0, "files", text), {}),
        (("anchors", 0, "subfolder"), text),
        (("anchors", 0, "name"), text),
        (("anchors", 0, "dtype"), text),
        (("anchors", 1, "parent"), text),
        (("axis_map", text), 5),
        (("axis_map", "model_type"), text),
        (("axis_map", "tensors", text), "(("),
        (("axis_map", "tensors", "a"), text),
        (("axis_map", "tensors", text), text),
        (("axis_map", "fields", text), text),
        (("axis_map", "norms", text), []),
        (("axis_map", "norm"), text),
        (("architecture",), text),
        (("format",), text),
        (("basis",), text),
    ]:
        (chain / MANIFEST_NAME).write_bytes(original)
        edit_manifest(chain, *path, value=value)
        with Watched() as outcome:
            opened = Chain.from_pretrained(chain)
            opened.initialize(opened.plan(size), progress=False)
        assert isinstance(outcome.error, CbdError), f"{path}: {outcome.told() if outcome.error else 'accepted'}"
        message = str(outcome.error)
        assert len(message.splitlines()) == 1, f"{path}: {message!r}"
        assert message.isprintable(), f"{path}: {message!r}"
    assert manifest["format"] == 1


# -- helpers for files that lie ---------------------------------------------------------------------------------------


class HungError(BaseException):
    """A case took too much processor time. Not an Exception, so that nothing on the way swallows it."""


class Watched:
    """Catches whatever its body raises (but no interrupt), and ends it after some seconds of processor time.

    Processor time, since a busy machine makes no case slow, and since the alarm belongs to pytest's own timeout.
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
        return kind is not None and not issubclass(kind, KeyboardInterrupt | AssertionError) or self._in_library()

    def _in_library(self) -> bool:
        """Whether an assertion was made by a library rather than by the test itself."""
        return isinstance(self.error, AssertionError) and "test_trust" not in self.where(whole=True)

    def where(self, whole: bool = False) -> str:
        """The last place in this package (or of all) that the error came through."""
        assert self.error is not None
        frames = traceback.extract_tb(self.error.__traceback__)
        if whole:
            return frames[-1].filename
        own = [f for f in frames if f"{os.sep}cbd_hub{os.sep}" in f.filename]
        last = frames[-1]
        inner = f"{Path(last.filename).name}:{last.lineno} {last.name}"
        return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name} > {inner}" if own else inner

    def told(self) -> str:
        """The error in one line, with where it came from."""
        return f"{type(self.error).__name__} at {self.where()}: {str(self.error)[:300]!r}"


def parameters_of(folder: Path, size: int) -> dict[str, torch.Tensor]:
    opened = Chain.from_pretrained(folder)
    return dict(opened.initialize(opened.plan(size), progress=False).state_dict())


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def attested(manifest: dict[str, Any], name: str, entry: dict[str, Any]) -> None:
    """Lets a manifest vouch for one file."""
    top = {INDEX_MAPS_NAME: "index_maps", CHECKSUMS_NAME: "checksums", CALIBRATION_NAME: "calibration"}
    if name in top:
        manifest[top[name]] = entry
    elif name.startswith("anchors/"):
        _, anchor, file = name.split("/", 2)
        manifest["anchors"][int(anchor[1:])]["files"][file] = entry
    else:
        manifest["tokenizer"][name] = entry


def attest(folder: Path, name: str) -> None:
    """Makes the manifest's hash of one file fit; digests of tensors, where there are any, are left out."""
    manifest = manifest_of(folder)
    attested(manifest, name, file_entry(folder / name).model_dump())
    if name.endswith(WEIGHTS):
        manifest.pop("checksums", None)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest), encoding="utf-8")


def attest_size(folder: Path, anchor: int, name: str, size: int) -> None:
    """Makes the manifest's size of a file fit; the digests of its tensors stand in for its hash."""
    edit_manifest(folder, "anchors", anchor, "files", name, "size", value=size)


# -- fuzz -------------------------------------------------------------------------------------------------------------

KINDS = (
    "manifest", "manifest", "manifest", "axis map", "claims", "config", "config", "header", "header", "data",
    "index maps", "index maps", "checksums", "generation config", "calibration",
)  # fmt: skip
"""What is altered, in turn."""

DEEP = ("@100@", "@300@", "@450@", "@700@", "@950@", "@5000@")
"""Stand for lists within lists, of that depth: Python's own writer could not write them all."""

HOSTILE: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 127, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64, -(2**63), 10**30,
    0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"), "", "a", "0", "1", "\n", "a\nb", "\0", "é", "\ud800",
    "../x", "/etc/passwd", "..", ".", "http://127.0.0.1:9/x", "x" * 300, "x" * 5000, "0" * 64, "0" * 40, "float16", "F32", "load",
    "hidden", "hidden 2", "(2 hidden)", "(hidden + ffn)", "0 hidden", "heads", "vocab hidden", "model.norm.weight", "a0", "a1",
    "owner/name", [], [[]], [0], [0, 1, 2], [None], ["a"], [1.5, "x"], {}, {"a": 1}, {"": {}}, [0] * 300, *DEEP,
]  # fmt: skip
"""Values of every type that nobody expects."""

KEYS = [
    "auto_map", "quantization_config", "configuration_files", "attn_implementation", "_attn_implementation", "num_labels",
    "id2label", "dtype", "torch_dtype", "per_layer_config", "layer_types", "no_rope_layers", "attribute_map", "sub_configs",
    "to_dict", "__class__", "__dict__", "self", "cls", "kwargs", "model_type", "architectures", "is_encoder_decoder",
    "rope_parameters", "rope_scaling", "pad_token_id", "head_dim", "hidden_act", "use_cache", "_name_or_path", "cbd_hub",
    "tie_word_embeddings", "num_experts", "pruned_heads", "transformers_weights", "fusion_config", "__metadata__",
    "sliding_window", "mlp_bias", "pretraining_tp", "base_model_tp_plan", "distributed_config", "__float__",
    "output_attentions", "problem_type", "revision", "repo_id", "subfolder", "parent", "format", "a0", "a9", "", "a\nb", "é",
]  # fmt: skip
"""Keys that mean something to somebody."""

DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "I64",
    "I32",
    "I8",
    "U8",
    "U64",
    "BOOL",
    "C64",
    "f32",
    "",
    "X",
]

LEGITIMATE = ("aligned", "training", "layer_order", "layers_last")
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


def dumped(value: Any) -> bytes:
    """JSON, with the lists that Python could not write."""
    text = json.dumps(value)
    for deep in DEEP:
        text = text.replace(f'"{deep}"', "[" * int(deep[1:-1]) + "]" * int(deep[1:-1]))
    return text.encode()


def alter_json(data: Any, draw: random.Random) -> tuple[str, tuple[Any, ...], bytes | None]:
    """Alters one place of a JSON value, in place: what was done, where, and the text where it is no JSON value."""
    path = draw.choice(list(paths_of(data)))
    parent, last = parent_of(data, path), path[-1]
    value = parent[last]
    action = draw.choice(["replace", "replace", "delete", "rename", "twice", "swap", "number", "insert", "string"])
    if action == "number" and isinstance(value, int):
        parent[last] = draw.choice([value - 1, value + 1, value * 2, value * 8, 2**31, 2**62, -1, 0, -value])
        return f"{value} becomes {parent[last]}", path, None
    if action == "string" and isinstance(value, str):
        options = [
            value + "x",
            value[:-1],
            value.upper(),
            "\n" + value,
            value + "\0",
            value.replace("*", "0"),
            value * 2,
        ]
        parent[last] = draw.choice(options)
        return f"{value!r} becomes {parent[last][:80]!r}", path, None
    if action == "delete":
        del parent[last]
        return "deleted", path, None
    if action == "rename" and isinstance(parent, dict):
        name = draw.choice([str(last) + "_", str(last).upper(), "x", *draw.sample(KEYS, 2), draw.choice(list(parent))])
        parent[name] = parent.pop(last)
        return f"renamed to {name!r}", path, None
    if action == "insert" and isinstance(parent, dict):
        name = draw.choice(KEYS)
        parent[name] = draw.choice(HOSTILE)
        return f"{name!r} inserted as {ascii(parent[name])[:80]}", (*path[:-1], name), None
    if action == "twice" and isinstance(parent, dict):
        other, first = draw.choice(HOSTILE), draw.random() < 0.5
        rest = dict(parent)
        parent.clear()
        parent.update({"@twice@": other, **rest} if first else {**rest, "@twice@": other})
        text = dumped(data).replace(b'"@twice@"', json.dumps(str(last)).encode())
        return f"{'preceded' if first else 'followed'} by itself as {ascii(other)[:80]}", path, text
    if action == "swap":
        others = [p for p in paths_of(data) if p[: len(path)] != path and path[: len(p)] != p]
        alike = [p for p in others if type(parent_of(data, p)[p[-1]]) is type(value)]
        if others:
            other_path = draw.choice(alike if alike and draw.random() < 0.8 else others)
            other_parent = parent_of(data, other_path)
            parent[last], other_parent[other_path[-1]] = other_parent[other_path[-1]], value
            return f"swapped with {'.'.join(map(str, other_path))}", (*path, *other_path), None
    parent[last] = draw.choice(HOSTILE)
    return f"replaced by {ascii(parent[last])[:80]}", path, None


def alter_bytes(data: bytes, draw: random.Random, start: int = 0, stop: int | None = None) -> tuple[str, bytes]:
    """Flips, deletes, inserts or cuts some bytes between two offsets."""
    changed, stop = bytearray(data), len(data) if stop is None else stop
    done = []
    for _ in range(draw.randint(1, 3)):
        if not start < min(stop, len(changed)):
            break
        place = draw.randrange(start, min(stop, len(changed)))
        action = draw.choice(["flip", "set", "set", "delete", "insert", "cut", "extend"])
        if action == "flip":
            changed[place] ^= 1 << draw.randrange(8)
        elif action == "set":
            changed[place] = draw.choice([draw.randrange(256), *b'0123456789{}[],:"- '])
        elif action == "delete":
            del changed[place : place + draw.choice([1, 1, 8])]
        elif action == "insert":
            changed[place:place] = draw.randbytes(draw.choice([1, 4, 8]))
        elif action == "cut":
            del changed[place:stop]
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
    action = draw.choice([
        "dtype", "shape", "offsets", "swap entries", "swap offsets", "swap names", "remove", "add", "metadata", "json", "bytes",
        "length", "append", "truncate", "rename", "order",
    ])  # fmt: skip
    entry: Any = header[one]
    keep_size = draw.random() < 0.5
    match action:
        case "dtype":
            entry["dtype"] = draw.choice(DTYPES)
        case "shape":
            shape = entry["shape"]
            options = [shape[::-1], [*shape, 1], shape[:-1], [2 * n for n in shape], [*shape, 0], [-n for n in shape], [2**62],
                       [n + draw.choice([-1, 1]) for n in shape], [float(n) for n in shape], [True], "12", 5, {}, [1] * 100,
                       [*shape, 2**31], [str(n) for n in shape], [[n] for n in shape], [int(np.prod(shape))]]  # fmt: skip
            entry["shape"] = draw.choice(options)
        case "offsets":
            start, stop = entry["data_offsets"]
            options = [[start + 4, stop], [start, stop + 4], [start, stop - 4], [start + 4, stop + 4], [stop, start], [0, 2**62],
                       [-4, stop], [start], [start, stop, stop], [2**63, 2**63 + 4], [float(start), stop], "12", {}, None,
                       [start - 1, stop - 1], [start, start], [[start], stop]]  # fmt: skip
            entry["data_offsets"] = draw.choice(options)
        case "swap entries":
            header[one], header[other] = header[other], header[one]
        case "swap offsets":
            entry["data_offsets"], header[other]["data_offsets"] = header[other]["data_offsets"], entry["data_offsets"]
        case "swap names":  # of tensors of one shape, where there are such
            alike = [name for name in names if header[name]["shape"] == entry["shape"]]
            other = draw.choice(alike)
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
            what, _, text = alter_json(header, draw)
            return f"{action}: {what}", joined(text or dumped(header), body)
        case "bytes":
            what, changed = alter_bytes(data, draw, 8, 8 + length)
            return f"{action}: {what}", changed
        case "length":
            new = draw.choice([0, 1, length - 1, length + 1, 2 * length, len(data), 2**31, 2**62, 2**63, 2**64 - 1])
            return f"length {length} becomes {new}", struct.pack("<Q", new) + data[8:]
        case "append":
            count = draw.choice([1, 4, 8, 1000])
            return f"{count} bytes appended", data + draw.randbytes(count)
        case "truncate":
            stop = draw.choice([0, 7, 8, 9, 8 + length, len(data) - 4, len(data) - 1, draw.randrange(len(data))])
            return f"cut to {stop} bytes", data[:stop]
        case "rename":
            header[
                draw.choice([one + "x", one.upper(), other + ".", one.replace("0", "00"), one.replace("1", "9"), ""])
            ] = header.pop(one)
        case "order":
            header = dict(draw.sample(sorted(header.items()), len(header)))
    text = dumped(header)
    if keep_size and len(text) < length:
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
        self.sizes = [between(folder, 0, 0.6), between(folder, 1, 0.3), between(folder, 1, 0.7)]
        opened = Chain.from_pretrained(folder)
        plans = [opened.plan(size, tolerance=0.2) for size in self.sizes]
        assert {plan.method for plan in plans} == {"interpolate", "expand"}
        assert {(plan.small, plan.large) for plan in plans} == {("a1", "a0"), ("a2", "a1")}
        self.models = dict(zip(self.sizes, (opened.initialize(plan, progress=False) for plan in plans), strict=True))
        self.calibration = opened.calibration
        self.anchors = [f"anchors/a{i}" for i in range(3)]

    def case(self, seed: str, number: int) -> Case:
        """The altered chain of one seed."""
        draw = random.Random(seed)
        kind = KINDS[number % len(KINDS)]
        case = Case(kind, number // len(KINDS) % 2 == 1, draw.choice(self.sizes))
        manifest = json.loads(self.files[MANIFEST_NAME])
        if kind in ("manifest", "axis map"):
            self._alter_manifest(case, manifest, draw)
            return case
        if kind == "claims":
            case.forged = True
            self._alter_claims(case, manifest, draw)
            return case
        anchor = draw.choice(self.anchors)
        name = {
            "config": f"{anchor}/config.json",
            "header": f"{anchor}/{WEIGHTS}",
            "data": f"{anchor}/{WEIGHTS}",
            "index maps": INDEX_MAPS_NAME,
            "checksums": CHECKSUMS_NAME,
            "generation config": f"anchors/a0/{GENERATION}",
            "calibration": CALIBRATION_NAME,
        }[kind]
        data = self.files[name]
        if name.endswith(".json"):
            case.what, data = self._altered_json(data, draw)
        elif kind == "data" or (kind != "header" and draw.random() < 0.2):
            start = 8 + int.from_bytes(data[:8], "little")
            case.what, data = alter_bytes(data, draw, start)
            case.finite = False
        else:
            case.what, data = alter_header(data, draw)
        case.what = f"{name}: {case.what}"
        case.files[name] = data
        if case.forged:
            case.may_differ = name.endswith(".safetensors")
            attested(manifest, name, {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
            if name.endswith(WEIGHTS):
                self._forge_digests(case, manifest, name, draw)
            case.files[MANIFEST_NAME] = json.dumps(manifest).encode()
        return case

    @staticmethod
    def _altered_json(data: bytes, draw: random.Random) -> tuple[str, bytes]:
        if draw.random() < 0.15:
            return alter_bytes(data, draw)
        value = json.loads(data)
        what, path, text = alter_json(value, draw)
        return f"{'.'.join(map(str, path))} {what}", text or dumped(value)

    def _alter_manifest(self, case: Case, manifest: dict[str, Any], draw: random.Random) -> None:
        if draw.random() < 0.1:
            case.what, case.files[MANIFEST_NAME] = alter_bytes(self.files[MANIFEST_NAME], draw)
            case.may_differ = True  # a digit of a layer's number, say; told from others below
            return
        told, touched, text = [], [], None
        for _ in range(draw.choice([1, 1, 2])):
            value = manifest["axis_map"] if case.kind == "axis map" else manifest
            what, path, text = alter_json(value, draw)
            told.append(f"{'.'.join(map(str, path))} {what}")
            touched += path
            if text is not None or not all(isinstance(manifest.get(k), dict) for k in ("axis_map",)):
                break
        if case.kind == "axis map" and text is not None:
            text = dumped({**manifest, "axis_map": "@map@"}).replace(b'"@map@"', text)
        if case.kind == "axis map" and case.forged and text is None:
            self._recount(manifest)
        case.what, case.may_differ = "; ".join(told), bool(set(LEGITIMATE) & set(map(str, touched)))
        case.files[MANIFEST_NAME] = text or dumped(manifest)

    @staticmethod
    def _recount(manifest: dict[str, Any]) -> None:
        """Makes the parameter counts fit a map, where that has any."""
        with Watched():
            axis_map = AxisMap.from_dict(manifest["axis_map"])
            for anchor in manifest["anchors"]:
                anchor["num_parameters"] = count_parameters(axis_map, axis_map.sizes(anchor["shape"]))

    def _alter_claims(self, case: Case, manifest: dict[str, Any], draw: random.Random) -> None:
        """Lets the manifest and a config agree on another size."""
        numbers = draw.choice([(0,), (1,), (2,), (0, 1), (0, 1, 2)])
        field_name = draw.choice(list(manifest["anchors"][0]["shape"]))
        told = []
        for i in numbers:
            anchor = manifest["anchors"][i]
            value = anchor["shape"][field_name]
            new = draw.choice([value + 1, value - 1, 2 * value, 1, value * 1000, 2**31, 2**40, 2**49])
            anchor["shape"][field_name] = new
            told.append(f"a{i} {field_name} {value} becomes {new}")
            name = f"anchors/a{i}/config.json"
            data = json.dumps(json.loads(self.files[name]) | {field_name: new}).encode()
            anchor["files"]["config.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            case.files[name] = data
        self._recount(manifest)
        case.what, case.may_differ = ", ".join(told), True
        case.files[MANIFEST_NAME] = json.dumps(manifest).encode()

    def _forge_digests(self, case: Case, manifest: dict[str, Any], name: str, draw: random.Random) -> None:
        """Digests that fit the altered file, or none at all."""
        if draw.random() < 0.3:
            manifest.pop("checksums")
            return
        data, digests = case.files[name], json.loads(self.files[CHECKSUMS_NAME])
        with Watched():  # a header that cannot be read has no digests
            header, body = split(data)
            digests[name.split("/")[1]] = {
                key: checksum(body[slice(*entry["data_offsets"])])
                for key, entry in header.items()
                if key != "__metadata__"
            }
        case.files[CHECKSUMS_NAME] = dumped(digests)
        size, sha256 = len(case.files[CHECKSUMS_NAME]), hashlib.sha256(case.files[CHECKSUMS_NAME]).hexdigest()
        attested(manifest, CHECKSUMS_NAME, {"size": size, "sha256": sha256})


@dataclass
class Made:
    """How far a case got, and what came of it."""

    stage: str = "manifest"
    plan: Plan | None = None
    model: PreTrainedModel | None = None
    calibration: torch.Tensor | None = None


def make(original: Original, case: Case, made: Made) -> None:
    """What :func:`cbd_hub.from_chain` does, step by step."""
    where = str(original.folder.parent / "hub")
    opened = Chain.from_pretrained(original.folder, cache_dir=where, local_files_only=True)
    made.stage = "plan"
    made.plan = opened.plan(case.size, tolerance=0.2)
    made.stage = "weights"
    if case.kind == "calibration":
        made.calibration = opened.calibration
    made.model = opened.initialize(made.plan, progress=False)
    made.stage = "model"


def comparable(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("cbd_hub", "_name_or_path")}


def judge(original: Original, case: Case, made: Made, outcome: Watched) -> tuple[str, str]:
    """What came of a case in a word, and what is wrong with it, if anything."""
    error = outcome.error
    if error is not None:
        if not isinstance(error, CbdError):
            return "failed", outcome.told()
        if len(str(error).splitlines()) != 1:
            return "failed", f"a message of several lines from {outcome.where()}: {str(error)[:200]!r}"
        return f"refused: {made.stage}", ""
    model, plan, expected = made.model, made.plan, original.models[case.size]
    assert model is not None
    assert plan is not None
    values = dict(model.named_parameters())
    if {k: tuple(v.shape) for k, v in values.items()} != {op.name: op.shape for op in plan.operations}:
        return "failed", "its shapes are not those of the plan"
    if "auto_map" in model.config.to_json_string():
        return "failed", "its config names code"
    if case.kind == "calibration" and made.calibration is not None:
        ids = made.calibration
        fits = case.forged and ids.ndim == 2 and 0 <= int(ids.min()) <= int(ids.max()) < 13
        if not fits and not torch.equal(ids, original.calibration):  # type: ignore[arg-type]
            return "failed", "it gives other token ids"
    wanted = dict(expected.named_parameters())
    if set(values) == set(wanted) and all(torch.equal(values[k], wanted[k]) for k in wanted):
        forged_config = case.forged and case.kind in ("config", "claims")
        if not forged_config and comparable(model.config) != comparable(expected.config):
            return "failed", "its config silently differs"
        if case.kind != "manifest" and not (case.forged and case.kind in ("generation config", "config", "claims")):
            if model.generation_config.to_dict() != expected.generation_config.to_dict():
                return "failed", "its generation config silently differs"
        return "same", ""
    if not case.may_differ:
        return "failed", "its tensors silently differ"
    if case.finite and not all(bool(torch.isfinite(v).all()) for v in values.values()):
        return "failed", "a parameter is not finite"
    return "other", ""


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two gigabytes more than are in use: a claim that is believed fails, and fails soon."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


NUMBERS = {"llama": 1500, "smollm3-nope-sliding": 750}
"""Cases of each family; the second one has lists of one entry a layer in its configs, and ties its embedding."""


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("variant", NUMBERS)
def test_whatever_is_altered_is_refused_or_harmless(
    tmp_path: Path, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CbdError in one line, the very same model, or the other one that a forger's chain says it is. Nothing else."""
    original = Original(tiny_chain(tmp_path / "work" / "chain", variant))
    (tmp_path / "work" / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "work" / "cwd")
    only, count = os.environ.get("TRUST_SEED", ""), NUMBERS[variant]
    numbers = [int(only.rpartition(":")[2])] if only.startswith(f"{variant}:") else range(0 if only else count)
    table: dict[tuple[str, bool], Counter[str]] = defaultdict(Counter)
    failures: dict[str, list[str]] = defaultdict(list)
    for number in numbers:
        case = original.case(f"{variant}:{number}", number)
        for name, data in case.files.items():
            (original.folder / name).write_bytes(data)
        before = tree(tmp_path)
        made = Made()
        with Watched() as outcome:
            make(original, case, made)
        label, problem = judge(original, case, made, outcome)
        if tree(tmp_path) != before:
            problem = f"it wrote {sorted(set(tree(tmp_path)) ^ set(before))[:3]}; {problem}"
        if torch.get_default_dtype() != torch.float32 or torch.is_inference_mode_enabled():
            problem = f"it left torch altered; {problem}"
            torch.set_default_dtype(torch.float32)
        table[case.kind, case.forged]["failed" if problem else label] += 1
        if problem:
            failures[problem.split(": '")[0].split(': "')[0]].append(
                f"TRUST_SEED={variant}:{number} ({case.kind}, {'forged' if case.forged else 'hashes kept'}, "
                f"{case.size}): {case.what[:160]}: {problem}"
            )
        if only:
            told = outcome.told() if outcome.error else label
            print(f"{case}\n{told}")
        for name in case.files:
            (original.folder / name).write_bytes(original.files[name])
    columns = ["refused: manifest", "refused: plan", "refused: weights", "same", "other", "failed"]
    print(f"\n{variant:<32}" + "".join(f"{c.removeprefix('refused: '):>10}" for c in columns))
    for (kind, forged), counts in sorted(table.items()):
        print(f"{kind + (', forged' if forged else ''):<32}" + "".join(f"{counts[c]:>10}" for c in columns))
    report = [f"{len(cases)} x {what}\n    {cases[0]}" for what, cases in failures.items()]
    assert not failures, "\n".join([f"{sum(map(len, failures.values()))} of {count} cases:", *sorted(report)])
    if not only:
        assert_sane(table, count)


def assert_sane(table: dict[tuple[str, bool], Counter[str]], count: int) -> None:
    """Every stage was reached by its share of the cases, so that none is refused for a reason other than meant."""
    total = sum(table.values(), Counter())
    assert total.total() == count
    for outcome, share in {
        "refused: manifest": 0.1, "refused: plan": 0.05, "refused: weights": 0.25, "same": 0.1, "other": 0.02
    }.items():  # fmt: skip
        assert total[outcome] >= share * count, (outcome, total)
    for kind in ("config", "index maps", "generation config", "checksums"):
        kept, forged = table[kind, False], table[kind, True]
        refused = sum(v for k, v in kept.items() if k.startswith("refused"))
        assert refused >= 0.9 * kept.total() - 1, (
            kind,
            kept,
        )  # a hash that does not fit, but for what changes nothing
        assert forged["same"] + forged["other"] >= 0.1 * forged.total(), (kind, forged)
    for kind in ("header", "data"):
        assert table[kind, False]["other"] == 0
        assert table[kind, True]["other"] + table[kind, True]["same"] >= 0.1 * table[kind, True].total()
