"""Writes what the recipes for one machine cost into docs/scaling.md: ``recipe_costs.py [--check] [--price DOLLARS]``.

Sizes, tokens and disk are those of ``check``, offline, on stand-ins (public_models.py). Time is the operations of the
training over a measured rate.
"""

import argparse
import json
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from public_models import lay_out

from cbd_hub.axes.sizing import format_count
from cbd_hub.build.check import BuildPlan, check_recipe, training_operations

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "scaling.md", ROOT / "docs" / "results"
BEGIN, END = "<!-- recipes:begin -->\n", "<!-- recipes:end -->"
RECIPES = [ROOT / "examples" / "recipes" / f"{name}.yaml" for name in ("gpt2", "pythia", "qwen3", "smollm2-1.7b")]
GPU = {"student": 103_102_272, "teacher": 134_515_008, "tokens_per_second": 135_000}  # on one H200
PEAK = 989e12  # operations a second of an H100 or H200 in bf16, without sparsity
TRAINED_BYTES, TEACHER_BYTES = 16, 4  # weight, gradient and two moments of AdamW in float32; a weight in float32


def plans() -> dict[str, BuildPlan]:
    """What ``check`` says of every recipe, by its file's name."""
    found = {}
    for recipe in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            found[recipe.stem] = check_recipe(lay_out(recipe, Path(folder)))
    return found


def rate(measured: Any) -> float:
    """Operations a second of a measured rate, which is in tokens a second."""
    return training_operations(measured["tokens_per_second"], measured["student"], measured["teacher"])


def table(price: float) -> str:
    """The Markdown between the markers; `price` is dollars a GPU hour."""
    lines = [
        f"| recipe | parameters | tokens | operations | hours on 1 | hours on 8 | GB on 1 | GB on each of 8 "
        f"| disk, GB | dollars at {price:.2f} a GPU hour |",
        "|---|" + "--:|" * 9,
    ]
    for name, plan in plans().items():
        hours = plan.operations / rate(GPU) / 3600
        counts = [anchor.num_parameters for anchor in plan.anchors]
        memory = [
            max(TEACHER_BYTES * large + TRAINED_BYTES * small / gpus for large, small in pairwise(counts)) / 1e9
            for gpus in (1, 8)
        ]
        sizes = " → ".join(format_count(count) for count in counts)
        tokens = format_count(sum(anchor.tokens for anchor in plan.anchors))
        lines.append(
            f"| [{name}](../examples/recipes/{name}.yaml) | {sizes} | {tokens} | {plan.operations:.1e} | {hours:.1f} "
            f"| {hours / 8:.1f} | {memory[0]:.0f} | {memory[1]:.0f} | {plan.disk / 1e9:.0f} | {hours * price:,.0f} |"
        )
    told = (
        f"The rate is the one that was measured on a GPU: {GPU['tokens_per_second']:,} tokens/s for a student of "
        f"{GPU['student'] / 1e6:.0f}M and a teacher of {GPU['teacher'] / 1e6:.0f}M parameters on one H200, in a bare "
        f"loop (eager bf16, fused AdamW) that is not part of this repository. That is {rate(GPU):.1e} operations a "
        f"second, {rate(GPU) / PEAK:.0%} of an H100's peak. Larger models should use more of it, gradient "
        f"checkpointing takes a third more of the student, and eight GPUs are taken as eight times one. The price is "
        f"assumed: `--price` takes another."
    )
    return "\n".join([*lines, "", told, "", against_measured()]) + "\n"


def against_measured() -> str:
    """The same estimate of a build that was run here, beside what it took."""
    train, build = (
        json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in ("train", "smollm2")
    )
    train |= train["ways"]["AnchorTrainer, hidden states"]
    parts = []
    for (large, small), step in zip(pairwise(build["anchors"]), build["build"].values(), strict=True):
        guess = training_operations(small["tokens"], small["parameters"], large["parameters"]) / rate(train)
        took = step["training"]
        parts.append(f"{small['name']} {guess:.0f} s estimated, {took:.0f} s measured ({took / guess:.1f} times)")
    return (
        f"The same estimate of a build on this CPU ([SmolLM2](results/smollm2.md), {build['machine']}), from the rate "
        f"of [training](results/train.md) ({train['tokens_per_second']:.0f} tokens/s, {train['machine']}): "
        f"{'; '.join(parts)}."
    )


def written(text: str, price: float) -> str:
    """The page with its table written anew."""
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}{table(price)}{END}{rest.split(END)[1]}"


def main() -> int:
    """Writes the page, or with ``--check`` returns 1 where it differs."""
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where the table differs")
    parser.add_argument("--price", type=float, default=3.0, help="dollars a GPU hour (3)")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    if (new := written(text, options.price)) == text:
        return 0
    if options.check:
        print("docs/scaling.md differs: run python .ci/recipe_costs.py")
        return 1
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
