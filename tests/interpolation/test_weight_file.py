"""A safetensors file that is written tensor by tensor is the one that the library writes of all at once."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cbd_hub.errors import IntegrityError
from cbd_hub.interpolation.weight_file import write_tensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_file_is_the_library_s_byte_for_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (3, 5), "a.bias": (7,), "model.layers.10.ä": (2, 1, 4), "model.layers.9": (1,)}
    state = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    save_file(state, tmp_path / "all", metadata={"format": "pt"})
    views = ((name, state[name].T.contiguous().T) for name in sorted(state) if state[name].ndim == 2)
    assert not next(views)[1].is_contiguous()
    made = ((name, state[name].T.contiguous().T if state[name].ndim == 2 else state[name]) for name in sorted(state))
    write_tensors(tmp_path / "one", shapes, dtype, made)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "all").read_bytes()
    assert all(torch.equal(value, state[name]) for name, value in load_file(tmp_path / "one").items())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ([("b", torch.zeros(2)), ("a", torch.zeros(2))], "'b' of shape"),
        ([("a", torch.zeros(3))], "'a' of shape"),
        ([("a", torch.zeros(2, dtype=torch.float16))], "float16 was not announced"),
        ([("a", torch.zeros(2))], "'b' was announced and not written"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(2)), ("c", torch.zeros(2))], "'c' of shape"),
    ],
)
def test_other_tensors_than_were_named_are_refused(
    tensors: list[tuple[str, torch.Tensor]], says: str, tmp_path: Path
) -> None:
    with pytest.raises(IntegrityError, match=says):
        write_tensors(tmp_path / "file", {"a": (2,), "b": (2,)}, torch.float32, tensors)
