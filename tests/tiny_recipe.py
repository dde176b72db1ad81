"""The smallest recipe that has everything: a tokenizer, a source trained from scratch, two distilled anchors."""

import hashlib
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from cbd_hub.build.build import build_chain

__all__ = ["TEXT", "built_chain", "digests", "tiny_recipe"]

TEXT = Path(__file__).resolve().parents[1] / "examples" / "data" / "sotu"
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def tiny_recipe(**changes: Any) -> dict[str, Any]:
    """A recipe of a few thousand tokens (seconds on one core), with some keys replaced."""
    config = {
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    training = {"learning_rate": 3e-3, "batch_size": 4, "eval_every": 12}
    return {
        "name": "tiny",
        "license": "apache-2.0",
        "source": {"train": {"config": config, "training": {**training, "tokens": 3072}}},
        "tokenizer": {"vocab_size": 300},
        "data": {"text_files": str(TEXT / "179*.txt"), "sequence_length": 32, "held_out_fraction": 0.2},
        "anchors": [0.75, 0.7],
        "distillation": {**training, "tokens": 2048},
        "calibration_tokens": 512,
        "evaluation": {"tokens": 1000, "curve_points": 2},
        **changes,
    }


@cache
def built_chain() -> Path:
    """The chain of :func:`tiny_recipe`, built once a process; read it, never write to it."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="cbd-hub-test-"))
    folder = Path(_KEPT[-1].name) / "chain"
    build_chain(tiny_recipe(), folder, progress=False)
    return folder


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a chain, by relative path; the records of the build itself left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".build" not in path.relative_to(folder).parts
    }
