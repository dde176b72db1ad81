"""Writes the quickstart's figures, docs/results/quickstart.json, into README.md: numbers are never typed by hand.

``python .ci/readme_table.py`` after copying a run's quickstart.json and size_loss.png to docs/results/.
"""

import json
import math
from pathlib import Path

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- quickstart:begin -->", "<!-- quickstart:end -->"
NAMES = {
    "bezier": "on the curve",
    "interpolate": "straight line",
    "small anchor": "small anchor",
    "prune": "pruned large anchor",
    "paper": "the paper's rule",
    "random init": "random init",
}


def table() -> str:
    """The Markdown between the markers."""
    data = json.loads((ROOT / "docs" / "results" / "quickstart.json").read_text(encoding="utf-8"))
    lines = ["| parameters | " + " | ".join(NAMES.values()) + " |", "|--:|" + "--:|" * len(NAMES)]
    for row in data["targets"]:
        cells = [f"{row[n]:.3f} ({math.exp(row[n]):.1f})" for n in NAMES]
        lines.append(f"| {row['num_parameters']:,} | " + " | ".join(cells) + " |")
    anchors = ", ".join(f"{count:,} parameters {loss:.3f}" for _, count, loss in data["anchors"])
    lines += [
        "",
        f"Held-out loss in nats a token (perplexity), zero-shot; {data['held_out_tokens']:,} held-out tokens, "
        f"one seed (0). The anchors themselves: {anchors}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    readme.write_text(f"{head}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")
