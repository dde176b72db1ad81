"""Speed and peak memory of AnchorTrainer against a plain loop in transformers and TRL's nearest trainer.

Run with ``python benchmarks/train.py``; writes docs/results/train.json and train.md. Every measurement is a process
of its own on the same models, tokens and optimizer (fused AdamW, float32, gradients clipped to 1), and the ways take
turns, forwards and backwards. Speed does not depend on what the weights are, so the students are random.

TRL is measured where it can be imported; it needs no installing beside the package:
``pip install --no-deps --target FOLDER trl``, then ``PYTHONPATH=FOLDER python benchmarks/train.py``.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results
import torch
from datasets import Dataset
from random_chain import SHAPES
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SMOLLM2 = {**SHAPES["135M"], "tie_word_embeddings": True}
WAYS = {
    "AnchorTrainer": "CE + KL",
    "AnchorTrainer, hidden states": "CE + KL + hidden states",
    "plain loop": "CE + KL",
    "TRL GKDTrainer": "KL",
}
_CHECKPOINTING = (
    f"{'activation' if hasattr(TrainingArguments, 'activation_checkpointing') else 'gradient'}_checkpointing"
)
WARM_UP = 1  # steps that are not timed
WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # processes of this measurement; train_scaling.py launches several


def make_models(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The teacher, and a student of 26/30 of its layers and 3/4 of its feed-forward width, both float32."""
    shape = {**SMOLLM2, **json.loads(options.shape)}
    config = AutoConfig.from_pretrained(options.model) if options.model else AutoConfig.for_model("llama", **shape)
    torch.manual_seed(0)
    if options.model:
        teacher = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    else:
        teacher = AutoModelForCausalLM.from_config(config)
    small = {
        "num_hidden_layers": round(config.num_hidden_layers * 26 / 30),
        "intermediate_size": config.intermediate_size * 3 // 4,
    }
    student = AutoModelForCausalLM.from_config(type(config).from_dict({**config.to_dict(), **small}))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return student.to(device), teacher.to(device).eval().requires_grad_(False)


def peak_bytes() -> int:
    """Largest memory so far: of the accelerator, or resident (Linux)."""
    if torch.accelerator.is_available():
        return torch.accelerator.max_memory_allocated()
    return _status("VmHWM")


def held_bytes() -> int:
    """Memory held now, of the same kind."""
    return torch.accelerator.memory_allocated() if torch.accelerator.is_available() else _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


class Clock(TrainerCallback):
    """When the timed steps began and ended, in seconds, and what the first step logged."""

    def __init__(self) -> None:
        self.ticks: list[float] = []
        self.first: dict[str, float] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ticks.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.first = self.first or {name: logs[name] for name in ("loss", "ce", "kl", "hidden") if name in logs}


def arguments(folder: str, options: argparse.Namespace, kind: type = TrainingArguments, **more: Any) -> Any:
    """What all trainers are given."""
    return kind(
        output_dir=folder,
        per_device_train_batch_size=options.batch,
        max_steps=WARM_UP + options.steps,
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


def rows(options: argparse.Namespace, vocabulary: int) -> Dataset:
    """Random tokens, one row a sequence."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch * WORLD * (WARM_UP + options.steps), options.length)
    ids = torch.randint(vocabulary, shape, generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * options.length] * len(ids)})


def anchor_trainer(options: argparse.Namespace, folder: str, clock: Clock, hidden: float) -> None:
    """This package's trainer, which applies the heads to a few hundred tokens at a time."""
    import numpy as np

    from cbd_hub.manifest.index_maps import IndexMap
    from cbd_hub.training.distill import AnchorTrainer, block_ends
    from cbd_hub.training.settings import DistillationConfig

    student, teacher = make_models(options)
    options.held = held_bytes()
    layers, of = student.config.num_hidden_layers, teacher.config.num_hidden_layers
    kept = np.linspace(0, of - 1, layers).round().astype(int)
    order = np.concatenate([kept, np.setdiff1d(np.arange(of), kept)])
    ends = block_ends(IndexMap(order), layers, of)
    data = rows(options, teacher.config.vocab_size).remove_columns("attention_mask")  # nothing is padded
    config = DistillationConfig(hidden=hidden)
    args = arguments(folder, options)
    AnchorTrainer(student, args, config, teacher, ends, train_dataset=data, callbacks=[clock]).train()


def plain_loop(options: argparse.Namespace, folder: str, clock: Clock) -> None:
    """What one writes by hand: both models, all logits, cross-entropy and KL, AdamW."""
    student, teacher = make_models(options)
    options.held = held_bytes()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    data = rows(options, teacher.config.vocab_size).with_format("torch", device=str(student.device))
    student.train()
    for batch in data.iter(options.batch):
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
        clock.on_log(None, None, None, {"loss": (ce + kl).item(), "ce": ce.item(), "kl": kl.item()})
        clock.on_step_end(None, None, None)


def trl_gkd(options: argparse.Namespace, folder: str, clock: Clock) -> None:
    """TRL's GKDTrainer on given text (``lmbda=0``), forward KL (``beta=0``); it has no cross-entropy."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, default_data_collator
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = make_models(options)
    options.held = held_bytes()
    tokenizer = PreTrainedTokenizerFast(  # asked for its special tokens, never for text
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
    )
    args = arguments(folder, options, GKDConfig, lmbda=0.0, beta=0.0, temperature=1.0, **{_CHECKPOINTING: False})
    GKDTrainer(
        student,
        teacher,
        args,
        data_collator=default_data_collator,
        train_dataset=rows(options, teacher.config.vocab_size),
        processing_class=tokenizer,
        callbacks=[clock],
    ).train()


def child(way: str, options: argparse.Namespace) -> None:
    """Runs one way and prints tokens a second, peak memory in bytes and the first step's losses."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        if way == "plain loop":
            plain_loop(options, folder, clock)
        elif way == "TRL GKDTrainer":
            trl_gkd(options, folder, clock)
        else:
            anchor_trainer(options, folder, clock, 10.0 if way.endswith("hidden states") else 0.0)
    seconds = clock.ticks[-1] - clock.ticks[WARM_UP - 1]
    tokens = WORLD * options.batch * options.length * (len(clock.ticks) - WARM_UP)
    peak = peak_bytes()
    result = {"tokens_per_second": tokens / seconds, "peak_bytes": peak, "above_models_bytes": peak - options.held}
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({**result, "first_step": clock.first}))


def main(options: argparse.Namespace, flags: list[str]) -> None:
    """Measures all ways in turns, checks that they computed the same losses, and writes the results."""
    ways = list(WAYS)
    if importlib.util.find_spec("trl") is None:
        ways.remove("TRL GKDTrainer")
        print("TRL is not importable and left out; the head of this file says how to add it.")
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for turn in range(options.rounds):
        for way in ways if turn % 2 == 0 else reversed(ways):
            command = [sys.executable, __file__, *flags, "--child", way]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
            runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, json.dumps(runs[way][-1]), flush=True)

    first = {way: measured[0]["first_step"] for way, measured in runs.items()}
    expected = first["plain loop"]
    for way, losses in first.items():
        kl = losses["loss"] if way.startswith("TRL") else losses["kl"]
        assert abs(kl - expected["kl"]) < 1e-3 * max(expected["kl"], 0.1), f"{way} computed {losses}, not {expected}"
    names = ("tokens_per_second", "peak_bytes", "above_models_bytes")
    student, teacher = make_models(options)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    if "TRL GKDTrainer" in ways:
        versions["trl"] = importlib.metadata.version("trl")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else platform.machine()
    result = {
        "machine": f"{device}, {torch.get_num_threads()} threads",
        "versions": versions,
        "model": options.model or "random weights",
        **{name: getattr(options, name) for name in ("batch", "length", "steps", "rounds")},
        "teacher": teacher.num_parameters(),
        "student": student.num_parameters(),
        "ways": {way: {n: statistics.median(run[n] for run in runs[way]) for n in names} for way in ways},
        "runs": runs,
    }
    results.save("train", result, options.output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder of the teacher; by default a random one of SmolLM2-135M's shape")
    parser.add_argument("--shape", default="{}", help="JSON, config fields of the random teacher to replace")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each way; the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options)
    else:
        main(options, sys.argv[1:])
