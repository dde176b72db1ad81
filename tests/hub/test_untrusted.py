"""Configs and tokenizers of a repository: what they claim is compared before transformers sees it."""

import json
from pathlib import Path
from typing import Any

import pytest
from make_chain import add_tokenizer, make_chain, variant_model
from transformers import AutoConfig, GenerationConfig

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.errors import IntegrityError, ManifestError
from cbd_hub.hub.untrusted import (
    guarded,
    has_chat_template,
    is_tokenizer_file,
    mend_generation_config,
    read_config,
    read_generation_config,
    read_tokenizer,
)


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox", "opt", "gemma3_text", "phi3", "olmo2", "smollm3"])
def test_a_config_is_what_transformers_reads(tmp_path: Path, variant: str) -> None:
    model = variant_model(variant)
    model.save_pretrained(tmp_path)
    axis_map = axis_map_for(model.config)
    shape = axis_map.config_fields(axis_map.sizes(model.config))
    read = read_config(tmp_path / "config.json", "it", model.config.model_type, axis_map, shape)
    expected = AutoConfig.from_pretrained(tmp_path)
    assert read.to_dict() == expected.to_dict() | {"_name_or_path": ""}
    assert type(read) is type(expected)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"hidden_size": 64}, "contradicts the shape"),
        ({"model_type": "gpt2"}, "is of the family 'gpt2'; the manifest says 'llama'"),
        ({"num_hidden_layers": 10**12}, "'num_hidden_layers' is 1000000000000; at most"),
        ({"num_labels": 10**9}, "at most 10000 are allowed"),
        ({"layer_types": ["full_attention"] * 20_000}, "has 20000 entries"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has 'quantization_config', which no anchor may have"),
        ({"hidden_act": 5}, "cannot be used"),
        ({"rope_parameters": "x"}, "cannot be used"),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_config_may_not_claim(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    model = variant_model("llama")
    model.save_pretrained(tmp_path)
    axis_map = axis_map_for(model.config)
    shape = axis_map.config_fields(axis_map.sizes(model.config))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ManifestError, match=why):
        read_config(path, "it", "llama", axis_map, shape)


def test_a_generation_config(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"max_new_tokens": 7, "do_sample": True}))
    assert read_generation_config(path).max_new_tokens == 7
    path.write_text("[]")
    with pytest.raises(IntegrityError, match="no JSON object"):
        read_generation_config(path)


def test_a_tokenizer_is_read_from_its_files_alone(tmp_path: Path) -> None:
    chain = add_tokenizer(make_chain(tmp_path / "c", variant_model("llama", vocab_size=320)))
    names = json.loads((chain / "chain.json").read_text())["tokenizer"]
    made = read_tokenizer({name: chain / name for name in names}, "org/chain")
    assert made.name_or_path == "org/chain"
    assert made.decode(made("word 7")["input_ids"]) == "word 7"
    made.save_pretrained(tmp_path / "saved")
    again = read_tokenizer({p.name: p for p in (tmp_path / "saved").iterdir()}, "x")
    assert again("word 7")["input_ids"] == made("word 7")["input_ids"]
    with pytest.raises(ManifestError, match="the chain's tokenizer cannot be used"):
        read_tokenizer({"odd.json": chain / "chain.json"}, "x")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"tokenizer.json": "{}"}, False),
        ({"tokenizer_config.json": '{"chat_template": null}'}, False),
        ({"tokenizer_config.json": '{"chat_template": "{{ messages }}"}'}, True),
        ({"tokenizer_config.json": "{}", "chat_template.jinja": "{{ messages }}"}, True),
        ({"additional_chat_templates/tool_use.jinja": "{{ messages }}"}, True),
    ],
)
def test_whether_there_is_a_chat_template(tmp_path: Path, files: dict[str, str], expected: bool | None) -> None:
    paths = {}
    for index, (name, text) in enumerate(files.items()):
        paths[name] = tmp_path / str(index)
        paths[name].write_text(text)
    assert has_chat_template(paths) is expected


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_a_tokenizer_config_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(IntegrityError, match="JSON"):
        has_chat_template({"tokenizer_config.json": tmp_path / "x"})


def test_errors_of_every_kind_are_one() -> None:
    def fail() -> None:
        raise RecursionError("deep\ndown")

    with pytest.raises(ManifestError, match="it cannot be used: RecursionError: deep down"):
        guarded("it", fail)
    with pytest.raises(IntegrityError, match=r"^as it was$"):
        guarded("it", lambda: (_ for _ in ()).throw(IntegrityError("as it was")))
    assert guarded("it", lambda: 5) == 5


@pytest.mark.parametrize(
    ("values", "done"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, "do_sample was set, which temperature, top_p asks for"),
        ({"top_k": 7, "pad_token_id": -1}, "pad_token_id -1 was dropped"),
        ({"min_p": 0.1, "do_sample": False}, "do_sample was set"),
        ({"early_stopping": True}, "all but the token ids was dropped"),
    ],
)
def test_a_generation_config_that_cannot_be_saved_is_mended(tmp_path: Path, values: dict, done: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2, **values}))
    config = GenerationConfig.from_dict(json.loads(path.read_text()))
    assert any(done in text for text in mend_generation_config(config))
    config.save_pretrained(tmp_path / "saved")
    assert config.eos_token_id == 2
    read_generation_config(path).save_pretrained(tmp_path / "again")


def test_a_good_generation_config_stays(tmp_path: Path) -> None:
    config = GenerationConfig(do_sample=True, temperature=0.5, eos_token_id=[1, 2], pad_token_id=0)
    before = config.to_dict()
    assert mend_generation_config(config) == []
    assert config.to_dict() == before


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja",
     "additional_chat_templates/tool_use.jinja", "special_tokens_map.json", "qwen.tiktoken"],
)  # fmt: skip
def test_tokenizer_files(name: str) -> None:
    assert is_tokenizer_file(name)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "../tokenizer.json", "tokenizer.py", "a/tokenizer.json", ".model", "x/../y.jinja",
             "additional_chat_templates/../../x.jinja", "config.json"]
)  # fmt: skip
def test_other_files(name: str) -> None:
    assert not is_tokenizer_file(name)
