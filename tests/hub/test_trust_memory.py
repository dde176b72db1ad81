"""No claim of a repository takes memory or time before it is checked."""

import itertools
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import (
    CONFIG,
    GENERATION,
    WEIGHTS,
    assert_none,
    between,
    edit_json,
    forge,
    joined,
    linux_only,
    manifest_of,
    split,
    tiny_chain,
    vouch,
    write_manifest,
)
from make_chain import edit_manifest
from safetensors.numpy import load_file, save_file
from sandbox import Sandbox

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.manifest.manifest import CALIBRATION_NAME, CHECKSUMS_NAME, INDEX_MAPS_NAME, MANIFEST_NAME, file_entry

pytestmark = linux_only


@pytest.mark.parametrize("basis", ["native", "pca"])
@pytest.mark.parametrize(
    ("name", "value", "anchors"),
    [
        ("vocab_size", 2**36, (0, 1, 2)),
        ("head_dim", 2**36, (0, 1, 2)),
        ("intermediate_size", 2**38, (0,)),
        ("intermediate_size", 2**38, (0, 1)),
        ("hidden_size", 2**36, (0,)),
        ("hidden_size", 2**36, (0, 1)),
    ],
)
def test_terabytes_that_a_manifest_claims_are_refused(
    sandbox: Sandbox, chain: Path, name: str, value: int, anchors: tuple[int, ...], basis: str
) -> None:
    """Manifest, configs and index maps agree on them; only the weights do not, whose headers are read first."""
    manifest = manifest_of(chain) | {"basis": basis}
    axis_map = AxisMap.from_dict(manifest["axis_map"])
    for i in anchors:
        anchor = manifest["anchors"][i]
        anchor["shape"] |= {name: value}
        anchor["num_parameters"] = count_parameters(axis_map, axis_map.sizes(anchor["shape"]))
        edit_json(chain / "anchors" / f"a{i}" / "config.json", **{name: value})
    write_manifest(chain, manifest)
    maps = load_file(chain / INDEX_MAPS_NAME)
    maps = {k: v for k, v in maps.items() if "/energy/" not in k}  # which have the size of what they are for
    if basis == "pca":  # its hidden units are in order, which is not stored
        maps = {k: v for k, v in maps.items() if not k.endswith("/hidden")}
    save_file(maps, chain / INDEX_MAPS_NAME)
    forge(chain, INDEX_MAPS_NAME, *(f"anchors/a{i}/config.json" for i in anchors))
    shapes = [dict(anchor["shape"]) for anchor in manifest["anchors"]]
    problems = {}
    for large, small in itertools.pairwise(shapes):
        half = (large["intermediate_size"] + small["intermediate_size"]) // 2
        for shape in (large, small, {**large, "intermediate_size": half}, {**small, "intermediate_size": half}):
            reply = sandbox.ask(chain, shape=shape, method="interpolate")
            if reply.kind == "model":  # made from those alone that tell the truth
                used = json.loads(reply.made["config"])["cbd_hub"]["anchors"]
                lying = {f"a{i}" for i in anchors} & set(used)
                problems[f"{shape}"] = reply.harm or (f"made from {lying}" if lying else "")
            else:
                problems[f"{shape}"] = reply.problem
    assert_none(problems)


@pytest.mark.parametrize(
    ("name", "key", "entry"),
    [
        (WEIGHTS, "model.norm.weight", {"shape": [2**40]}),
        (WEIGHTS, "model.norm.weight", {"shape": [2**40], "data_offsets": [0, 2**42]}),
        (WEIGHTS, "x", {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}),
        (WEIGHTS, "x", {"dtype": "F32", "shape": [0, 2**61], "data_offsets": [0, 0]}),
        (INDEX_MAPS_NAME, "a1/order/ffn", {"shape": [3, 2**40]}),
        (INDEX_MAPS_NAME, "a1/order/ffn", {"shape": [3, 2**40], "data_offsets": [0, 3 * 2**42]}),
        (INDEX_MAPS_NAME, "x", {"dtype": "I32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}),
        (CALIBRATION_NAME, "input_ids", {"shape": [2**40, 8]}),
        (CALIBRATION_NAME, "input_ids", {"shape": [2**40, 8], "data_offsets": [0, 2**45]}),
    ],
)
def test_terabytes_that_a_header_claims_are_refused(
    sandbox: Sandbox, chain: Path, name: str, key: str, entry: dict[str, Any]
) -> None:
    size = between(chain)
    header, data = split((chain / name).read_bytes())
    header[key] = header.get(key, {}) | entry
    (chain / name).write_bytes(joined(header, data))
    forge(chain, name)
    assert sandbox.ask(chain, size, do="calibration" if name == CALIBRATION_NAME else "make").problem == ""


def test_a_header_is_checked_before_anything_else_of_its_file(sandbox: Sandbox, chain: Path) -> None:
    """Its length before it is read; all of it before a terabyte (of holes) is hashed, where digests are missing."""
    size, path, problems = between(chain), chain / WEIGHTS, {}
    ordinary = path.read_bytes()
    for length in (2**64 - 1, 2**62, 2**40, 10**8, 10**8 - 1):
        path.write_bytes(struct.pack("<Q", length) + ordinary[8:])
        forge(chain, WEIGHTS)
        problems[f"a header of {length} bytes"] = sandbox.ask(chain, size).problem
        with path.open("r+b") as file:
            file.truncate(2**40)
        edit_manifest(chain, "anchors", 0, "files", "model.safetensors", "size", value=2**40)
        problems[f"a header of {length} bytes in a terabyte"] = sandbox.ask(chain, size).problem
    edit_manifest(chain, "checksums", value=None)
    problems["a terabyte without digests"] = sandbox.ask(chain, size).problem
    path.write_bytes(joined(b"[" + b"[]," * 33_000_000 + b"[]]", b""))  # two gigabytes of lists
    edit_manifest(chain, "anchors", 0, "files", "model.safetensors", "size", value=path.stat().st_size)
    problems["a header of 99 megabytes"] = sandbox.ask(chain, size).problem
    assert_none(problems)


@pytest.mark.parametrize(
    "what", ["dimensions", "factors", "stored dimensions", "tensors of many layers", "9 more axes", "40 more axes"]
)
def test_small_files_that_ask_for_endless_work_are_refused(sandbox: Sandbox, chain: Path, what: str) -> None:
    """Kilobytes (the first three: megabytes) that would keep a trusting reader busy for minutes to years."""
    size, manifest = between(chain), manifest_of(chain)
    axis_map, anchors = manifest["axis_map"], manifest["anchors"]
    if what == "dimensions":  # of one tensor in a header; their product has millions of digits
        header, data = split((chain / WEIGHTS).read_bytes())
        header["model.norm.weight"]["shape"] = [2**61] * 300_000
        (chain / WEIGHTS).write_bytes(joined(header, data))
        vouch(manifest, WEIGHTS, file_entry(chain / WEIGHTS).model_dump())
    elif what == "factors":  # of one dimension, in an axis string
        axis_map["tensors"]["model.norm.weight"] = "(" + "999999999 " * 500_000 + "hidden)"
    elif what == "stored dimensions":
        axis_map["tensors"]["model.norm.weight"] = "999999999 " * 500_000 + "hidden"
    elif what == "tensors of many layers":  # twenty million operations
        axis_map["tensors"] |= {f"x{i}.*": "1" for i in range(2_000)}
        anchors[0]["shape"]["num_hidden_layers"] = 10_000
        read = AxisMap.from_dict(axis_map)
        anchors[0]["num_parameters"] = size = count_parameters(read, read.sizes(anchors[0]["shape"]))
        manifest |= {"anchors": anchors[:1], "index_maps": None}
    else:  # that all differ, so that every combination could be tried, of three values an axis
        names = [f"x{i}" for i in range(int(what.split()[0]))]
        axis_map["tensors"] |= {name: name for name in names}
        axis_map["fields"] |= {f"num_{name}": name for name in names}
        read = AxisMap.from_dict(axis_map)
        for i, anchor in enumerate(anchors):
            anchor["shape"] |= {f"num_{name}": 9 - 3 * i for name in names}
            anchor["num_parameters"] = count_parameters(read, read.sizes(anchor["shape"]))
        maps = load_file(chain / INDEX_MAPS_NAME)
        for i, small in enumerate(("a1", "a2")):
            order = np.arange(9 - 3 * i, dtype=np.int32)
            rows = np.tile(order, (anchors[i]["shape"]["num_hidden_layers"], 1))
            maps |= {f"{small}/order/{name}": rows for name in names}
        save_file(maps, chain / INDEX_MAPS_NAME)
        vouch(manifest, INDEX_MAPS_NAME, file_entry(chain / INDEX_MAPS_NAME).model_dump())
        size = (anchors[0]["num_parameters"] + anchors[1]["num_parameters"]) // 2
    write_manifest(chain, manifest)
    assert sandbox.ask(chain, size).problem == ""


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("llama", {"num_labels": 2**40}),
        ("llama", {"num_labels": 10**8}),
        ("llama", {"num_hidden_layers": 2**40}),
        ("llama", {"vocab_size": 2**60, "hidden_size": 2**60}),
        ("llama", {"per_layer_config": {str(i): {} for i in range(100_000)}}),
        ("smollm3", {"num_hidden_layers": 2**40, "layer_types": None, "no_rope_layers": None}),
        ("qwen2", {"num_hidden_layers": 2**40, "layer_types": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_what_a_config_claims_takes_no_memory(
    sandbox: Sandbox, tmp_path: Path, chain: Path, variant: str, change: dict[str, Any]
) -> None:
    """transformers makes lists as long as a config says: it must not see the config before the sizes are right."""
    folder = chain if variant == "llama" else tiny_chain(tmp_path / variant, variant)
    size = between(folder)
    edit_json(folder / CONFIG, **change)
    forge(folder, CONFIG)
    assert sandbox.ask(folder, size).problem == ""


@pytest.mark.parametrize("name", [MANIFEST_NAME, CHECKSUMS_NAME, CONFIG, GENERATION])
def test_a_huge_json_file_is_refused(sandbox: Sandbox, chain: Path, name: str) -> None:
    """A gigabyte (of holes) in place of kilobytes."""
    size = between(chain)
    with (chain / name).open("r+b") as file:
        file.truncate(2**40 if name == MANIFEST_NAME else 2**30)
    if name != MANIFEST_NAME:
        forge(chain, name)
    assert sandbox.ask(chain, size).problem == ""
