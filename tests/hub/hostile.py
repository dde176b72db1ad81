"""Chains of strangers: a tiny chain with everything that a chain can have, ways to alter it, and what may come of it.

A repository may hold anything: it is refused in one line, or gives what its manifest says.
"""

import json
import os
import signal
import struct
import sys
import traceback
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import pytest
import torch
from make_chain import add_calibration, edit_manifest, make_chain, variant_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GenerationConfig, PreTrainedTokenizerFast

import cbd_hub
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import CbdError
from cbd_hub.manifest.manifest import CALIBRATION_NAME, CHECKSUMS_NAME, INDEX_MAPS_NAME, MANIFEST_NAME, file_entry

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "anchors/a0/model.safetensors"
CONFIG = "anchors/a0/config.json"
GENERATION = "anchors/a0/generation_config.json"

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits memory, and is ended by SIGPROF")

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


class HungError(BaseException):
    """A case took too much processor time. Not an Exception, so that nothing on the way swallows it."""


class Watched:
    """Keeps whatever its body raises, and ends it after some seconds of processor time.

    Assertions of the tests beside this module and interrupts pass. Processor time, since a busy machine makes no case
    slow, and since the alarm belongs to pytest's own timeout.
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
        raised_in = Path(traceback.extract_tb(trace)[-1].filename).parent if trace else None
        own = isinstance(error, AssertionError) and raised_in == Path(__file__).parent
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
