"""Distilling real tiny models on real text: the loss, the gradient, the result, and what is left alone."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from pydantic import ValidationError
from tiny_pair import LENGTH, packed_text, pair
from torch import Tensor, nn

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.losses.heads import kept_hidden
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.distill import block_ends, distill
from cbd_hub.training.settings import DistillationConfig

FAST = DistillationConfig(tokens=2 * 4 * LENGTH, batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def blocks() -> tuple[Dataset, Dataset]:
    return packed_text()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_block_ends_are_where_the_next_kept_layer_begins() -> None:
    index_map = IndexMap(np.array([0, 2, 3, 7, 1, 4, 5, 6]))
    assert block_ends(index_map, 4, 8) == [1, 2, 6, 7]
    assert block_ends(IndexMap(np.arange(3)), 3, 3) == [0, 1, 2]
    with pytest.raises(RecipeError, match="ascending"):
        block_ends(index_map, 5, 8)


def test_kept_hidden_is_the_start_of_the_order() -> None:
    order = np.array([3, 0, 2, 1], dtype=np.int32)
    kept = kept_hidden(IndexMap(np.arange(1), {"hidden": order}), 2, 4)
    assert kept is not None and kept.tolist() == [3, 0] and kept.dtype == torch.int64
    assert kept_hidden(IndexMap(np.arange(1)), 4, 4) is None
    prefix = kept_hidden(IndexMap(np.arange(1)), 3, 4)
    assert prefix is not None and prefix.tolist() == [0, 1, 2]


def test_loss_falls_towards_the_teacher(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    train, validation = blocks
    student, teacher, index_map = pair()
    before_teacher = state(teacher)
    config = DistillationConfig(tokens=60 * 4 * LENGTH, batch_size=4, learning_rate=3e-3)
    training = distill(
        student, teacher, train, validation, config, index_map=index_map, work_dir=tmp_path, progress=False
    )

    assert training.tokens == 60 * 4 * LENGTH and training.best_step is not None and training.best_step > 0
    assert training.start_loss is not None and training.best_loss is not None
    assert training.best_loss < training.start_loss - 0.5
    assert evaluate_loss(student, validation).loss == pytest.approx(training.best_loss, abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["trainer_state.json"]

    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    steps = [entry for entry in log if "ce" in entry]
    assert len(steps) == 60
    first, last = steps[0], steps[-1]
    assert all(last[term] < first[term] for term in ("ce", "kl", "hidden"))
    assert 0.1 < first["kl"] / first["ce"] < 10  # both summed over the vocabulary, in nats
    assert first["loss"] == pytest.approx(first["ce"] + first["kl"] + 10 * first["hidden"], rel=1e-4)

    assert same(state(teacher), before_teacher)
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training and not student.training
    assert student.config.use_cache and all(p.requires_grad for p in student.parameters())


def test_same_seed_same_bytes(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    def run(seed: int) -> dict[str, Tensor]:
        student, teacher, index_map = pair()
        config = FAST.model_copy(update={"tokens": 6 * 4 * LENGTH, "seed": seed})
        distill(student, teacher, *blocks, config, index_map=index_map, work_dir=tmp_path, progress=False)
        return state(student)

    one = run(3)
    torch.rand(5)  # the global random state does not matter
    assert same(one, run(3))
    assert not same(one, run(4))


def test_best_weights_are_kept_the_start_included(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    student, teacher, index_map = pair()
    teach = FAST.model_copy(update={"tokens": 30 * 4 * LENGTH, "learning_rate": 3e-3})
    distill(student, teacher, *blocks, teach, index_map=index_map, work_dir=tmp_path, progress=False)
    start = state(student)
    diverging = FAST.model_copy(update={"learning_rate": 10.0, "schedule": "constant", "warmup_fraction": 0.0})
    training = distill(student, teacher, *blocks, diverging, index_map=index_map, work_dir=tmp_path, progress=False)
    assert training.best_step == 0 and training.best_loss == training.start_loss
    assert same(state(student), start)


def test_no_tokens_returns_at_once(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    student, teacher, index_map = pair()
    start, config = state(student), DistillationConfig(tokens=0, seed=5)
    training = distill(student, teacher, *blocks, config, index_map=index_map, work_dir=tmp_path / "none")
    assert training.model_dump(exclude_none=True) == {"tokens": 0, "seed": 5}
    assert same(state(student), start) and not (tmp_path / "none").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox", "opt", "qwen3", "phi3"])
def test_every_family_runs(family: str, blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    student, teacher, index_map = pair(family)
    start = state(student)
    training = distill(student, teacher, *blocks, FAST, index_map=index_map, work_dir=tmp_path, progress=False)
    assert training.tokens == FAST.tokens
    assert not same(state(student), start)
    assert state(student).keys() == start.keys()


def test_narrower_student_meets_the_coordinates_it_kept(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    student, teacher, index_map = pair(hidden_size=40)
    order = np.random.default_rng(0).permutation(48).astype(np.int32)
    index_map = IndexMap(index_map.layers, {"hidden": order})
    training = distill(student, teacher, *blocks, FAST, index_map=index_map, work_dir=tmp_path, progress=False)
    assert training.tokens == FAST.tokens


def test_without_a_teacher(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    student, _, _ = pair()
    config = DistillationConfig(tokens=40 * 4 * LENGTH, batch_size=4, learning_rate=3e-3)
    training = distill(student, None, *blocks, config, work_dir=tmp_path, progress=False)
    assert training.best_loss is not None and training.start_loss is not None
    assert training.best_loss < training.start_loss
    with pytest.raises(RecipeError, match="set `ce` above 0"):
        only_kl = FAST.model_copy(update={"ce": 0.0})
        distill(student, None, *blocks, only_kl, work_dir=tmp_path, progress=False)


def test_dtypes_mix(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    student, teacher, index_map = pair()
    teacher, student = teacher.to(torch.bfloat16), student.to(torch.bfloat16)
    before = state(teacher)
    config = FAST.model_copy(update={"precision": "bf16", "gradient_accumulation": 2})
    training = distill(student, teacher, *blocks, config, index_map=index_map, work_dir=tmp_path, progress=False)
    assert training.best_loss is not None and math.isfinite(training.best_loss)
    assert teacher.dtype == torch.bfloat16 and same(state(teacher), before)
    assert student.dtype == torch.float32


def test_checkpointing_gives_the_same_weights(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    results = []
    for checkpointing in (False, True):
        student, teacher, index_map = pair()
        config = FAST.model_copy(update={"gradient_checkpointing": checkpointing})
        distill(student, teacher, *blocks, config, index_map=index_map, work_dir=tmp_path, progress=False)
        assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
        results.append(state(student))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=1e-4, atol=1e-5)


def test_little_text_is_repeated_and_a_stream_is_read(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    few, validation = blocks[0].select(range(3)), blocks[1]
    for train in (few, few.to_iterable_dataset()):
        student, teacher, index_map = pair()
        training = distill(
            student, teacher, train, validation, FAST, index_map=index_map, work_dir=tmp_path, progress=False
        )
        assert training.tokens >= 2 * 3 * LENGTH
        assert isinstance(train, IterableDataset) or training.tokens == FAST.tokens
    with pytest.raises(RecipeError, match="no block"):
        distill(student, teacher, few.select([]), validation, FAST, work_dir=tmp_path)


def test_progress_is_a_bar_on_standard_error(
    blocks: tuple[Dataset, Dataset],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def output() -> tuple[str, str]:
        student, teacher, index_map = pair()
        distill(student, teacher, *blocks, FAST, index_map=index_map, work_dir=tmp_path)
        captured = capsys.readouterr()
        return captured.out, captured.err

    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    assert output() == ("", "")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS")
    assert output()[0] == ""
    student, teacher, index_map = pair()
    distill(student, teacher, *blocks, FAST, index_map=index_map, work_dir=tmp_path)
    (line,) = capsys.readouterr().err.splitlines()  # no terminal, so no bar
    assert re.fullmatch(r"trained on 256 tokens: validation loss \d\.\d{3} to \d\.\d{3}, \d+ s", line)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    out, err = output()
    assert out == "" and "2/2" in err and "eval_loss=" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": -1}, "greater than or equal to 0"),
        ({"tokens": "many"}, "many"),
        ({"schedule": "step"}, "'cosine', 'linear' or 'constant'"),
        ({"ce": 0, "kl": 0, "hidden": 0}, "at least one loss"),
        ({"batchsize": 4}, "Extra inputs"),
        ({"divergence": "kl"}, "'forward_kl', 'reverse_kl', 'js', 'skewed_kl' or 'skewed_reverse_kl'"),
        ({"skew": 1.0}, "less than 1"),
    ],
)
def test_config_refuses(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DistillationConfig(**change)


def test_config_reads_counts() -> None:
    assert DistillationConfig(tokens="5M").tokens == 5_000_000


def test_fp16_needs_an_accelerator(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.raises(RecipeError, match="fp16 needs an accelerator"):
        distill(pair()[0], None, *blocks, FAST.model_copy(update={"precision": "fp16"}), work_dir=tmp_path)
