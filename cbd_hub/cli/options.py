"""The command line as a whole, the options that several commands have, and what is done with them first."""

import json
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from cbd_hub.chain.chain import Chain
    from cbd_hub.hub.read import Location

__all__ = ["app", "locate", "open_chain", "print_json", "read_shape"]

app = typer.Typer(
    name="cbd-hub",
    help="Chain-based distillation: build a chain of anchors, and make a model of any size from it.",
    epilog="First steps: cbd-hub plan CHAIN --num-parameters 138M shows what would be made; cbd-hub from-chain CHAIN "
    "--num-parameters 138M --output my-model makes it. CHAIN is a Hub repo id or a folder.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
"""The command line as a Typer application; the entry point is :func:`main`."""


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"cbd-hub {version('cbd_hub')}\n")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    context.obj = {"debug": debug}


ChainArgument = Annotated[
    str, typer.Argument(help="A Hub repo id, or a folder that holds chain.json.", metavar="CHAIN")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]
Token = Annotated[str | None, typer.Option(help="Hub token; by default the one that `hf auth login` stored.")]
CacheDir = Annotated[str | None, typer.Option(help="Another cache folder than HF_HOME's.")]
LocalOnly = Annotated[bool, typer.Option("--local-files-only", help="Use the cache alone; never ask the Hub.")]
Size = Annotated[str | None, typer.Option(help="Size, e.g. 138M, 1.2B or 138000000.")]
ShapeOption = Annotated[str | None, typer.Option(help="Or the shape, as JSON: '{\"num_hidden_layers\": 14}'.")]
Alpha = Annotated[float | None, typer.Option(help="Weight of the small anchor, 0 to 1; by default 1 - position.")]
Method = Annotated[str, typer.Option(help="auto, bezier, interpolate, paper, expand or prune.")]
Memory = Annotated[str | None, typer.Option(help="Or the most that the weights may take on disk, e.g. 512MB.")]
Quant = Annotated[str, typer.Option(help="As what, for --memory: bf16, q8_0 or q4_k_m.")]
Tolerance = Annotated[float, typer.Option(help="Largest relative error of the parameter count.")]


def locate(
    place: str, revision: str | None, token: str | None, cache_dir: str | None, local_files_only: bool
) -> "Location":
    """Returns where a chain or model is, as the options of the command line say."""
    from cbd_hub.hub.read import Location

    return Location(place, revision, "", token, cache_dir, local_files_only)


def open_chain(location: "Location") -> "Chain":
    """Reads a chain's manifest."""
    from cbd_hub.chain.chain import Chain

    return Chain.open(location)


def print_json(document: Any) -> None:
    """Prints one JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=1) + "\n")


def read_shape(text: str | None) -> dict[str, int] | None:
    """The shape that ``--shape`` gives as JSON."""
    if text is None:
        return None
    try:
        shape = json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"--shape is no JSON: {error}") from None
    if not isinstance(shape, dict):
        raise typer.BadParameter("--shape must be a JSON object of config fields")
    return shape
