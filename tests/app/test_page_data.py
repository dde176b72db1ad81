"""What the page shows, as plain values: scale, rows, picture, texts."""

import base64
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from cbd_hub.app import page_data as app_data
from cbd_hub.app.page_data import SizeScale
from cbd_hub.chain.chain import Chain
from cbd_hub.errors import PublishError, SizeError
from cbd_hub.manifest.manifest import Manifest


def tags(html: str) -> list[dict[str, str]]:
    """The attributes of all tags."""
    found: list[dict[str, str]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append({k: v or "" for k, v in attributes})  # type: ignore[method-assign]
    parser.feed(html)
    return found


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
    bent = measured.curve[1].model_copy(update={"loss": 3.4, "method": "bezier"})
    lines = app_data.curve_points(measured.model_copy(update={"curve": [*measured.curve, bent]}))
    assert [loss for _, loss in lines["bezier"]] == [5.0, 4.0, 3.4, 3.0]  # the curve runs through the anchors as well
    assert [loss for _, loss in lines["interpolate"]] == [5.0, 4.0, 3.5, 3.1, 3.0]


def test_the_picture_says_in_words_what_it_shows(measured: Manifest) -> None:
    html = app_data.curve_html(measured, 100_000, 3.75)
    drawn, without = (re.search(r"base64,([^\"]+)", text) for text in (html, app_data.curve_html(measured, 1, None)))
    assert drawn and without and drawn[1] != without[1]
    assert base64.b64decode(drawn[1]).lstrip().startswith(b"<?xml")
    (image,) = tags(html)
    assert "100k parameters, expected loss 3.750" in image["alt"]
    assert "a0" in image["alt"] and "3.000" in image["alt"] and "between: 2" in image["alt"]
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
