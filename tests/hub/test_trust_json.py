"""Whatever stands in a JSON file of a repository: refused in one line, or harmless."""

from pathlib import Path

import pytest
from hostile import (
    CONFIG,
    GENERATION,
    WEIGHTS,
    Watched,
    assert_none,
    between,
    edit_json,
    equal,
    forge,
    joined,
    linux_only,
    made_of,
    make,
    refusal,
    split,
)
from make_chain import edit_manifest

from cbd_hub.chain.chain import Chain
from cbd_hub.manifest.manifest import CHECKSUMS_NAME, MANIFEST_NAME

pytestmark = linux_only

JSON_FILES = [MANIFEST_NAME, CHECKSUMS_NAME, CONFIG, "anchors/a1/config.json", GENERATION]


@pytest.mark.parametrize("name", JSON_FILES)
def test_what_is_no_json_object_is_refused(chain: Path, name: str) -> None:
    size, problems = between(chain), {}
    for content in (
        b"", b"{", b"[]", b"null", b"5", b'"x"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"{}\0", b'{"a": 1,}', b"{'a': 1}",
        b"[" * 200, b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"\x80", "{}".encode("utf-16"),
        b'{"a": 9' + b"9" * 5000 + b"}",
    ):  # fmt: skip
        (chain / name).write_bytes(content)
        if name != MANIFEST_NAME:
            forge(chain, name)
        problems[ascii(content)[:30]] = refusal(chain, size)
    assert_none(problems)


@pytest.mark.parametrize("name", JSON_FILES)
def test_deeply_nested_json_is_refused_or_harmless(chain: Path, name: str) -> None:
    """At every depth: readers differ in how deep they go, and one may read what the next cannot copy or write."""
    size, problems = between(chain), {}
    text = (chain / name).read_text(encoding="utf-8").rstrip()
    for depth in (100, 200, 300, 450, 600, 800, 950, 990, 2000, 100_000):
        for opening, closing in ("[]", ('{"a":', "}")):
            key, value = "recipe" if name == MANIFEST_NAME else "extra", opening * depth + "0" + closing * depth
            (chain / name).write_text(f'{text[:-1]}, "{key}": {{"a": {value}}}}}', encoding="utf-8")
            if name != MANIFEST_NAME:
                forge(chain, name)
            problems[f"{depth} times {opening}"] = make(chain, size).problem
    assert_none(problems)


@pytest.mark.parametrize(
    ("path", "template"),
    [
        (("anchors", 0, "num_parameters"), "{}"),
        (("anchors", 0, "shape", "hidden_size"), "{}"),
        (("anchors", 1, "layer_order", 0), "{}"),
        (("anchors", 0, "evaluation"), '{{"loss": {}, "perplexity": 1.0, "num_tokens": 5}}'),
        (("anchors", 0, "evaluation"), '{{"loss": 1.0, "perplexity": {}, "num_tokens": 5}}'),
        (("anchors", 0, "training"), '{{"tokens": 5, "seed": 1, "best_loss": {}}}'),
        (("anchors", 1, "barrier"), '{{"num_parameters": 5, "alphas": [{}], "losses": [1.0], "height": 0.0}}'),
        (("anchors", 1, "barrier"), '{{"num_parameters": 5, "alphas": [0.5], "losses": [{}], "height": 0.0}}'),
        (("curve",), '[{{"num_parameters": 5, "loss": {}, "method": "auto"}}]'),
        (("recipe",), '{{"a": {}}}'),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else value[2:20],
)
def test_what_is_no_number_is_refused(chain: Path, path: tuple[str | int, ...], template: str) -> None:
    """JSON has no NaN and no infinity, and a loss of NaN would be compared as if it were one."""
    edit_manifest(chain, *path, value="<here>")
    text, problems = (chain / MANIFEST_NAME).read_text(encoding="utf-8"), {}
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999"):
        changed = text.replace('"<here>"', template.format(number))
        (chain / MANIFEST_NAME).write_text(changed, encoding="utf-8")
        with Watched() as outcome:
            Chain.from_pretrained(chain)
        problems[number] = outcome.problem or ("" if outcome.error else "it was accepted")
    assert_none(problems)


def test_of_a_key_that_stands_twice_one_value_counts_everywhere(chain: Path) -> None:
    """What is checked is what is used: either it is refused, or the last one counts, as in Python's reader."""
    size, problems = between(chain), {}
    expected, text = made_of(chain, size), (chain / MANIFEST_NAME).read_text(encoding="utf-8").strip()
    for other in ('"format": 2', '"anchors": []', '"architecture": "gpt2"', '"axis_map": {}', '"index_maps": null'):
        (chain / MANIFEST_NAME).write_text("{" + other + ", " + text[1:], encoding="utf-8")
        with Watched() as outcome:
            assert equal(made_of(chain, size), expected)
        problems[f"{other} first"] = outcome.problem
        (chain / MANIFEST_NAME).write_text(text[:-1] + ", " + other + "}", encoding="utf-8")
        problems[f"{other} last"] = refusal(chain, size)
    assert_none(problems)


@pytest.mark.parametrize("text", ["a\nb", "a\u2028b", "\x1b[2J\x1b[31mred"], ids=ascii)
def test_a_refusal_is_one_line_whatever_it_quotes(chain: Path, text: str) -> None:
    """A message that moves the cursor or starts a new line could be taken for another program's."""
    size, ordinary, problems = between(chain), (chain / MANIFEST_NAME).read_bytes(), {}
    entry = {"size": 1, "sha256": "0" * 64}
    for path, value in [
        ((text,), 5), (("anchors", 0, text), 5), (("anchors", 0, "shape", text), 5),
        (("anchors", 0, "files", text + ".safetensors"), entry), (("anchors", 0, "files", text), {}),
        (("anchors", 0, "subfolder"), text), (("anchors", 0, "name"), text), (("anchors", 0, "dtype"), text),
        (("anchors", 0, "repo_id"), text), (("anchors", 1, "parent"), text), (("axis_map", text), 5),
        (("axis_map", "model_type"), text), (("axis_map", "tensors", text), "(("),
        (("axis_map", "tensors", "a"), text),
        (("axis_map", "tensors", text), text), (("axis_map", "fields", text), text), (("axis_map", "norms", text), []),
        (("axis_map", "norm"), text), (("architecture",), text), (("format",), text), (("basis",), text),
    ]:  # fmt: skip
        (chain / MANIFEST_NAME).write_bytes(ordinary)
        edit_manifest(chain, *path, value=value)
        problems[ascii(path)] = refusal(chain, size)
    (chain / MANIFEST_NAME).write_bytes(ordinary)
    config = (chain / CONFIG).read_text()
    for change in (
        {"pretraining_tp": text},
        {"hidden_act": text},
        {"hidden_size": text},
        {"model_type": text},
        {"dtype": text},
    ):
        (chain / CONFIG).write_text(config)
        edit_json(chain / CONFIG, **change)
        forge(chain, CONFIG)
        problems[f"config.json {change!a}"] = refusal(chain, size)
    (chain / CONFIG).write_text(config)
    forge(chain, CONFIG)
    header, data = split((chain / WEIGHTS).read_bytes())
    for change in ({text: header["model.norm.weight"]}, {text: 5}, {"model.norm.weight": {"dtype": text}}):
        (chain / WEIGHTS).write_bytes(joined(header | change, data))
        forge(chain, WEIGHTS)
        problems[f"header {ascii(change)[:40]}"] = refusal(chain, size)
    assert_none(problems)
