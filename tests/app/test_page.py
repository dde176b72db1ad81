"""The page of a chain in a real browser, against the loopback Hub."""

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
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_server import HubServer
from transformers import AutoModelForCausalLM

from cbd_hub.app import page_data as app_data
from cbd_hub.app.page import launch
from cbd_hub.app.page_data import SizeScale
from cbd_hub.app.workbench import Workbench, complete
from cbd_hub.axes.sizing import format_count
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import CbdError

WRONG, OWNER = "hf_wrongWRONGwrong", "hf_ownerOWNERowner"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


# -- the work


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
    choose(page, 30)
    build(page)
    choose(page, 40)  # the text is of the size that is shown, not of the one that was built
    page.get_by_label("Prompt").fill("The Congress of the United States")
    page.get_by_label("20", exact=True).check()
    page.get_by_role("button", name="Generate").click()
    page.locator("#generating").get_by_text("Done").wait_for()
    bench = Workbench(pages["chain"].chain)
    plan = bench.chain.plan(40_000)
    anchors = [bench.chain.plan(shape=a.shape) for a in app_data.compared(bench.chain.manifest, plan)]
    names = ("Small anchor", "This size", "Large anchor")
    for name, each in zip(names, (anchors[0], plan, anchors[1]), strict=True):
        *_, expected = complete(bench.model(each), bench.chain.tokenizer, "The Congress of the United States", 20)
        assert page.get_by_label(f"{name}, {format_count(each.num_parameters)}").input_value() == expected
    page.get_by_role("button", name="Sampling").click()
    page.get_by_role("spinbutton", name="Temperature").fill("1.5")
    page.get_by_role("spinbutton", name="Temperature").blur()
    page.get_by_role("button", name="Generate").click()
    page.locator("#generating").get_by_text("Done: temperature 1.5, top p 0.95").wait_for()
    page.get_by_label("Prompt").fill(" ")
    page.get_by_role("button", name="Generate").click()
    assert "no prompt" in alert(page, "generating")


@pytest.mark.slow
def test_the_model_can_be_taken_along(page: Any, tmp_path: Path) -> None:
    page.locator("#curve img").wait_for()
    choose(page, 40)
    build(page)
    choose(page, 30)  # what is taken along is what the plan shows
    page.get_by_role("button", name="Make a zip file").click()
    page.locator("#taking").get_by_text("is ready").wait_for()
    with page.expect_download() as download:
        page.get_by_role("link", name=re.compile("KB")).click()
    with zipfile.ZipFile(download.value.path()) as packed:
        config = json.loads(packed.read(next(n for n in packed.namelist() if n.endswith("/config.json"))))
    assert config["cbd_hub"]["method"] == "bezier"
    for target, told in ((tmp_path / "model", "Saved to"), (tmp_path / "model", "not empty"), ("", "name a new")):
        page.get_by_label("Folder on this machine").fill(str(target))
        page.get_by_role("button", name="Save to the folder").click()
        page.locator("#taking").get_by_text(told).wait_for()
    shown = page.locator("#plan").inner_text()
    count = AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters()
    assert 29_000 < count < 31_000 and f"{count:,}" in shown


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


CONTRAST = """() => {
    const part = color => color.match(/[\\d.]+/g).map(Number)
    const light = color => part(color).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0)
    const behind = e => {
        for (; e; e = e.parentElement) {
            const [, , , alpha = 1] = part(getComputedStyle(e).backgroundColor)
            if (alpha > 0.99) return getComputedStyle(e).backgroundColor
        }
        return "rgb(255, 255, 255)"
    }
    return [...document.querySelectorAll("main h1, main h2, main p, main th, main td, main button, main label span")]
        .filter(e => e.checkVisibility() && e.innerText.trim())
        .map(e => {
            const [a, b] = [light(getComputedStyle(e).color), light(behind(e))].sort((a, b) => b - a)
            return [e.innerText.trim(), (a + 0.05) / (b + 0.05)]
        })
}"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_by_day_and_by_night(browser: Any, pages: dict[str, Served], scheme: str) -> None:
    """4.5 : 1 between text and what is behind it (WCAG 2.2, 1.4.3)."""
    tab = browser.new_page(color_scheme=scheme)
    tab.goto(pages["chain"].url)
    tab.locator("#curve img").wait_for(timeout=60_000)
    build(tab)
    texts = tab.evaluate(CONTRAST)
    dark = tab.evaluate("document.body.classList.contains('dark')")
    tab.close()
    assert dark == (scheme == "dark")
    assert {"Build", "Generate", "The plan"} & {text for text, _ in texts} and len(texts) > 20
    assert [(text, ratio) for text, ratio in texts if ratio < 4.5] == []


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
        tab.get_by_role("button", name="Generate").click()
        tab.locator("#generating").get_by_text("Done").wait_for(timeout=60_000)
        tab.close()
    finally:
        process.terminate()
        process.wait(20)
