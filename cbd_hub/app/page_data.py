"""What the page of a chain shows, as plain values: the slider's scale, the plan's rows, the picture of the curve.

Nothing here knows the page (:mod:`cbd_hub.app.page` does) or reads a weight. Text that comes from a chain is not
trusted: whatever is returned as HTML has been escaped.
"""

import base64
import io
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from cbd_hub.axes.disk_size import QUANTS
from cbd_hub.axes.sizing import format_count
from cbd_hub.errors import PublishError, SizeError
from cbd_hub.interpolation.plan import Plan
from cbd_hub.manifest.manifest import Anchor, Manifest

__all__ = [
    "BLUE",
    "STYLE",
    "VERMILION",
    "SizeScale",
    "check_token",
    "compared",
    "curve_html",
    "curve_points",
    "curve_text",
    "format_bytes",
    "heading_html",
    "message_html",
    "plan_html",
    "plan_rows",
]

# Okabe and Ito's palette, as in cbd_hub.evaluation.held_out: blue is what was measured, vermilion what was chosen.
BLUE = "#0072B2"
VERMILION = "#D55E00"
# The page's CSS. gradio puts a prefix before every selector and cuts them at commas: no :is(a, b) here.
STYLE = """
.cbd-curve {width: 100%; background: white; border-radius: 8px}
.cbd-plan {width: 100%; border-collapse: collapse; border: 0}
.cbd-plan caption {text-align: left; font-weight: 600; padding: 4px 0}
.cbd-plan tr {border: 0}
.cbd-plan th, .cbd-plan td {text-align: left; vertical-align: top; border: solid #bbbbbb; border-width: 0 0 1px}
.cbd-plan th {font-weight: 500; padding: 3px 16px 3px 0}
.cbd-plan td {overflow-wrap: anywhere; padding: 3px 0}
.cbd-message {padding: 8px 12px; border-radius: 6px; overflow-wrap: anywhere; color: black; background: #eaf3f8}
.cbd-error {background: #fdeee4; border-left: 5px solid #D55E00}
.cbd-quiet:not(:has(p)) {display: none}
.cbd-busy {min-height: 64px}
"""
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_JOINED = ("auto", "interpolate")  # the methods whose points, with the anchors', give a plan's expected loss
_LABELS = {"interpolate": "measured on the line", "bezier": "measured on the curve"}
_UNITS = ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (1, ""))
_FEWEST_STEPS = 100


@dataclass(frozen=True)
class SizeScale:
    """A slider over the sizes of a chain, in thousands, millions or billions of parameters."""

    smallest: int
    """Parameters of the smallest anchor."""
    largest: int
    """Parameters of the largest anchor."""
    unit: int
    """Parameters that the slider's 1 stands for."""
    step: float
    """In units."""

    @classmethod
    def of(cls, manifest: Manifest) -> "SizeScale":
        """Returns the scale from a chain's smallest anchor to its largest, in 100 to 1,000 round steps."""
        smallest, largest = manifest.anchors[-1].num_parameters, manifest.anchors[0].num_parameters
        unit = next(unit for unit, _ in _UNITS if largest >= unit)
        span = max(largest - smallest, 1) / unit
        return cls(smallest, largest, unit, 10.0 ** math.floor(math.log10(span / _FEWEST_STEPS)))

    @property
    def low(self) -> float:
        """The slider's left end: the smallest anchor, rounded down to a step."""
        return self._round(math.floor(self.smallest / self.unit / self.step))

    @property
    def high(self) -> float:
        """The slider's right end: the largest anchor, rounded up to a step."""
        return self._round(math.ceil(self.largest / self.unit / self.step))

    @property
    def middle(self) -> float:
        """A step near the middle."""
        return self._round(round((self.low + self.high) / 2 / self.step))

    @property
    def label(self) -> str:
        """What the slider counts."""
        return " ".join(["Size in", *(name for unit, name in _UNITS if unit == self.unit and name), "parameters"])

    def count(self, value: float | None) -> int:
        """Returns the parameters that a value of the slider stands for; its ends are the anchors themselves.

        Raises:
            SizeError: No number. One outside the range is left to the plan, whose message names the range.
        """
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise SizeError(f"{value!r} is no size; type a number from {self.low:g} to {self.high:g}")
        ends = {self.low: self.smallest, self.high: self.largest}
        return ends.get(value, round(value * self.unit))

    def _round(self, steps: int) -> float:
        return round(steps * self.step, 12)


def curve_points(manifest: Manifest) -> dict[str, list[tuple[int, float]]]:
    """Returns a chain's measured losses: method → points (parameters, nats a token), smallest first.

    The lines ``interpolate`` and ``bezier`` join the anchors and what was measured between them, so a plan's expected
    loss lies on the line of its method. There is none where no anchor was measured.
    """
    anchors = [(a.num_parameters, a.evaluation.loss) for a in manifest.anchors if a.evaluation]
    lines = {"interpolate": [*anchors]} if anchors else {}
    for point in manifest.curve:
        method = "interpolate" if point.method in _JOINED else point.method
        line = lines.setdefault(method, [*anchors] if method == "bezier" else [])
        line.append((point.num_parameters, point.loss))
    return {method: sorted(line) for method, line in lines.items()}


def curve_text(manifest: Manifest, count: int, loss: float | None) -> str:
    """Returns what the picture of the curve shows, in words, for those who do not see it."""
    measured = [
        f"{a.name} ({format_count(a.num_parameters)}) {a.evaluation.loss:.3f}"
        for a in manifest.anchors
        if a.evaluation
    ]
    between = len({point.num_parameters for point in manifest.curve})
    expected = "not known" if loss is None else f"{loss:.3f}"
    return (
        f"Held-out loss over size, in nats a token. Anchors: {', '.join(measured) or 'not measured'}. Sizes measured "
        f"in between: {between}. Chosen: {format_count(count)} parameters, expected loss {expected}."
    )


def curve_html(manifest: Manifest, count: int, loss: float | None) -> str:
    """Returns the measured size-loss curve, with a marker at the chosen size, as an HTML image.

    Args:
        manifest: The chain's manifest.
        count: The chosen size, in parameters.
        loss: Expected there, nats a token; None draws the size alone.

    Cost: a tenth of a second.
    """
    from matplotlib.figure import Figure  # slow to import, and only the picture needs it
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(5.6, 3.5), layout="constrained")  # small, so that its text can be read on a phone
    axes = figure.add_subplot()
    for index, (method, line) in enumerate(curve_points(manifest).items()):
        label = _LABELS.get(method, f"measured, {method}")
        color = (BLUE, *_OTHERS)[index % (1 + len(_OTHERS))]
        axes.plot(*zip(*line, strict=True), "o-", color=color, linewidth=2, markersize=4, label=label)
    sizes = [a.num_parameters for a in manifest.anchors if a.evaluation]
    if sizes:
        losses = [a.evaluation.loss for a in manifest.anchors if a.evaluation]
        axes.plot(sizes, losses, "D", color="black", markersize=8, zorder=5, label="anchors")
    axes.axvline(count, color=VERMILION, linestyle="--", linewidth=1.2)
    chosen = f"{format_count(count)} parameters"
    if loss is None:
        axes.plot([], [], color=VERMILION, linestyle="--", label=chosen)
    else:
        axes.plot(count, loss, "o", color=VERMILION, markersize=11, zorder=6, label=f"{chosen}: {loss:.3f} expected")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: format_count(round(size))))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(x=0.06, y=0.12)
    axes.set_xlabel("parameters")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(fontsize=9, framealpha=0.9, edgecolor="none").get_texts():
        text.set_parse_math(False)  # a method's name may hold a dollar sign
    drawn = io.BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    source = f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
    return f'<img class="cbd-curve" alt="{escape(curve_text(manifest, count, loss))}" src="{source}">'


def format_bytes(number: int) -> str:
    """Writes bytes for a person, e.g. 538060032 → ``"538.1 MB"``."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number} bytes"


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """Returns a plan as (what, value) for a person, the numbers asked for first at the top."""
    if plan.method == "anchor":
        origin = f"anchor {plan.large} as it is"
    else:
        origin = f"{plan.method} between {plan.small} (small) and {plan.large} (large)"
    expected = "not measured" if plan.expected_loss is None else f"{plan.expected_loss:.3f} nats a token"
    return [
        ("Parameters", f"{plan.num_parameters:,} ({format_count(plan.num_parameters)})"),
        ("Expected loss", expected),
        ("Made by", origin),
        ("Position r", f"{plan.position:.3f} (0: small anchor, 1: large anchor)"),
        ("Alpha", f"{plan.alpha:.3f} (weight of the small anchor)"),
        ("Memory, fp32", format_bytes(4 * plan.num_parameters)),
        ("Memory, bf16", format_bytes(2 * plan.num_parameters)),
        ("Quantized", ", ".join(f"{format_bytes(plan.disk_size(q))} as {q}" for q in QUANTS[1:])),
        ("To fetch", f"{format_bytes(plan.bytes_to_fetch)} where nothing is cached"),
        *((name, f"{value:,}") for name, value in plan.shape.items()),
        *(("Note", note) for note in plan.notes),
    ]


def plan_html(rows: Iterable[tuple[str, str]]) -> str:
    """Returns rows as an HTML table."""
    lines = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in rows)
    return f'<table class="cbd-plan"><caption>The plan</caption><tbody>{lines}</tbody></table>'


def heading_html(manifest: Manifest) -> str:
    """Returns the head of the page: what chain this is, in HTML."""
    anchors = ", ".join(format_count(a.num_parameters) for a in reversed(manifest.anchors))
    license = manifest.license or "not stated"
    about = f"Anchors of {anchors} parameters ({manifest.architecture}); license {license}. Choose a size in between."
    return f"<h1>{escape(manifest.name)}</h1><p>{escape(about)}</p>"


def message_html(text: str, error: bool = False) -> str:
    """Returns a line of text that screen readers speak, in HTML: an alert where something went wrong."""
    role, kind = ("alert", "cbd-error") if error else ("status", "cbd-done")
    return f'<p role="{role}" class="cbd-message {kind}">{escape(text)}</p>'


def compared(manifest: Manifest, plan: Plan) -> tuple[Anchor, Anchor]:
    """Returns the small and the large anchor that a model is compared with.

    They are those that it was made from; where it is an anchor itself, its neighbors (at an end, itself and one).
    """
    names = [a.name for a in manifest.anchors]
    small, large = names.index(plan.small), names.index(plan.large)
    if small == large:
        small, large = min(small + 1, len(names) - 1), max(large - 1, 0)
    return manifest.anchors[small], manifest.anchors[large]


def check_token(text: str) -> str:
    """Returns a Hub token as it was typed, without the blanks around it.

    A token must be given: the one of whoever started the page is not a visitor's to use. What could not stand in a
    header is refused here, for an error of the client would quote it.

    Raises:
        PublishError: Nothing was typed, or what is no token.
    """
    token = (text or "").strip()
    if not token:
        raise PublishError("type a Hub token with write permission; this page has none of its own")
    if not re.fullmatch(r"[!-~]{1,512}", token):
        raise PublishError("that is no Hub token: a token is one word of letters, digits and signs, such as hf_...")
    return token
