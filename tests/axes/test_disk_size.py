"""Sizes on disk, against the files that are written."""

from pathlib import Path

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
