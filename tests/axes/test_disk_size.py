"""Sizes on disk, against the files that are written."""

import os
import subprocess
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_models import VARIANTS, tiny_config, tiny_model
from tiny_recipe import built_chain
from transformers import AutoTokenizer

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.disk_size import QUANTS, disk_size, format_bytes, parse_bytes
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.chain.gguf_file import write_gguf
from cbd_hub.errors import SizeError


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_is_two_bytes_a_parameter(variant: str) -> None:
    family, fields = VARIANTS[variant]
    config = tiny_config(family, **fields)
    axis_map = axis_map_for(config)
    sizes = axis_map.sizes(config)
    assert disk_size(axis_map, sizes, "bf16") == 2 * count_parameters(axis_map, sizes)
    assert disk_size(axis_map, sizes, "q4_k_m") > 0 and disk_size(axis_map, sizes, "q8_0") > 0


@pytest.mark.parametrize("ffn", [80, 96, 256])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_q8_0_is_what_a_file_has(tmp_path: Path, family: str, ffn: int) -> None:
    """Rows of 80 are no multiple of 32: the matrix that reads them stays in half precision."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": ffn}
    model = tiny_model(tiny_config(family, **sizes))
    axis_map = axis_map_for(model.config)
    write_gguf(model, AutoTokenizer.from_pretrained(built_chain()), tmp_path / "m.gguf", "q8_0", progress=False)
    written = sum(int(t.n_bytes) for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    assert disk_size(axis_map, axis_map.sizes(model.config), "q8_0") == written


QUANTIZE = """
import sys
from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize
parameters = LlamaModelQuantizeParams()
parameters.ftype = 15  # Q4_K_M
model_quantize(sys.argv[1], sys.argv[2], parameters)
"""

Q4_K_M_BYTES = {  # of the tensors of files that llama.cpp quantized: family, layers, hidden, ffn, tied head
    ("llama", 3, 256, 768, True): 1_456_408,
    ("llama", 8, 256, 544, False): 3_270_360,
    ("llama", 3, 96, 200, True): 286_440,
    ("qwen2", 9, 64, 192, False): 374_080,
    ("qwen3", 17, 192, 512, True): 4_915_344,
}


def q4_k_m_config(family: str, layers: int, hidden: int, ffn: int, tied: bool) -> Any:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": hidden // 4}
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": 300}
    return tiny_config(family, **heads, **sizes, tie_word_embeddings=tied)


@pytest.mark.parametrize("shape", Q4_K_M_BYTES)
def test_q4_k_m_is_what_llama_cpp_made(shape: tuple[str, int, int, int, bool]) -> None:
    config = q4_k_m_config(*shape)
    axis_map = axis_map_for(config)
    assert disk_size(axis_map, axis_map.sizes(config), "q4_k_m") == Q4_K_M_BYTES[shape]


@pytest.mark.slow
@pytest.mark.parametrize("shape", Q4_K_M_BYTES)
def test_llama_cpp_makes_files_of_that_size(tmp_path: Path, shape: tuple[str, int, int, int, bool]) -> None:
    python = os.environ.get("CBD_HUB_LLAMA_CPP")
    if python is None:
        pytest.skip("set CBD_HUB_LLAMA_CPP to a Python with cyllama, which brings llama.cpp's quantizer")
    model, tokenizer = tiny_model(q4_k_m_config(*shape)), AutoTokenizer.from_pretrained(built_chain())
    write_gguf(model, tokenizer, tmp_path / "f16.gguf", "f16", progress=False)
    command = [python, "-c", QUANTIZE, tmp_path / "f16.gguf", tmp_path / "q4.gguf"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    file = tmp_path / "q4.gguf"
    assert sum(int(t.n_bytes) for t in gguf.GGUFReader(file).tensors) == Q4_K_M_BYTES[shape]
    assert Q4_K_M_BYTES[shape] < file.stat().st_size < Q4_K_M_BYTES[shape] + 40_000  # names and the vocabulary


def test_larger_kinds_are_larger_where_rows_allow_them_all() -> None:
    config = tiny_config("llama", hidden_size=256, intermediate_size=768, vocab_size=1024, num_attention_heads=4)
    axis_map = axis_map_for(config)
    bf16, q8, q4 = (disk_size(axis_map, axis_map.sizes(config), quant) for quant in QUANTS)
    assert 0.52 < q8 / bf16 < 0.54 and 0.28 < q4 / bf16 < 0.36
    with pytest.raises(SizeError, match=r"quant is 'q4_km'; allowed: bf16, q8_0, q4_k_m. Did you mean 'q4_k_m'"):
        disk_size(axis_map, axis_map.sizes(config), "q4_km")


@pytest.mark.parametrize(
    ("text", "count"),
    [("512MB", 512_000_000), ("1.5 GB", 1_500_000_000), ("300MiB", 300 * 2**20), ("7k", 7000), (12, 12), ("9b", 9)],
)
def test_amounts_of_memory(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "MB", "1,5GB", "-1MB", "5 TB", True, 0, "0MB", float("inf")])
def test_what_is_no_amount_of_memory(text: object) -> None:
    with pytest.raises(SizeError):
        parse_bytes(text)  # type: ignore[arg-type]


def test_amounts_are_written_as_people_say_them() -> None:
    assert [format_bytes(n) for n in (71_700_000, 1_234_000_000, 85_664, 12)] == [
        "71.7 MB",
        "1.23 GB",
        "85.7 kB",
        "12 bytes",
    ]
