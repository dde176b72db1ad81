"""Models of the page: made once, kept, packed, and writing."""

import multiprocessing
import shutil
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cbd_hub.app.workbench import Workbench, complete
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import ChainNotFoundError, RecipeError


def test_models_are_made_once_and_four_are_kept(folder: Path) -> None:
    bench = Workbench(folder)
    plans = [bench.chain.plan(size) for size in ("80k", "90k", "100k", "110k", "120k")]
    first = bench.model(plans[0])
    assert first.num_parameters() == plans[0].num_parameters
    made = [bench.model(plan) for plan in plans[1:4]]
    assert bench.model(plans[0]) is first
    bench.model(plans[4])  # the one used least recently makes room
    assert bench.model(plans[0]) is first
    assert bench.model(plans[1]) is not made[0]


def test_a_packed_model_is_a_transformers_model(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(folder)
    plan = bench.chain.plan("100k")
    path = bench.pack(plan)
    with zipfile.ZipFile(path) as packed:
        packed.extractall(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / path.stem)
    assert loaded.num_parameters() == plan.num_parameters
    assert (tmp_path / path.stem / "tokenizer.json").is_file() and (tmp_path / path.stem / "README.md").is_file()
    assert bench.pack(bench.chain.plan("90k")).is_file()
    assert not path.exists()


def test_a_chain_that_appears_later_is_opened_then(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(tmp_path / "chain")
    with pytest.raises(ChainNotFoundError):
        _ = bench.chain
    shutil.copytree(folder, tmp_path / "chain")
    assert bench.chain.manifest.name


def test_a_continuation_is_limited(folder: Path) -> None:
    bench = Workbench(folder)
    model, tokenizer = bench.model(bench.chain.plan("100k")), bench.chain.tokenizer
    model.generation_config.eos_token_id = None
    parts = [list(complete(model, tokenizer, "The state of the Union", n)) for n in (5, 20)]
    assert len(parts[1]) > 3 and all(later.startswith(text) for text, later in pairwise(parts[1]))
    short, long = (each[-1] for each in parts)
    assert short and long.startswith(short[:-1]) and len(short) < len(long)
    context = model.config.max_position_embeddings
    assert list(complete(model, tokenizer, "The state of the Union " * context, 10 * context))[-1]
    for empty in ("", " \n"):
        with pytest.raises(RecipeError, match="no prompt"):
            next(complete(model, tokenizer, empty, 5))


def test_tokens_are_drawn_as_asked_and_a_failure_reaches_the_reader(folder: Path) -> None:
    bench = Workbench(folder)
    model, tokenizer = bench.model(bench.chain.plan("100k")), bench.chain.tokenizer
    model.generation_config.eos_token_id = None
    *_, greedy = complete(model, tokenizer, "The state", 20)
    torch.manual_seed(0)
    *_, drawn = complete(model, tokenizer, "The state", 20, temperature=1.5)
    assert drawn != greedy
    *_, nearly_none = complete(model, tokenizer, "The state", 20, temperature=1.5, top_p=1e-6)
    assert nearly_none == greedy  # of the likeliest tokens, one is left
    torch.nn.Module.to(model, torch.float64)
    model.get_output_embeddings().to(torch.float32)
    with pytest.raises(RuntimeError, match="dtype"):
        list(complete(model, tokenizer, "The state", 5))


def _write_elsewhere(asked: Any, written: Any) -> None:
    for text in complete(*asked.get()):
        written.put(text)
    written.put(None)


def test_a_process_that_is_handed_the_model_writes_the_same(chain: Chain) -> None:
    """As on ZeroGPU, where texts are written in a fork that is there first and is handed all arguments."""
    forked = multiprocessing.get_context("fork")
    asked, written = forked.SimpleQueue(), forked.SimpleQueue()
    process = forked.Process(target=_write_elsewhere, args=(asked, written))
    process.start()
    arguments = (chain("100k"), chain.tokenizer, "The state of the Union", 20, 0.0, 1.0)
    asked.put(arguments)
    texts = list(iter(written.get, None))
    process.join(20)
    assert process.exitcode == 0 and texts[-1] == list(complete(*arguments))[-1] != ""
