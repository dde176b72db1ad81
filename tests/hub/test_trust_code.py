"""Nothing of a repository is unpickled, and no code of it runs."""

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hostile import (
    CONFIG,
    GENERATION,
    WEIGHTS,
    Watched,
    assert_none,
    between,
    edit_json,
    forge,
    linux_only,
    made_of,
    make,
    manifest_of,
    write_manifest,
)
from make_chain import edit_manifest, refresh
from sandbox import Sandbox

import cbd_hub
from cbd_hub.chain.chain import Chain
from cbd_hub.manifest.manifest import CALIBRATION_NAME, CHECKSUMS_NAME, INDEX_MAPS_NAME

pytestmark = linux_only


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
