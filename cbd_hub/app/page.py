"""The page of a chain: choose a size, see the plan, build the model, try it beside its anchors, download it.

The page is a thin skin: :class:`cbd_hub.app.workbench.Workbench` does the work through
:class:`cbd_hub.chain.chain.Chain`, and :mod:`cbd_hub.app.page_data` says it in words and pictures. A chain is opened
when the page is loaded, so one that cannot be read is a message on the page and does not end it; the same holds for
every later error.

A token that a visitor types is used for one push and forgotten: gradio's run history is off, its events are no public
interface, and no text of the page quotes it.
Pages that others can reach (``share=True``, a Space) cannot write to the machine's folders.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from cbd_hub.app.page_data import (
    BLUE,
    STYLE,
    SizeScale,
    compared,
    curve_html,
    heading_html,
    message_html,
    plan_html,
    plan_rows,
)
from cbd_hub.app.workbench import NEW_TOKENS, Workbench, complete
from cbd_hub.axes.sizing import format_count
from cbd_hub.chain.export import write_model
from cbd_hub.errors import CbdError, RecipeError, SizeError
from cbd_hub.hub.read import Location
from cbd_hub.interpolation.plan import Plan

__all__ = ["launch"]


_PROBLEMS = (CbdError, OSError, MemoryError, torch.OutOfMemoryError)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def launch(
    chain: str | Path | Location,
    *,
    port: int | None = None,
    share: bool = False,
    browser: bool = True,
    write: Callable[..., Iterator[str]] = complete,
) -> None:
    """Serves the page until it is stopped (Ctrl-C), on this machine's loopback address.

    The variable GRADIO_SERVER_NAME names another address, as a Space does; folders cannot be written then.

    Args:
        chain: A Hub repo id, or a folder that holds ``chain.json``; or its location. The page says why a chain cannot
            be read. Visitors publish with a token of their own, never with the location's.
        port: None is the first free one from 7860 on.
        share: Let others reach the page, through gradio's servers.
        browser: Open the page in a browser.
        write: What continues a text, with the arguments of :func:`cbd_hub.app.workbench.complete`: a Space borrows a
            GPU for it.

    Raises:
        CbdError: gradio is not installed.
        OSError: The port is taken.
    """
    gr = _gradio()
    bench = Workbench(chain)
    address = os.environ.get("GRADIO_SERVER_NAME", _LOOPBACK[0])
    alone = not share and address in _LOOPBACK and "SPACE_ID" not in os.environ
    plain = ["system-ui", "sans-serif"]  # gradio's own would be fetched from a server of fonts
    theme = gr.themes.Default(primary_hue="blue", font=plain, font_mono=["monospace"]).set(
        button_primary_background_fill=BLUE,
        button_primary_background_fill_hover="#005a8d",
        button_primary_text_color="white",
        slider_color=BLUE,
        **dict.fromkeys(("body_text_color_subdued", "block_info_text_color", "input_placeholder_color"), "#6b7280"),
    )
    _page(gr, bench, alone, write).launch(
        server_port=port,
        share=share,
        inbrowser=browser,
        theme=theme,
        css=STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
    )


def _gradio() -> Any:
    try:
        return import_module("gradio")
    except ImportError as error:
        raise CbdError(f'the page needs gradio ({error}); install it: pip install "cbd_hub[app]"') from None


def _telling(place: Any) -> Callable[[Callable[..., Iterator[Any]]], Callable[..., Iterator[Any]]]:
    """Makes a handler's error a message at a place of the page; the rest of the page stays as it is."""

    def wrap(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @wraps(handler)
        def run(*arguments: Any) -> Iterator[Any]:
            try:
                yield from handler(*arguments)
            except _PROBLEMS as error:
                yield {place: message_html(str(error) or type(error).__name__, error=True)}

        return run

    return wrap


def _page(gr: Any, bench: Workbench, alone: bool, write: Callable[..., Iterator[str]]) -> Any:
    """The page; ``alone`` where only the user of this machine can reach it."""
    bar = gr.Progress(track_tqdm=True)
    with gr.Blocks(title=f"Chain {bench.location.place}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        heading = gr.HTML("<h1>cbd_hub</h1>")
        opening = gr.HTML("", elem_id="opening", elem_classes="cbd-quiet")
        retry = gr.Button("Try again", visible=False)
        with gr.Column(visible=False) as body:
            with gr.Row():
                with gr.Column(scale=3):
                    curve = gr.HTML("", elem_id="curve")
                    size = gr.Slider(label="Size", elem_id="size", buttons=[])
                    planning = gr.HTML("", elem_id="planning", elem_classes="cbd-quiet")
                    build = gr.Button("Build", variant="primary")
                    building = gr.HTML("", elem_id="building", elem_classes="cbd-busy")
                with gr.Column(scale=2):
                    planned = gr.HTML("", elem_id="plan")
            gr.HTML("<h2>Try it</h2>")
            with gr.Row(equal_height=True):
                prompt = gr.Textbox(label="Prompt", lines=2, value="The state of the Union", scale=3, min_width=280)
                tokens = gr.Radio(NEW_TOKENS, value=NEW_TOKENS[1], label="New tokens", scale=2, min_width=280)
            with gr.Accordion("Sampling", open=False):
                temperature = gr.Slider(
                    0, 2, 0, step=0.05, label="Temperature", info="0: the likeliest token each time"
                )
                top_p = gr.Slider(0.05, 1, 0.95, step=0.05, label="Top p")
            generate = gr.Button("Generate", variant="primary")
            generating = gr.HTML("", elem_id="generating", elem_classes="cbd-busy")
            with gr.Row():
                names = ("Small anchor", "This size", "Large anchor")
                texts = [
                    gr.Textbox(label=name, lines=8, max_lines=8, min_width=240, interactive=False) for name in names
                ]
            gr.HTML("<h2>Take it along</h2>")
            with gr.Row():
                with gr.Column():
                    pack = gr.Button("Make a zip file")
                    packed = gr.File(label="Zip file of the model", interactive=False, visible=False)
                    folder = gr.Textbox(
                        label="Folder on this machine", placeholder="for example my-model", visible=alone
                    )
                    save = gr.Button("Save to the folder", visible=alone)
                with gr.Column():
                    repo_id = gr.Textbox(label="Repository", placeholder="for example my-name/my-model")
                    token = gr.Textbox(
                        label="Hub token with write permission",
                        type="password",
                        info="Used once, for this push; neither logged nor kept.",
                        html_attributes=gr.InputHTMLAttributes(autocomplete="off"),
                    )
                    private = gr.Checkbox(label="Private", value=True)
                    push = gr.Button("Push to the Hub")
            taking = gr.HTML("", elem_id="taking", elem_classes="cbd-busy")

        def chosen(value: float | None) -> Plan:
            """The plan that the page shows: whatever is made or taken along is of this size."""
            return bench.chain.plan(SizeScale.of(bench.chain.manifest).count(value))

        @_telling(opening)
        def show() -> Iterator[Any]:
            yield {retry: gr.Button(visible=True)}  # until it is open
            manifest = bench.chain.manifest
            scale = SizeScale.of(manifest)
            yield {
                heading: heading_html(manifest),
                opening: "",
                retry: gr.Button(visible=False),
                body: gr.Column(visible=True),
                size: gr.Slider(scale.low, scale.high, scale.middle, step=scale.step, label=scale.label),
            }

        @_telling(planning)
        def plan_it(value: float | None) -> Iterator[Any]:
            manifest = bench.chain.manifest
            count = SizeScale.of(manifest).count(value)
            try:
                plan = bench.chain.plan(count)
            except SizeError:
                yield {curve: curve_html(manifest, count, None), planned: ""}
                raise
            yield {
                curve: curve_html(manifest, plan.num_parameters, plan.expected_loss),
                planned: plan_html(plan_rows(plan)),
                planning: "",
            }

        @_telling(building)
        def build_it(value: float | None, progress: Any = bar) -> Iterator[Any]:
            start = time.monotonic()
            model = bench.model(chosen(value))
            seconds = time.monotonic() - start
            yield {building: message_html(f"Built: {model.num_parameters():,} parameters, in {seconds:.1f} s.")}

        @_telling(generating)
        def generate_it(
            value: float | None, text: str, most: int, heat: float, share: float, progress: Any = bar
        ) -> Iterator[Any]:
            chain, plan = bench.chain, chosen(value)
            small, large = (chain.plan(shape=anchor.shape) for anchor in compared(chain.manifest, plan))
            yield {generating: "", **dict.fromkeys(texts, "")}
            for place, name, each in zip(texts, names, (small, plan, large), strict=True):
                label = f"{name}, {format_count(each.num_parameters)}"
                yield {place: gr.Textbox(value="", label=label)}
                for written in write(bench.model(each), chain.tokenizer, text, most, heat, share):
                    yield {place: written}
            how = f"temperature {heat:g}, top p {share:g}" if heat else "the likeliest token each time"
            yield {generating: message_html(f"Done: {how}.")}

        @_telling(taking)
        def pack_it(value: float | None, progress: Any = bar) -> Iterator[Any]:
            path = bench.pack(chosen(value))
            yield {packed: gr.File(str(path), visible=True), taking: message_html(f"{path.name} is ready.")}

        @_telling(taking)
        def save_it(value: float | None, name: str, progress: Any = bar) -> Iterator[Any]:
            if not alone or not name.strip():
                raise RecipeError("name a new or empty folder on this machine")
            target = Path(name.strip()).expanduser()
            write_model(bench.chain, chosen(value), target)
            yield {taking: message_html(f"Saved to {target.resolve()}.")}

        @_telling(taking)
        def push_it(value: float | None, name: str, secret: str, hidden: bool, progress: Any = bar) -> Iterator[Any]:
            yield {token: ""}
            where = bench.push(chosen(value), name.strip(), secret, hidden)
            yield {taking: message_html(f"Published: {where}.")}

        def bind(event: Any, handler: Any, inputs: Any, outputs: Any, shown: Any = None, **more: Any) -> None:
            quiet = {"show_progress_on": shown} if shown else {"show_progress": "hidden"}
            event(handler, inputs, outputs, api_visibility="private", **quiet, **more)

        heavy = {"concurrency_limit": 1, "concurrency_id": "models"}  # one after another: they share the memory
        for event in (page.load, retry.click):
            bind(event, show, None, [heading, opening, retry, body, size])
        raw = {"preprocess": False}  # the plan reports a value typed beyond the slider's ends
        bind(size.change, plan_it, size, [curve, planned, planning], trigger_mode="always_last", **raw)
        bind(build.click, build_it, size, building, building, **heavy, **raw)
        asked = [size, prompt, tokens, temperature, top_p]
        for event in (generate.click, prompt.submit):
            bind(event, generate_it, asked, [generating, *texts], generating, **heavy, **raw)
        bind(pack.click, pack_it, size, [packed, taking], taking, **heavy, **raw)
        bind(save.click, save_it, [size, folder], taking, taking, **heavy, **raw)
        bind(push.click, push_it, [size, repo_id, token, private], [token, taking], taking, **heavy, **raw)
    return page
