"""What a chain from a 7B source costs, on paper, and from_chain on it: the tables of docs/scaling.md.

From growth.json and train.json, and from the assumptions below, which the page names.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import growth
from transformers import LlamaConfig

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import count_parameters, ladder

__all__ = ["tables"]

SOURCE = {  # Llama 2 7B
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
FRACTIONS = (0.7, 0.7, 0.7)
TOKENS = 1_000_000_000
BATCH, LENGTH = 1, 4096  # sequences a GPU, tokens
PEAK_FLOPS, USED = 989e12, 0.4  # H100, bf16 without sparsity; the share of it that training reaches
GPUS = (8, 64)
TRAINED_BYTES = 16  # weight, gradient and two moments of AdamW, float32
TEACHER_BYTES = 4  # a build loads it in float32


def chain() -> list[tuple[int, Mapping[str, int]]]:
    """(parameters, sizes) of source and anchors, as the ladder would choose them."""
    config = LlamaConfig(**SOURCE, tie_word_embeddings=False)
    axis_map = axis_map_for(config)
    sizes = axis_map.sizes(config)
    found = [(count_parameters(axis_map, sizes), sizes)]
    for fraction in FRACTIONS:
        sizes = ladder(axis_map, sizes, round(fraction * found[-1][0]))
        found.append((count_parameters(axis_map, sizes), sizes))
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|--:" * len(head) + "|", *("| " + " | ".join(r) + " |" for r in rows), ""]


def compute(anchors: Sequence[tuple[int, Mapping[str, int]]]) -> list[str]:
    """Operations and hours of every anchor."""
    rows, total = [], 0.0
    for (large, _), (small, _) in pairwise(anchors):
        work = (6 * small + 2 * large) * TOKENS
        total += work
        rows.append([f"{small / 1e9:.2f}B", f"{large / 1e9:.2f}B", f"{work:.2e}", *_hours(work)])
    rows.append(["whole chain", "", f"{total:.2e}", *_hours(total)])
    head = ["anchor", "teacher", f"operations for {TOKENS / 1e9:g}B tokens", "GPU hours"]
    return _table([*head, *(f"hours on {n} GPUs" for n in GPUS)], rows)


def _hours(work: float) -> list[str]:
    hours = work / (PEAK_FLOPS * USED) / 3600
    return [f"{hours:,.0f}", *(f"{hours / n:,.1f}" for n in GPUS)]


def memory(anchors: Sequence[tuple[int, Mapping[str, int]]]) -> list[str]:
    """Gigabytes on a GPU, and in a process's main memory, for every anchor."""
    rows = []
    for (large, teacher), (small, student) in pairwise(anchors):
        held = TEACHER_BYTES * large
        states = 4 * BATCH * LENGTH * teacher["hidden"] * (teacher["layers"] + student["layers"])
        needed = [(held + states + TRAINED_BYTES * small / n) / 1e9 for n in (1, *GPUS)]
        host = 4 * (large + 2 * small) / 1e9
        rows.append(
            [
                f"{small / 1e9:.2f}B",
                f"{held / 1e9:.0f}",
                f"{states / 1e9:.1f}",
                *(f"{n:.0f}" for n in needed),
                f"{host:.0f}",
            ]
        )
    head = ["anchor", "teacher", "kept states", "DDP", *(f"FSDP on {n}" for n in GPUS)]
    return _table([*head, "main memory a process"], rows)


def assembly(anchors: Sequence[tuple[int, Mapping[str, int]]], measured: Mapping[str, Any]) -> list[str]:
    """from_chain half-way between every two anchors, from the largest sizes that were measured."""
    top = measured["from_chain"][-3:]
    exponent = growth.slope(top, "cpu")
    size, cpu, peak = top[-1]["parameters"], growth.medians(top, "cpu")[-1], growth.medians(top, "peak")[-1]
    rows = [[f"{size / 1e9:.2f}B (measured)", f"{cpu:.1f}", f"{peak / 1e9:.1f}"]]
    for (large, _), (small, _) in reversed(list(pairwise(anchors))):
        middle = (large + small) // 2
        rows.append(
            [
                f"{middle / 1e9:.2f}B",
                f"{cpu * (middle / size) ** exponent:.0f}",
                f"{peak / top[-1]['bytes_made'] * 2 * middle / 1e9:.0f}",
            ]
        )
    return _table(["model, bfloat16", "CPU seconds", "peak GB"], rows)


def tables(figures: Mapping[str, Any]) -> str:
    """The Markdown between the page's markers; what is not measured yet is left out."""
    anchors = chain()
    lines = ["### Compute", "", *compute(anchors), "### Memory, in GB", "", *memory(anchors)]
    if "train" in figures:
        train = figures["train"]
        speed = train["ways"]["AnchorTrainer"]["tokens_per_second"]
        plain = train["ways"]["plain loop"]["tokens_per_second"]
        work = (6 * train["student"] + 2 * train["teacher"]) * speed
        lines += [
            f"Measured, to set beside it: AnchorTrainer on {train['machine']}: {speed:,.0f} tokens/s for a student of "
            f"{train['student'] / 1e6:.0f}M and a teacher of {train['teacher'] / 1e6:.0f}M parameters, {work:.2e} "
            f"operations a second by the same count, {speed / plain:.2f} times a plain loop's speed.",
            "",
        ]
    if "growth" in figures:
        _, _, miss = growth.line(figures["growth"]["builds"])
        lines += ["### Models in between", "", *assembly(anchors, figures["growth"])]
        lines += [
            f"A build's time grows with its anchors along a line (within {miss:.0%} for 1 to "
            f"{figures['growth']['builds'][-1]['anchors']} of them, tiny ones).",
            "",
        ]
    return "\n".join(lines).rstrip()
