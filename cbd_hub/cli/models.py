"""Commands about models: measure them, train them further, compare their vocabularies, look at them."""

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from cbd_hub.cli.options import (
    CacheDir,
    ChainArgument,
    Json,
    LocalOnly,
    Revision,
    ShapeOption,
    Size,
    Token,
    app,
    locate,
    open_chain,
    print_json,
    read_shape,
)

__all__ = ["app_command", "demo", "env", "eval_command", "export", "recover", "vocabulary"]


@app.command()
def vocabulary(
    chain_tokenizer: Annotated[str, typer.Argument(help="Tokenizer of the chain: a folder or a repo id.")],
    source_tokenizer: Annotated[str, typer.Argument(help="Tokenizer of the source: a folder or a repo id.")],
    text: Annotated[list[Path], typer.Option(help="UTF-8 text to count on; may be repeated.")],
    as_json: Json = False,
    token: Token = None,
) -> None:
    """Compares two vocabularies, as a bridge would.

    Example: cbd-hub vocabulary my-chain org/source-model --text corpus.txt
    """
    from cbd_hub.chain.compare import compare_tokenizers

    chain, source = (locate(place, None, token, None, False) for place in (chain_tokenizer, source_tokenizer))
    report = compare_tokenizers(chain, source, text)
    if as_json:
        print_json(report.to_dict())
    else:
        sys.stdout.write(f"{report}\n")


@app.command()
def demo(
    num_parameters: Size = "600k",
    prompt: Annotated[str, typer.Option(help="How the text begins.")] = "The Congress of the United States",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.", min=1)] = 60,
    seed: Annotated[int, typer.Option(help="Another seed writes another text.")] = 0,
    as_json: Json = False,
) -> None:
    """Makes a model from the small chain that comes with the package, offline, and lets it write.

    Example: cbd-hub demo --num-parameters 500k
    """
    from cbd_hub.chain.chain import SHIPPED, Chain
    from cbd_hub.text.generators import LocalGenerator
    from cbd_hub.text.settings import Sampling

    chain = Chain.from_pretrained(SHIPPED)
    plan = chain.plan(num_parameters)
    start = time.perf_counter()
    model = chain.initialize(plan, progress=False)
    seconds = time.perf_counter() - start
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=0.7, seed=seed)
    (written,) = LocalGenerator(model, chain.tokenizer).generate([prompt], sampling)
    if as_json:
        print_json({"num_parameters": plan.num_parameters, "seconds": seconds, "text": prompt + written.text})
        return
    between = f"between {plan.small} and {plan.large}" if plan.small != plan.large else f"{plan.large} itself"
    sys.stdout.write(
        f"{plan.num_parameters:,} parameters, made in {seconds:.2f} s ({plan.method}, {between})\n\n"
        f"{prompt}{written.text}\n\n"
        f'The same in Python: from_chain("{SHIPPED}", "{num_parameters}")\n'
    )


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A chain, or a model: a folder or a repo id.", metavar="CHAIN_OR_MODEL")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file.")],
    gguf: Annotated[str, typer.Option(help="f32, f16 or q8_0.")] = "f16",
    num_parameters: Size = None,
    shape: ShapeOption = None,
    as_json: Json = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Writes a model as one GGUF file, for llama.cpp and what is built on it.

    Of a chain, name the size; a model folder is written as it is.

    Example: cbd-hub export my-chain --num-parameters 138M --gguf q8_0 --output my-model.gguf
    """
    from cbd_hub.chain.gguf_file import write_gguf

    location = locate(model, revision, token, cache_dir, local_files_only)
    if num_parameters is None and shape is None:
        from transformers import AutoTokenizer

        from cbd_hub.hub.load import load_model

        made = load_model(location, "auto")
        tokenizer: Any = AutoTokenizer.from_pretrained(location.place, trust_remote_code=False, **location.options)
    else:
        chain = open_chain(location)
        made = chain.initialize(chain.plan(num_parameters, shape=read_shape(shape)), progress=not as_json)
        tokenizer = chain.tokenizer
    size = write_gguf(made, tokenizer, output, gguf, progress=not as_json)  # type: ignore[arg-type]
    if as_json:
        print_json({"output": str(output), "kind": gguf, "bytes": size, "num_parameters": made.num_parameters()})
    else:
        sys.stdout.write(f"{made.num_parameters():,} parameters as {gguf}, {size:,} bytes, written to {output}\n")


@app.command("eval")
def eval_command(
    models: Annotated[
        list[str],
        typer.Argument(help="Models and chains, each a folder or a repo id.", metavar="MODEL_OR_CHAIN..."),
    ],
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 text to measure on; may be repeated.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens a block.", min=2)] = 512,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.", min=1)] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Or tasks, comma-separated: boolq, piqa, openbookqa, commonsense_qa.")
    ] = None,
    items: Annotated[Path, typer.Option(help="Folder of the tasks' JSONL files.")] = Path("eval-items"),
    summaries: Annotated[
        Path | None, typer.Option(help="Or JSONL, a prompt and a reference a line, for ROUGE.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens written behind a prompt.", min=1)] = 64,
    metric_scripts: Annotated[
        str | None,
        typer.Option(help="Run evaluate's metric script, of a folder or fetched ('hub'), instead of rouge-score."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first so many items of each task.", min=1)] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the results over parameters, as FILE.png.")] = None,
    update_card: Annotated[
        bool, typer.Option("--update-card", help="Write the results into the README.md of each folder.")
    ] = False,
    as_json: Json = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Measures models and chains: on text, tasks or summaries.

    A chain stands for all its anchors. Text gives perplexity and bits a byte, tasks give accuracy, summaries ROUGE.

    Example: cbd-hub eval my-chain my-model --text held-out.txt
    """
    from cbd_hub.chain import compare
    from cbd_hub.evaluation import plots as eval_plots
    from cbd_hub.hub import card_results

    if sum(bool(given) for given in (text, tasks is not None, summaries)) > 1:
        raise typer.BadParameter("give --text, --tasks or --summaries, not both or all")
    locations = [locate(model, revision, token, cache_dir, local_files_only) for model in models]
    progress = not as_json
    if plot:
        eval_plots.check_plot(plot)
    for model in models if update_card else []:
        card_results.open_card(model)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        rows = compare.evaluate_on_tasks(locations, names, items, limit=limit, progress=progress)
    elif summaries is not None:
        writing: dict[str, Any] = {"limit": limit, "max_new_tokens": max_new_tokens, "metric_scripts": metric_scripts}
        rows = compare.evaluate_on_summaries(locations, summaries, **writing, progress=progress)
    else:
        blocks: dict[str, Any] = {"sequence_length": sequence_length, "max_tokens": max_tokens}
        rows = compare.evaluate_on_text(locations, text or [], **blocks, progress=progress)
    if as_json:
        print_json(rows)
    else:
        _print_rows(rows)
    if plot:
        (eval_plots.plot_losses if text else eval_plots.plot_scores)(rows, plot)
    for model in dict.fromkeys(models) if update_card else []:
        own = [row for row in rows if row["of"] == model]
        card = card_results.update_card(model, own, ", ".join(path.name for path in text or []))
        if not as_json:
            sys.stdout.write(f"results written into {card}\n")


def _print_rows(rows: list[dict[str, Any]]) -> None:
    """What was measured as a table, and what has to be known to read it."""
    from cbd_hub.evaluation.plots import one_tokenizer

    arguments = list(dict.fromkeys(row["of"] for row in rows))
    several, losses = len(arguments) > 1, "loss" in rows[0]
    heads = (
        ["loss (nats a token)", "perplexity", "bits a byte", "tokens"]
        if losses
        else ["task", "metric", "value", "items"]
    )
    names = ["of", "anchor"] if several else ["model"]
    numbers = (Column(head, no_wrap=" " not in head) for head in ["parameters", *heads])
    table = Table(*(Column(name, overflow="fold") for name in names), *numbers)
    for row in rows:
        if losses:
            bits = f"{row['bits_per_byte']:.4f}"
            cells = [f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", bits, f"{row['num_tokens']:,}"]
        else:
            error = "" if row["stderr"] is None else f" ± {row['stderr']:.4f}"
            cells = [row["task"], row["metric"], f"{row['value']:.4f}{error}", f"{row['items']:,}"]
        anchor = "" if row["name"] == row["of"] else row["name"]
        labels = [row["of"], anchor] if several else [row["name"]]
        table.add_row(*map(escape, labels), f"{row['num_parameters']:,}", *map(escape, cells))
    Console(highlight=False).print(table)
    if losses:
        if not one_tokenizer(rows):
            sys.stdout.write(
                "the tokenizers differ, so only bits a byte compare, not losses or perplexities a token\n"
            )
        return
    by = rows[0].get("implementation")
    how = f"greedy; ROUGE F1 by {by}" if by else "zero-shot"
    sys.stdout.write(f"{how}; ± is one standard error, over items\n")
    cuts = {(row["of"], row["task"]): row["truncated"] for row in rows if row["truncated"]}
    for (of, task), cut in cuts.items():
        whose = f" of {of}" if several else ""
        sys.stdout.write(f"{cut} items of {task} were longer than the context{whose} and lost their beginning\n")


@app.command()
def recover(
    model: Annotated[str, typer.Argument(help="A model made from a chain: a folder or a repo id.", metavar="MODEL")],
    text: Annotated[list[str], typer.Option(help="UTF-8 text, a file or a quoted pattern; may be repeated.")],
    output: Annotated[Path, typer.Option(help="A new or empty folder for the model and its curve.")],
    tokens: Annotated[str, typer.Option(help="Training tokens, e.g. 5M.")] = "1M",
    learning_rate: Annotated[
        float, typer.Option(help="Peak rate; 1e-4 for 100M parameters, 1e-3 for tiny ones.")
    ] = 1e-4,
    teacher: Annotated[
        str | None, typer.Option(help="Learn from this model, or a chain's largest anchor, too.")
    ] = None,
    against_scratch: Annotated[
        bool, typer.Option("--against-scratch", help="Train the same shape from random weights as well.")
    ] = False,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens a block; by default at most 512.", min=2)] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks a step.", min=1)] = 8,
    as_json: Json = False,
) -> None:
    """Trains a model from a chain further on text.

    Draws the curve of its loss, against random weights if you like.

    Example: cbd-hub recover my-model --text 'corpus/*.txt' --output recovered --tokens 5M --teacher my-chain
    """
    from cbd_hub.training.recover import recover_on_text

    recoveries = recover_on_text(
        model,
        text,
        output,
        tokens=tokens,
        learning_rate=learning_rate,
        teacher=teacher,
        against_scratch=against_scratch,
        sequence_length=sequence_length,
        batch_size=batch_size,
        progress=not as_json,
    )
    if as_json:
        print_json({name: result.as_dict() for name, result in recoveries.items()})
        return
    table = Table(Column("model", overflow="fold"), "tokens", "loss before", "loss after")
    for name, result in recoveries.items():
        table.add_row(name, f"{result.training.tokens:,}", f"{result.start_loss:.4f}", f"{result.final_loss:.4f}")
    Console(highlight=False).print(table)
    sys.stdout.write(f"losses in nats a token, on held-out text; written to {output}\n")


@app.command("app")
def app_command(
    chain: ChainArgument,
    port: Annotated[
        int | None, typer.Option(help="Port on this machine; by default the first free one from 7860.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Make a public link, for 72 hours, through gradio.live.")
    ] = False,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Do not open the page.")] = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Opens a page: choose a size, build it, let it write.

    Example: cbd-hub app my-chain
    """
    from cbd_hub.app.page import launch

    launch(
        locate(chain, revision, token, cache_dir, local_files_only),
        port=port,
        share=share,
        browser=not no_browser,
    )


@app.command()
def env(as_json: Json = False) -> None:
    """Prints versions and settings, for bug reports.

    Example: cbd-hub env --json
    """
    libraries = ["cbd_hub", "torch", "transformers", "huggingface_hub", "safetensors", "datasets", "accelerate"]
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for library in libraries:
        try:
            facts[library] = version(library)
        except PackageNotFoundError:
            facts[library] = "not installed"
    import torch

    facts["accelerator"] = (
        str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "none (CPU)"
    )
    facts |= {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT") if name in os.environ}
    if as_json:
        print_json(facts)
    else:
        for name, value in facts.items():
            sys.stdout.write(f"- {name}: {value}\n")
