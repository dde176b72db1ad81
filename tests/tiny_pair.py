"""What the tests of distillation share: packed real text, and a tiny teacher with a student cut out of it."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from tiny_models import tiny_config, tiny_model
from transformers import PreTrainedModel

from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import pack, train_tokenizer
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.splits import split_documents

__all__ = ["LENGTH", "VOCAB", "packed_text", "pair"]

TEXT = Path(__file__).resolve().parents[1] / "examples" / "data" / "sotu"
VOCAB = 300
LENGTH = 32


@cache
def packed_text() -> tuple[Dataset, Dataset]:
    """Packed training and validation blocks of (LENGTH,) tokens, from addresses of the first presidents."""
    splits = split_documents(load_documents(DataConfig(text_files="179*.txt"), TEXT), 0.2, seed=0)
    tokenizer = train_tokenizer(splits.train, VOCAB)
    packed = [pack(documents, tokenizer, LENGTH) for documents in (splits.train, splits.validation)]
    return packed[0], packed[1].select(range(16))


def pair(family: str = "llama", **small: Any) -> tuple[PreTrainedModel, PreTrainedModel, IndexMap]:
    """A teacher, and the student that keeps all but one of its layers: (student, teacher, index map)."""
    teacher = tiny_model(tiny_config(family, vocab_size=VOCAB), seed=0)
    layers = teacher.config.num_hidden_layers
    kept = [layer for layer in range(layers) if layer != 1]
    config = {"num_hidden_layers": layers - 1, "vocab_size": VOCAB, **small}
    if getattr(teacher.config, "layer_types", None):
        config["layer_types"] = [teacher.config.layer_types[layer] for layer in kept]
    student = tiny_model(tiny_config(family, **config), seed=1)
    return student, teacher, IndexMap(np.array([*kept, 1]))
