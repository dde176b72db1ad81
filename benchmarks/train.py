"""Speed and peak memory of AnchorTrainer against a plain loop in transformers and TRL's nearest trainer.

Run with ``python benchmarks/train.py``; writes docs/results/train.json and train.md. Every measurement is a process
of its own on the same models, tokens and optimizer (fused AdamW, float32, gradients clipped to 1), and the ways take
turns, forwards and backwards. Speed does not depend on what the weights are, so the students are random.

TRL is measured where it can be imported; it needs no installing beside the package:
``pip install --no-deps --target FOLDER trl``, then ``PYTHONPATH=FOLDER python benchmarks/train.py``.
"""

import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import results
import torch
from datasets import Dataset
from models import SHAPES, kept_first
from tokenizers import Tokenizer, models
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.training.distill import AnchorTrainer, block_ends
from cbd_hub.training.settings import DistillationConfig

SMOLLM2 = {**SHAPES["135M"], "tie_word_embeddings": True}
WARM_UP = 1  # steps that are not timed
MEASURES = ("tokens_per_second", "peak_bytes", "above_models_bytes")


@dataclass
class Case(TrainerCallback):
    """What is trained on what, when its steps ended (seconds), and what the first step logged."""

    shape: dict[str, Any]
    batch: int
    length: int
    steps: int
    model: Path | None = None
    ticks: list[float] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)

    def models(self) -> tuple[PreTrainedModel, PreTrainedModel]:
        """A student of 26/30 of its teacher's layers and 3/4 of its feed-forward width, and that, both float32."""
        torch.manual_seed(0)
        if self.model:
            teacher = AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32)
        else:
            teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **self.shape))
        whole = teacher.config.to_dict()
        layers, width = round(whole["num_hidden_layers"] * 26 / 30), whole["intermediate_size"] * 3 // 4
        small = {**whole, "num_hidden_layers": layers, "intermediate_size": width}
        student = AutoModelForCausalLM.from_config(type(teacher.config).from_dict(small))
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        return student.to(device), teacher.to(device).eval().requires_grad_(False)

    def rows(self, vocabulary: int) -> Dataset:
        """Random tokens, one row a sequence; nothing is padded."""
        count = self.batch * int(os.environ.get("WORLD_SIZE", "1")) * (WARM_UP + self.steps)
        ids = torch.randint(vocabulary, (count, self.length), generator=torch.Generator().manual_seed(0)).tolist()
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    def arguments(self, folder: str, kind: type = TrainingArguments, **more: Any) -> Any:
        """What all trainers are given."""
        return kind(
            output_dir=folder,
            per_device_train_batch_size=self.batch,
            max_steps=WARM_UP + self.steps,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            max_grad_norm=1.0,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.accelerator.is_available(),
            dataloader_pin_memory=False,
            **more,
        )

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ticks.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        self.first = self.first or {name: logs[name] for name in ("loss", "ce", "kl", "hidden") if name in logs}


def anchor_trainer(hidden: float, case: Case, student: PreTrainedModel, teacher: PreTrainedModel, folder: str) -> None:
    """This package's trainer, which applies the heads to a few hundred tokens at a time."""
    layers, of = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    order = kept_first(np.linspace(0, of - 1, layers).round(), of)
    ends, data = block_ends(IndexMap(order), layers, of), case.rows(teacher.config.vocab_size)
    config = DistillationConfig(hidden=hidden)
    AnchorTrainer(student, case.arguments(folder), config, teacher, ends, train_dataset=data, callbacks=[case]).train()


def plain_loop(case: Case, student: PreTrainedModel, teacher: PreTrainedModel, folder: str) -> None:
    """What one writes by hand: both models, all logits, cross-entropy and KL, AdamW."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    data = case.rows(teacher.config.vocab_size).with_format("torch", device=str(student.device))
    student.train()
    for batch in data.iter(case.batch):
        ids = batch["input_ids"]
        logits = student(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            target = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        ce = cross_entropy(logits, ids[:, 1:].flatten())
        log_q, log_p = logits.log_softmax(-1), target.log_softmax(-1)
        kl = kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        (ce + kl).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        case.on_log(logs={"loss": (ce + kl).item(), "ce": ce.item(), "kl": kl.item()})
        case.on_step_end()


def trl_gkd(case: Case, student: PreTrainedModel, teacher: PreTrainedModel, folder: str) -> None:
    """TRL's GKDTrainer on given text (``lmbda=0``), forward KL (``beta=0``); it has no cross-entropy."""
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    tokenizer = PreTrainedTokenizerFast(  # asked for its special tokens, never for text
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    off = {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0, f"{kind}_checkpointing": False}
    data = case.rows(teacher.config.vocab_size)
    data = data.add_column("attention_mask", [[1] * case.length] * len(data))
    more = {"train_dataset": data, "processing_class": tokenizer, "data_collator": default_data_collator}
    GKDTrainer(student, teacher, case.arguments(folder, GKDConfig, **off), callbacks=[case], **more).train()


WAYS = {
    "AnchorTrainer": partial(anchor_trainer, 0.0),
    "AnchorTrainer, hidden states": partial(anchor_trainer, 10.0),
    "plain loop": plain_loop,
    "TRL GKDTrainer": trl_gkd,
}


def work(way: str, case: Case) -> dict[str, Any]:
    """Tokens a second over all processes, peak memory in bytes (of the accelerator, or resident), first losses."""
    accelerator = torch.accelerator.is_available()
    student, teacher = case.models()
    held = torch.accelerator.memory_allocated() if accelerator else harness.memory("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        WAYS[way](case, student, teacher, folder)
    peak = torch.accelerator.max_memory_allocated() if accelerator else harness.memory("VmHWM")
    tokens = int(os.environ.get("WORLD_SIZE", "1")) * case.batch * case.length * (len(case.ticks) - WARM_UP)
    found = tokens / (case.ticks[-1] - case.ticks[WARM_UP - 1]), peak, peak - held
    return {**dict(zip(MEASURES, found, strict=True)), "first_step": case.first}


def run(way: str, *case: Any, processes: int = 1) -> dict[str, Any]:
    """One measurement in processes of its own; the case's fields in their order."""
    if (found := harness.forked(work, way, Case(*case), processes=processes)) is None:
        raise SystemExit(f"{way} failed")
    return found


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Of every measure."""
    return {name: statistics.median(run[name] for run in runs) for name in MEASURES}


def check_losses(first: dict[str, dict[str, float]]) -> None:
    """That all ways computed the same divergence in their first step."""
    expected = first["plain loop"]["kl"]
    for way, losses in first.items():
        kl = losses["loss"] if way.startswith("TRL") else losses["kl"]
        assert abs(kl - expected) < 1e-3 * max(expected, 0.1), f"{way} computed {losses}, not {first['plain loop']}"


def main() -> None:
    options = harness.options(
        __doc__,
        model=(None, "folder of the teacher; by default a random one of SmolLM2-135M's shape"),
        shape=("{}", "JSON, config fields of the random teacher to replace", json.dumps(SHAPES["toy"])),
        batch=(4, "sequences in a step"),
        length=(256, "tokens in a sequence", 32),
        steps=(4, "timed steps", 1),
        rounds=(3, "processes of each way; the median counts", 1),
    )
    ways = [way for way in WAYS if not way.startswith("TRL") or importlib.util.find_spec("trl")]
    if len(ways) < len(WAYS):
        print("TRL is not importable and left out; the head of this file says how to add it.")
    shape = {**SMOLLM2, **json.loads(options.shape)}
    case = (shape, options.batch, options.length, options.steps, options.model)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for way in harness.turns(ways, options.rounds):
        runs[way].append(run(way, *case))
        print(way, json.dumps(runs[way][-1]), flush=True)
    check_losses({way: measured[0]["first_step"] for way, measured in runs.items()})
    student, teacher = Case(*case).models()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else platform.machine()
    packages = ("torch", "transformers", "accelerate", *(["trl"] if len(ways) == len(WAYS) else []))
    result = {
        "machine": f"{device}, {torch.get_num_threads()} threads",
        "versions": harness.about(*packages)["versions"],
        "model": str(options.model or "random weights"),
        **{name: getattr(options, name) for name in ("batch", "length", "steps", "rounds")},
        "teacher": teacher.num_parameters(),
        "student": student.num_parameters(),
        "ways": {way: medians(found) for way, found in runs.items()},
        "runs": runs,
    }
    results.save("train", result, options.results)


if __name__ == "__main__":
    main()
