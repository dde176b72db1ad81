"""The tutorial from a public model to a GGUF, command by command, as the page has them.

The public model is a random one of 0.2M parameters under its name on the loopback Hub, so the counts are smaller.
"""

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from hub_client import Client
from hub_server import HubServer
from test_readme import ROOT, shell_commands
from tiny_models import tiny_config, tiny_model
from tiny_recipe import TEXT, built_chain
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALLER = {"20M": "4k", "5M": "4k", "100MB": "180kB"}
PUBLISH = """
from huggingface_hub import HfApi
HfApi().create_repo(repo_id)
HfApi().upload_folder(repo_id=repo_id, folder_path=folder)
"""
RUN = """
import os
os.chdir(place)
from cbd_hub.cli.main import main
main(words)
"""


@pytest.mark.slow
def test_every_command_of_the_tutorial(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "max_position_embeddings": 512}
    source = tiny_model(tiny_config("llama", vocab_size=300, head_dim=16, tie_word_embeddings=True, **sizes))
    source.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(built_chain()).save_pretrained(tmp_path / "source")
    (tmp_path / "corpus").mkdir()
    speeches = sorted(TEXT.glob("1[78]*.txt"))
    for path in speeches[1:6]:
        shutil.copy(path, tmp_path / "corpus")
    shutil.copy(speeches[0], tmp_path / "held-out.txt")

    calls = shell_commands(ROOT / "docs" / "how-to" / "to-a-phone.md", "cbd-hub")
    assert [name for name, *_ in calls] == ["build", "build", "plan", "from-chain", "eval", "recover", "export"]
    said = []
    with HubServer() as hub:
        hub.add_user("HuggingFaceTB", "hf_theirs")
        with Client(hub.environment(tmp_path / "home", "hf_theirs")) as client:
            assert client.run(PUBLISH, repo_id=calls[0][2], folder=tmp_path / "source").status == 0
            for words in calls:
                smaller = [SMALLER.get(word, word.strip('"')) for word in words]
                done = client.run(RUN, place=tmp_path, words=smaller)
                assert done.status == 0, f"{words}\n{done.err[-3000:]}"
                said.append(done.out)
                if "--dry-run" in words:
                    assert not (tmp_path / "my-chain").exists() and "the build can start" in done.out

    planned = said[2]
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model")
    assert f"({made.num_parameters():,})" in planned and made.num_parameters() < source.num_parameters()
    recovered = AutoModelForCausalLM.from_pretrained(tmp_path / "my-model-recovered", dtype=torch.float32)
    assert recovered.num_parameters() == made.num_parameters()
    fields = gguf.GGUFReader(tmp_path / "my-model.gguf").fields
    assert fields["llama.block_count"].contents() == made.config.num_hidden_layers
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="my-model.gguf", dtype=torch.float32)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, recovered(ids).logits, rtol=0, atol=0.3)  # blocks of 8 bits
    assert (tmp_path / "my-model.gguf").stat().st_size < 220_000  # 180 kB of weights, and the tokenizer
