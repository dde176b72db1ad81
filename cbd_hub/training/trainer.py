"""The trainer of an anchor: a :class:`transformers.Trainer` whose loss compares the model with a frozen teacher.

Three terms, each a mean per predicted token, make up the loss:

    loss = ce * CE(labels) + kl * T^2 KL(teacher || student) + hidden * |s - t|^2 / |t|^2

The last states are taken behind the final norm, as the head reads them, and the head is applied to a few hundred
tokens at a time (:mod:`cbd_hub.losses.chunked`). DDP, FSDP and DeepSpeed prepare a model's weights around *one*
call of its forward: under FSDP a weight used after it is a shard, under DDP one that goes unaccounted. So while a
batch is computed, the student's forward is redirected to :class:`Objective`, which runs student, teacher and losses
inside that call. The student itself stays what is wrapped, saved and named.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.losses.chunked import Head
from cbd_hub.losses.cross_vocabulary import Across, cross_vocabulary_loss
from cbd_hub.losses.distillation import distillation_loss
from cbd_hub.losses.heads import head_of, run_model, unhooked
from cbd_hub.losses.hidden_states import hidden_state_loss
from cbd_hub.text.packing import block_batches
from cbd_hub.training.curve import MIDDLE, Curve, Point
from cbd_hub.training.settings import DistillationConfig

__all__ = ["AnchorTrainer", "Objective", "collate"]

_INPUTS = ("input_ids", "attention_mask", "position_ids")  # what both models read of a batch
_ACROSS = ("teacher_input_ids", "teacher_attention_mask", "groups")  # of a teacher with another vocabulary


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stacks blocks of equal length into a batch of (B, S) int64 tensors; ``labels`` default to ``input_ids``."""
    batch = {name: torch.from_numpy(np.array([row[name] for row in rows], dtype=np.int64)) for name in rows[0]}
    return {"labels": batch["input_ids"].clone(), **batch}


class AnchorTrainer(Trainer):
    """A :class:`transformers.Trainer` whose loss compares the model with a frozen teacher.

    Batches hold ``input_ids``, ``labels`` (not shifted, -100 is ignored), ``position_ids`` that start again with every
    document where several share a row and must not see each other, and ``attention_mask`` where there is padding; see
    :func:`collate`. The loss of a step is summed over micro batches and devices and divided by all their predicted
    tokens, so the gradient does not depend on how the step is cut. ``ce``, ``kl`` and ``hidden`` are logged unweighted
    beside ``loss``. :meth:`evaluate` measures plain cross-entropy.

    Under DDP, FSDP and DeepSpeed only the student is wrapped: the teacher stays whole on every device.

    Args:
        model: The student, in float32.
        config: The weights of the losses.
        teacher: The larger neighbor, in any dtype; put into ``eval()`` mode and onto the student's device. None
            trains with cross-entropy alone.
        ends: Teacher layer that each student layer meets (:func:`cbd_hub.training.distill.block_ends`); None compares
            no hidden states.
        kept_units: The teacher's hidden coordinates, in the student's order
            (:func:`cbd_hub.losses.heads.kept_hidden`); None for all.
        across: The teacher has another vocabulary: what meets what. Batches then hold its tokens of the same text too.
        curve: The curve between the teacher and the student, whose control point is trained as well; it is a part of
            the student while this trainer lives. Some steps then take the loss of a model on the curve.

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
        kept_units: Tensor | None = None,
        across: Across | None = None,
        curve: Curve | None = None,
        **kwargs: Any,
    ) -> None:
        args._n_gpu = min(args.n_gpu, 1)  # one process uses one GPU; several are for `accelerate launch`
        with_hidden = teacher is not None and ends is not None and config.hidden > 0
        if not (config.ce or (teacher is not None and config.kl) or with_hidden):
            raise RecipeError("Without a teacher (or an index map) only cross-entropy is left: set `ce` above 0.")
        layers = model.config.get_text_config().num_hidden_layers
        if with_hidden and ends is not None and len(ends) != layers:
            raise RecipeError(f"The student has {layers} layers and `ends` names {len(ends)}; name one for each.")
        super().__init__(model, args, **{"data_collator": _Collator(across), **kwargs})
        self.model_accepts_loss_kwargs = True  # compute_loss takes num_items_in_batch itself,
        self._loss_shifts_labels = True  # counted without the first column, which nothing predicts
        self.config = config
        self.teacher = teacher if config.kl or with_hidden else None
        if self.teacher is not None:
            nn.Module.to(self.teacher, args.device).eval()
        self._student = model
        self._names = [name for name, _ in model.named_parameters()]  # before FSDP wraps; tied ones once
        self._objective = Objective(model, config, self.teacher, ends if with_hidden else None, kept_units, across)
        self.curve = curve
        self._objective.curve = curve
        self._anchor_loss: float | None = None
        self._held_out = Objective(model, DistillationConfig(ce=1))
        self._terms: dict[str, Tensor] = {}
        self._terms_since = 0

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP or DeepSpeed holds the weights, so that they are whole only inside the forward."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted loss of a micro batch, a scalar; with `return_outputs` its detached terms too."""
        self._objective.point = self._point() if model.training else None
        loss, terms = self._run(model, self._objective, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            scale = self.accelerator.num_processes  # gradients are averaged over devices, tokens were summed
            loss, terms = loss * scale, {name: term * scale for name, term in terms.items()}
        if model.training:
            self._terms = {name: self._terms.get(name, 0.0) + term for name, term in terms.items()}
        return (loss, terms) if return_outputs else loss

    def _point(self) -> Point | None:
        """Where on the curve this step is; None for the student itself. Steps of both kinds are spread evenly."""
        if self.curve is None:
            return None
        step, share = self.state.global_step, self.curve.share
        return self.curve.draw(step) if int((step + 1) * share) > int(step * share) else None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's optimizer, in which the control point has a learning rate of its own and no decay."""
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.curve is not None and not any(group.get("control_point") for group in optimizer.param_groups):
            control = list(self.curve.control.parameters())
            ids = {id(parameter) for parameter in control}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in ids]
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            own = {"params": control, "lr": self.curve.learning_rate, "weight_decay": 0.0, "control_point": True}
            optimizer.add_param_group(own)
        return optimizer

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs, and adds the mean of every loss term since the last time beside ``loss``."""
        if "loss" in logs and self._terms:
            steps = max(self.state.global_step - self._terms_since, 1)
            for name, term in self._terms.items():
                logs[name] = self.accelerator.reduce(term, "mean").item() / steps
            self._terms, self._terms_since = {}, self.state.global_step
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Returns the held-out loss, nats a token, and perplexity (:func:`cbd_hub.evaluation.held_out.evaluate_loss`).

        Every process of a launch evaluates all of it.
        """
        blocks = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        if self.is_sharded:
            loss = self._sharded_loss(blocks, size)
        elif self._anchor_loss is not None:
            loss = self._anchor_loss
        else:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            loss = evaluate_loss(model, blocks, batch_size=size).loss
            if self.curve is not None and not self.curve.together:
                self._anchor_loss = loss  # the student is not trained, and its loss stays
        perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": perplexity}
        if self.curve is not None:
            metrics[f"{metric_key_prefix}_curve_loss"] = self.curve.loss(MIDDLE, blocks, batch_size=size)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def weights(self) -> dict[str, Tensor]:
        """Returns the student's weights, whole, on the CPU, tied ones once.

        Every process of a launch has to call it; where weights are sharded, only the first may receive them.
        """
        if self.is_sharded:
            whole = self.accelerator.get_state_dict(self.model_wrapped) or {}
            return {name: whole[name].contiguous() for name in self._names if name in whole}
        return {name: p.detach().cpu().contiguous() for name, p in self._student.named_parameters()}

    def _run(
        self, model: nn.Module, objective: "Objective", inputs: Mapping[str, Tensor], num_items: Tensor | int | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, differentiable, and its detached terms; `model` is the student, in whatever wrapping."""
        batch: dict[str, Any] = {name: inputs[name] for name in (*_INPUTS, *_ACROSS) if name in inputs}
        if num_items is not None:  # an int, because mixed precision rounds the float inputs of a model
            batch["num_items"] = torch.as_tensor(num_items, device=inputs["labels"].device).long()
        with self.accelerator.autocast(), _redirected(self._student, objective):
            loss = model(labels=inputs["labels"], **batch)
        return loss, objective.terms

    @torch.no_grad()
    def _sharded_loss(self, blocks: Any, batch_size: int) -> float:
        """Held-out loss, taken inside the forward, where the weights are whole."""
        model, total, tokens = self.model_wrapped, 0.0, 0
        was_training = model.training
        model.eval()
        for batch in block_batches(blocks, batch_size):
            batch = {name: rows.to(self.args.device) for name, rows in {"labels": batch["input_ids"], **batch}.items()}
            _, terms = self._run(model, self._held_out, batch, 1)
            total += terms["ce"].item()
            tokens += int(batch["labels"][:, 1:].ne(-100).sum())
        model.train(was_training)
        if not tokens:
            raise RecipeError("There is nothing to evaluate on: pass one block of two tokens or more.")
        return total / tokens


class _Collator:
    """:func:`collate`, and the teacher's tokens of the same text where its vocabulary is another."""

    def __init__(self, across: Across | None) -> None:
        self.across = across

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = collate(rows)
        return batch if self.across is None else batch | self.across.aligner.align(batch["input_ids"], batch["labels"])


class Objective:
    """The loss of a batch, computed in place of the student's forward.

    Not a module: the teacher must be no part of what is trained, or DDP would broadcast it.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        config: DistillationConfig,
        teacher: PreTrainedModel | None = None,
        ends: Sequence[int] | None = None,
        kept_units: Tensor | None = None,
        across: Across | None = None,
    ) -> None:
        self.config = config
        self.across = across
        self.teacher = teacher
        self.ends = ends
        self.kept_units = kept_units if kept_units is None or teacher is None else kept_units.to(teacher.device)
        self.forward = student.forward  # as it is now: later ones go through autocast and turn all states to float32
        self.student_head = head_of(student)
        self.teacher_head = None if teacher is None else head_of(teacher)
        self.curve: Curve | None = None
        self.point: Point | None = None
        """Where on the curve the loss is taken; None is the student itself."""
        self.terms: dict[str, Tensor] = {}
        """The last batch's ``loss`` and its terms, detached. Not returned, as FSDP would round them to bf16."""

    def __call__(self, labels: Tensor, num_items: Tensor | None = None, **batch: Tensor) -> Tensor:
        teachers = {name: batch.pop(name) for name in _ACROSS if name in batch}
        if self.curve is None or (point := self.point) is None:
            hidden, states = run_model(self.forward, self.student_head, batch)
            return self.losses(hidden, states, labels, num_items, batch, teachers)
        curve, ends = self.curve, None if self.ends is None else self.curve.ends(point)
        kept_units = curve.kept_units(point)

        def compute(model: PreTrainedModel) -> Tensor:
            head = nn.Identity() if isinstance(self.student_head, nn.Identity) else model.get_output_embeddings()
            hidden, states = run_model(model.forward, head, batch)
            units_there = None if kept_units is None else kept_units.to(hidden.device)
            return self.losses(hidden, states, labels, num_items, batch, {}, (head, ends, units_there))

        return curve.run(point, compute)

    @torch.compiler.disable  # closed-form gradients, nothing to fuse
    def losses(
        self,
        hidden: Tensor,
        states: tuple[Tensor, ...],
        labels: Tensor,
        num_items: Tensor | None,
        batch: Mapping[str, Tensor],
        teachers: Mapping[str, Tensor],
        student: tuple[Head, Sequence[int] | None, Tensor | None] | None = None,
    ) -> Tensor:
        """The weighted loss, a scalar; runs the teacher. `student`: another head, its block ends, its kept units."""
        config = self.config
        student_head, ends, kept_units = student or (self.student_head, self.ends, self.kept_units)
        if self.across is not None and teachers:
            return self._across_losses(hidden, labels, num_items, batch["input_ids"], teachers)
        teacher_hidden: Tensor | None = None
        teacher_states: tuple[Tensor, ...] = ()
        if self.teacher is not None and self.teacher_head is not None:
            with torch.no_grad():
                teacher_hidden, teacher_states = run_model(self.teacher, self.teacher_head, batch)
        with_kl = self.teacher is not None and config.kl > 0
        loss, ce, kl, _ = distillation_loss(
            hidden,
            unhooked(student_head),
            teacher_hidden if with_kl else None,
            self.teacher_head if with_kl else None,
            labels,
            ce=config.ce,
            kl=config.kl,
            temperature=config.temperature,
            num_items=num_items,
            divergence=config.divergence,
            skew=config.skew,
        )
        terms = {"ce": ce, "kl": kl} if with_kl else {"ce": ce}
        if ends is not None:
            distance = hidden_state_loss(
                states[1:],
                [teacher_states[end + 1] for end in ends],
                kept_units,
                nn.functional.pad(labels[:, 1:] != -100, (0, 1)),  # where CE and KL are taken, so never on padding
                kind=config.hidden_kind,
                num_items=num_items,
            )
            loss, terms["hidden"] = loss + config.hidden * distance, distance.detach()
        self.terms = {"loss": loss.detach(), **terms}
        return loss

    def _across_losses(
        self, hidden: Tensor, labels: Tensor, num_items: Tensor | None, ids: Tensor, teachers: Mapping[str, Tensor]
    ) -> Tensor:
        """The same for a teacher with another vocabulary, which reads its own tokens of the text."""
        if self.across is None or self.teacher is None or self.teacher_head is None:
            raise RecipeError("There is no teacher with another vocabulary.")
        config, teacher_ids, mask, groups = self.config, *(teachers[name] for name in _ACROSS)
        with torch.no_grad():
            batch = {"input_ids": teacher_ids, "attention_mask": mask}
            teacher_hidden, _ = run_model(self.teacher, self.teacher_head, batch)
        found = cross_vocabulary_loss(
            hidden,
            unhooked(self.student_head),
            teacher_hidden,
            self.teacher_head,
            labels,
            ids,
            teacher_ids,
            groups,
            self.across.pairs,
            ce=config.ce,
            kl=config.kl,
            uld=self.across.uld,
            divergence=config.divergence,
            skew=config.skew,
            temperature=config.temperature,
            num_items=num_items,
        )
        self.terms = {"loss": found.loss.detach(), "ce": found.ce, "kl": found.kl, "uld": found.uld}
        return found.loss


@contextmanager
def _redirected(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Has a module call `forward` in place of its own."""
    before = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(model)["forward"]
        else:
            vars(model)["forward"] = before
