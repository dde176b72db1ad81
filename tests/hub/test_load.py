"""The door for whole models: a checkpoint that is not what it says is refused, and good ones come whole."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_client import Client
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_config, tiny_model

import cbd_hub
from cbd_hub.errors import RecipeError
from cbd_hub.hub.load import load_config, load_model
from cbd_hub.hub.read import Location

Weights = dict[str, torch.Tensor]


def save(folder: Path, family: str = "llama", **fields: object) -> Path:
    tiny_model(tiny_config(family, **fields)).save_pretrained(folder)
    return folder


def change(folder: Path, edit: Callable[[Weights], Weights | None]) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights = edit(weights) or weights
    save_file({k: v.clone().contiguous() for k, v in weights.items()}, path, metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_good_model_comes_whole(family: str, tmp_path: Path) -> None:
    model = tiny_model(tiny_config(family))
    model.save_pretrained(tmp_path)
    loaded = load_model(Location(str(tmp_path))).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.float().state_dict().items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_wrapper_prefix_is_refused(prefix: str, tmp_path: Path) -> None:
    save(tmp_path)
    change(tmp_path, lambda w: {prefix + name: value for name, value in w.items()})
    with pytest.raises(RecipeError, match=r"lacks .* it has others instead, such as " + prefix):
        load_model(Location(str(tmp_path)))


@pytest.mark.parametrize("lost", ["model.layers.1.", "model.norm.", "model.embed_tokens."])
def test_missing_weights_are_refused_by_name(lost: str, tmp_path: Path) -> None:
    save(tmp_path)
    change(tmp_path, lambda w: {name: value for name, value in w.items() if not name.startswith(lost)})
    with pytest.raises(RecipeError, match=f"lacks .*{lost.rstrip('.')}"):
        load_model(Location(str(tmp_path)))


def test_left_over_weights_are_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path)
    change(tmp_path, lambda w: {**w, "model.layers.0.mlp.experts.weight": torch.zeros(2)})
    with pytest.raises(RecipeError, match=r"the model does not, model\.layers\.0\.mlp\.experts\.weight"):
        load_model(Location(str(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    save(tmp_path)
    name = "model.layers.1.self_attn.q_proj.weight"
    change(tmp_path, lambda w: w[name].view(-1).__setitem__(3, value))
    with pytest.raises(RecipeError, match=rf"{name} of .* not finite"):
        load_model(Location(str(tmp_path)))


def test_a_tied_flag_beside_another_head_is_refused(tmp_path: Path) -> None:
    save(tmp_path, tie_word_embeddings=True)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change(tmp_path, lambda w: {**w, "lm_head.weight": embedding})
    load_model(Location(str(tmp_path)))  # a copy of the embedding is no contradiction
    change(tmp_path, lambda w: {**w, "lm_head.weight": embedding + 1})
    with pytest.raises(RecipeError, match=r"ties lm_head\.weight to the embedding, and its files hold another head"):
        load_model(Location(str(tmp_path)))


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    for data, said in (
        (raw[: len(raw) // 2], "damaged or incomplete"),
        (b"", "damaged or incomplete"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
    ):
        path.write_bytes(data)
        with pytest.raises(RecipeError, match=said):
            load_model(Location(str(tmp_path)))
    path.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_model(Location(str(tmp_path)))


@pytest.mark.parametrize("field", ["intermediate_size", "num_key_value_heads", "vocab_size"])
def test_a_config_of_another_shape_is_refused(field: str, tmp_path: Path) -> None:
    save(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    edit_config(tmp_path, **{field: values[field] * 2})
    with pytest.raises(RecipeError, match="shape"):
        load_model(Location(str(tmp_path)))


def test_configs_that_no_chain_is_made_from_are_refused(tmp_path: Path) -> None:
    model = save(tmp_path / "model")
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    for name, value in (("pad_token_id", size), ("eos_token_id", [1, size + 5]), ("bos_token_id", size)):
        before = json.loads((model / "config.json").read_text())
        edit_config(model, **{name: value})
        with pytest.raises(RecipeError, match=rf"{name} .* outside its vocabulary of {size}"):
            load_config(Location(str(model)))
        (model / "config.json").write_text(json.dumps(before))
    edit_config(model, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(RecipeError, match="quantized"):
        load_model(Location(str(model)))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="is an adapter"):
        load_model(Location(str(tmp_path / "adapter")))


def test_there_is_no_other_door() -> None:
    """No module loads weights by itself; assembly gives transformers tensors that it has checked, and no place."""
    root = Path(cbd_hub.__file__).parent
    doors = {root / "hub" / "load.py", root / "interpolation" / "materialize.py"}
    for path in set(root.rglob("*.py")) - doors:
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        loads = [ast.unparse(call.func) for call in calls if ast.unparse(call.func).endswith("from_pretrained")]
        assert set(loads) <= {
            "Chain.from_pretrained",
            "AutoConfig.from_pretrained",
            "AutoTokenizer.from_pretrained",
        }, path


HUB_CODE = """
from huggingface_hub import HfApi
from cbd_hub.hub.load import load_model
from cbd_hub.hub.read import Location
api = HfApi()
api.create_repo("owner/m", exist_ok=True)
api.upload_folder(repo_id="owner/m", folder_path=folder)
try:
    load_model(Location("owner/m"))
    print(json.dumps("loaded"))
except CbdError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("other", [False, True])
def test_a_head_of_its_own_is_refused_from_the_hub_too(tmp_path: Path, other: bool) -> None:
    folder = save(tmp_path / "m", tie_word_embeddings=True)
    if other:
        change(folder, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"] + 1})
    with HubServer() as hub:
        hub.add_user("owner", "hf_owner")
        with Client(hub.environment(tmp_path / "home", "hf_owner")) as client:
            done = client.run(HUB_CODE, folder=str(folder))
    assert done.status == 0, done.err
    assert ("ties lm_head.weight to the embedding" in done.value) if other else done.value == "loaded"


CHECK_CODE = """
from cbd_hub.build.check import check_recipe
from huggingface_hub import HfApi
HfApi().create_repo("owner/x", exist_ok=True)
HfApi().upload_folder(repo_id="owner/x", folder_path=folder)
recipe = {"name": "x", "source": {"model": "owner/x"}, "anchors": [0.8], "distillation": {"tokens": 0}}
print(json.dumps(check_recipe(recipe).problems))
"""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (lambda w: w, None),
        (lambda w: {f"module.{name}": tensor for name, tensor in w.items()}, "lacks model.embed_tokens"),
        (lambda w: {**w, "model.extra": torch.ones(2)}, "has, and the model does not, model.extra"),
        (lambda w: {**w, "model.norm.weight": torch.ones(3)}, "has shape [3], and config.json says"),
    ],
)
def test_a_check_reads_headers_from_the_hub_and_no_weight(
    tmp_path: Path, changed: Callable[[Weights], Weights], message: str | None
) -> None:
    folder = save(tmp_path / "m")
    change(folder, changed)
    with HubServer() as hub:
        hub.add_user("owner", "hf_owner")
        with Client(hub.environment(tmp_path / "home", "hf_owner")) as client:
            found = client.run(CHECK_CODE, folder=str(folder)).value
            asked = [r for r in hub.requests if r.method == "GET" and r.path.endswith("model.safetensors")]
    assert (found == []) if message is None else any(message in text for text in found), found
    assert asked and not list((tmp_path / "home").rglob("*.safetensors"))
