"""The examples that go on from a made model, each run as a user runs it, on the smallest chain that has everything."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_recipe import TEXT, built_chain
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub.chain.chain import Chain

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SPEECHES = [str(TEXT / name) for name in ("1790_george_washington_n.txt", "1797_john_adams_f.txt")]


def run(script: str, *arguments: Any) -> str:
    """Runs an example offline in a process of its own and returns what it printed."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def size() -> int:
    """A size between the two largest anchors."""
    return int(Chain.from_pretrained(built_chain()).manifest.curve[0].num_parameters)


def losses(printed: str) -> tuple[float, float]:
    found = re.search(r"held-out loss, nats a token: (\S+) before, (\S+) after", printed)
    assert found, printed
    return float(found[1]), float(found[2])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(40)[None]).logits
    return found


def metadata(card: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.read_text().split("---\n")[1])
    return found


def test_full_fine_tuning(tmp_path: Path) -> None:
    made = Chain.from_pretrained(built_chain())
    common = (built_chain(), "--num-parameters", size(), "--output", tmp_path / "out")
    printed = run("finetune.py", *common, "--text", *SPEECHES, "--steps", 25, "--learning-rate", 3e-3)
    before, after = losses(printed)
    assert after < before - 0.02
    tuned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and f"{tuned.num_parameters():,} parameters" in printed
    start = made.initialize(made.plan(size()), progress=False)
    assert tuned.config.use_cache and tuned.config.cbd_hub == start.config.cbd_hub
    assert not torch.allclose(logits(tuned), logits(start), atol=1e-2)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == made.tokenizer.get_vocab()


def test_an_adapter_names_the_base_that_it_fits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    common = (built_chain(), "--num-parameters", size(), "--text", *SPEECHES)
    printed = run("lora.py", *common, "--output", tmp_path / "out", "--steps", 100, "--learning-rate", 2e-3)
    before, after = losses(printed)
    assert after < before  # by little: the blocks of this model, trained on 3,072 tokens, hardly do anything yet
    base, adapter = tmp_path / "out" / "base", tmp_path / "out" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert metadata(adapter / "README.md")["base_model"] == str(base)
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(adapter)  # finds the base by its name
    alone = AutoModelForCausalLM.from_pretrained(base)
    assert not torch.allclose(logits(tuned), logits(alone), atol=1e-3)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), logits(alone))
    whole = tuned.merge_and_unload()
    whole.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(merged), logits(whole)) and merged.num_parameters() == alone.num_parameters()


@pytest.mark.slow
def test_an_adapter_names_the_repository_of_its_base(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    common = (built_chain(), "--num-parameters", size(), "--text", *SPEECHES, "--steps", 1)
    run("lora.py", *common, "--output", tmp_path, "--base-id", "owner/base")
    adapter = tmp_path / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "owner/base"
    assert metadata(adapter / "README.md")["base_model"] == "owner/base"


@pytest.mark.slow
def test_chat(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    common = (built_chain(), "--num-parameters", size(), "--output", tmp_path / "out", "--base-id", "owner/base")
    printed = run("sft_trl.py", *common, "--steps", 20, "--learning-rate", 3e-3)
    before, after = losses(printed)
    assert after < before - 0.1
    assert "asked: Who reports on the state of the Union?\nanswered:" in printed
    tuned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and tuned.config.cbd_hub["chain"] == "tiny"
    assert metadata(tmp_path / "out" / "README.md")["base_model"] == "owner/base"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: Who?\nassistant: I.\n<|endoftext|>"


def test_the_conversations_that_are_shipped() -> None:
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "chat" / "union.jsonl").read_text().splitlines()]
    assert 0 < len(rows) <= 40
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        assert all(message["content"].strip() for message in row["messages"])
