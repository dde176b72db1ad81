"""GGUF files, read back by the package's own reader and by transformers: the same numbers, the same logits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from tiny_recipe import built_chain
from tiny_text import make_documents, make_text, tokenizer_with_beginning
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from cbd_hub import Chain
from cbd_hub.chain.gguf_file import write_gguf
from cbd_hub.cli.main import app
from cbd_hub.errors import OutputExistsError, RecipeError

TEXT = "Fellow-Citizens:\n\n  it didn't cost 1790 dollars, été.<|endoftext|>"


def model_of(family: str, **fields: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2, "head_dim": 16}
    return tiny_model(tiny_config(family, **{**sizes, **fields}))


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 290, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(built_chain())


@pytest.mark.parametrize(("kind", "close"), [("f32", 1e-5), ("f16", 2e-2), ("q8_0", 0.3)])
@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True, "head_dim": 128}),
    ],
)
def test_transformers_reads_back_the_same_logits(
    tokenizer: Any, tmp_path: Path, family: str, fields: dict[str, Any], kind: Any, close: float
) -> None:
    model = model_of(family, **fields)
    size = write_gguf(model, tokenizer, tmp_path / "m.gguf", kind, progress=False)
    assert size == (tmp_path / "m.gguf").stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    expected, got = logits(model), logits(loaded)
    assert (got - expected).abs().max() <= close * expected.std()
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert again(TEXT).input_ids == tokenizer(TEXT).input_ids
    assert again.decode(again(TEXT).input_ids) == TEXT and again.eos_token == "<|endoftext|>"


def test_kinds_take_the_bytes_that_they_say(tokenizer: Any, tmp_path: Path) -> None:
    """Q8_0 is 34 bytes for 32 numbers; rows that are no multiple of 32 are float16, vectors float32."""
    model = model_of("llama", intermediate_size=80)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "q8_0", progress=False)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert len(tensors) == sum(1 for _ in model.parameters())
    up, down = tensors["blk.1.ffn_up.weight"], tensors["blk.1.ffn_down.weight"]
    assert (up.tensor_type.name, up.n_bytes) == ("Q8_0", 80 * 64 // 32 * 34)
    assert (down.tensor_type.name, down.n_bytes) == ("F16", 64 * 80 * 2)
    assert tensors["blk.1.attn_norm.weight"].tensor_type.name == "F32"
    exact = model.get_parameter("model.layers.1.mlp.up_proj.weight").detach().numpy()
    read = gguf.dequantize(up.data, up.tensor_type)
    assert np.abs(read - exact).max() <= np.abs(exact).max() / 127


def test_a_text_begins_as_the_tokenizer_begins_it(tokenizer: Any, tmp_path: Path) -> None:
    begun = tokenizer_with_beginning(make_documents(), 290)
    for name, own, begins in (("a", begun, True), ("b", tokenizer, False)):
        write_gguf(model_of("llama"), own, tmp_path / f"{name}.gguf", progress=False)
        fields = gguf.GGUFReader(tmp_path / f"{name}.gguf").fields
        assert fields["tokenizer.ggml.add_bos_token"].contents() is begins
        assert fields["tokenizer.ggml.eos_token_id"].contents() == own.eos_token_id


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {}, "of gpt2 models"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "sliding windows"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "linear rotary embeddings",
        ),
    ],
)
def test_what_is_not_written_is_said(
    tokenizer: Any, tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    model = tiny_model(tiny_config(family, **fields))
    with pytest.raises(RecipeError, match=rf"{message}.*convert_hf_to_gguf"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf", progress=False)
    with pytest.raises(RecipeError, match=r"of kind 'q2'.*f32, f16, q8_0"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf", "q2", progress=False)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_stays(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputExistsError, match="nothing was changed"):
        write_gguf(model_of("llama"), tokenizer, tmp_path / "m.gguf", progress=False)
    assert (tmp_path / "m.gguf").read_text() == "mine"


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command(tmp_path: Path) -> None:
    """A size of a chain, and the same model from its folder: the same file."""
    chain = Chain.from_pretrained(built_chain())
    size = str((chain.anchors[0].num_parameters + chain.anchors[1].num_parameters) // 2)
    of_chain = [str(built_chain()), "--num-parameters", size]
    told = json.loads(command("export", *of_chain, "--gguf", "q8_0", "-o", str(tmp_path / "a.gguf"), "--json"))
    assert told["bytes"] == (tmp_path / "a.gguf").stat().st_size
    command("from-chain", *of_chain, "--output", str(tmp_path / "a"))
    again = command("export", str(tmp_path / "a"), "--gguf", "q8_0", "--output", str(tmp_path / "b" / "a.gguf"))
    assert f"{told['num_parameters']:,} parameters as q8_0, {told['bytes']:,} bytes" in again
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b" / "a.gguf").read_bytes()


def test_the_package_that_is_missing_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['gguf'] = None; from cbd_hub.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "export", str(built_chain()), "--num-parameters", "40k", "-o", "x.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "pip install 'cbd_hub[gguf]'" in done.stderr


LLAMA_CPP = """
import json, sys
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = sys.argv[1], 256, False
server = xllamacpp.Server(params)
asked = {"prompt": json.loads(sys.argv[2]), "max_tokens": 1, "logprobs": 20, "temperature": 0}
print(json.dumps(server.handle_completions(asked)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "close"), [("f32", 5e-3), ("q8_0", 0.2)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_reads_the_same_distribution(tmp_path: Path, family: str, kind: Any, close: float) -> None:
    """llama.cpp itself (CBD_HUB_LLAMA_CPP: a Python with xllamacpp) reads a text's tokens, and predicts the next."""
    python = os.environ.get("CBD_HUB_LLAMA_CPP")
    if python is None:
        pytest.skip("set CBD_HUB_LLAMA_CPP to a Python with xllamacpp")
    begun = tokenizer_with_beginning(make_documents(), 290)
    model = model_of(family)
    write_gguf(model, begun, tmp_path / "m.gguf", kind, progress=False)
    text = make_text(3, 1)
    ids = begun(text)["input_ids"]
    done = subprocess.run(
        [python, "-c", LLAMA_CPP, str(tmp_path / "m.gguf"), json.dumps(text)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["usage"]["prompt_tokens"] == len(ids)
    found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert len(found) == 20
    for token in found:
        assert token["logprob"] == pytest.approx(expected[token["id"]].item(), abs=close)
