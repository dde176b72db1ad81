"""Models go to the accelerator and come back; without one nothing moves."""

import numpy as np
import pytest
import torch
from tiny_models import tiny_config, tiny_model
from torch import nn

from cbd_hub.alignment.ranking import rank
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.devices import on_accelerator, working_device
from cbd_hub.evaluation.held_out import evaluate_loss

BLOCKS = torch.randint(0, 97, (16, 24), generator=torch.Generator().manual_seed(0))


class Recorded(nn.Linear):
    """Notes where it is sent."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.sent: list[str] = []

    def to(self, device: torch.device) -> "Recorded":  # type: ignore[override]
        self.sent.append(device.type)
        return self


def test_models_go_to_the_accelerator_and_come_back_even_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cbd_hub.devices.working_device", lambda float64: torch.device("cuda"))
    first, second = Recorded(), Recorded()
    with pytest.raises(ZeroDivisionError), on_accelerator(first, second):
        assert first.sent == second.sent == ["cuda"]
        _ = 1 / 0
    assert first.sent == second.sent == ["cuda", "cpu"]


def test_metal_is_passed_over_where_float64_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert (working_device().type, working_device(float64=True).type) == ("mps", "cpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert working_device(float64=True).type == "cuda"


def test_without_an_accelerator_nothing_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert working_device() == torch.device("cpu")
    model = Recorded()
    with on_accelerator(model):
        pass
    assert model.sent == []


@pytest.mark.skipif(working_device().type == "cpu", reason="needs an accelerator")
def test_losses_and_rankings_there_are_those_of_the_cpu() -> None:
    model = tiny_model(tiny_config("llama", num_hidden_layers=6), torch.float32)
    axis_map = axis_map_for(model.config)
    sizes = axis_map.sizes(model.config)
    small = {**sizes, "layers": 4, "ffn": sizes["ffn"] // 2}
    here = evaluate_loss(model, BLOCKS).loss, rank(model, axis_map, sizes, small, BLOCKS)
    with on_accelerator(model):
        there = evaluate_loss(model, BLOCKS).loss, rank(model, axis_map, sizes, small, BLOCKS)
    assert there[0] == pytest.approx(here[0], rel=1e-4)
    assert np.array_equal(there[1].layers, here[1].layers)
    assert next(model.parameters()).device.type == "cpu"
