"""Older transformers, ONNX and MLX: each in an environment of its own, by the commands of docs/how-to/export.md."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from test_readme import ROOT, shell_commands
from tiny_recipe import built_chain

from cbd_hub.chain.chain import Chain
from cbd_hub.chain.export import write_model

ONNX = """
import json, sys
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (ORTModelForCausalLM, AutoTokenizer))
read = tokenizer(sys.argv[2], return_tensors="pt")
logits = model(input_ids=read["input_ids"], attention_mask=read["attention_mask"]).logits
print(json.dumps({"ids": read["input_ids"][0].tolist(), "last": logits[0, -1].tolist()}))
"""

MLX = """
import json, sys
import mlx.core as mx
from mlx_lm import load
model, tokenizer = load(sys.argv[1])
ids = tokenizer.encode(sys.argv[2])
print(json.dumps({"ids": ids, "last": model(mx.array([ids]))[0, -1].tolist()}))
"""

OLDER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer(sys.argv[2], return_tensors="pt")["input_ids"]
with torch.no_grad():
    print(json.dumps({"ids": ids[0].tolist(), "last": model.float()(ids).logits[0, -1].tolist()}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variable", "needs", "program", "code"),
    [
        ("CBD_HUB_OLDER_TRANSFORMERS", "transformers 4 and torch", None, OLDER),
        ("CBD_HUB_ONNX", "optimum-onnx and onnxruntime", "optimum-cli", ONNX),
        ("CBD_HUB_MLX", "mlx-lm", "mlx_lm.convert", MLX),
    ],
)
def test_others_read_the_same_logits(
    tmp_path: Path, variable: str, needs: str, program: str | None, code: str
) -> None:
    """The variable names the Python of the environment; the command that converts, if any, is the page's."""
    python = os.environ.get(variable)
    if python is None:
        pytest.skip(f"set {variable} to a Python with {needs}")
    chain = Chain.from_pretrained(built_chain())
    plan = chain.plan(chain.manifest.curve[0].num_parameters)
    write_model(chain, plan, tmp_path / "my-model", progress=False)
    commands: list[list[str]] = []
    if program is not None:
        (words,) = shell_commands(ROOT / "docs" / "how-to" / "export.md", program)
        commands.append([str(Path(python).parent / program), *words])
    text = "Fellow-Citizens of the Senate"
    commands.append([python, "-c", code, commands[0][-1] if commands else "my-model", text])
    for command in commands:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(done.stdout.splitlines()[-1])
    ids = chain.tokenizer(text, return_tensors="pt")["input_ids"]
    assert theirs["ids"] == ids[0].tolist()
    with torch.no_grad():
        expected = chain.initialize(plan, progress=False)(ids).logits[0, -1]
    torch.testing.assert_close(torch.tensor(theirs["last"]), expected, rtol=1e-4, atol=1e-5)
