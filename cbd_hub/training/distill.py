"""Distilling an anchor from its larger neighbor.

The student starts as a subset of its teacher, so there is more to compare than the logits: every student layer
stands for a *block* of teacher layers, and the hidden state behind it is pulled towards the one at the end of that
block, on the hidden coordinates that the student kept. No projection is learned, so nothing has to be thrown away
afterwards. :mod:`cbd_hub.training.trainer` has the loss. Held-out loss is measured before the first step and along
the way, and the best weights are the result; the start counts, so an anchor never ends below it.
"""

import copy
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from cbd_hub.errors import RecipeError
from cbd_hub.losses.cross_vocabulary import Across
from cbd_hub.losses.heads import kept_hidden
from cbd_hub.losses.hidden_states import ends_of_blocks
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.manifest.manifest import Training
from cbd_hub.progress import stage_line
from cbd_hub.training.curve import Curve
from cbd_hub.training.settings import DistillationConfig
from cbd_hub.training.trackers import check_trackers
from cbd_hub.training.trainer import AnchorTrainer, collate

__all__ = [
    "AnchorTrainer",
    "block_ends",
    "collate",
    "distill",
]

# What accelerate leaves on a model that it prepared; the first two would run it under autocast ever after.
_LEFT_BEHIND = ("forward", "_original_forward", "_is_accelerate_prepared")
_CONTROL = "control_point"
_CHECKPOINTING = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # renamed


def block_ends(index_map: IndexMap, small_layers: int, large_layers: int) -> list[int]:
    """Returns, for every student layer, the last teacher layer of the block that it stands for.

    Raises:
        RecipeError: The map's first layers are not as many ascending ones.
    """
    kept_layers = [int(layer) for layer in index_map.layers[:small_layers]]
    if (
        len(kept_layers) != small_layers
        or sorted(set(kept_layers)) != kept_layers
        or not kept_layers
        or kept_layers[-1] >= large_layers
    ):
        raise RecipeError(f"The kept layers {kept_layers} are not {small_layers} ascending layers of {large_layers}.")
    return ends_of_blocks(kept_layers, large_layers)


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train: Dataset | IterableDataset,
    validation: Dataset | IterableDataset,
    config: DistillationConfig,
    *,
    index_map: IndexMap | None = None,
    across: Across | None = None,
    curve: Curve | None = None,
    work_dir: Path,
    progress: bool = True,
) -> Training:
    """Trains a student in place and leaves it with its best weights, in ``eval()`` mode, on the training device.

    While training, the best weights so far lie in a file of `work_dir`: memory has the teacher and the optimizer to
    hold, and all processes of a launch restore the same ones. ``trainer_state.json`` stays there, with all losses.
    Text is drawn in shuffled passes, a stream in its own order. The same seed gives the same bytes on the same
    machine (on a GPU as far as its kernels are deterministic). Runs on the accelerator if there is one, or on several
    (``accelerate launch``, ``torchrun``); `work_dir` is then a folder that all processes share. FSDP and DeepSpeed
    take a model apart, so they are given a copy, and the student stays whole, where it was; DeepSpeed in bf16 gives
    back weights rounded to bf16.

    Args:
        student: The model to train; cast to float32 and left so.
        teacher: Its larger neighbor; None trains with cross-entropy alone.
        train: Packed blocks, column ``input_ids`` of one length.
        validation: Packed blocks that choose the best weights.
        config: What to do; with ``tokens = 0`` nothing is done or measured.
        index_map: How the student's units correspond to the teacher's; None compares no hidden states.
        across: The teacher has another vocabulary: what meets what (:class:`cbd_hub.losses.cross_vocabulary.Across`).
        curve: The curve from the teacher to the student; its control point is trained on top, for ``curve.tokens``
            tokens, in steps between those of the student. With ``curve.together`` False the student stays as it is.
        work_dir: Folder for the files named above; made if need be.
        progress: Show a progress bar, unless ``HF_HUB_DISABLE_PROGRESS_BARS`` is set.

    Raises:
        RecipeError: No training text, fp16 without an accelerator, a tracker that is not installed, or vocabularies
            that differ.
    """
    if config.tokens == 0 and curve is None:
        student.eval()
        return Training(tokens=0, seed=config.seed)
    if config.precision == "fp16" and not torch.accelerator.is_available():
        raise RecipeError("precision fp16 needs an accelerator and none was found; use float32 or bf16.")
    check_trackers(config.report_to)
    if (first := next(iter(train), None)) is None:
        raise RecipeError("There is no training text: the training split has no block.")
    ends = kept_units = None
    if teacher is not None and index_map is not None:
        small, large = student.config.get_text_config(), teacher.config.get_text_config()
        ends = block_ends(index_map, small.num_hidden_layers, large.num_hidden_layers)
        kept_units = kept_hidden(index_map, small.hidden_size, large.hidden_size)

    student.float()
    sharded = any(os.environ.get(f"ACCELERATE_USE_{way}", "").lower() == "true" for way in ("FSDP", "DEEPSPEED"))
    if sharded and curve is not None:
        raise RecipeError(
            "a control point is trained on one device or under DDP, not under FSDP or DeepSpeed, which take its "
            "models apart; set distillation.control_point to null, and fit the curve of the finished chain later"
        )
    trained = copy.deepcopy(student) if sharded else student
    found = {name: vars(student).get(name) for name in _LEFT_BEHIND}
    use_cache = student.config.use_cache
    arguments = _arguments(config, len(first["input_ids"]), work_dir, curve)
    if not isinstance(train, IterableDataset):
        step = config.batch_size * config.gradient_accumulation * arguments.world_size
        train = train.select(_draw(len(train), arguments.max_steps * step, config.seed))
    silent = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0").upper() in ("1", "ON", "YES", "TRUE")
    more: dict[str, Any] = {"train_dataset": train, "eval_dataset": validation}
    more["callbacks"] = [_Progress()] if progress and not silent and sys.stderr.isatty() else []
    begun = time.monotonic()
    wanted = {name: p.requires_grad for name, p in student.named_parameters()}
    if curve is not None:
        student.requires_grad_(curve.together)
        student.add_module(_CONTROL, curve.control)  # so that it is wrapped, optimized and kept with the student
    trainer = AnchorTrainer(trained, arguments, config, teacher, ends, kept_units, across, curve, **more)
    best = _KeepBest(trainer, work_dir / "best.safetensors")
    trainer.add_callback(best)
    trainer.remove_callback(PrinterCallback)  # standard output belongs to the caller
    try:
        trainer.train()
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
        best.restore(student)
        trainer.accelerator.wait_for_everyone()
    finally:
        student._modules.pop(_CONTROL, None)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(wanted[name])
        if config.gradient_checkpointing:
            getattr(student, f"{_CHECKPOINTING}_checkpointing_disable")()
        for name, value in found.items():
            vars(student).pop(name, None)
            if value is not None:
                vars(student)[name] = value
        student.config.use_cache = use_cache
        student.eval()
        best.path.unlink(missing_ok=True)
    seen = int(trainer.state.num_input_tokens_seen)
    if progress and not silent and not sys.stderr.isatty() and trainer.state.is_world_process_zero:
        start, best_loss = best.found["start_loss"], best.found["best_loss"]
        label = f"trained on {seen:,} tokens: validation loss {start:.3f} to {best_loss:.3f}"
        stage_line(f"{label}, {time.monotonic() - begun:.0f} s")
    on_curve = 0 if curve is None else round(seen * curve.share)
    return Training(tokens=seen - on_curve, seed=config.seed, **best.found)


def _arguments(
    config: DistillationConfig, sequence_length: int, work_dir: Path, curve: Curve | None = None
) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(work_dir),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        torch_compile=config.torch_compile,
        report_to=config.report_to,
        seed=config.seed,
        train_sampling_strategy="sequential",  # the rows are drawn in order of use
        include_num_input_tokens_seen="all",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        eval_strategy="steps",
        eval_on_start=True,
        save_strategy="no",
        disable_tqdm=True,  # _Progress is added instead
        ddp_find_unused_parameters=curve is not None,  # a step uses them all, but for the control point's
    )
    setattr(arguments, f"{_CHECKPOINTING}_checkpointing", config.gradient_checkpointing)
    step = config.batch_size * config.gradient_accumulation * arguments.world_size * sequence_length
    arguments.max_steps = math.ceil(config.tokens / step)
    if curve is not None:
        steps = math.ceil(curve.tokens / step)
        curve.share = steps / (steps + arguments.max_steps)
        arguments.max_steps += steps
    arguments.warmup_steps = round(config.warmup_fraction * arguments.max_steps)
    arguments.eval_steps = config.eval_every or math.ceil(arguments.max_steps / 10)
    arguments.logging_steps = math.ceil(arguments.max_steps / 100)
    return arguments


def _draw(rows: int, needed: int, seed: int) -> np.ndarray:
    """Row numbers in order of use, (needed,) int64: shuffled passes over all rows, the last one cut."""
    generator = np.random.default_rng(seed)
    return np.concatenate([generator.permutation(rows) for _ in range(math.ceil(needed / rows))])[:needed]


class _KeepBest(TrainerCallback):
    """Keeps the weights with the lowest held-out loss in a file."""

    def __init__(self, trainer: AnchorTrainer, path: Path) -> None:
        self.trainer = trainer
        self.path = path
        self.found: dict[str, Any] = {}
        self.score = math.nan

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Writes the weights if they are the best so far; NaN is better than nothing."""
        loss = metrics["eval_loss"]
        score = loss + metrics.get("eval_curve_loss", 0.0)
        if self.found and not (score < self.score or (math.isnan(self.score) and not math.isnan(score))):
            return
        if loss > self.found.get("start_loss", math.inf):  # a better curve is no reason for a worse anchor
            return
        self.score = score
        self.found = {"start_loss": loss, **self.found, "best_loss": loss, "best_step": state.global_step}
        weights = self.trainer.weights()  # every process takes part
        if state.is_world_process_zero:
            save_file(weights, self.path)

    def restore(self, student: PreTrainedModel) -> None:
        """Puts the best weights into a student."""
        weights = load_file(self.path)
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                parameter.copy_(weights[name])


class _Progress(ProgressCallback):
    """The Trainer's bar, with the losses at its end instead of printed lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        bar: Any = self.training_bar
        if bar is not None:
            bar.set_postfix({name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs})
