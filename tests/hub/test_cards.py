"""Model cards: their text, their metadata, quick starts that run, and manifests that try to break them."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from pydantic import ValidationError
from tiny_models import tiny_config, tiny_model

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.sizing import count_parameters
from cbd_hub.hub.card_results import update_card
from cbd_hub.hub.cards import CURVE_PICTURE, anchor_card, chain_card, is_generated, model_card, recovered_card
from cbd_hub.interpolation.plan import Plan, make_plan
from cbd_hub.manifest.index_maps import IndexMap, save_index_maps
from cbd_hub.manifest.manifest import (
    INDEX_MAPS_NAME,
    Anchor,
    CurvePoint,
    Evaluation,
    FileEntry,
    Manifest,
    Training,
    file_entry,
    write_manifest,
)
from cbd_hub.text.packing import train_tokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NOWHERE = FileEntry(size=1, sha256="0" * 64)
FFN = {"large": 80, "small": 40}
LARGE, SMALL = 58_032, 40_752
"""Parameters of the two anchors: 3 layers x 3 matrices x 40 ffn units x 48 hidden units apart."""


def make_anchor(name: str, files: dict[str, FileEntry] | None = None, **more: Any) -> Anchor:
    config = tiny_config("llama", intermediate_size=FFN[name])
    axis_map = axis_map_for(config)
    sizes = axis_map.sizes(config)
    return Anchor(
        **{
            "name": name,
            "shape": axis_map.config_fields(sizes),
            "num_parameters": count_parameters(axis_map, sizes),
            "dtype": "float32",
            "parent": None if name == "large" else "large",
            "files": files or {"config.json": NOWHERE},
            **more,
        }
    )


def make_manifest(*anchors: Anchor, **more: Any) -> Manifest:
    return Manifest(
        **{
            "name": "tiny-chain",
            "architecture": "llama",
            "axis_map": axis_map_for(tiny_config("llama")).to_dict(),
            "source": "org/source",
            "license": "apache-2.0",
            "anchors": list(anchors or (make_anchor("large"), make_anchor("small"))),
            **more,
        }
    )


def make_middle(manifest: Manifest, **more: Any) -> Plan:
    return make_plan(manifest, {"small": IndexMap(np.arange(3))}, **{"num_parameters": (LARGE + SMALL) // 2, **more})


def measured(name: str, loss: float, tokens: int) -> Anchor:
    return make_anchor(
        name,
        training=Training(tokens=1_234_567, seed=5, start_loss=4.5, best_loss=3.25, best_step=77),
        evaluation=Evaluation(loss=loss, perplexity=float(np.exp(loss)), num_tokens=tokens),
    )


def cells(card: ModelCard, first: str) -> list[str]:
    """The cells of the one table row whose first cell is ``first``, split as GitHub does: not at ``\\|``."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in card.text.splitlines() if line.startswith("|")]
    (row,) = [row for row in rows if row[0].strip() == first][:1]
    return [cell.strip() for cell in row]


def code(card: ModelCard, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card.text, re.MULTILINE | re.DOTALL)


# -- text ---------------------------------------------------------------------------------------------------------


def test_a_chains_card_lists_its_anchors() -> None:
    manifest = make_manifest(
        measured("large", 3.0, 9_999),
        measured("small", 3.5, 9_999),
        curve=[CurvePoint(num_parameters=49_392, loss=3.2, method="interpolate")],
        recipe={"name": "tiny-chain", "anchors": [0.5]},
        versions={"torch": "2.13.0"},
    )
    card = chain_card(manifest, "org/tiny-chain")
    assert card.text.lstrip().startswith("# tiny-chain\n")
    assert "any size from 40.75k to 58.03k parameters" in card.text
    row = ["`small`", "40,752", "intermediate_size 40", "1,234,567", "3.5000", "33.115", "9,999"]
    assert cells(card, "`small`") == row
    assert cells(card, "`large`")[4:6] == ["3.0000", "20.086"]
    assert "All anchors share: hidden_size 48, num_hidden_layers 3" in card.text
    assert cells(card, "49,392") == ["49,392", "interpolate", "3.2000", "98.8 kB", "95.1 kB", "93.4 kB"]
    assert cells(card, "58,032")[:4] == ["58,032", "anchor", "3.0000", "116 kB"]
    sizes = card.text.partition("## Sizes")[2]
    assert sizes.index("| 40,752 |") < sizes.index("| 49,392 |") < sizes.index("| 58,032 |")
    assert "| `small` | `large` | – | 4.5000 | 3.2500 | 77 | 5 |" in card.text
    assert cells(card, "torch") == ["torch", "2.13.0"]
    assert [yaml.safe_load(text) for text in code(card, "yaml")] == [manifest.recipe]
    assert (
        "- Source: org/source\n- Basis of the residual stream: the source's own\n- License: apache-2.0\n" in card.text
    )
    assert "## Limits" in card.text
    assert "eprint        = {2605.07783}" in card.text


def test_what_was_not_measured_is_not_claimed() -> None:
    card = chain_card(make_manifest(license=None), "org/tiny-chain")
    assert cells(card, "`small`")[3:] == ["–"] * 4
    assert "License" not in card.text
    assert "Sizes in between" not in card.text
    assert "Recipe" not in card.text
    assert "model-index" not in card.data.to_dict()
    assert "license" not in card.data.to_dict()
    assert "tokenizer" not in card.text


def test_a_chains_card_says_whether_it_is_for_chat() -> None:
    told = {chat: chain_card(make_manifest(), "org/x", chat=chat).text for chat in (True, False, None)}
    assert "The tokenizer has a chat template;" in told[True] and "base models" not in told[True]
    assert "no chat template: these are base models" in told[False]
    assert "chat" not in told[None]


def test_the_picture_is_shown_where_it_lies(tmp_path: Path) -> None:
    assert CURVE_PICTURE not in chain_card(make_manifest(), folder=tmp_path).text
    (tmp_path / CURVE_PICTURE).write_bytes(b"")
    assert f"]({CURVE_PICTURE})" in chain_card(make_manifest(), folder=tmp_path).text


def test_a_chain_of_one_anchor_has_a_card() -> None:
    card = chain_card(make_manifest(make_anchor("large")), "org/one")
    assert "one anchor so far" in card.text
    assert "num_parameters=58032)" in card.text
    assert "hidden_size 48, intermediate_size 80" in cells(card, "`large`")[2]


def test_an_anchors_card_tells_where_it_came_from() -> None:
    large, small = make_anchor("large", repo_id="org/large", revision=COMMIT), measured("small", 3.5, 999)
    manifest = make_manifest(large, small)
    card = anchor_card(manifest, small, "org/small")
    assert "started as a subset of its larger neighbor `large` (58.03k)" in card.text
    assert cells(card, "40,752")[2:] == ["1,234,567", "3.5000", "33.115", "999"]
    assert "checkpoint that was kept: 3.2500 (step 77)" in card.text
    assert card.data.base_model == "org/large"
    first = anchor_card(manifest, large)
    assert "made from the source: org/source" in first.text
    assert "No training was done" in first.text
    assert 'from_pretrained("org/large")' in first.text
    assert first.data.base_model == "org/source"
    scratch = anchor_card(make_manifest(source="trained from scratch"), make_anchor("large"))
    assert "It is the largest anchor, trained from scratch." in scratch.text
    assert scratch.data.base_model is None


@pytest.mark.parametrize(
    ("own", "repo_id", "subfolder", "model", "tokenizer"),
    [
        (True, "org/small", None, '"org/small"', '"org/small"'),
        (False, "org/small", None, '"org/small"', '"org/small"'),
        (False, "org/chain", "anchors/small", '"org/chain", subfolder="anchors/small"', '"org/chain"'),
        (True, "org/chain", "a", '"org/chain", subfolder="a"', '"org/chain", subfolder="a"'),
        (True, None, "anchors/small", '"."', '"."'),
        (False, None, "anchors/small", '"."', '"../.."'),
    ],
)
def test_an_anchor_finds_its_tokenizer(
    own: bool, repo_id: str | None, subfolder: str | None, model: str, tokenizer: str
) -> None:
    files = {"config.json": NOWHERE, **({"tokenizer.json": NOWHERE} if own else {})}
    small = make_anchor("small", files, subfolder=subfolder)
    manifest = make_manifest(make_anchor("large"), small, tokenizer={"tokenizer.json": NOWHERE})
    (start,) = code(anchor_card(manifest, small, repo_id), "python")
    assert f"AutoModelForCausalLM.from_pretrained({model})\n" in start
    assert f"AutoTokenizer.from_pretrained({tokenizer})\n" in start


def test_an_unaligned_anchor_is_called_that() -> None:
    small = make_anchor("small", aligned=False)
    assert "cannot be averaged" in anchor_card(make_manifest(make_anchor("large"), small), small).text


@pytest.mark.parametrize(
    ("method", "said", "blended"),
    [
        ("interpolate", "0.5 x `large`, and what units of the larger one alone write into the residual stream", True),
        ("paper", "averaged: 0.5 x `small` + 0.5 x `large`, missing units of the smaller one counted as zero", True),
        ("expand", "The smaller anchor `small` was placed in a larger frame", False),
        ("prune", "A subset of the units of the larger anchor `large`", False),
    ],
)
def test_a_models_card_tells_how_it_was_made(method: str, said: str, blended: bool) -> None:
    manifest = make_manifest()
    plan = make_middle(manifest, method=method)
    card = model_card(manifest, plan, chain="org/tiny-chain", revision=COMMIT)
    assert "# tiny-chain: 49.39k\n" in card.text
    assert said in card.text
    assert "position between the two is 0.500" in card.text
    assert cells(card, "**this model**")[1] == "49,392"
    assert cells(card, "**this model**")[4] == "not measured"
    again = code(card, "python")[1]
    assert f'method="{method}"' in again
    assert ("alpha=0.5" in again) == blended
    assert f'revision="{COMMIT}"' in again
    assert '    "org/tiny-chain",\n' in again
    assert '"intermediate_size": 60' in again
    assert card.data.base_model == "org/tiny-chain"
    assert card.data.get("base_model_relation") == ("merge" if blended else None)
    assert ("merge" in (card.data.tags or [])) == blended


def test_a_models_card_shows_what_was_measured() -> None:
    manifest = make_manifest(measured("large", 3.0, 9), measured("small", 3.5, 9))
    plan = make_middle(manifest)
    evaluation = Evaluation(loss=3.125, perplexity=22.76, num_tokens=4_321)
    card = model_card(manifest, plan, chain="tiny-chain", revision=None, evaluation=evaluation, repo_id="org/middle")
    assert cells(card, "**this model**")[4:] == ["3.1250", "22.760", "4,321"]
    assert "a held-out loss of 3.250 nats a token be expected" in card.text
    assert 'from_pretrained("org/middle")' in card.text
    assert '    # the folder of the chain\n    "tiny-chain",\n' in card.text
    assert card.data.base_model == "org/source"  # neither the anchors nor the chain have a repository
    assert [r.metric_value for r in card.data.eval_results or []] == [3.125, 22.76]


def test_an_anchor_as_it_is_says_so() -> None:
    manifest = make_manifest()
    plan = make_middle(manifest, num_parameters=SMALL)
    card = model_card(manifest, plan, chain="tiny-chain", revision=None)
    assert "It is the anchor `small` as it is." in card.text
    assert "position" not in card.text
    assert "method=" not in card.text


# -- metadata -----------------------------------------------------------------------------------------------------


def test_metadata_goes_through_model_card_and_back(tmp_path: Path) -> None:
    anchors = [
        make_anchor("large", repo_id="org/large", revision=COMMIT),
        make_anchor(
            "small",
            repo_id="org/small",
            revision=COMMIT,
            evaluation=Evaluation(loss=3.5, perplexity=33.1, num_tokens=999),
        ),
    ]
    manifest = make_manifest(*anchors, recipe={"data": {"dataset": {"name": "org/text"}}})
    cards = {
        "chain": chain_card(manifest, "org/tiny-chain"),
        "anchor": anchor_card(manifest, anchors[1]),
        "model": model_card(manifest, make_middle(manifest), chain="org/tiny-chain", revision=COMMIT),
    }
    for name, card in cards.items():
        card.save(tmp_path / f"{name}.md")
        again = ModelCard.load(tmp_path / f"{name}.md")
        assert again.data.to_dict() == card.data.to_dict()
        assert again.text == card.text
        whole = name != "chain"  # whose repository has no config.json, so that no pipeline can run it
        assert again.data.library_name == ("transformers" if whole else "cbd-hub")
        assert again.data.pipeline_tag == ("text-generation" if whole else None)
        relation = {"chain": None, "anchor": "finetune", "model": "merge"}[name]
        assert getattr(again.data, "base_model_relation", None) == relation
        assert again.data.license == "apache-2.0"
        assert again.data.datasets == ["org/text"]
        assert {"cbd-hub", "chain-based-distillation"} <= set(again.data.tags or [])
    assert cards["chain"].data.base_model == "org/source"
    assert cards["model"].data.base_model == ["org/large", "org/small"]
    results = cards["anchor"].data.eval_results or []
    assert cards["anchor"].data.model_name == "tiny-chain-small"
    assert [(r.metric_type, r.metric_value, r.metric_args) for r in results] == [
        ("loss", 3.5, {"num_tokens": 999}),
        ("perplexity", 33.1, {"num_tokens": 999}),
    ]
    assert {r.dataset_type for r in results} == {"org/text"}
    assert [r.metric_name for r in cards["chain"].data.eval_results or []] == [
        "held-out loss of small",
        "held-out perplexity of small",
    ]


@pytest.mark.parametrize("source", ["trained from scratch", "gpt2-folder", "../org/name", "a/b/c", "org/na me", "/a"])
def test_only_repository_ids_become_base_models(source: str) -> None:
    assert chain_card(make_manifest(source=source)).data.base_model is None


def test_losses_that_are_no_numbers_are_no_evaluation() -> None:
    for value in (float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="finite number"):
            Evaluation(loss=800.0, perplexity=value, num_tokens=9)


# -- hostile manifests ----------------------------------------------------------------------------------------------

HOSTILE = [
    "a | b | c",
    "a\n---\nlicense: stolen\n---\n# Heading",
    "a\r\n\r\n| x | y |\r\n|---|---|",
    "a\u2028---\u2028b\u202ec\x00\x1b[31m",
    "```\n# out of the fence",
    "</details><script>alert(1)</script>",
    "[click](https://example.com) ![x](y) <https://example.com> &lt;",
    "*a* _b_ ~~c~~ `d` $e$ \\",
    "'\": {a: b} # c",
    "{{ 7 * 7 }}{% raw %}",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_strings_of_a_manifest_cannot_break_a_card(text: str) -> None:
    tame = make_manifest(
        measured("large", 3.0, 9),
        measured("small", 3.5, 9),
        source="x",
        source_revision="x",
        license="x",
        curve=[CurvePoint(num_parameters=49_392, loss=3.2, method="x")],
        recipe={"x": "x", "data": {"dataset": {"name": "x y"}}},
        versions={"x": "x"},
    )
    curve = [CurvePoint(num_parameters=49_392, loss=3.2, method=text)]
    recipe = {text: f"\n{text}\n", "data": {"dataset": {"name": text}}}
    names = {"source": text, "source_revision": text, "license": text, "versions": {text: text}}
    hostile = tame.model_copy(update={**names, "curve": curve, "recipe": recipe})

    def cards(manifest: Manifest, chain: str) -> list[ModelCard]:
        plan = make_middle(manifest)
        return [
            chain_card(manifest, chain),
            anchor_card(manifest, manifest.anchors[0]),
            anchor_card(manifest, manifest.anchors[1]),
            model_card(manifest, plan, chain=chain, revision=chain),
        ]

    for good, bad in zip(cards(tame, "x"), cards(hostile, text), strict=True):
        again = ModelCard(str(bad))  # one metadata block, of known fields alone
        assert again.text == bad.text
        one_line = "".join(c for c in " ".join(text.split()) if c.isprintable())
        assert set(again.data.to_dict()) <= set(good.data.to_dict()) | {"license_name"}
        assert again.data.license == "other"
        assert again.data.license_name == one_line
        assert again.data.base_model is None
        # Outside the recipe's fence, line by line the same structure: headings, fences, tables and their cells.
        assert structure(bad) == structure(good)
        for fence, block in re.findall(r"^(`{3,})yaml\n(.*?)^\1$", bad.text, re.MULTILINE | re.DOTALL):
            assert fence not in block
            assert yaml.safe_load(block) == recipe


def structure(card: ModelCard) -> list[Any]:
    """What every line outside the fences is: its heading, fence, number of cells, HTML, or plain text."""
    text = re.sub(r"^(`{3,})(\w+)\n.*?^\1$", r"```\2", card.text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"[0-9a-f]{16} -->\n\Z", "HASH -->\n", text)  # the one thing that may differ
    lines: list[Any] = []
    for line in text.splitlines():
        if line.startswith(("#", "```", "<")):
            lines.append(line)
        elif line.startswith("|"):
            lines.append(len(re.split(r"(?<!\\)(?:\\\\)*\|", line)))
        else:
            without = re.sub(r"\\.", "", line)
            lines.append((bool(line), re.findall(r"[\[\]<>!]", without), re.match(r"\s*(---|>|- |\* )?", line)[0]))  # type: ignore[index]
    return lines


def test_a_card_knows_whether_somebody_edited_it(tmp_path: Path) -> None:
    card = chain_card(make_manifest(), "org/x")
    card.save(tmp_path / "README.md")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert is_generated(text)
    assert is_generated(text.replace("\n", "\r\n"))  # as an editor may have saved it, with nothing else changed
    assert not is_generated(text.replace("tiny-chain", "my-chain", 1))
    assert not is_generated(text + "\nMore words\n")
    assert not is_generated("Only my words\n")
    assert not is_generated("")
    assert is_generated(str(anchor_card(make_manifest(), make_manifest().anchors[1], "org/a", chain="org/x")))


def test_results_are_no_edit_and_other_metadata_is(tmp_path: Path) -> None:
    recovered_card("m", 9, "llama", tokens=1, losses=(2.0, 1.0), test_tokens=1).save(tmp_path / "README.md")
    row = {"name": "m", "task": "piqa", "metric": "acc", "value": 0.5, "stderr": 0.1, "items": 9}
    text = update_card(tmp_path, [row]).read_text(encoding="utf-8")
    assert "model-index:" in text and is_generated(text) and is_generated(text.replace("\n", "\r\n"))
    assert is_generated(text.replace("value: 0.5", "value: 0.6"))
    for edited in (
        text.replace("tags:\n", "tags:\n- mine\n"),
        text.replace("tags:\n", "# a note\ntags:\n"),
        text.replace("library_name: transformers", "library_name: other"),
        text.replace("model-index:", "license: mit\nmodel-index:"),
        text.replace("\n---\n", "\nlicense: mit\n---\n"),
    ):
        assert edited != text and not is_generated(edited)


# -- quick starts -----------------------------------------------------------------------------------------------------


def test_quick_starts_run_as_printed(tmp_path: Path) -> None:
    """A chain on disk, its README in its folder, those of an anchor and of a model made from it in theirs."""
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["Once upon a time there was a chain. " * 20]}), 300)
    tokenizer.save_pretrained(tmp_path)
    top = {name: file_entry(tmp_path / name) for name in ("tokenizer.json", "tokenizer_config.json")}
    anchors = []
    for name, ffn in FFN.items():
        folder = tmp_path / "anchors" / name
        tiny_model(tiny_config("llama", intermediate_size=ffn, vocab_size=300)).save_pretrained(folder)
        config = tiny_config("llama", intermediate_size=ffn, vocab_size=300)
        axis_map = axis_map_for(config)
        sizes = axis_map.sizes(config)
        anchors.append(
            make_anchor(
                name,
                {path.name: file_entry(path) for path in folder.iterdir()},
                subfolder=f"anchors/{name}",
                shape=axis_map.config_fields(sizes),
                num_parameters=count_parameters(axis_map, sizes),
            )
        )
    order = np.tile(np.arange(FFN["large"]), (3, 1))  # both anchors are random: any correspondence will do
    save_index_maps({"small": IndexMap(np.arange(3), {"ffn": order})}, tmp_path / INDEX_MAPS_NAME)
    manifest = make_manifest(*anchors, tokenizer=top, index_maps=file_entry(tmp_path / INDEX_MAPS_NAME))
    write_manifest(manifest, tmp_path)
    middle = make_middle(manifest, num_parameters=(anchors[0].num_parameters + anchors[1].num_parameters) // 2)
    model = model_card(manifest, middle, chain="../..", revision=None)
    parts = {
        ".": code(chain_card(manifest), "python"),
        "anchors/small": code(anchor_card(manifest, anchors[1]), "python"),
        "anchors/large": [code(model, "python")[1] + "print(model.num_parameters())\n"],
    }
    script = "import os\n"
    for place, blocks in parts.items():
        script += f"os.chdir({str(tmp_path / place)!r})\n" + "\n".join(blocks)
    result = subprocess.run([sys.executable, "-"], input=script, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, f"{script}\n{result.stderr}"
    printed = [line for line in result.stdout.splitlines() if line.strip()]
    assert printed[0].endswith(" parameters")
    assert any(line.startswith("Once upon a time") for line in printed)
    assert f"{anchors[1].num_parameters:,} parameters" in printed
    assert printed[-1] == str(middle.num_parameters)
