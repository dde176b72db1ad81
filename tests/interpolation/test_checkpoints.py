"""Reading safetensors: what is damaged is refused before it is trusted, and only what is asked for is read."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from make_chain import variant_model
from safetensors.torch import load_file, save_file
from tiny_models import VARIANTS, tiny_config

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import IntegrityError
from cbd_hub.interpolation.checkpoints import Checkpoint, checksum, checksum_file, find_files, read_header
from cbd_hub.interpolation.ranges import BLOCK


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one file."""
    folder = tmp_path_factory.mktemp("llama")
    variant_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama() -> tuple[AxisMap, dict[str, int]]:
    config = variant_model("llama").config
    axis_map = axis_map_for(config)
    return axis_map, axis_map.sizes(config)


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# -- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        (b"", b"", "unreadable"),
        (b"{", b"", "unreadable"),
        (b'{"a": \xff}', b"", "unreadable"),
        (b"[" * 100_000, b"", "unreadable"),
        (b'{"a": ' + b"9" * 5000 + b"}", b"", "unreadable"),
        ([], b"", "no JSON object"),
        ({"a": 5}, b"", "malformed entry for tensor 'a'"),
        ({"a": []}, b"", "malformed entry"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", "malformed entry"),
        ({"a": entry(["F32"])}, b"\0" * 8, "malformed entry"),
        ({"a": entry(None)}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape=2)}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape=[2.0])}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape=[True, 2])}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape="12")}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape=[-1, -2])}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape=[2**63])}, b"\0" * 8, "malformed entry"),
        ({"a": entry(offsets=[0])}, b"\0" * 8, "malformed entry"),
        ({"a": entry(offsets=[0, 8, 16])}, b"\0" * 8, "malformed entry"),
        ({"a": entry(offsets={"0": 1, "8": 2})}, b"\0" * 8, "malformed entry"),
        ({"a": entry(offsets=[-8, 0])}, b"\0" * 8, "malformed entry"),
        ({"a": entry(shape=[3])}, b"\0" * 8, "gives it 8 bytes"),
        ({"a": entry("BF16")}, b"\0" * 8, "gives it 8 bytes"),
        ({"a": entry(offsets=[8, 16])}, b"\0" * 16, "a gap or an overlap before tensor 'a'"),
        ({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12, "a gap or an overlap before tensor 'b'"),
        ({"a": entry()}, b"\0" * 7, "should have"),
        ({"a": entry()}, b"\0" * 9, "should have"),
        ({"a": entry("I8", [2], [8, 0])}, b"", "a gap or an overlap"),
    ],
)  # fmt: skip
def test_a_bad_header_is_refused(tmp_path: Path, header: Any, data: bytes, says: str) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(IntegrityError) as caught:
        read_header(path)
    assert says in str(caught.value)
    assert f"model.safetensors in {tmp_path}" in str(caught.value)
    assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 7, struct.pack("<Q", 9) + b"{}", b"\xff" * 8 + b"{}", b"PK\x03\x04" * 50]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(IntegrityError, match="is not a safetensors file"):
        read_header(tmp_path / "x.safetensors")


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(IntegrityError, match="cannot be read: "):
            read_header(path)


def test_a_header_says_where_tensors_lie(saved: Path) -> None:
    header = read_header(saved / "model.safetensors")
    whole = (saved / "model.safetensors").read_bytes()
    for key, value in load_file(saved / "model.safetensors").items():
        info = header[key]
        assert whole[info.start : info.stop] == value.numpy().tobytes()
        assert (info.shape, info.num_bytes) == (tuple(value.shape), value.nbytes)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shards", [False, True])
def test_every_parameter_is_read(tmp_path: Path, variant: str, shards: bool) -> None:
    model = variant_model(variant, torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="60KB" if shards else "1GB")
    names = find_files(tmp_path)
    assert (len(names) > 1) == shards
    axis_map = axis_map_for(model.config)
    checkpoint = Checkpoint([tmp_path / name for name in names], axis_map)
    checkpoint.check(axis_map.sizes(model.config), torch.bfloat16)
    parameters = dict(model.named_parameters())
    assert checkpoint.bytes_read == 0
    for name in checkpoint.tensors:
        assert torch.equal(checkpoint.read(name), parameters.pop(name))
    assert not parameters  # tied ones are named once
    assert checkpoint.bytes_read == sum(info.num_bytes for info in checkpoint.tensors.values())
    assert checkpoint.bytes_read == 2 * model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, llama: tuple[AxisMap, dict[str, int]], dtype: torch.dtype) -> None:
    model = variant_model("llama", dtype)
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint([tmp_path / "model.safetensors"], llama[0])
    checkpoint.check(llama[1], dtype)
    weight = checkpoint.read("model.norm.weight")
    assert weight.dtype == dtype
    assert torch.equal(weight, model.model.norm.weight)
    other = torch.float16 if dtype != torch.float16 else torch.float32
    with pytest.raises(IntegrityError, match=r"is stored as \w+; allowed: F(16|32)$"):
        checkpoint.check(llama[1], other)


def altered(saved: Path, folder: Path, llama: tuple[AxisMap, dict[str, int]], **tensors: Any) -> Checkpoint:
    """The saved model with some tensors replaced (None: left out)."""
    state = load_file(saved / "model.safetensors") | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")
    return Checkpoint([folder / "model.safetensors"], llama[0])


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"model__norm__weight": None}, "the checkpoint lacks 'model.norm.weight'"),
        ({"model__extra": torch.ones(1)}, "'model.extra': tensor 'model.extra' matches no pattern"),
        ({"model__layers__3__input_layernorm__weight": torch.ones(48)}, "the config says 3 layers"),
        ({"model__layers__01__input_layernorm__weight": torch.ones(48)}, "matches no pattern"),
        ({"model__norm__weight": torch.ones(47)}, "has shape [47]; the manifest says [48]"),
        ({"model__norm__weight": torch.ones(48, dtype=torch.int32)}, "is stored as I32; allowed: F64, F32, F16, BF16"),
        ({"model__norm__weight": torch.ones(48).to(torch.float8_e4m3fn)}, "is stored as F8_E4M3"),
        (
            {f"model__layers__{i}__mlp__{p}_proj__weight": None for i in range(3) for p in ("up", "down")},
            "and 3 more tensors",
        ),
    ],
)
def test_other_tensors_than_expected_are_refused(
    tmp_path: Path, saved: Path, llama: tuple[AxisMap, dict[str, int]], tensors: dict[str, Any], says: str
) -> None:
    checkpoint = altered(saved, tmp_path, llama, **tensors)
    with pytest.raises(IntegrityError) as caught:
        checkpoint.check(llama[1])
    assert says in str(caught.value)
    assert checkpoint.bytes_read == 0


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, saved: Path, llama: tuple[AxisMap, dict[str, int]]) -> None:
    save_file({"model.norm.weight": torch.ones(48)}, tmp_path / "second.safetensors")
    with pytest.raises(IntegrityError, match=r"'model\.norm\.weight' is stored twice"):
        Checkpoint([saved / "model.safetensors", tmp_path / "second.safetensors"], llama[0])


def test_a_flipped_bit_is_found(tmp_path: Path, saved: Path, llama: tuple[AxisMap, dict[str, int]]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((saved / "model.safetensors").read_bytes())
    digests = {k: checksum(v.numpy().tobytes()) for k, v in load_file(path).items()}
    for seed in range(20):
        whole = bytearray((saved / "model.safetensors").read_bytes())
        checkpoint = Checkpoint([path], llama[0], digests)
        name = random.Random(seed).choice(sorted(checkpoint.tensors))
        info = checkpoint.tensors[name]
        assert checkpoint.read(name) is not None
        whole[random.Random(seed).randrange(info.start, info.stop)] ^= 1 << seed % 8
        path.write_bytes(whole)
        with pytest.raises(IntegrityError, match=rf"{name}.*checksum differs"):
            checkpoint.read(name)
        path.write_bytes((saved / "model.safetensors").read_bytes())


def test_a_tensor_without_a_checksum_is_refused(saved: Path, llama: tuple[AxisMap, dict[str, int]]) -> None:
    with pytest.raises(IntegrityError, match="checksum differs"):
        Checkpoint([saved / "model.safetensors"], llama[0], {}).read("model.norm.weight")


def test_a_file_cut_short_after_it_was_opened(
    tmp_path: Path, saved: Path, llama: tuple[AxisMap, dict[str, int]]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((saved / "model.safetensors").read_bytes())
    checkpoint = Checkpoint([path], llama[0])
    last = max(checkpoint.tensors.values(), key=lambda info: info.stop)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match=f"ends inside tensor '{last.key}'"):
        checkpoint.read(last.key)
    path.unlink()
    with pytest.raises(IntegrityError, match="cannot be read: No such file"):
        checkpoint.read(last.key)


def test_older_keys_are_read(tmp_path: Path) -> None:
    """GPT-2's prefix left out, causal masks and a copy of the tied head stored: as old checkpoints have it."""
    model = variant_model("gpt2")
    state = {k.removeprefix("transformer."): v.clone() for k, v in model.named_parameters()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "lm_head.weight": model.lm_head.weight.detach().clone()}
    save_file(state, tmp_path / "model.safetensors")
    axis_map = axis_map_for(model.config)
    checkpoint = Checkpoint([tmp_path / "model.safetensors"], axis_map)
    checkpoint.check(axis_map.sizes(model.config))
    assert all(torch.equal(checkpoint.read(k), v) for k, v in model.named_parameters())


# -- folders ----------------------------------------------------------------------------------------------------------


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(IntegrityError, match="only safetensors weights are read"):
        find_files(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "is malformed"),
        ("[]", "is malformed"),
        ('{"weight_map": 5}', "is malformed"),
        ('{"weight_map": {"a": []}}', "is malformed"),
        ('{"weight_map": {"a": 5}}', "names 5"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "names '../x.safetensors'"),
        ('{"weight_map": {"a": "/x.safetensors"}}', "names '/x.safetensors'"),
        ('{"weight_map": {"a": ".."}}', "names '..'"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "names 'pytorch_model.bin'"),
    ],
)
def test_a_bad_shard_index_is_refused(tmp_path: Path, index: str, says: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(IntegrityError) as caught:
        find_files(tmp_path)
    assert says in str(caught.value)


def test_checksum_is_xxh3_128() -> None:
    assert checksum(b"") == "99aa06d3014798d86001c324468d497f"  # the reference value of the empty input
    assert checksum(b"abc") != checksum(b"abd")


# -- damage at random -------------------------------------------------------------------------------------------------


def test_random_damage_to_the_header_is_refused_or_harmless(
    tmp_path: Path, saved: Path, llama: tuple[AxisMap, dict[str, int]]
) -> None:
    """Whatever 300 random edits of the header do: an IntegrityError, or the same tensors."""
    original = (saved / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(original[:8], "little")
    state = load_file(saved / "model.safetensors")
    digests = {k: checksum(v.numpy().tobytes()) for k, v in state.items()}
    path, refused = tmp_path / "model.safetensors", 0
    for seed in range(300):
        draw = random.Random(seed)
        data = bytearray(original)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(0, 8) if draw.random() < 0.1 else draw.randrange(8, end)
            match draw.randrange(3):
                case 0:
                    data[place] = draw.randrange(256)
                case 1:
                    data[place] = ord(draw.choice('0123456789{}[],:"'))
                case _:
                    del data[place]
        path.write_bytes(data)
        try:
            checkpoint = Checkpoint([path], llama[0], digests)
            checkpoint.check(llama[1], torch.float32)
            assert {n: checkpoint.read(n).tolist() for n in checkpoint.tensors} == {
                n: v.tolist() for n, v in state.items()
            }
        except IntegrityError:
            refused += 1
    assert refused > 150


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_part_of_a_tensor_is_checked_by_its_blocks(tmp_path: Path, block: int) -> None:
    """Blocks that are there are compared with their digests, the others are not."""
    weight = torch.randn(5, BLOCK // 8)  # two and a half blocks
    axis_map, path = axis_map_for(tiny_config("llama")), tmp_path / "model.safetensors"
    save_file({"model.norm.weight": weight}, path)
    sums = checksum_file(tmp_path, [path.name])
    assert isinstance(sums["model.norm.weight"], list) and len(sums["model.norm.weight"]) == 3
    info = read_header(path)["model.norm.weight"]
    runs = [(block * BLOCK, min((block + 1) * BLOCK, info.num_bytes))]
    opened = Checkpoint([path], axis_map, sums, {"model.norm.weight": runs})
    assert torch.equal(opened.read("model.norm.weight"), weight)
    for damaged in range(3):
        data = bytearray(path.read_bytes())
        data[info.start + damaged * BLOCK] ^= 1
        path.write_bytes(data)
        if damaged == block:
            with pytest.raises(IntegrityError, match="checksum differs"):
                opened.read("model.norm.weight")
        else:
            opened.read("model.norm.weight")
        with pytest.raises(IntegrityError, match="checksum differs"):
            Checkpoint([path], axis_map, sums).read("model.norm.weight")
        data[info.start + damaged * BLOCK] ^= 1
        path.write_bytes(data)
    with pytest.raises(IntegrityError, match="checksum differs"):  # fewer digests than blocks
        Checkpoint([path], axis_map, {"model.norm.weight": "0"}, {"model.norm.weight": []}).read("model.norm.weight")
