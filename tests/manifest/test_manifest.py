"""The manifest: strict, and everything it claims is checked before any weight is read."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from make_chain import make_chain, variant_model

from cbd_hub.errors import IntegrityError, ManifestError
from cbd_hub.manifest.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    check_file,
    file_entry,
    read_manifest,
    write_manifest,
)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama chain of three anchors."""
    return make_chain(tmp_path_factory.mktemp("chains") / "llama", variant_model("llama"), energy=True)


@pytest.fixture(scope="module")
def data(chain: Path) -> dict[str, Any]:
    return json.loads((chain / MANIFEST_NAME).read_text(encoding="utf-8"))


def refusal(tmp_path: Path, content: Any) -> str:
    """The message with which a manifest is refused."""
    path = tmp_path / MANIFEST_NAME
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_value(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one value replaced; ``path`` is dotted, numbers index lists."""
    new = copy.deepcopy(data)
    place: Any = new
    *keys, last = [int(k) if k.isdigit() else k for k in path.split(".")]
    for key in keys:
        place = place[key]
    place[last] = value
    return new


# -- reading and writing ----------------------------------------------------------------------------------------------


def test_round_trip(chain: Path, tmp_path: Path) -> None:
    manifest = read_manifest(chain / MANIFEST_NAME)
    write_manifest(manifest, tmp_path)
    assert read_manifest(tmp_path / MANIFEST_NAME) == manifest
    first = (tmp_path / MANIFEST_NAME).read_bytes()
    write_manifest(manifest, tmp_path)
    assert (tmp_path / MANIFEST_NAME).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [MANIFEST_NAME]  # no partial file is left


def test_a_manifest_is_readable_for_a_person(chain: Path, tmp_path: Path) -> None:
    write_manifest(read_manifest(chain / MANIFEST_NAME), tmp_path)
    lines = (tmp_path / MANIFEST_NAME).read_text(encoding="utf-8").splitlines()
    assert len(lines) > 50
    assert max(map(len, lines)) < 200
    assert ' "architecture": "llama",' in lines


def test_sizes_and_map_come_with_it(chain: Path) -> None:
    manifest = read_manifest(chain / MANIFEST_NAME)
    assert [a.name for a in manifest.anchors] == ["a0", "a1", "a2"]
    assert manifest.sizes(manifest.anchors[0])["layers"] == 3
    assert manifest.resolved_axis_map.model_type == "llama"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b'{"format": ' + b"1" * 5000 + b"}", "cannot be read as JSON"),
        (b"[]", "is no JSON object"),
        (b"{}", "has format None; expected 1"),
        (b'{"format": 4}', "has format 4; this cbd_hub reads formats up to 3. Upgrade it"),
        (b'{"format": "1"}', "has format '1'; expected 1"),
        (b'{"format": 0}', "has format 0; expected 1"),
        (b'{"format": 1, "name": "\\ud800"}', "is not valid"),
        (b'{"format": 1}', "is not valid at name: Field required. (and "),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    assert says in refusal(tmp_path, content)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="cannot be read"):
        read_manifest(tmp_path / MANIFEST_NAME)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("color", 5, "at color: Extra inputs"),
        ("archtecture", "llama", "Did you mean 'architecture'?"),
        ("anchors.0.color", 5, "at anchors.0.color: Extra inputs"),
        ("anchors", [], "at anchors: List should have at least 1 item"),
        ("name", "a/b", "at name: String should match pattern"),
        ("anchors.0.name", "..", "at anchors.0.name: String should match pattern"),
        ("anchors.0.name", "x" * 97, "at anchors.0.name"),
        ("anchors.2.name", "a0", "two anchors have the same name"),
        ("anchors.0.num_parameters", "58032", "at anchors.0.num_parameters: Input should be a valid integer"),
        ("anchors.0.num_parameters", 58032, "claims 58032 parameters; its shape has"),
        ("anchors.0.num_parameters", -1, "at anchors.0.num_parameters: Input should be greater than 0"),
        ("anchors.0.shape.intermediate_size", 301, "claims"),
        ("anchors.0.shape.intermediate_size", 2**60, "should be less than"),
        ("anchors.0.shape.intermediate_size", 0, "should be greater than 0"),
        ("anchors.0.shape.intermediate_size", 80.0, "valid integer"),
        ("anchors.0.shape.num_hidden_layers", 10**9, "claims 1000000000 layers"),
        ("anchors.0.shape.num_attention_heads", 5, "it must be kv_heads x q_per_kv"),
        ("anchors.0.shape.color", 5, "does not state exactly"),
        ("anchors.0.shape", {}, "anchor 'a0': axis 'kv_heads' has no size"),
        ("anchors.0.dtype", "int8", "at anchors.0.dtype"),
        ("anchors.0.parent", "a1", "is the largest and can have no parent"),
        ("anchors.1.parent", None, "must have parent 'a0', not None"),
        ("anchors.2.parent", "a0", "must have parent 'a1', not 'a0'"),
        ("anchors.1.layer_order", [0, 1], "is no permutation of its parent's layers"),
        ("anchors.1.layer_order", [0, 1, 1], "is no permutation"),
        ("anchors.1.layer_order", [0, 1, -1], "at anchors.1.layer_order.2"),
        ("anchors.1.layer_order", [1, 0, 2], "the kept layers of layer_order must ascend"),
        ("anchors.0.files", {}, "files must list config.json"),
        ("anchors.0.files", {"config.json": {"size": 1, "sha256": "0" * 63}}, "sha256: String should match pattern"),
        ("anchors.0.revision", "main", "at anchors.0.revision"),
        ("anchors.0.revision", "0" * 40, "repo_id and revision (a full commit hash) go together"),
        ("anchors.0.repo_id", "owner/name", "repo_id and revision (a full commit hash) go together"),
        ("axis_map", {}, "axis map field model_type"),
        ("axis_map.norm", "batch", "norm is 'batch'; allowed: rms, rms+1, layer"),
        ("axis_map.color", 5, "axis map has no field 'color'"),
        ("axis_map.tensors", {"a": "((hidden"}, "cannot be nested"),
        ("axis_map.fields", {}, "anchor 'a0': axis 'kv_heads' has no size"),
        ("basis", "fourier", "at basis"),
        ("curve", [{"num_parameters": 1, "loss": "low", "method": "auto"}], "at curve.0.loss"),
    ],
)
def test_a_claim_that_cannot_be_is_refused(
    tmp_path: Path, data: dict[str, Any], path: str, value: Any, says: str
) -> None:
    assert says in refusal(tmp_path, with_value(data, path, value))


@pytest.mark.parametrize("bad", ["../x", "a/../../x", "/etc/passwd", "a\\b", "C:x", "", "..", "a\0b"])
def test_a_path_that_leaves_its_folder_is_refused(tmp_path: Path, data: dict[str, Any], bad: str) -> None:
    entry = {"size": 1, "sha256": "0" * 64}
    files = data["anchors"][0]["files"] | {bad: entry}
    for place, value in (("anchors.0.subfolder", bad), ("anchors.0.files", files), ("tokenizer", {bad: entry})):
        assert "is not a path inside the repository" in refusal(tmp_path, with_value(data, place, value))


def test_anchors_go_from_large_to_small(tmp_path: Path, data: dict[str, Any]) -> None:
    turned = with_value(data, "anchors", data["anchors"][::-1])
    turned["anchors"][0]["parent"], turned["anchors"][0]["layer_order"] = None, None
    assert "is not smaller than 'a2' on every axis" in refusal(tmp_path, turned)


# -- files ------------------------------------------------------------------------------------------------------------


def test_check_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    entry = file_entry(path)
    assert entry == FileEntry(size=3, sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    check_file(path, entry)
    for changed in (b"abd", b"ab", b"abcd"):
        path.write_bytes(changed)
        with pytest.raises(IntegrityError, match="is not the file that the manifest names"):
            check_file(path, entry)
    path.unlink()
    with pytest.raises(IntegrityError, match="is named by the manifest and does not exist"):
        check_file(path, entry)


# -- what neighbors must say -----------------------------------------------------------------------------------------


def test_missing_layer_order_is_refused(chain: Path, tmp_path: Path) -> None:
    data = json.loads((chain / MANIFEST_NAME).read_text())
    del data["anchors"][1]["layer_order"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))
    layers = [a["shape"]["num_hidden_layers"] for a in data["anchors"]]
    assert layers[0] != layers[1]
    with pytest.raises(ManifestError, match="does not say which layers it keeps"):
        read_manifest(tmp_path / MANIFEST_NAME)


def test_one_anchor_is_a_chain(chain: Path, tmp_path: Path, data: dict[str, Any]) -> None:
    alone = with_value(data, "anchors", data["anchors"][:1])
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(alone))
    assert isinstance(read_manifest(tmp_path / MANIFEST_NAME), Manifest)


@pytest.mark.parametrize("field", ["n_embd", "n_head", "n_layer", "n_inner"])
def test_a_shape_without_a_field_is_refused(tmp_path: Path, field: str) -> None:
    """GPT-2's width must equal heads x head_dim, of which any may be missing."""
    folder = make_chain(tmp_path / "c", variant_model("gpt2"))
    data = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    for value in (None, 1, 5):
        shape = {k: v for k, v in data["anchors"][0]["shape"].items() if k != field}
        shape |= {} if value is None else {field: value}
        assert "Value error, anchor 'a" in refusal(tmp_path, with_value(data, "anchors.0.shape", shape))
