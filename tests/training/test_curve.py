"""The curve while it is trained: exact gradients, the same model as the chain's, and what training does to it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from make_chain import random_index_map, variant_model
from safetensors.torch import load_file
from tiny_models import VARIANTS
from torch import Tensor, nn
from trained import text, trained_model
from transformers import PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import RecipeError
from cbd_hub.interpolation.materialize import cut
from cbd_hub.interpolation.pair import Pair
from cbd_hub.training.curve import MIDDLE, Curve, curve_learning_rate, curve_points, is_better
from cbd_hub.training.distill import distill
from cbd_hub.training.settings import DistillationConfig


def smaller(sizes: Sizes) -> dict[str, int]:
    return {**sizes, "layers": sizes["layers"] - 1, "ffn": sizes["ffn"] // 2}


def make_curve(large: PreTrainedModel, narrow: bool = False, **options: Any) -> Curve:
    """A curve between a model and a cut of it, on the straight line."""
    axis_map = axis_map_for(large.config)
    sizes = axis_map.sizes(large.config)
    small = smaller(sizes)
    if narrow and "hidden" not in axis_map.equal:
        heads = sizes.get("heads", sizes.get("kv_heads", 0) * sizes.get("q_per_kv", 0))
        small["hidden"] = sizes["hidden"] * 3 // 4 // heads * heads
    index_map = random_index_map(axis_map, sizes, small, np.random.default_rng(0))
    student = cut(large, axis_map, sizes, small, index_map)
    options = {"learning_rate": 1e-2, "tokens": 2048, **options}
    return Curve(large, student, Pair(axis_map, small, sizes, index_map), **options)


def shake(curve: Curve, scale: float = 0.05) -> Curve:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*curve.control.parameters(), *curve.small.parameters()]:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return curve


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_on_the_curve_is_the_chain_s(variant: str) -> None:
    """The differentiable model and the one with weights of its own compute the same, in every family."""
    curve = shake(make_curve(variant_model(variant), narrow=True))
    ids = torch.arange(3, 27).view(2, 12)
    for position in (0.1, MIDDLE, 0.9):
        point = curve.nearest(position)
        with torch.no_grad():
            got = curve.run(point, lambda model: model.eval()(input_ids=ids).logits)
            want = curve.model(point)(input_ids=ids).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert curve.model(point).num_parameters() == point.num_parameters


@pytest.mark.parametrize("variant", ["llama", "gpt2", "gpt_neox", "phi3", "gemma3_text"])
def test_gradients_are_those_of_the_formula(variant: str) -> None:
    """theta is linear in the control's factors (one at a time) and in the small anchor: differences are exact."""
    curve = shake(make_curve(variant_model(variant), narrow=True))
    for module in (curve.large, curve.small, curve.control):
        module.double()
    point = curve.nearest(MIDDLE)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        directions = {
            name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
            for name, value in curve.weights(point).items()
        }

    def value() -> Tensor:
        return sum(((w * directions[name]).sum() for name, w in curve.weights(point).items()), torch.zeros(()))

    value().backward()
    rng, seen = np.random.default_rng(0), 0
    for module in (curve.small, curve.control):
        for name, parameter in module.named_parameters():
            for _ in range(2):
                place = tuple(int(rng.integers(n)) for n in parameter.shape)
                with torch.no_grad():
                    parameter[place] += 1e-3
                    high = value()
                    parameter[place] -= 2e-3
                    low = value()
                    parameter[place] += 1e-3
                got = 0.0 if parameter.grad is None else float(parameter.grad[place])
                assert got == pytest.approx(float(high - low) / 2e-3, abs=1e-6), (name, place)
                seen += parameter.grad is not None
    assert seen > 20
    assert all(p.grad is None for p in curve.large.parameters())


def test_it_starts_on_the_straight_line() -> None:
    curve = make_curve(variant_model("llama"))
    for position in (0.25, 0.75):
        point = curve.nearest(position)
        bent, straight = curve.model(point).state_dict(), curve.model(point, straight=True).state_dict()
        assert all(torch.equal(value, straight[name]) for name, value in bent.items())


def test_draws_are_the_seed_s_alone() -> None:
    first, second, other = (make_curve(variant_model("llama"), seed=seed) for seed in (3, 3, 4))
    draws = [[curve.draw(step).num_parameters for step in range(50)] for curve in (first, second, other)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) > 10
    for name, value in first.factors().items():
        assert torch.equal(value, second.factors()[name])


def test_no_size_between_is_an_error() -> None:
    large = variant_model("llama")
    axis_map = axis_map_for(large.config)
    pair = Pair.same(axis_map, axis_map.sizes(large.config))
    assert curve_points(pair) == []
    with pytest.raises(RecipeError, match="needs a size between its anchors"):
        Curve(large, large, pair, learning_rate=1e-3, tokens=10)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> PreTrainedModel:
    return trained_model("llama", intermediate_size=256)


def blocks(rows: int, seed: int) -> Dataset:
    return Dataset.from_dict({"input_ids": text(rows, seed=seed).tolist()})


def train(curve: Curve, folder: Path, tokens: int, **config: Any) -> Any:
    values = {"learning_rate": 1e-3, "batch_size": 8, "tokens": tokens, "hidden": 1.0, **config}
    return distill(
        curve.small,
        curve.large,
        blocks(256, 1),
        blocks(24, 2),
        DistillationConfig(**values),
        index_map=curve.pair.index_map,
        curve=curve,
        work_dir=folder,
        progress=False,
    )


def test_alone_it_lowers_the_loss_between_and_leaves_the_anchor(large: PreTrainedModel, tmp_path: Path) -> None:
    curve = make_curve(large, tokens=16384, together=False)
    before = {name: value.clone() for name, value in curve.small.state_dict().items()}
    training = train(curve, tmp_path, 0)
    assert all(torch.equal(value, before[name]) for name, value in curve.small.state_dict().items())
    assert training.tokens == 0
    assert all(p.requires_grad for p in curve.small.parameters())
    assert "control_point" not in dict(curve.small.named_modules())
    record = curve.judge(blocks(24, 2))
    assert is_better(record)
    assert all(bent < straight for bent, straight in zip(record.losses, record.straight_losses, strict=True))
    assert record.tokens == 16384 and not record.together and record.file is None


def test_together_both_learn(large: PreTrainedModel, tmp_path: Path) -> None:
    plain = make_curve(large)
    reference = distill(
        plain.small,
        large,
        blocks(256, 1),
        blocks(24, 2),
        DistillationConfig(learning_rate=1e-3, batch_size=8, tokens=8192, hidden=1.0),
        index_map=plain.pair.index_map,
        work_dir=tmp_path / "plain",
        progress=False,
    )
    curve = make_curve(large, tokens=8192)
    training = train(curve, tmp_path / "both", 8192)
    assert training.tokens == 8192 == reference.tokens
    assert training.start_loss == pytest.approx(reference.start_loss)
    assert training.best_loss < training.start_loss
    assert is_better(curve.judge(blocks(24, 2)))
    state = json.loads((tmp_path / "both" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 * 8192 // (8 * 32)
    measured = [entry for entry in state["log_history"] if "eval_curve_loss" in entry]
    assert measured[-1]["eval_curve_loss"] < measured[0]["eval_curve_loss"]


def test_the_same_seed_gives_the_same_bytes(large: PreTrainedModel, tmp_path: Path) -> None:
    results = []
    for name in ("first", "second"):
        curve = make_curve(large, tokens=1024)
        train(curve, tmp_path / name, 1024)
        results.append({**curve.factors(), **curve.small.state_dict()})
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_steps_of_both_kinds_are_spread_evenly(large: PreTrainedModel, tmp_path: Path) -> None:
    curve = make_curve(large, tokens=512)
    drawn: list[int] = []
    draw = curve.draw
    curve.draw = lambda step: drawn.append(step) or draw(step)  # type: ignore[func-returns-value,method-assign]
    train(curve, tmp_path, 1536)
    assert curve.share == 0.25
    assert drawn == [3, 7]


def test_sharded_training_is_refused(large: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="not under FSDP or DeepSpeed"):
        train(make_curve(large), tmp_path, 512)


def test_soft_capped_and_scaled_heads_train_too(tmp_path: Path) -> None:
    """Heads that are not all of the logits: the model's own logits are compared."""
    model = trained_model("gemma3_text", steps=20, final_logit_softcapping=30.0)
    curve = make_curve(model, tokens=512)
    train(curve, tmp_path, 512)
    assert any(bool(value.any()) for name, value in curve.factors().items() if name.endswith(".columns"))


def test_no_part_of_it_stays_in_the_student(large: PreTrainedModel, tmp_path: Path) -> None:
    curve = make_curve(large, tokens=512)
    names = list(curve.small.state_dict())
    train(curve, tmp_path, 512)
    assert list(curve.small.state_dict()) == names
    assert isinstance(curve.control, nn.Module)


def test_learning_rates_fall_with_steps_and_width() -> None:
    assert curve_learning_rate(576, 393) == pytest.approx(2e-3, rel=0.02)
    assert curve_learning_rate(96, 98) == pytest.approx(1e-2, rel=0.02)
    assert curve_learning_rate(576, 10**6) == 2e-3
    assert curve_learning_rate(4096, 10**6) == 1e-3 < curve_learning_rate(4096, 1) == 4e-3


def test_two_processes_train_one_curve(tmp_path: Path) -> None:
    """Under DDP every process draws the same point, and all end with the same control point and anchor."""
    script = Path(__file__).parents[1] / "launched_curve.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "PYTHONPATH": f"{script.parent}:{script.parents[1]}", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "two")], env=env, check=True, capture_output=True)
    subprocess.run([sys.executable, str(script), str(tmp_path / "one")], env=env, check=True, capture_output=True)
    first, second, alone = (load_file(tmp_path / name) for name in ("two-0.st", "two-1.st", "one-0.st"))
    assert first.keys() == alone.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
        torch.testing.assert_close(value, alone[name], rtol=0, atol=2e-4)
