"""The loss of a step in a real Trainer: what it adds up to, how it is cut over steps and devices, what it leaves."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import launched
import numpy as np
import pytest
import torch
import yaml
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import Dataset
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model
from tiny_pair import LENGTH, VOCAB, packed_text, pair
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from cbd_hub.errors import RecipeError
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.distill import block_ends, distill
from cbd_hub.training.settings import DistillationConfig
from cbd_hub.training.trainer import AnchorTrainer, collate

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEEPSPEED = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]
FAST = DistillationConfig(tokens=2 * 4 * LENGTH, batch_size=4, learning_rate=1e-3)


@pytest.fixture(scope="module")
def blocks() -> tuple[Dataset, Dataset]:
    return packed_text()


class Gradients(TrainerCallback):
    """Takes the gradient of the first step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.taken = {name: p.grad.clone() for name, p in kwargs["model"].named_parameters()}


def trainer_for(
    folder: Path,
    train: Dataset,
    config: DistillationConfig,
    family: str = "llama",
    model: tuple[PreTrainedModel, PreTrainedModel, IndexMap] | None = None,
    **arguments: Any,
) -> tuple[AnchorTrainer, Gradients]:
    student, teacher, index_map = model or pair(family)
    ends = block_ends(index_map, student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    arguments = {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "max_steps": 1, **arguments}
    arguments["dataloader_pin_memory"] = False
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1, **arguments
    )
    gradients = Gradients()
    return AnchorTrainer(student, args, config, teacher, ends, train_dataset=train, callbacks=[gradients]), gradients


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_does_not_depend_on_accumulation(
    family: str, blocks: tuple[Dataset, Dataset], tmp_path: Path
) -> None:
    rows = [{"input_ids": row["input_ids"], "labels": list(row["input_ids"])} for row in blocks[0].select(range(8))]
    for index, row in enumerate(rows):  # unequal numbers of labels a row
        row["labels"][: 3 * index] = [-100] * (3 * index)
    train = Dataset.from_list(rows)
    found, losses = [], []
    for size, accumulation in ((8, 1), (2, 4), (1, 8)):
        config = DistillationConfig()
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer, gradients = trainer_for(tmp_path, train, config, family, **arguments)
        trainer.train()
        found.append(gradients.taken)
        losses.append({k: v for k, v in trainer.state.log_history[0].items() if k in ("loss", "ce", "kl", "hidden")})
    for other, logged in zip(found[1:], losses[1:], strict=True):
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=1e-5)
        assert logged == pytest.approx(losses[0], rel=1e-4)


def test_padding_changes_nothing(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    ids = [row["input_ids"][: 20 - 3 * i] for i, row in enumerate(blocks[0].select(range(3)))]
    trainer, _ = trainer_for(tmp_path, blocks[0], DistillationConfig())
    padded = collate(
        [
            {
                "input_ids": row + [0] * (24 - len(row)),
                "labels": row + [-100] * (24 - len(row)),
                "attention_mask": [1] * len(row) + [0] * (24 - len(row)),
            }
            for row in ids
        ]
    )
    items = sum(len(row) - 1 for row in ids)
    with torch.no_grad():
        together = trainer.compute_loss(trainer.model, padded, num_items_in_batch=items)
        alone = [
            trainer.compute_loss(trainer.model, collate([{"input_ids": row}]), num_items_in_batch=items) for row in ids
        ]
    torch.testing.assert_close(together, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)


def test_heads_are_read_in_chunks_and_equal_the_models_own(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    """CE equals the loss that transformers computes, for a plain head and for one with soft capping."""
    batch = collate(list(blocks[0].select(range(2))))
    for overrides in ({}, {"final_logit_softcapping": 3.0}):
        model = tiny_model(tiny_config("gemma3_text", vocab_size=VOCAB, **overrides))
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", disable_tqdm=True)
        trainer = AnchorTrainer(model, args, DistillationConfig(kl=0, hidden=0))
        assert isinstance(trainer._objective.student_head, nn.Identity) == bool(overrides)
        torch.testing.assert_close(trainer.compute_loss(model, batch), model(**batch).loss)


def test_hidden_loss_is_zero_between_a_model_and_itself(blocks: tuple[Dataset, Dataset], tmp_path: Path) -> None:
    twins = tiny_model(tiny_config("llama")), tiny_model(tiny_config("llama")), IndexMap(np.arange(3))
    trainer, _ = trainer_for(tmp_path, blocks[0], DistillationConfig(ce=0, kl=1), model=twins)
    batch = collate([{"input_ids": [token % 97 for token in row["input_ids"]]} for row in blocks[0].select(range(2))])
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(0, abs=1e-5)


def terms_of(trainer: AnchorTrainer, batch: dict[str, Tensor], items: int | None = None) -> dict[str, float]:
    """The loss of a batch and its terms."""
    _, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True, num_items_in_batch=items)
    return {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_packed_documents_do_not_see_each_other(family: str, tmp_path: Path) -> None:
    """A row of three documents with their positions is worth what the documents are one by one."""
    lengths = (11, 5, 16)
    ids = np.random.default_rng(0).integers(3, VOCAB, sum(lengths)).tolist()
    starts = np.cumsum((0, *lengths[:-1]))
    labels = [-100 if at in starts else token for at, token in enumerate(ids)]
    positions = [position for length in lengths for position in range(length)]
    trainer, _ = trainer_for(tmp_path, Dataset.from_dict({"input_ids": [ids]}), DistillationConfig(), family)
    items = sum(lengths) - len(lengths)
    row = {"input_ids": ids, "labels": labels}
    together = terms_of(trainer, collate([{**row, "position_ids": positions}]), items)
    alone = [collate([{"input_ids": ids[at : at + n]}]) for at, n in zip(starts, lengths, strict=True)]
    each = [terms_of(trainer, batch, items) for batch in alone]
    assert together == pytest.approx({name: sum(terms[name] for terms in each) for name in together}, rel=1e-4)
    assert terms_of(trainer, collate([row]), items)["ce"] != pytest.approx(together["ce"], rel=1e-3)


def test_position_ids_reach_the_trainer(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    row = {"input_ids": list(blocks[0][0]["input_ids"]), "position_ids": [*range(8), *range(LENGTH - 8)], "no": 1}
    trainer, _ = trainer_for(tmp_path, Dataset.from_list([row]), DistillationConfig())
    assert set(next(iter(trainer.get_train_dataloader()))) == {"input_ids", "labels", "position_ids"}


def test_divergences_are_those_of_the_whole_distributions(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    student, teacher, index_map = pair()
    batch = collate(list(blocks[0].select(range(2))))
    with torch.no_grad():
        p, q = (model(batch["input_ids"]).logits[:, :-1].softmax(-1) for model in (teacher, student))

    def kl(one: Tensor, other: Tensor) -> float:
        return (one * (one / other).log()).sum(-1).mean().item()

    m, skew = (p + q) / 2, 0.3
    expected = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "js": (kl(p, m) + kl(q, m)) / 2,
        "skewed_kl": kl(p, skew * p + (1 - skew) * q),
        "skewed_reverse_kl": kl(q, skew * q + (1 - skew) * p),
    }
    found = {}
    for name in expected:
        config = DistillationConfig(divergence=name, skew=skew)
        trainer, _ = trainer_for(tmp_path, blocks[0], config, model=(student, teacher, index_map))
        found[name] = terms_of(trainer, batch)["kl"]
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_student_is_what_is_trained_and_saved(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    trainer, gradients = trainer_for(tmp_path, blocks[0], DistillationConfig())
    student, teacher = trainer.model, trainer.teacher
    before = student(**collate([blocks[0][0]])).logits
    trainer.train()
    assert gradients.taken.keys() == dict(student.named_parameters()).keys() == trainer.weights().keys()
    assert trainer.model is student and "forward" not in vars(student)
    assert not {id(p) for p in trainer.model_wrapped.parameters()} & {id(p) for p in teacher.parameters()}
    after = student(**collate([blocks[0][0]])).logits
    assert after.shape == before.shape and not torch.equal(after, before)

    trainer.save_model(str(tmp_path / "saved"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert saved.keys() == student.state_dict().keys()
    assert all(torch.equal(saved[name], weight) for name, weight in student.state_dict().items())


def test_checkpointing_gives_the_same_gradients(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    found = []
    for checkpointing in (False, True):
        trainer, gradients = trainer_for(
            tmp_path, blocks[0], DistillationConfig(), gradient_checkpointing=checkpointing
        )
        trainer.train()
        found.append(gradients.taken)
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_bf16_is_close_to_float32(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    logged, dtypes = [], []
    for bf16 in (False, True):
        trainer, gradients = trainer_for(tmp_path, blocks[0], DistillationConfig(), bf16=bf16, use_cpu=True)
        seen: list[torch.dtype] = []
        hook = trainer.model.model.layers[0].mlp.register_forward_hook(lambda *a, seen=seen: seen.append(a[2].dtype))
        trainer.train()
        hook.remove()
        dtypes.append(seen[0])
        logged.append({name: trainer.state.log_history[0][name] for name in ("loss", "ce", "kl", "hidden")})
        assert all(gradient.dtype == torch.float32 for gradient in gradients.taken.values())
    assert dtypes == [torch.float32, torch.bfloat16]
    assert logged[1] == pytest.approx(logged[0], rel=0.01)
    assert logged[1] != logged[0]


def test_a_student_comes_back_as_it_was(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    """After bf16 it computes in float32 again, and a copy of it is its own model."""
    student, teacher, index_map = pair()
    keys = set(vars(student))
    config = FAST.model_copy(update={"precision": "bf16"})
    distill(student, teacher, *blocks, config, index_map=index_map, work_dir=tmp_path, progress=False)
    assert set(vars(student)) <= keys
    other, batch = copy.deepcopy(student), collate([blocks[0][0]])
    with torch.no_grad():
        other.lm_head.weight.zero_()
        assert student(**batch).logits.abs().max() > 0 and other(**batch).logits.abs().max() == 0


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_gives_the_same_losses(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    logs = []
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        student, teacher, index_map = pair()
        config = FAST.model_copy(update={"torch_compile": compiled})
        training = distill(student, teacher, *blocks, config, index_map=index_map, work_dir=tmp_path, progress=False)
        log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        logs.append([entry["loss"] for entry in log if "loss" in entry] + [training.best_loss])
        assert bool(torch._dynamo.utils.counters["stats"].get("unique_graphs")) == compiled
    assert logs[1] == pytest.approx(logs[0], rel=1e-4)


def test_report_to_is_that_of_the_trainer(tmp_path: Path, blocks: tuple[Dataset, Dataset]) -> None:
    student, teacher, _ = pair()
    config = FAST.model_copy(update={"report_to": ["tensorboard"]})
    if importlib.util.find_spec("tensorboard") or importlib.util.find_spec("tensorboardX"):
        distill(student, teacher, *blocks, config, work_dir=tmp_path, progress=False)
        assert list(tmp_path.rglob("events.out.tfevents.*"))
    else:
        with pytest.raises(RecipeError, match=r"report_to names 'tensorboard'.*pip install tensorboard"):
            distill(student, teacher, *blocks, config, work_dir=tmp_path, progress=False)


def launch(config: str, folder: Path, fields: dict[str, Any], *flags: str) -> None:
    """Runs launched.py in two processes, as a shipped config of accelerate starts them."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", *flags]
    command += ["--config_file", str(EXAMPLES / "accelerate" / config)]
    if "deepspeed" not in config:  # there the precision is the recipe's
        command += ["--mixed_precision", "no"]
    result = subprocess.run(
        [*command, launched.__file__, str(folder), json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=EXAMPLES.parent,
        env={name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
        | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "DS_ACCELERATOR": "cpu"},
    )
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the two processes are to be on the CPU")
@pytest.mark.parametrize(
    ("config", "strategy", "tied"),
    [
        ("ddp.yaml", "MULTI_CPU", True),
        ("fsdp2.yaml", "FSDP", True),
        pytest.param("fsdp2.yaml", "FSDP", False, marks=pytest.mark.slow),
        pytest.param("deepspeed-zero2.yaml", "DEEPSPEED", True, marks=DEEPSPEED),
        pytest.param("deepspeed-zero3.yaml", "DEEPSPEED", True, marks=DEEPSPEED),
        pytest.param("deepspeed-zero3.yaml", "DEEPSPEED", False, marks=DEEPSPEED),
    ],
)
def test_two_processes_train_as_one_does(config: str, strategy: str, tied: bool, tmp_path: Path) -> None:
    """Two processes of half the batch give the losses, gradient norms and weights of one process."""
    fields = {"tokens": 6 * 8 * launched.LENGTH, "gradient_accumulation": 2, "eval_every": 2, "tied": tied}
    (tmp_path / "one").mkdir()
    alone = launched.run(tmp_path / "one", **fields, batch_size=4)
    launch(config, tmp_path, {**fields, "batch_size": 2})
    logged = ("loss", "ce", "kl", "hidden", "grad_norm", "eval_loss")
    for rank in (0, 1):
        result = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (result["world"], result["strategy"]) == (2, strategy)
        assert len(result["log"]) == len(alone["log"])
        for mine, expected in zip(result["log"], alone["log"], strict=True):
            for name in logged:
                assert mine.get(name) == pytest.approx(expected.get(name), abs=1e-4), name
        assert result["training"]["best_step"] == alone["training"]["best_step"] > 0
        assert result["training"]["tokens"] == alone["training"]["tokens"] == fields["tokens"]
        weights = load_file(tmp_path / f"{rank}.safetensors")
        assert weights.keys() == alone["weights"].keys()
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-4)


def test_shipped_configs_are_read_by_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = {}
    for path in sorted((EXAMPLES / "accelerate").glob("*.yaml")):
        config = load_config_from_file(str(path))  # refuses keys that it does not know
        assert config.num_processes == yaml.safe_load(path.read_text())["num_processes"] == 2
        found[path.stem] = config.distributed_type.value
        if config.distributed_type == "DEEPSPEED":
            file = EXAMPLES.parent / config.deepspeed_config["deepspeed_config_file"]
            assert file.parent == EXAMPLES / "deepspeed" and file.is_file()
    types = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed-zero2": "DEEPSPEED", "deepspeed-zero3": "DEEPSPEED"}
    assert found == types


@pytest.mark.parametrize("stage", [2, 3])
def test_shipped_deepspeed_configs(stage: int) -> None:
    config = HfDeepSpeedConfig(str(EXAMPLES / "deepspeed" / f"zero{stage}.json"))
    assert (config.is_zero2(), config.is_zero3()) == (stage == 2, stage == 3) and not config.is_offload()
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16.enabled", "fp16.enabled"):
        assert config.get_value(key) == "auto", f"{key} is the recipe's to say"
    gather = "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    assert config.is_true(gather) == (stage == 3)  # without it the best weights cannot be collected
