"""Results in cards: what is added, replaced and kept, and that a card is never half written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from tiny_recipe import built_chain

from cbd_hub.errors import RecipeError
from cbd_hub.hub.card_results import add_results, open_card, update_card
from cbd_hub.hub.cards import OWN_TEXT
from cbd_hub.manifest.manifest import MANIFEST_NAME

CARD = """---
license: apache-2.0
custom: {kept: [1, two]}
tags:
- mine
model-index:
- name: My Model
  results:
  - task:
      type: text-generation
      name: Text
    dataset:
      name: Wiki
      type: wikitext
    metrics:
    - type: perplexity
      value: 20.5
      name: perplexity
      verified: false
    source:
      name: A board
      url: https://example.com
---
# My model

Words of mine, with  two spaces,\ttabs and ünïcode.
---
no: metadata
"""


def losses(name: str, of: str, loss: float) -> dict[str, Any]:
    numbers = {"loss": loss, "perplexity": 2 * loss, "bits_per_byte": loss / 2, "num_tokens": 99}
    return {"name": name, "num_parameters": 7, **numbers, "tokenizer": "x", "of": of}


def score(name: str, of: str, task: str, metric: str, value: float, **more: Any) -> dict[str, Any]:
    counts = {"stderr": 0.01, "items": 50, "truncated": 0}
    return {
        "name": name,
        "num_parameters": 7,
        "task": task,
        "metric": metric,
        "value": value,
        **counts,
        "of": of,
        **more,
    }


def results(folder: Path) -> list[EvalResult]:
    return ModelCard.load(folder / "README.md").data.eval_results or []  # type: ignore[attr-defined]


def test_a_folder_without_a_card_gets_a_minimal_one(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    open_card(folder)
    assert list(folder.iterdir()) == []  # looking writes nothing
    path = update_card(folder, [losses(str(folder), str(folder), 3.0)], "held-out.txt")
    assert path == folder / "README.md" and list(folder.iterdir()) == [path]
    card = ModelCard.load(path)
    assert card.text.strip() == "# my-model"
    assert (card.data.model_name, card.data.library_name) == ("my-model", "transformers")  # type: ignore[attr-defined]
    assert [(r.metric_type, r.metric_name, r.metric_value, r.metric_args) for r in results(folder)] == [
        ("loss", "loss", 3.0, {"num_tokens": 99}),
        ("perplexity", "perplexity", 6.0, {"num_tokens": 99}),
        ("bits_per_byte", "bits_per_byte", 1.5, {"num_tokens": 99}),
    ]
    assert {r.dataset_name for r in results(folder)} == {"held-out.txt"}
    assert open_card(folder).data.tags is None  # type: ignore[attr-defined]
    path.unlink()
    (folder / MANIFEST_NAME).touch()
    assert open_card(folder).data.tags == ["cbd-hub"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_metadata_and_other_results_stay(end: str, tmp_path: Path) -> None:
    before = CARD.replace("\n", end).encode()
    (tmp_path / "README.md").write_bytes(before)
    (tmp_path / "README.md").chmod(0o640)
    update_card(tmp_path, [score(str(tmp_path), str(tmp_path), "boolq", "acc", 0.6)])
    after = (tmp_path / "README.md").read_bytes()
    mark = f"---{end}".encode()
    assert after.split(mark, 2)[2] == before.split(mark, 2)[2]  # the text, to the byte
    assert after.count(b"\r\n") == (after.count(b"\n") if end == "\r\n" else 0)
    assert (tmp_path / "README.md").stat().st_mode & 0o777 == 0o640
    old, new = ModelCard(before.decode()), ModelCard(after.decode())
    assert {k: v for k, v in new.data.to_dict().items() if k != "model-index"} == {
        k: v for k, v in old.data.to_dict().items() if k != "model-index"
    }
    assert list(new.data.to_dict()) == list(old.data.to_dict())
    assert results(tmp_path)[:1] == old.data.eval_results  # type: ignore[attr-defined]
    assert new.data.model_name == "My Model"  # type: ignore[attr-defined]
    added = results(tmp_path)[1]
    assert (added.task_type, added.dataset_type, added.metric_type, added.metric_value) == (
        "multiple-choice",
        "boolq",
        "acc",
        0.6,
    )
    assert added.metric_args == {"stderr": 0.01, "items": 50, "truncated": 0}


def test_a_card_without_metadata_gets_some(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# Mine: {[\n- : words\n", encoding="utf-8")
    update_card(tmp_path, [losses(str(tmp_path), str(tmp_path), 3.0)], "a.txt")
    assert ModelCard.load(tmp_path / "README.md").text == "# Mine: {[\n- : words\n"
    assert len(results(tmp_path)) == 3


def test_measuring_again_replaces_and_other_data_sets_stay(tmp_path: Path) -> None:
    place = str(tmp_path)

    def add(loss: float, dataset: str) -> bytes:
        return update_card(place, [losses(place, place, loss)], dataset).read_bytes()

    first = add(3.0, "a.txt")
    assert add(3.0, "a.txt") == first
    add(4.0, "b.txt")
    assert [(r.dataset_name, r.metric_value) for r in results(tmp_path) if r.metric_type == "loss"] == [
        ("a.txt", 3.0),
        ("b.txt", 4.0),
    ]
    add(2.5, "a.txt")
    assert sorted((r.dataset_name, r.metric_value) for r in results(tmp_path) if r.metric_type == "loss") == [
        ("a.txt", 2.5),
        ("b.txt", 4.0),
    ]
    rows = [score(place, place, "piqa", metric, 0.5) for metric in ("acc", "acc_norm")]
    update_card(place, rows)
    update_card(place, [{**row, "value": 0.75} for row in rows])
    told = [r for r in results(tmp_path) if r.dataset_type == "piqa"]
    assert [(r.metric_type, r.metric_value) for r in told] == [("acc", 0.75), ("acc_norm", 0.75)]
    update_card(place, [score(place, place, "s.jsonl", "rougeL", 0.2, implementation="rouge-score 1")])
    (told,) = [r for r in results(tmp_path) if r.dataset_name == "s.jsonl"]
    assert told.task_type == "text-generation" and told.metric_args["implementation"] == "rouge-score 1"
    assert len(results(tmp_path)) == 6 + 2 + 1


def test_a_chains_card_keeps_what_its_build_measured(tmp_path: Path) -> None:
    shutil.copy(built_chain() / "README.md", tmp_path)
    before = results(tmp_path)
    assert len(before) == 6
    text = ModelCard.load(tmp_path / "README.md").text
    rows = [losses(name, str(tmp_path), loss) for name, loss in (("large", 3.0), ("small", 3.5))]
    for _ in range(2):
        update_card(tmp_path, rows, "mine.txt")
        assert results(tmp_path)[:6] == before
        assert [r.metric_name for r in results(tmp_path)[6:] if r.metric_type == "loss"] == [
            "loss of large",
            "loss of small",
        ]
        assert len(results(tmp_path)) == 12
    assert ModelCard.load(tmp_path / "README.md").text == text


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    row = losses(str(tmp_path), str(tmp_path), 800.0) | {"perplexity": float("inf")}
    update_card(tmp_path, [row], "a.txt")
    assert [r.metric_type for r in results(tmp_path)] == ["loss", "bits_per_byte"]
    update_card(tmp_path, [score(str(tmp_path), str(tmp_path), "piqa", "acc", 1.0, stderr=None)])
    assert results(tmp_path)[-1].metric_args == {"items": 50, "truncated": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"---\na: [\n---\n", "cannot be updated"),
        (b"---\n- a\n---\n", "dict"),
        (b"---\nmodel-index: 3\n---\n", "model-index|model_index"),
        (b"---\nmodel-index:\n- name: a\n---\n", "model_index"),
        (b"---\nmodel-index:\n- {name: a, results: []}\n- {name: b, results: []}\n---\n", "of 2 models"),
        (b"\xe4", "utf-8"),
    ],
)
def test_a_card_that_cannot_be_kept_is_refused_and_left(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(content)
    for attempt in (lambda: open_card(tmp_path), lambda: update_card(tmp_path, [])):
        with pytest.raises(RecipeError, match=message):
            attempt()
    assert (tmp_path / "README.md").read_bytes() == content


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"org/name is no local folder.*hf download org/name --local-dir"):
        open_card("org/name")
    (tmp_path / MANIFEST_NAME).touch()
    with pytest.raises(RecipeError, match="no local folder"):
        open_card(tmp_path / MANIFEST_NAME)


def test_a_write_that_breaks_off_leaves_the_old_card(tmp_path: Path) -> None:
    """A process that may write 2,000 bytes to a file, as on a disk that is full, and has more to say."""
    pytest.importorskip("resource", reason="sizes are limited as POSIX does")
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    rows = [score(str(tmp_path), str(tmp_path), f"task {i}", "acc", 0.5) for i in range(30)]
    code = (
        "import json, resource, sys\nfrom cbd_hub.hub.card_results import update_card\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nupdate_card(sys.argv[1], json.loads(sys.argv[2]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), json.dumps(rows)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "OSError" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == CARD


def result(dataset: str, value: float) -> EvalResult:
    return EvalResult("text-generation", "text", dataset, "loss", value, dataset_config=dataset, metric_name="loss")


def card_with(*found: EvalResult) -> ModelCard:
    data = ModelCardData(tags=["x"], model_name="m" if found else None, eval_results=list(found) or None)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\nWords\n")


def test_results_of_an_earlier_card_are_taken_over() -> None:
    held = str(card_with(result("wiki", 3.0), result("news", 2.0), result(OWN_TEXT, 1.0)))
    card: Any = add_results(card_with(result("news", 2.5), result(OWN_TEXT, 1.5)), held)
    found = {r.dataset_name: r.metric_value for r in ModelCard(str(card)).data.eval_results}  # type: ignore[attr-defined]
    assert found == {"wiki": 3.0, "news": 2.5, OWN_TEXT: 1.5}
    bare: Any = add_results(card_with(), held)
    assert [r.metric_value for r in bare.data.eval_results] == [3.0, 2.0]
    assert bare.data.model_name == "m" and ModelCard(str(bare)).text == "\nWords\n"


@pytest.mark.parametrize(
    "held",
    ["", "Words", str(card_with()), str(card_with(result(OWN_TEXT, 1.0)))]
    + [f"---\ntags: [x]\nmodel-index:{index}\n---\nWords\n" for index in (" 3", " [", "\n- name: m\n  results: [3]")],
)
def test_without_results_that_can_be_read_the_new_card_stays_as_it_is(held: str) -> None:
    assert str(add_results(card_with(result("news", 2.5)), held)) == str(card_with(result("news", 2.5)))
    assert str(add_results(card_with(), held)) == str(card_with())
