"""Commands about chains: build, push, inspect, plan, and make a model."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich import box
from rich.console import Console
from rich.table import Column, Table

from cbd_hub.build.recipe import short_recipe
from cbd_hub.cli.options import (
    Alpha,
    CacheDir,
    ChainArgument,
    Json,
    LocalOnly,
    Memory,
    Method,
    Quant,
    Revision,
    ShapeOption,
    Size,
    Token,
    Tolerance,
    app,
    locate,
    open_chain,
    print_json,
    read_shape,
)
from cbd_hub.errors import OutputExistsError
from cbd_hub.progress import stage_line

if TYPE_CHECKING:
    from cbd_hub.build.check import BuildPlan
    from cbd_hub.chain.chain import Chain

__all__ = ["build", "check", "fit_curve_command", "from_chain_command", "inspect", "plan", "push"]


@app.command()
def build(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the chain.")],
    recipe: Annotated[Path | None, typer.Argument(help="The recipe, a YAML file.", metavar="[RECIPE.yaml]")] = None,
    source: Annotated[str | None, typer.Option(help="Instead of a recipe: a model, a folder or a repo id.")] = None,
    anchors: Annotated[
        list[str] | None, typer.Option(help="Sizes of its anchors: fractions of the source (0.75 0.5) or counts.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="UTF-8 text files to train on, or patterns.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Or a dataset: a repo id or a folder.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens an anchor; by default 1M.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the chain; by default the source's.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built, and stop.")] = False,
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start over instead of resuming.")] = False,
    as_json: Json = False,
) -> None:
    """Builds a chain from a recipe, or from a model and text; or resumes a build.

    Without a recipe one is made and written beside the chain (OUTPUT.yaml).

    Example: cbd-hub build examples/recipes/quickstart.yaml --output my-chain

    Example: cbd-hub build --source org/model --anchors 0.75 0.5 --text corpus/*.txt --output my-chain
    """
    if (recipe is None) == (source is None):
        raise typer.BadParameter("give a recipe, or --source with --anchors and --text or --dataset")
    chosen_recipe: Path | dict[str, Any] | None = recipe
    if source is not None:
        if bool(text) == (dataset is not None):
            raise typer.BadParameter("give exactly one of --text and --dataset")
        chosen_recipe = short_recipe(source, anchors or [], text or [], dataset, tokens, name)
        stage_line(yaml.safe_dump(chosen_recipe, sort_keys=False), not as_json)
    from cbd_hub.build.build import build_chain
    from cbd_hub.build.check import check_recipe

    if dry_run or source is not None:
        plan = check_recipe(chosen_recipe, output)
        if dry_run:
            _show_check(plan, as_json)
            return
        stage_line(str(plan), not as_json)
    if isinstance(chosen_recipe, dict):
        chosen_recipe = _write_recipe(output, chosen_recipe)
    chain = build_chain(chosen_recipe, output, resume=not no_resume, progress=not as_json)  # type: ignore[arg-type]
    _show_chain(chain, as_json)


def _write_recipe(output: Path, recipe: dict[str, Any]) -> Path:
    """Writes a recipe beside the chain that it makes; one that is there must say the same."""
    path = output.with_name(f"{output.name}.yaml")
    written = yaml.safe_dump(recipe, sort_keys=False)
    if path.exists() and path.read_text(encoding="utf-8") != written:
        raise OutputExistsError(f"{path} holds another recipe; name another --output, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written, encoding="utf-8")
    return path


@app.command()
def check(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE.yaml")],
    output: Annotated[Path | None, typer.Option(help="Where the build would go; its disk is looked at.")] = None,
    as_json: Json = False,
) -> None:
    """Checks a recipe without training: shows the plan of the build, and everything that would stop it.

    Exit 1 where something would.

    Example: cbd-hub check examples/recipes/quickstart.yaml
    """
    from cbd_hub.build.check import check_recipe

    _show_check(check_recipe(recipe, output), as_json)


def _show_check(plan: "BuildPlan", as_json: bool) -> None:
    """Prints what a build would do; exit 1 where something would stop it."""
    if as_json:
        print_json(plan.as_dict())
    else:
        sys.stdout.write(f"{plan}\n")
    if plan.problems:
        raise typer.Exit(1)


@app.command("fit-curve")
def fit_curve_command(
    folder: Annotated[Path, typer.Argument(help="The chain: a folder that holds chain.json.", metavar="DIR")],
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe whose text to train on; by default the chain's own.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens a pair; by default the recipe's.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the control points; by default at most 32.", min=1)] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of the control points.")] = None,
    as_json: Json = False,
) -> None:
    """Trains control points for a chain that has none; its anchors stay as they are.

    Models between two anchors then lie on a curve, below the straight line in loss.

    Example: cbd-hub fit-curve my-chain --tokens 5M
    """
    from cbd_hub.build.fit_curve import fit_curve

    chain = fit_curve(folder, recipe, tokens=tokens, rank=rank, learning_rate=learning_rate, progress=not as_json)
    _show_chain(chain, as_json)


@app.command()
def push(
    folder: Annotated[str, typer.Argument(help="The chain: a folder that holds chain.json.", metavar="DIR")],
    repo_id: Annotated[str, typer.Argument(help="owner/name of the chain's repository.", metavar="REPO_ID")],
    private: Annotated[bool, typer.Option("--private", help="Make the repositories private.")] = False,
    no_collection: Annotated[bool, typer.Option("--no-collection", help="Make no Collection of them.")] = False,
    branch: Annotated[str | None, typer.Option(help="Branch to commit to; made if need be.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the changes as pull requests.")] = False,
    license: Annotated[str | None, typer.Option(help="License on the cards, e.g. apache-2.0.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be uploaded, and stop.")] = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Publishes a chain: repositories, and a Collection of them.

    There is one for each anchor and one for the chain. Pushing again uploads only what changed; a push that was
    interrupted is finished by the next one.

    Example: cbd-hub push my-chain my-name/my-chain --private
    """
    from cbd_hub.chain.chain import Chain

    published = Chain.from_pretrained(folder).push_to_hub(
        repo_id,
        private or None,
        token,
        not no_collection,
        branch=branch,
        create_pr=create_pr,
        license=license,
        dry_run=dry_run,
        progress=not as_json,
    )
    if as_json:
        print_json(published.as_dict())
    else:
        sys.stdout.write(f"{published}\n")


@app.command()
def inspect(
    chain: ChainArgument,
    as_json: Json = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Shows the anchors of a chain: sizes, losses, origin.

    Example: cbd-hub inspect my-chain
    """
    _show_chain(open_chain(locate(chain, revision, token, cache_dir, local_files_only)), as_json)


def _show_chain(chain: "Chain", as_json: bool) -> None:
    from cbd_hub.axes.sizing import format_count

    manifest = chain.manifest
    if as_json:
        print_json(manifest.model_dump(mode="json", exclude={"axis_map"}, exclude_none=True))
        return
    console = Console(highlight=False)
    console.print(
        f"{manifest.name}: a {manifest.architecture} chain (source: {manifest.source}), license "
        f"{manifest.license or 'not stated'}, basis {manifest.basis}",
        markup=False,
    )
    varying = [name for name, value in manifest.anchors[0].shape.items() if manifest.anchors[-1].shape[name] != value]
    columns = [Column(name.replace("_", " ").removeprefix("num "), justify="right") for name in varying]
    table = Table(
        Column("anchor", no_wrap=True), "size", *columns, "tokens", "loss", "aligned", box=box.SIMPLE, pad_edge=False
    )
    for anchor in manifest.anchors:
        evaluation = anchor.evaluation
        table.add_row(
            anchor.name,
            format_count(anchor.num_parameters),
            *(str(anchor.shape[name]) for name in varying),
            format_count(anchor.training.tokens) if anchor.training else "-",
            f"{evaluation.loss:.4f}" if evaluation else "-",
            "-" if anchor.barrier is None else "yes" if anchor.aligned else "no",
        )
    console.print(table)
    if manifest.anchors[0].evaluation:
        console.print(f"losses in nats a token, on {manifest.anchors[0].evaluation.num_tokens} held-out tokens")
    if better := manifest.better_than_source:
        console.print(f"warning: {' and '.join(better)} read it better than the source; was it trained on such text?")
    for method in sorted({p.method for p in manifest.curve}):
        points = ", ".join(
            f"{format_count(p.num_parameters)} {p.loss:.3f}"
            for p in sorted(manifest.curve, key=lambda p: p.num_parameters)
            if p.method == method
        )
        console.print(f"in between, {method}: {points}", markup=False)


@app.command()
def plan(
    chain: ChainArgument,
    num_parameters: Size = None,
    shape: ShapeOption = None,
    alpha: Alpha = None,
    method: Method = "auto",
    tolerance: Tolerance = 0.01,
    memory: Memory = None,
    quant: Quant = "bf16",
    as_json: Json = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Shows what from-chain would do, without reading a weight.

    Example: cbd-hub plan my-chain --num-parameters 138M
    """
    planned = open_chain(locate(chain, revision, token, cache_dir, local_files_only)).plan(
        num_parameters,
        shape=read_shape(shape),
        alpha="auto" if alpha is None else alpha,
        method=method,
        tolerance=tolerance,
        memory=memory,
        quant=quant,
    )
    if as_json:
        print_json(planned.as_dict())
    else:
        sys.stdout.write(f"{planned}\n")


@app.command("from-chain")
def from_chain_command(
    chain: ChainArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new or empty folder for the model.")],
    num_parameters: Size = None,
    shape: ShapeOption = None,
    alpha: Alpha = None,
    method: Method = "auto",
    tolerance: Tolerance = 0.01,
    memory: Memory = None,
    quant: Quant = "bf16",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    refine: Annotated[
        bool, typer.Option("--refine", help="Compare other ways to make it on the chain's calibration tokens.")
    ] = False,
    push_to_hub: Annotated[str | None, typer.Option(help="Publish the model there: owner/name.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    as_json: Json = False,
    revision: Revision = None,
    token: Token = None,
    cache_dir: CacheDir = None,
    local_files_only: LocalOnly = False,
) -> None:
    """Makes a model of any size from a chain: a ready folder.

    The folder holds weights, config, tokenizer and card.

    Example: cbd-hub from-chain my-chain --num-parameters 138M --output my-model
    """
    from cbd_hub.chain.export import write_model
    from cbd_hub.hub.publish import publish_folder

    opened = open_chain(locate(chain, revision, token, cache_dir, local_files_only))
    planned = opened.plan(
        num_parameters,
        shape=read_shape(shape),
        alpha="auto" if alpha is None else alpha,
        method=method,
        tolerance=tolerance,
        memory=memory,
        quant=quant,
    )
    write_model(opened, planned, output, dtype=dtype, progress=not as_json, refine=refine, repo_id=push_to_hub)
    published = None
    if push_to_hub:
        message = f"{planned.num_parameters:,} parameters from the chain {chain}"
        published = publish_folder(output, push_to_hub, message, private=private or None, token=token)
    if as_json:
        publication = {"published": {"repo_id": published.repo_id, "commit": published.sha}} if published else {}
        print_json({**planned.as_dict(), "output": str(output), **publication})
    else:
        for note in planned.notes:
            sys.stderr.write(f"note: {note}\n")
        sys.stdout.write(f"{planned.num_parameters:,} parameters, {planned.method}, written to {output}\n")
        if published:
            sys.stdout.write(f"published as {published.repo_id} at {published.sha}\n")
