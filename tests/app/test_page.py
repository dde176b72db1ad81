"""The page of a chain: its data by themselves, and the page itself in a real browser, against the loopback Hub."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_server import HubServer
from make_chain import add_tokenizer, make_chain, variant_model
from transformers import AutoModelForCausalLM

from cbd_hub.app import page_data as app_data
from cbd_hub.app.page import Workbench, complete, launch
from cbd_hub.app.page_data import SizeScale
from cbd_hub.axes.sizing import format_count
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import CbdError, ChainNotFoundError, PublishError, RecipeError, SizeError
from cbd_hub.manifest.manifest import CurvePoint, Evaluation, Manifest

WRONG, OWNER = "hf_wrongWRONGwrong", "hf_ownerOWNERowner"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("chains") / "chain"
    make_chain(made, variant_model("llama", vocab_size=320))
    add_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def chain(folder: Path) -> Chain:
    return Chain.from_pretrained(folder)


@pytest.fixture(scope="module")
def measured(chain: Chain) -> Manifest:
    """The manifest with losses of the anchors (3, 4, 5) and of two sizes between the upper two."""
    anchors = [
        a.model_copy(update={"evaluation": Evaluation(loss=loss, perplexity=20.0, num_tokens=100)})
        for a, loss in zip(chain.manifest.anchors, (3.0, 4.0, 5.0), strict=True)
    ]
    high, low = anchors[0].num_parameters, anchors[1].num_parameters
    curve = [
        CurvePoint(num_parameters=low + (high - low) * 2 // 3, loss=3.1, method="interpolate"),
        CurvePoint(num_parameters=low + (high - low) // 3, loss=3.5, method="interpolate"),
        CurvePoint(num_parameters=low + (high - low) // 3, loss=4.5, method="$x$<b>"),
    ]
    return chain.manifest.model_copy(update={"anchors": anchors, "curve": curve})


# -- the data


def test_the_slider_runs_from_the_smallest_anchor_to_the_largest(chain: Chain) -> None:
    scale, anchors = SizeScale.of(chain.manifest), chain.manifest.anchors
    assert (scale.count(scale.low), scale.count(scale.high)) == (anchors[-1].num_parameters, anchors[0].num_parameters)
    assert scale.label == "Size in thousand parameters"
    assert scale.low < scale.middle < scale.high
    assert 100 <= (scale.high - scale.low) / scale.step <= 1002
    for value in (scale.low, scale.middle, scale.high):
        assert value / scale.step == pytest.approx(round(value / scale.step))
    assert scale.count(scale.middle) == round(scale.middle * 1000)
    for wrong in (None, "big", float("nan")):
        with pytest.raises(SizeError, match="type a number"):
            scale.count(wrong)  # type: ignore[arg-type]
    with pytest.raises(SizeError, match="outside this chain"):
        chain.plan(scale.count(scale.high * 2))


def test_one_anchor_is_a_scale_of_one_size(chain: Chain) -> None:
    alone = chain.manifest.model_copy(update={"anchors": chain.manifest.anchors[:1]})
    scale = SizeScale.of(alone)
    assert scale.count(scale.low) == scale.count(scale.high) == scale.largest


def test_the_curve_joins_anchors_and_interpolated_sizes(measured: Manifest) -> None:
    lines = app_data.curve_points(measured)
    assert [loss for _, loss in lines["interpolate"]] == [5.0, 4.0, 3.5, 3.1, 3.0]
    assert lines["$x$<b>"] == [(measured.curve[2].num_parameters, 4.5)]
    assert app_data.curve_points(measured.model_copy(update={"anchors": [], "curve": []})) == {}


def test_the_picture_says_in_words_what_it_shows(measured: Manifest) -> None:
    html = app_data.curve_html(measured, 100_000, 3.75)
    drawn, without = (re.search(r"base64,([^\"]+)", text) for text in (html, app_data.curve_html(measured, 1, None)))
    assert drawn and without and drawn[1] != without[1]
    assert base64.b64decode(drawn[1]).lstrip().startswith(b"<?xml")
    (image,) = tags(html)
    assert "100k parameters, expected loss 3.750" in image["alt"]
    assert "a0" in image["alt"] and "3.000" in image["alt"] and "between: 3" in image["alt"]
    assert "not measured" in app_data.curve_text(measured.model_copy(update={"anchors": []}), 1, None)


def test_a_plan_in_rows(chain: Chain) -> None:
    plan = chain.plan("100k")
    rows = dict(app_data.plan_rows(plan))
    assert rows["Memory, fp32"] == app_data.format_bytes(4 * plan.num_parameters)
    assert rows["Memory, bf16"] == app_data.format_bytes(2 * plan.num_parameters)
    assert rows["To fetch"].startswith(app_data.format_bytes(plan.bytes_to_fetch))
    assert rows["Expected loss"] == "not measured"
    assert plan.small in rows["Made by"] and plan.large in rows["Made by"]
    assert rows["Position r"].startswith(f"{plan.position:.3f}") and rows["Alpha"].startswith(f"{plan.alpha:.3f}")
    assert {name: f"{value:,}" for name, value in plan.shape.items()}.items() <= rows.items()
    assert app_data.plan_html(rows.items()).count("<tr>") == len(rows)
    assert "as it is" in dict(app_data.plan_rows(chain.plan(shape=chain.anchors[0].shape)))["Made by"]


@pytest.mark.parametrize(
    ("number", "text"), [(999, "999 bytes"), (1500, "1.5 kB"), (538_060_032, "538.1 MB"), (2_700_000_000, "2.7 GB")]
)
def test_bytes_for_a_person(number: int, text: str) -> None:
    assert app_data.format_bytes(number) == text


def test_what_a_model_is_compared_with(chain: Chain) -> None:
    large, middle, small = chain.manifest.anchors

    def names(plan: Any) -> list[str]:
        return [a.name for a in app_data.compared(chain.manifest, plan)]

    between = chain.plan((large.num_parameters + middle.num_parameters) // 2)
    assert names(between) == [middle.name, large.name]
    assert names(chain.plan(shape=middle.shape)) == [small.name, large.name]
    assert names(chain.plan(shape=large.shape)) == [middle.name, large.name]
    assert names(chain.plan(shape=small.shape)) == [small.name, middle.name]


def test_text_of_a_chain_is_escaped(chain: Chain) -> None:
    manifest = chain.manifest.model_copy(update={"license": "<script>", "architecture": '"><img src=x>'})
    for html in (
        app_data.heading_html(manifest),
        app_data.message_html("<script>", error=True),
        app_data.plan_html([("<script>", "<img src=x>")]),
    ):
        assert "<script" not in html and "<img" not in html


@pytest.mark.parametrize("text", ["", "  ", "hf_a b", "hf_a\nb", "hf_é", "x" * 600])
def test_what_is_no_token_is_refused_and_not_quoted(text: str) -> None:
    with pytest.raises(PublishError) as caught:
        app_data.check_token(text)
    assert not text.strip() or text not in str(caught.value)


def test_a_token_loses_the_blanks_around_it() -> None:
    assert app_data.check_token(" hf_abc\n") == "hf_abc"


# -- the work


def test_models_are_made_once_and_four_are_kept(folder: Path) -> None:
    bench = Workbench(folder)
    plans = [bench.chain.plan(size) for size in ("80k", "90k", "100k", "110k", "120k")]
    first = bench.model(plans[0])
    assert first.num_parameters() == plans[0].num_parameters
    made = [bench.model(plan) for plan in plans[1:4]]
    assert bench.model(plans[0]) is first
    bench.model(plans[4])  # the one used least recently makes room
    assert bench.model(plans[0]) is first
    assert bench.model(plans[1]) is not made[0]


def test_a_packed_model_is_a_transformers_model(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(folder)
    plan = bench.chain.plan("100k")
    path = bench.pack(plan)
    with zipfile.ZipFile(path) as packed:
        packed.extractall(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / path.stem)
    assert loaded.num_parameters() == plan.num_parameters
    assert (tmp_path / path.stem / "tokenizer.json").is_file() and (tmp_path / path.stem / "README.md").is_file()
    assert bench.pack(bench.chain.plan("90k")).is_file()
    assert not path.exists()


def test_a_chain_that_appears_later_is_opened_then(folder: Path, tmp_path: Path) -> None:
    bench = Workbench(tmp_path / "chain")
    with pytest.raises(ChainNotFoundError):
        _ = bench.chain
    shutil.copytree(folder, tmp_path / "chain")
    assert bench.chain.manifest.name


def test_a_continuation_is_limited(folder: Path) -> None:
    bench = Workbench(folder)
    model, tokenizer = bench.model(bench.chain.plan("100k")), bench.chain.tokenizer
    model.generation_config.eos_token_id = None
    short, long = (complete(model, tokenizer, "The state of the Union", n) for n in (5, 20))
    assert short and long.startswith(short[:-1]) and len(short) < len(long)
    context = model.config.max_position_embeddings
    assert complete(model, tokenizer, "The state of the Union " * context, 10 * context)
    for empty in ("", " \n"):
        with pytest.raises(RecipeError, match="no prompt"):
            complete(model, tokenizer, empty, 5)


def test_a_page_without_gradio_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(CbdError, match=re.escape('pip install "cbd_hub[app]"')):
        launch("somewhere")


# -- the page


class Served(NamedTuple):
    """A page that is served by a process of its own."""

    url: str
    chain: Path
    log: Path
    hub: HubServer


def browser_path() -> str:
    """The browser, or a skip that names what is missing."""
    for module in ("gradio", "playwright"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install {module}")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)}): apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = browser_path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--no-proxy-server"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_user("owner", OWNER)
        yield server


@pytest.fixture(scope="module")
def pages(browser: Any, hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Served]]:
    """Two pages: of a chain, and of a folder that is not there yet."""
    from tiny_recipe import built_chain

    home = tmp_path_factory.mktemp("app")
    shutil.copytree(built_chain(), home / "chain", ignore=shutil.ignore_patterns(".build"))
    environment = {
        **{name: value for name, value in hub.environment(home / "hf", None).items() if name[:7] != "GRADIO_"},
        "GRADIO_TEMP_DIR": str(home / "gradio"),
        "PYTHONUNBUFFERED": "1",
    }
    code = "import sys; from cbd_hub.app.page import launch; launch(sys.argv[1], port=int(sys.argv[2]), browser=False)"
    served, processes = {}, []
    for name in ("chain", "later"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        served[name] = Served(f"http://127.0.0.1:{port}", home / name, home / f"{name}.log", hub)
        with served[name].log.open("w") as log:
            command = [sys.executable, "-c", code, str(home / name), str(port)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=home))
    try:
        for process, page in zip(processes, served.values(), strict=True):
            deadline = time.monotonic() + 120
            while "Running on" not in page.log.read_text():
                assert process.poll() is None and time.monotonic() < deadline, page.log.read_text()
                time.sleep(0.2)
        yield served
    finally:
        for process in processes:
            process.terminate()
            process.wait(20)


@pytest.fixture
def page(browser: Any, pages: dict[str, Served]) -> Iterator[Any]:
    """The chain's page, opened; nothing that is done with it may leave a traceback in the server's log."""
    yield from opened(browser, pages["chain"])


@pytest.fixture
def later(browser: Any, pages: dict[str, Served]) -> Iterator[Any]:
    """The page of a chain that is not there yet."""
    yield from opened(browser, pages["later"])


def opened(browser: Any, served: Served) -> Iterator[Any]:
    tab = browser.new_page(viewport={"width": 1200, "height": 900})
    tab.set_default_timeout(60_000)
    tab.goto(served.url)
    yield tab
    tab.close()
    assert "Traceback" not in served.log.read_text(), served.log.read_text()


def tags(html: str) -> list[dict[str, str]]:
    """The attributes of all tags."""
    found: list[dict[str, str]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append({k: v or "" for k, v in attributes})  # type: ignore[method-assign]
    parser.feed(html)
    return found


def alert(page: Any, place: str) -> str:
    """The message of an error, once it is there."""
    page.locator(f"#{place} [role=alert]").wait_for()
    return str(page.locator(f"#{place}").inner_text())


def choose(page: Any, value: float) -> None:
    """Types another size, in thousands, and waits until the picture shows it."""
    before = page.locator("#curve img").get_attribute("alt")
    box = page.locator("#size input[type=number]")
    box.fill(str(value))
    box.blur()
    page.wait_for_function("before => document.querySelector('#curve img').alt != before", arg=before)


def build(page: Any) -> None:
    page.get_by_role("button", name="Build").click()
    page.locator("#building").get_by_text("Built:").wait_for()


@pytest.mark.slow
def test_sliding_shows_the_plan_of_each_size(page: Any, pages: dict[str, Served]) -> None:
    chain = Chain.from_pretrained(pages["chain"].chain)
    scale = SizeScale.of(chain.manifest)
    page.locator("#curve img").wait_for()
    slider = page.get_by_role("slider", name="Size in thousand parameters")
    for key, anchor in (("Home", chain.anchors[-1]), ("End", chain.anchors[0])):
        slider.press(key)
        page.locator("#plan").get_by_text(f"anchor {anchor.name} as it is").wait_for()
        assert f"{anchor.num_parameters:,}" in page.locator("#plan").inner_text()
    slider.press("ArrowLeft")
    plan = chain.plan(scale.count(round(scale.high - scale.step, 6)))
    page.locator("#plan").get_by_text(f"{plan.num_parameters:,}").wait_for()
    told = page.locator("#plan").inner_text()
    assert f"{plan.alpha:.3f}" in told and f"{plan.position:.3f}" in told and f"{plan.expected_loss:.3f}" in told
    assert f"expected loss {plan.expected_loss:.3f}" in page.locator("#curve img").get_attribute("alt")


@pytest.mark.slow
def test_an_impossible_size_is_a_message(page: Any) -> None:
    page.locator("#curve img").wait_for()
    page.locator("#size input[type=number]").fill("500")
    assert "500k parameters (500000) is outside this chain, which covers" in alert(page, "planning")
    choose(page, 40)
    assert page.locator("#planning [role=alert]").count() == 0
    build(page)


@pytest.mark.slow
def test_build_and_generate_beside_the_anchors(page: Any, pages: dict[str, Served]) -> None:
    page.locator("#curve img").wait_for()
    page.get_by_role("button", name="Generate").click()
    assert "no model yet" in alert(page, "generating")
    choose(page, 40)
    build(page)
    page.get_by_label("Prompt").fill("The Congress of the United States")
    page.get_by_label("20", exact=True).check()
    page.get_by_role("button", name="Generate").click()
    page.locator("#generating").get_by_text("Done").wait_for()
    bench = Workbench(pages["chain"].chain)
    plan = bench.chain.plan(40_000)
    anchors = [bench.chain.plan(shape=a.shape) for a in app_data.compared(bench.chain.manifest, plan)]
    names = ("Small anchor", "Built model", "Large anchor")
    for name, each in zip(names, (anchors[0], plan, anchors[1]), strict=True):
        expected = complete(bench.model(each), bench.chain.tokenizer, "The Congress of the United States", 20)
        assert page.get_by_label(f"{name}, {format_count(each.num_parameters)}").input_value() == expected
    page.get_by_label("Prompt").fill(" ")
    page.get_by_role("button", name="Generate").click()
    assert "no prompt" in alert(page, "generating")


@pytest.mark.slow
def test_the_model_can_be_taken_along(page: Any, tmp_path: Path) -> None:
    page.locator("#curve img").wait_for()
    choose(page, 30)
    build(page)
    page.get_by_role("button", name="Make a zip file").click()
    page.locator("#taking").get_by_text("is ready").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name=re.compile("KB")).click()
    with zipfile.ZipFile(download.value.path()) as packed:
        config = json.loads(packed.read(next(n for n in packed.namelist() if n.endswith("/config.json"))))
    assert config["cbd_hub"]["method"] == "interpolate"
    for target, told in ((tmp_path / "model", "Saved to"), (tmp_path / "model", "not empty"), ("", "name a new")):
        page.get_by_label("Folder on this machine").fill(str(target))
        page.get_by_role("button", name="Save to the folder").click()
        page.locator("#taking").get_by_text(told).wait_for()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() > 29_000


@pytest.mark.slow
def test_a_wrong_token_is_a_message_and_no_token_is_kept(page: Any, pages: dict[str, Served]) -> None:
    hub, log = pages["chain"].hub, pages["chain"].log
    sent: list[str] = []
    page.on("response", lambda response: sent.append(response.url))
    page.locator("#curve img").wait_for()
    build(page)

    def push(token: str, repo_id: str = "owner/mine") -> None:
        page.get_by_label("Repository").fill(repo_id)
        page.get_by_label("Hub token with write permission").fill(token)
        page.get_by_role("button", name="Push to the Hub").click()

    push("")
    assert "type a Hub token" in alert(page, "taking")
    for token, repo_id, told in (
        (WRONG, "owner/mine", "owner/mine"),
        ("hf_é", "owner/mine", "no Hub token"),
        (OWNER, "somebody/else", "somebody"),
        (OWNER, "no good/id", "no good"),
    ):
        push(token, repo_id)
        page.locator("#taking [role=alert]").get_by_text(told).wait_for()
        assert token not in page.locator("#taking").inner_text()
        assert page.get_by_label("Hub token with write permission").input_value() == ""
    assert not hub.repos
    push(OWNER)
    page.locator("#taking").get_by_text(f"Published: {hub.endpoint}/owner/mine at").wait_for()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= hub.files("owner/mine").keys()
    assert hub.repos["owner/mine"].private

    kept = page.evaluate(
        """async () => {
            const names = (await indexedDB.databases()).map(database => database.name)
            return JSON.stringify([names, {...localStorage}, {...sessionStorage}, document.cookie])
        }"""
    )
    written = [p.read_bytes() for p in log.parent.rglob("*") if p.is_file()]
    for secret in (WRONG, OWNER):
        assert secret not in kept and secret not in page.content() and secret not in log.read_text()
        assert not any(secret in url for url in sent) and not any(secret.encode() in data for data in written)
    assert "history" not in kept.lower()


@pytest.mark.slow
def test_a_chain_that_is_gone_is_a_message(later: Any, pages: dict[str, Served]) -> None:
    place = pages["later"].chain
    assert "later" in alert(later, "opening")
    later.get_by_role("button", name="Try again").click()
    assert not later.get_by_role("button", name="Build").is_visible()
    shutil.copytree(pages["chain"].chain, place)
    later.get_by_role("button", name="Try again").click()
    later.locator("#curve img").wait_for()
    later.get_by_role("button", name="Try again").wait_for(state="hidden")
    choose(later, 30)
    build(later)
    shutil.rmtree(place / "anchors")
    choose(later, 40)  # the manifest is known
    later.get_by_role("button", name="Build").click()
    assert "which the manifest names" in alert(later, "building")
    later.get_by_role("button", name="Make a zip file").click()
    assert "which the manifest names" in alert(later, "taking")
    shutil.copytree(pages["chain"].chain / "anchors", place / "anchors")
    build(later)
    shutil.rmtree(place)


@pytest.mark.slow
def test_the_page_fits_a_phone_and_everything_has_a_name(page: Any) -> None:
    page.locator("#curve img").wait_for()
    page.set_viewport_size({"width": 360, "height": 740})
    build(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    nameless = """() => [...document.querySelectorAll("main input, main textarea, main button, main img")]
        .filter(e => e.checkVisibility() && !(e.labels?.length || e.ariaLabel || e.textContent.trim() || e.alt))
        .map(e => e.outerHTML)"""
    assert page.evaluate(nameless) == []
    outside = """() => [...document.querySelectorAll("main input, main textarea, main button, main img, main table")]
        .filter(e => e.checkVisibility() && e.getBoundingClientRect().right > 360).map(e => e.outerHTML)"""
    assert page.evaluate(outside) == []


@pytest.mark.slow
def test_the_space_serves_the_chain_of_its_variable(browser: Any, folder: Path, tmp_path: Path) -> None:
    space = Path(__file__).resolve().parents[2] / "examples" / "space"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {**os.environ, "CBD_CHAIN": str(folder), "GRADIO_SERVER_PORT": str(port), "SPACE_ID": "me/space"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, space / "app.py"], env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while "Running on" not in (tmp_path / "log").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.2)
        tab = browser.new_page()
        tab.goto(f"http://127.0.0.1:{port}")
        tab.locator("#curve img").wait_for(timeout=60_000)
        assert tab.get_by_role("button", name="Push to the Hub").is_visible()
        assert not tab.get_by_role("button", name="Save to the folder").is_visible()  # others can reach a Space
        tab.close()
    finally:
        process.terminate()
        process.wait(20)
