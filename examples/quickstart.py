"""The main job on real text: build a chain, then make models of sizes in between and compare them.

Run with ``make quickstart``. Everything is local: the text lies in examples/data, the source is trained from scratch.
"""

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from cbd_hub import Chain, build_chain
from cbd_hub.axes.sizing import format_count
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.evaluation.plots import plot_size_loss

HERE = Path(__file__).parent


def main(recipe: Path, output: Path) -> None:
    """Builds the chain of a recipe, makes three models between its anchors, prints and plots how good they are."""
    chain = build_chain(recipe, output / "chain")
    test = BuildInputs(*load_recipe(recipe)).text.test
    counts = [anchor.num_parameters for anchor in chain.anchors]
    rows, ways = [], ("bezier", "interpolate", "prune", "paper")
    for pair, position in ((1, 0.5), (0, 0.4), (0, 0.75)):
        size = round(counts[pair + 1] + position * (counts[pair] - counts[pair + 1]))
        bent = chain.manifest.anchors[pair + 1].bent  # a control point is kept only where it helps
        plans = {way: chain.plan(size, method=way if bent or way != "bezier" else "auto") for way in ways}
        models = {way: chain.initialize(plan, progress=False) for way, plan in plans.items()}
        torch.manual_seed(0)
        models["random init"] = AutoModelForCausalLM.from_config(models["bezier"].config)
        losses = {way: evaluate_loss(model, test).loss for way, model in models.items()}
        losses["small anchor"] = next(
            a for a in chain.manifest.anchors if a.name == plans["prune"].small
        ).evaluation.loss
        rows.append({"num_parameters": plans["interpolate"].num_parameters, **losses})
    exact = chain.initialize(chain.plan(chain.anchors[1].num_parameters), progress=False)
    reference = AutoModelForCausalLM.from_pretrained(output / "chain" / "anchors" / chain.anchors[1].name)
    same = all(torch.equal(a, b) for a, b in zip(exact.parameters(), reference.parameters(), strict=True))
    show(chain, rows)
    print(f"At an anchor's own size the model is that anchor, bit for bit: {same}")
    sample(chain, models["bezier"])
    series = {way: [(row["num_parameters"], row[way]) for row in rows] for way in ways}
    anchors = [(a.name, a.num_parameters, a.evaluation.loss) for a in chain.manifest.anchors]
    plot_size_loss(series, anchors, output / "size_loss.png", "Held-out loss of models from one chain, by size")
    tokens = chain.manifest.anchors[0].evaluation.num_tokens
    report = {"targets": rows, "anchors": anchors, "held_out_tokens": tokens, "bit_for_bit": same}
    (output / "quickstart.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nCurve: {output / 'size_loss.png'}   chain: {output / 'chain'}   figures: {output / 'quickstart.json'}")


def show(chain: Chain, rows: list[dict[str, float]]) -> None:
    """Prints losses (nats a token) and perplexities on text that took no part in training or selection."""
    names = ["bezier", "interpolate", "random init", "small anchor", "prune", "paper"]
    table = Table("parameters", *names, title="Held-out loss in nats a token (perplexity)")
    for row in rows:
        cells = [f"{row[n]:.3f} ({torch.tensor(row[n]).exp():.1f})" for n in names]
        table.add_row(format_count(int(row["num_parameters"])), *cells)
    console = Console(width=120)
    console.print(table)
    anchors = ", ".join(f"{a.name} {a.evaluation.loss:.3f}" for a in chain.manifest.anchors)
    console.print(f"anchors: {anchors}; {chain.manifest.anchors[0].evaluation.num_tokens} held-out tokens; seed 0")


def sample(chain: Chain, model: torch.nn.Module) -> None:
    """Prints a text that an interpolated model writes."""
    torch.manual_seed(0)
    inputs = chain.tokenizer("The Congress of the United States", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=60, do_sample=True, top_k=40)
    print(f"\nA sample of the {format_count(model.num_parameters())} model:\n{chain.tokenizer.decode(ids[0])}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=HERE / "recipes" / "quickstart.yaml")
    parser.add_argument("--output", type=Path, default=Path("quickstart-output"))
    arguments = parser.parse_args()
    main(arguments.recipe, arguments.output)
