"""Distilling an anchor from its larger neighbour, on :class:`transformers.Trainer`.

The student starts as a subset of its teacher, so there is more to compare than the logits: every student layer
stands for a *block* of teacher layers, and the hidden state behind it is pulled towards the one at the end of that
block, on the hidden coordinates that the student kept. No projection is learned, so nothing has to be thrown away
afterwards. Three terms, each a mean per predicted token, make up the loss:

    loss = ce * CE(labels) + kl * T^2 KL(teacher || student) + hidden * |s - t|^2 / |t|^2

The last states are taken behind the final norm, as the head reads them. Held-out loss is measured before the first
step and along the way, and the best weights are the result; the start counts, so an anchor never ends below it.
"""

import math
import os
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback

from cbd_hub.chain import IndexMap, Training
from cbd_hub.errors import RecipeError
from cbd_hub.evaluation import evaluate_loss
from cbd_hub.losses import Head, distillation_loss, hidden_and_head, hidden_state_loss
from cbd_hub.sizing import parse_count

__all__ = ["AnchorTrainer", "DistillationConfig", "TokenCount", "block_ends", "collate", "distill", "kept_hidden"]

_CHECKPOINTING = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"  # renamed

TokenCount = Annotated[int, BeforeValidator(lambda v: parse_count(v) if isinstance(v, str) else v), Field(ge=0)]
"""A number of tokens: an int, or a string such as ``"5M"``."""


class DistillationConfig(BaseModel, extra="forbid", frozen=True, use_attribute_docstrings=True):
    """How an anchor is trained."""

    tokens: TokenCount = 1_000_000
    """Training tokens, rounded up to whole steps; text is repeated if need be. 0 only cuts out and trains nothing."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW. 1e-4 suits pretrained models; a tiny one trained from scratch takes 1e-3."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: to 0 along a cosine or a line, or not at all."""
    warmup_fraction: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0, 0 to 1."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass and device."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; the result is that of one large batch."""
    ce: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy with the text (nats a token)."""
    kl: float = Field(default=1.0, ge=0)
    """Weight of the KL divergence from the teacher (nats a token)."""
    hidden: float = Field(default=10.0, ge=0)
    """Weight of the distance between hidden states (relative, 0 when they agree)."""
    hidden_kind: Literal["mse", "cosine"] = "mse"
    """That distance: squared error over the teacher's squared norm, or 1 - cosine."""
    temperature: float = Field(default=1.0, gt=0)
    """Softens both distributions of the KL term; 1 leaves them as they are."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW, not applied to biases and norms."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 never does."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Arithmetic of both passes; weights and optimizer stay in float32. fp16 needs an accelerator."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about 20 % slower."""
    torch_compile: bool = False
    """Compile the student with ``torch.compile``; needs a C++ compiler."""
    report_to: str | list[str] = "none"
    """Experiment trackers to log to, as in ``TrainingArguments`` ("none", "tensorboard", "wandb", ...)."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two measurements of the held-out loss; None measures ten times a run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides the order of the text and dropout."""

    @model_validator(mode="after")
    def _some_loss(self) -> "DistillationConfig":
        if self.tokens and not (self.ce or self.kl or self.hidden):
            raise ValueError("ce, kl and hidden are all 0: give at least one loss a weight")
        return self


def block_ends(index_map: IndexMap, small_layers: int, large_layers: int) -> list[int]:
    """Returns, for every student layer, the last teacher layer of the block that it stands for.

    The kept layers k_0 < k_1 < ... cut the teacher into blocks: layer j stands for the layers k_j to k_{j+1} - 1.
    The last block ends with the teacher.

    Raises:
        RecipeError: The map's first layers are not as many ascending ones.
    """
    kept = [int(layer) for layer in index_map.layers[:small_layers]]
    if len(kept) != small_layers or sorted(set(kept)) != kept or not kept or kept[-1] >= large_layers:
        raise RecipeError(f"The kept layers {kept} are not {small_layers} ascending layers of {large_layers}.")
    return [following - 1 for following in kept[1:]] + [large_layers - 1]


def kept_hidden(index_map: IndexMap, small_hidden: int, large_hidden: int) -> Tensor | None:
    """Returns the teacher's hidden coordinates that the student kept, (small_hidden,) int64; None for all in order."""
    kept = torch.from_numpy(index_map.order("hidden", None, large_hidden)[:small_hidden].copy())
    return None if torch.equal(kept, torch.arange(large_hidden)) else kept


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks blocks of equal length into a batch of (B, S) int64 tensors; ``labels`` default to ``input_ids``."""
    batch = {name: torch.from_numpy(np.array([row[name] for row in rows], dtype=np.int64)) for name in rows[0]}
    return {"labels": batch["input_ids"].clone(), **batch}


class AnchorTrainer(Trainer):
    """A :class:`transformers.Trainer` whose loss compares the model with a frozen teacher.

    Batches hold ``input_ids``, ``labels`` (not shifted, -100 is ignored) and, where there is padding,
    ``attention_mask``; see :func:`collate`. The loss of a step is summed over micro batches and devices and divided
    by all their predicted tokens, so the gradient does not depend on how the step is cut. ``ce``, ``kl`` and
    ``hidden`` are logged unweighted beside ``loss``. :meth:`evaluate` measures plain cross-entropy.

    Args:
        model: The student, in float32.
        config: The weights of the losses.
        teacher: The larger neighbour, in any dtype; put into ``eval()`` mode and onto the student's device. None
            trains with cross-entropy alone.
        ends: Teacher layer that each student layer meets (:func:`block_ends`); None compares no hidden states.
        kept: The teacher's hidden coordinates, in the student's order (:func:`kept_hidden`); None for all.

    Raises:
        RecipeError: No loss is left without a teacher, or there is not one end for every layer of the student.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: TrainingArguments,
        config: DistillationConfig,
        teacher: PreTrainedModel | None = None,
        ends: Sequence[int] | None = None,
        kept: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        args._n_gpu = min(args.n_gpu, 1)  # one process uses one GPU; several are for `accelerate launch`
        with_hidden = teacher is not None and ends is not None and config.hidden > 0
        if not (config.ce or (teacher is not None and config.kl) or with_hidden):
            raise RecipeError("Without a teacher (or an index map) only cross-entropy is left: set `ce` above 0.")
        layers = model.config.get_text_config().num_hidden_layers
        if with_hidden and ends is not None and len(ends) != layers:
            raise RecipeError(f"The student has {layers} layers and `ends` names {len(ends)}; name one for each.")
        super().__init__(model, args, **{"data_collator": collate, **kwargs})
        self.model_accepts_loss_kwargs = True  # compute_loss takes num_items_in_batch itself,
        self._loss_shifts_labels = True  # counted without the first column, which nothing predicts
        self.config = config
        self.teacher = teacher if config.kl or with_hidden else None
        if self.teacher is not None:
            nn.Module.to(self.teacher, args.device).eval()
        self._ends = ends if with_hidden else None
        self._kept = None if kept is None else kept.to(args.device)
        self._student_head = _head_of(model)
        self._teacher_head = None if self.teacher is None else _head_of(self.teacher)
        self._terms: dict[str, Tensor] = {}
        self._terms_since = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of a micro batch, a scalar; with `return_outputs` the student's hidden states too."""
        labels, config = inputs["labels"], self.config
        batch: dict[str, Tensor] = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        with self.accelerator.autocast():
            hidden, states = _run(model, self._student_head, batch)
            teacher_hidden: Tensor | None = None
            teacher_states: tuple[Tensor, ...] = ()
            if self.teacher is not None and self._teacher_head is not None:
                with torch.no_grad():
                    teacher_hidden, teacher_states = _run(self.teacher, self._teacher_head, batch)
            with_kl = self.teacher is not None and config.kl > 0
            loss, ce, kl, _ = distillation_loss(
                hidden,
                self._student_head,
                teacher_hidden if with_kl else None,
                self._teacher_head if with_kl else None,
                labels,
                ce=config.ce,
                kl=config.kl,
                temperature=config.temperature,
                num_items=num_items_in_batch,
            )
        terms = {"ce": ce, "kl": kl} if with_kl else {"ce": ce}
        if self._ends is not None:
            distance = hidden_state_loss(
                states[1:],
                [teacher_states[end + 1] for end in self._ends],
                self._kept,
                nn.functional.pad(labels[:, 1:] != -100, (0, 1)),  # where CE and KL are taken, so never on padding
                kind=config.hidden_kind,
                num_items=num_items_in_batch,
            )
            loss, terms["hidden"] = loss + config.hidden * distance, distance.detach()
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            scale = self.accelerator.num_processes  # gradients are averaged over devices, tokens were summed
            loss, terms = loss * scale, {name: term * scale for name, term in terms.items()}
        if model.training:
            self._terms = {name: self._terms.get(name, 0.0) + term for name, term in terms.items()}
        return (loss, {"hidden_states": states}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, and adds the mean of every loss term since the last time beside ``loss``."""
        if "loss" in logs and self._terms:
            steps = max(self.state.global_step - self._terms_since, 1)
            for name, term in self._terms.items():
                logs[name] = self.accelerator.reduce(term, "mean").item() / steps
            self._terms, self._terms_since = {}, self.state.global_step
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Returns the held-out loss, nats a token, and perplexity (:func:`cbd_hub.evaluation.evaluate_loss`)."""
        blocks = self.eval_dataset if eval_dataset is None else eval_dataset
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        result = evaluate_loss(model, blocks, batch_size=self.args.per_device_eval_batch_size)
        metrics = {f"{metric_key_prefix}_loss": result.loss, f"{metric_key_prefix}_perplexity": result.perplexity}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train: Dataset | IterableDataset,
    validation: Dataset | IterableDataset,
    config: DistillationConfig,
    *,
    index_map: IndexMap | None = None,
    work_dir: Path,
    progress: bool = True,
) -> Training:
    """Trains a student in place and leaves it with its best weights, in ``eval()`` mode, on the training device.

    While training, the best weights so far lie in a file of `work_dir`: memory has the teacher and the optimizer to
    hold, and all processes of a launch restore the same ones. ``trainer_state.json`` stays there, with all losses.
    Text is drawn in shuffled passes, a stream in its own order. The same seed gives the same bytes on the same
    machine (on a GPU as far as its kernels are deterministic). Runs on the accelerator if there is one, or several.

    Args:
        student: The model to train; cast to float32 and left so.
        teacher: Its larger neighbour; None trains with cross-entropy alone.
        train: Packed blocks, column ``input_ids`` of one length.
        validation: Packed blocks that choose the best weights.
        config: What to do; with ``tokens = 0`` nothing is done or measured.
        index_map: How the student's units correspond to the teacher's; None compares no hidden states.
        work_dir: Folder for the files named above; made if need be.
        progress: Show a progress bar, unless ``HF_HUB_DISABLE_PROGRESS_BARS`` is set.

    Raises:
        RecipeError: No training text, fp16 without an accelerator, or vocabularies that differ.
    """
    if config.tokens == 0:
        student.eval()
        return Training(tokens=0, seed=config.seed)
    if config.precision == "fp16" and not torch.accelerator.is_available():
        raise RecipeError("precision fp16 needs an accelerator and none was found; use float32 or bf16.")
    if (first := next(iter(train), None)) is None:
        raise RecipeError("There is no training text: the training split has no block.")
    ends = kept = None
    if teacher is not None and index_map is not None:
        small, large = student.config.get_text_config(), teacher.config.get_text_config()
        ends = block_ends(index_map, small.num_hidden_layers, large.num_hidden_layers)
        kept = kept_hidden(index_map, small.hidden_size, large.hidden_size)

    use_cache = student.config.use_cache
    student.float()
    arguments = _arguments(config, len(first["input_ids"]), work_dir)
    if not isinstance(train, IterableDataset):
        step = config.batch_size * config.gradient_accumulation * arguments.world_size
        train = train.select(_draw(len(train), arguments.max_steps * step, config.seed))
    best = _KeepBest(student, work_dir / "best.safetensors")
    silent = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "0").upper() in ("1", "ON", "YES", "TRUE")
    more = {"eval_dataset": validation, "callbacks": [best, *([_Progress()] if progress and not silent else [])]}
    trainer = AnchorTrainer(student, arguments, config, teacher, ends, kept, train_dataset=train, **more)
    trainer.remove_callback(PrinterCallback)  # standard output belongs to the caller
    try:
        trainer.train()
        trainer.save_state()
        trainer.accelerator.wait_for_everyone()
        best.restore()
        trainer.accelerator.wait_for_everyone()
    finally:
        if config.gradient_checkpointing:
            getattr(student, f"{_CHECKPOINTING}_checkpointing_disable")()
        student.config.use_cache = use_cache
        student.eval()
        best.path.unlink(missing_ok=True)
    return Training(tokens=int(trainer.state.num_input_tokens_seen), seed=config.seed, **best.found)


def _head_of(model: PreTrainedModel) -> Head:
    """Returns the head that turns ``hidden_states[-1]`` into logits, or an identity where that is not all (soft
    capping, scaling): then the model's own logits are used."""
    was_training, token = model.training, torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.eval()
    with torch.no_grad():
        hidden, head = hidden_and_head(model, token)
        last = model(input_ids=token, use_cache=False, output_hidden_states=True).hidden_states[-1]
    model.train(was_training)
    plain = "logits_to_keep" in signature(type(model).forward).parameters
    return head if plain and last.shape == hidden.shape and torch.allclose(last, hidden) else nn.Identity()


def _run(model: nn.Module, head: Head, batch: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Calls a model as a whole, as DDP and ``torch.compile`` need it; returns what `head` reads, and all states."""
    whole = isinstance(head, nn.Identity)
    few = {} if whole else {"logits_to_keep": 1}
    outputs = model(**batch, use_cache=False, output_hidden_states=True, **few)
    return outputs.logits if whole else outputs.hidden_states[-1], outputs.hidden_states


def _arguments(config: DistillationConfig, sequence_length: int, work_dir: Path) -> TrainingArguments:
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
    )
    setattr(arguments, f"{_CHECKPOINTING}_checkpointing", config.gradient_checkpointing)
    step = config.batch_size * config.gradient_accumulation * arguments.world_size * sequence_length
    arguments.max_steps = math.ceil(config.tokens / step)
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

    def __init__(self, student: PreTrainedModel, path: Path) -> None:
        self.student = student
        self.path = path
        self.found: dict[str, Any] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        """Writes the weights if they are the best so far; NaN is better than nothing."""
        loss, best = metrics["eval_loss"], self.found.get("best_loss", math.nan)
        if self.found and not (loss < best or (math.isnan(best) and not math.isnan(loss))):
            return
        self.found = {"start_loss": loss, **self.found, "best_loss": loss, "best_step": state.global_step}
        if state.is_world_process_zero:  # tied weights are named once
            weights = {name: p.detach().cpu().contiguous() for name, p in self.student.named_parameters()}
            save_file(weights, self.path)

    def restore(self) -> None:
        """Puts the best weights back into the student."""
        weights = load_file(self.path)
        with torch.no_grad():
            for name, parameter in self.student.named_parameters():
                parameter.copy_(weights[name])


class _Progress(ProgressCallback):
    """The Trainer's bar, with the losses at its end instead of printed lines."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        bar: Any = self.training_bar
        if bar is not None:
            bar.set_postfix({name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs})
