"""Stand-ins for the public models and datasets that recipes name, for ``check`` to read offline.

The configs are the public ones; weight files are headers alone; tokenizer and text are made from this repository's.
"""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from cbd_hub.build.recipe import load_recipe
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.settings import DataConfig

TEXT = Path(__file__).resolve().parents[1] / "examples" / "data" / "sotu"


def _qwen3(hidden: int, ffn: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, max_position_embeddings=40960, max_window_layers=28, vocab_size=151936, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )  # fmt: skip


CONFIGS: dict[str, PreTrainedConfig] = {
    "openai-community/gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),
    "openai-community/gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),
    "openai-community/gpt2": GPT2Config(n_embd=768, n_layer=12, n_head=12),
    "EleutherAI/pythia-1b": GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192,
        bos_token_id=0, eos_token_id=0,
    ),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 6144),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 3072),
    "HuggingFaceTB/SmolLM2-1.7B": LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=8192, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 130_000.0}, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip
"""The public config of every model that the recipes name."""


def lay_out(recipe: Path, folder: Path) -> Path:
    """Copies a recipe to a folder where all that it names stands under its own name; returns the copy."""
    loaded, _ = load_recipe(recipe)
    tokenizer = train_tokenizer(load_documents(DataConfig(text_files=str(TEXT / "179*.txt"))), 300)
    for name in filter(None, (loaded.source.model, *(anchor.init for anchor in loaded.anchors))):
        place = folder / name
        CONFIGS[name].save_pretrained(place)
        tokenizer.save_pretrained(place)
        write_headers(CONFIGS[name], place / "model.safetensors")
    for source in loaded.data.each_source() if loaded.data else ():
        if source.dataset is not None:
            text = folder / source.dataset.name
            text.mkdir(parents=True)
            rows = [json.dumps({"text": path.read_text(encoding="utf-8")}) for path in sorted(TEXT.glob("179*.txt"))]
            (text / "train.jsonl").write_text("\n".join(rows), encoding="utf-8")
            card = {"configs": [{"config_name": source.dataset.config or "default", "data_files": "train.jsonl"}]}
            (text / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n", encoding="utf-8")
    return Path(shutil.copy(recipe, folder))


def write_headers(config: PreTrainedConfig, path: Path) -> None:
    """Writes a bfloat16 weight file of which only the header takes room; names and shapes are transformers' own."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in model.named_parameters():  # tied ones once
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with path.open("r+b") as file:
        file.truncate(8 + len(text) + end)
