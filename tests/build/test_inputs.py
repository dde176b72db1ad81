"""What a build is made from: the same ingredients every time, and none that are made up."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_model
from tiny_recipe import TEXT, built_chain, tiny_recipe
from tiny_text import make_documents, tokenizer_with_beginning
from transformers import AutoTokenizer
from typer.testing import CliRunner

from cbd_hub.build.begun import as_recorded
from cbd_hub.build.build import build_chain
from cbd_hub.build.inputs import BuildInputs
from cbd_hub.build.recipe import load_recipe
from cbd_hub.chain.chain import Chain
from cbd_hub.chain.export import write_model
from cbd_hub.cli.main import app
from cbd_hub.errors import RecipeError, UnknownArchitectureError
from cbd_hub.evaluation.held_out import evaluate_loss, losses_by_beginning
from cbd_hub.hub.untrusted import is_tokenizer_file
from cbd_hub.initialization.refit import REFIT_TOKENS
from cbd_hub.text.packing import train_tokenizer


def made(**changes: Any) -> BuildInputs:
    return BuildInputs(*load_recipe(tiny_recipe(**changes)))


def of_model(folder: Path, **changes: Any) -> BuildInputs:
    recipe = {
        "name": "x",
        "source": {"model": str(folder)},
        "anchors": [{"init": "a/b"}],
        "distillation": {"tokens": 0},
    }
    return BuildInputs(*load_recipe({**recipe, **changes}))


def test_splits_share_no_text_and_repeat() -> None:
    one, two = made(), made()
    (splits,) = one.splits
    rows = {name: set(getattr(splits, name)["text"]) for name in ("train", "validation", "test")}
    assert not rows["train"] & rows["validation"] and not rows["train"] & rows["test"]
    assert not rows["validation"] & rows["test"]
    assert one.tokenizer is not None and two.tokenizer is not None and one.text is not None and two.text is not None
    assert one.tokenizer.get_vocab() == two.tokenizer.get_vocab()
    assert len(one.tokenizer) <= 300
    assert one.text.train["input_ids"] == two.text.train["input_ids"]


def test_several_sources_are_mixed_and_documents_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"body": f"{n} bottles of beer. " * 20}) for n in range(99))
    )
    data = {
        "sources": [
            {"text_files": str(TEXT / "179*.txt"), "weight": 3},
            {"dataset": {"name": str(tmp_path), "column": "body"}},
        ],
        "sequence_length": 32,
        "document_boundaries": True,
    }
    ingredients = made(data=data)
    assert len(ingredients.splits) == 2 and ingredients.text is not None and ingredients.tokenizer is not None
    assert "bottles" in ingredients.tokenizer.decode(ingredients.tokenizer("bottles")["input_ids"])
    for blocks in (ingredients.text.train, ingredients.text.validation, ingredients.text.test):
        assert set(blocks.column_names) == {"input_ids", "position_ids", "labels"}
        of_beer = ["beer" in ingredients.tokenizer.decode(ids) for ids in blocks["input_ids"]]
        assert 0.1 < sum(of_beer) / len(of_beer) < 0.4
    calibration = ingredients.calibration()
    assert calibration is not None and calibration.shape[1] == 32


def test_conversations_take_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "As ever."}]
    (tmp_path / "chats").mkdir()
    lines = [json.dumps({"messages": [*chat, {"role": "user", "content": str(n)}]}) for n in range(60)]
    (tmp_path / "chats" / "rows.jsonl").write_text("\n".join(lines))
    tokenizer = AutoTokenizer.from_pretrained(built_chain())
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chatty")
    data = {"dataset": {"name": str(tmp_path / "chats"), "column": "messages"}, "sequence_length": 16}
    ingredients = made(data=data, tokenizer=str(tmp_path / "chatty"))
    assert ingredients.text is not None
    assert all(
        text.startswith("[user] How are you? [assistant] As ever. [user] ")
        for text in ingredients.splits[0].train["text"]
    )
    with pytest.raises(RecipeError, match="no chat template"):
        _ = made(data=data).text


def test_calibration_is_the_beginning_of_the_validation_text() -> None:
    ingredients = made(calibration_tokens=70)
    blocks = ingredients.calibration()
    assert blocks is not None and ingredients.text is not None
    assert (blocks.shape, blocks.dtype) == ((2, 32), torch.int64)
    assert blocks.tolist() == ingredients.text.validation["input_ids"][:2]
    few = made(calibration_tokens=1).calibration()
    assert few is not None and few.shape == (1, 32)
    assert made(calibration_tokens=0, anchors=[{"init": "a/b"}]).calibration() is None


def test_as_many_validation_blocks_as_the_recipe_allows() -> None:
    for tokens, blocks in ((1000, 1000 // 31), (31, 1), (1, 1), (10**9, None), (None, None)):
        ingredients = made(evaluation={"tokens": tokens})
        assert ingredients.text is not None and ingredients.validation is not None
        whole = ingredients.text.validation["input_ids"]
        assert list(ingredients.validation["input_ids"]) == whole[:blocks]


def test_what_refine_gets_is_validation_text_too(tmp_path: Path) -> None:
    """32,768 tokens or all there are; more only where calibration has more."""
    ingredients = made(calibration_tokens=70)
    shipped, few = ingredients.shipped_calibration(), ingredients.calibration()
    assert shipped is not None and few is not None and ingredients.text is not None
    assert shipped.tolist() == ingredients.text.validation["input_ids"][: 32_768 // 32]
    assert shipped[: len(few)].tolist() == few.tolist()
    assert made(calibration_tokens=0, anchors=[{"init": "a/b"}]).shipped_calibration() is None
    assert of_model(tmp_path).shipped_calibration() is None
    (tmp_path / "long.txt").write_text("\n\n".join(f"{n} bottles of beer on the wall. " * 40 for n in range(2000)))
    data = {"text_files": str(tmp_path / "long.txt"), "sequence_length": 512, "held_out_fraction": 0.5}
    for asked, rows in ((512, 64), (40_000, 78)):
        blocks = made(data=data, calibration_tokens=asked).shipped_calibration()
        assert blocks is not None and blocks.shape == (rows, 512)


def test_a_refit_looks_at_training_text_alone(tmp_path: Path) -> None:
    ingredients = made()
    blocks = ingredients.training_blocks(REFIT_TOKENS)
    assert blocks is not None and ingredients.text is not None
    assert blocks.tolist() == ingredients.text.train["input_ids"][: REFIT_TOKENS // 32]
    held_out = {tuple(ids) for ids in ingredients.text.validation["input_ids"]}
    assert not held_out & {tuple(ids) for ids in blocks.tolist()}
    assert of_model(tmp_path).training_blocks(REFIT_TOKENS) is None


def test_without_data_there_is_neither_text_nor_calibration(tmp_path: Path) -> None:
    ingredients = of_model(tmp_path)
    assert ingredients.text is None
    assert ingredients.calibration() is None
    assert ingredients.validation is None
    with pytest.raises(RecipeError, match="no `data`"):
        _ = ingredients.splits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gpt_neox"])
def test_no_tokenizer_is_made_up_for_a_bare_model(family: str, tmp_path: Path) -> None:
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    assert of_model(tmp_path).tokenizer is None
    with pytest.raises(RecipeError, match="no `tokenizer`"):
        _ = of_model(tmp_path, data=tiny_recipe()["data"]).text


def test_the_tokenizer_of_the_source_or_of_a_folder_beside_the_recipe(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built_chain())
    tokenizer.save_pretrained(tmp_path / "source")
    found = of_model(tmp_path / "source").tokenizer
    assert found is not None and found.get_vocab() == tokenizer.get_vocab()
    recipe, _ = load_recipe(tiny_recipe(tokenizer="source"))
    beside = BuildInputs(recipe, tmp_path).tokenizer
    assert beside is not None and beside.get_vocab() == tokenizer.get_vocab()


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(RecipeError, match=r"cannot be loaded"):
        _ = of_model(tmp_path).tokenizer


def test_text_is_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((TEXT.parents[1] / "recipes" / "quickstart.yaml").read_text())
    (tmp_path.parent / "data").mkdir(exist_ok=True)
    (tmp_path.parent / "data" / "sotu").symlink_to(TEXT)
    try:
        assert len(BuildInputs(*load_recipe(tmp_path / "recipe.yaml")).splits[0].train) > 50
    finally:
        (tmp_path.parent / "data" / "sotu").unlink()


def test_the_source_is_loaded_in_float32_and_trained_ones_repeat(tmp_path: Path) -> None:
    tiny_model(tiny_config("llama"), torch.bfloat16).save_pretrained(tmp_path / "source")
    model, training = of_model(tmp_path / "source").source(tmp_path / "work", progress=False)
    assert (model.dtype, training, model.training) == (torch.float32, None, False)
    recipe = tiny_recipe()
    recipe["source"]["train"]["training"]["tokens"] = 512
    states = []
    for name in ("one", "two"):
        trained, record = made(source=recipe["source"]).source(tmp_path / name, progress=False)
        assert record is not None and record.tokens == 512
        assert trained.config.vocab_size <= 300 and trained.config.eos_token_id == 0
        states.append(trained.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(
    ("train", "error", "match"),
    [
        ({"architecture": "lama"}, RecipeError, "no lama config"),
        ({"architecture": "bloom", "config": {"hidden_size": 32, "n_head": 4}}, UnknownArchitectureError, "axis_map"),
        ({"config": {"hidden_size": 32, "num_attention_heads": 5}}, RecipeError, "not a multiple"),
        ({"config": {"hidden_size": "wide"}}, RecipeError, "hidden_size"),
        ({"config": {"hiden_size": 32, "num_hidden_layers": 1}}, ValueError, "hiden_size"),
    ],
)
def test_a_source_that_cannot_be_trained_is_refused_first(
    train: Any, error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        made(source={"train": train}).source(tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


# -- the tokenizer's files -----------------------------------------------------------------------------------------


def with_files(folder: Path, edit: Callable[[Path], object]) -> Path:
    tokenizer = train_tokenizer(make_documents(), 300)
    tokenizer.save_pretrained(folder)
    tiny_model(tiny_config("llama", vocab_size=300)).save_pretrained(folder)
    edit(folder)
    return folder


def named_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T {{ messages[0]['content'] }}")


def another_class(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "GPT2Tokenizer"}, indent=7))


def foreign_spacing(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))


@pytest.mark.filterwarnings("ignore:transformers reads the tokenizer")
@pytest.mark.parametrize("edit", [named_templates, another_class, foreign_spacing])
def test_tokenizer_files_are_kept_byte_for_byte(tmp_path: Path, edit: Callable[[Path], object]) -> None:
    source = with_files(tmp_path / "src", edit)
    recipe = {"name": "t", "source": {"model": str(source)}, "anchors": [0.8], "distillation": {"tokens": 0}}
    chain = build_chain(recipe, tmp_path / "chain", progress=False)
    kept = [
        p.relative_to(source)
        for p in source.rglob("*")
        if p.is_file() and is_tokenizer_file(str(p.relative_to(source)))
    ]
    assert sorted(map(str, kept)) == sorted(chain.manifest.tokenizer)
    Chain.from_pretrained(tmp_path / "chain").save_pretrained(tmp_path / "copy")
    write_model(chain, chain.plan(chain.anchors[1].num_parameters), tmp_path / "model", progress=False)
    for folder in ("chain", "copy", "model", f"chain/anchors/{chain.anchors[1].name}"):
        for name in kept:
            written, own = (tmp_path / folder / name).read_bytes(), (source / name).read_bytes()
            if folder == "model" and b'"TokenizersBackend"' in own:  # a class that older readers do not know
                assert json.loads(written)["tokenizer_class"] == "PreTrainedTokenizerFast"
            else:
                assert written == own
    again, first = (AutoTokenizer.from_pretrained(place) for place in (tmp_path / "model", source))
    assert again.chat_template == first.chat_template == chain.tokenizer.chat_template
    assert again("one 2 three")["input_ids"] == first("one 2 three")["input_ids"]


def test_another_reading_than_the_file_s_is_said(tmp_path: Path) -> None:
    def edit(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["pre_tokenizer"] = {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        }
        path.write_text(json.dumps(content))
        another_class(folder)

    source = with_files(tmp_path / "src", edit)
    recipe = {"name": "t", "source": {"model": str(source)}, "anchors": [0.8], "distillation": {"tokens": 0}}
    with pytest.warns(UserWarning, match="splits text otherwise than its tokenizer.json does"):
        assert BuildInputs(*load_recipe(recipe)).tokenizer is not None


# -- how a text begins -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain whose tokenizer puts ``<s>`` before a text, its source trained from scratch."""
    folder = tmp_path_factory.mktemp("begun")
    tokenizer_with_beginning(made().splits[0].train, 300).save_pretrained(folder / "tokenizer")
    build_chain(tiny_recipe(tokenizer=str(folder / "tokenizer")), folder / "chain", progress=False)
    return folder / "chain"


def test_all_text_of_a_build_begins_as_the_tokenizer_begins_it(begun_chain: Path) -> None:
    inputs = made(tokenizer=str(begun_chain))
    tokenizer = inputs.tokenizer
    assert inputs.text is not None and tokenizer is not None
    calibration, refit, validation = inputs.calibration(), inputs.training_blocks(REFIT_TOKENS), inputs.validation
    assert calibration is not None and refit is not None and validation is not None
    for blocks in (inputs.text.train, inputs.text.validation, inputs.text.test, validation):
        assert {ids[0] for ids in blocks["input_ids"]} == {tokenizer.bos_token_id}
    for tokens in (calibration, refit, load_file(begun_chain / "calibration.safetensors")["input_ids"]):
        assert set(tokens[:, 0].tolist()) == {tokenizer.bos_token_id}


def test_the_manifest_says_how_its_text_was_packed(begun_chain: Path) -> None:
    for folder, begin, end in ((begun_chain, "<s>", "</s>"), (built_chain(), "none", "<|endoftext|>")):
        recipe = Chain.from_pretrained(folder).manifest.recipe
        assert recipe is not None
        assert (recipe["data"]["begin_of_text"], recipe["data"]["end_of_text"]) == (begin, end)
        again = BuildInputs(*load_recipe(as_recorded(recipe)))  # and a build from it packs alike
        assert again.recipe.data is not None and again.recipe.data.begin_of_text == begin
    older = as_recorded({"data": {"text_files": "a"}})["data"]  # a chain of before
    assert (older["begin_of_text"], older["end_of_text"]) == ("none", "eos")


def test_the_recorded_loss_is_that_of_text_that_begins_so(begun_chain: Path) -> None:
    chain, inputs = Chain.from_pretrained(begun_chain), made(tokenizer=str(begun_chain))
    without = made(tokenizer=str(begun_chain), data={**tiny_recipe()["data"], "begin_of_text": "none"})
    assert inputs.text is not None and without.text is not None
    model = chain.anchors[0].load()
    recorded = chain.manifest.anchors[0].evaluation
    assert recorded is not None
    assert evaluate_loss(model, inputs.text.test, max_tokens=1000).loss == pytest.approx(recorded.loss, abs=1e-5)
    assert evaluate_loss(model, without.text.test, max_tokens=1000).loss != pytest.approx(recorded.loss, abs=1e-3)


@pytest.mark.parametrize(
    ("begin", "has", "has_not", "advice"), [("auto", "with", "without", "none"), ("none", "without", "with", "<s>")]
)
def test_a_source_that_reads_its_own_beginning_worse_is_said(
    begun_chain: Path, monkeypatch: pytest.MonkeyPatch, begin: str, has: str, has_not: str, advice: str
) -> None:
    chain = Chain.from_pretrained(begun_chain)
    data = {**tiny_recipe()["data"], "begin_of_text": begin}
    inputs = made(source={"model": str(begun_chain / "anchors" / chain.anchors[0].name)}, tokenizer=None, data=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source, _ = inputs.source(begun_chain, False)  # a tiny model reads both ways alike
    calibration, tokenizer = inputs.calibration(), inputs.tokenizer
    assert calibration is not None and tokenizer is not None
    text = calibration[:, 1:] if begin == "auto" else calibration
    began, bare = losses_by_beginning(source, text, tokenizer.bos_token_id)
    own, other = (began, bare) if begin == "auto" else (bare, began)
    monkeypatch.setattr("cbd_hub.build.inputs._WORSE", -1.0)
    said = (
        f"at {own:.2f} nats a token {has} '<s>' before it.* at {other:.2f} {has_not} it; .*begin_of_text to '{advice}'"
    )
    with pytest.warns(UserWarning, match=said):
        inputs.source(begun_chain, False)


def test_an_anchor_that_reads_better_than_a_source_from_elsewhere_is_said(begun_chain: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(begun_chain)
    config = tiny_config("llama", vocab_size=len(tokenizer))
    tiny_model(config).save_pretrained(tmp_path / "source")  # untrained
    tokenizer.save_pretrained(tmp_path / "source")
    training = {"tokens": 2048, "learning_rate": 3e-3, "batch_size": 4, "ce": 1.0}
    recipe = tiny_recipe(source={"model": str(tmp_path / "source")}, tokenizer=None, anchors=[0.9])
    recipe["distillation"] = {**training, "control_point": None}
    with pytest.warns(UserWarning, match="read the held-out text better than the source, tiny-"):
        chain = build_chain(recipe, tmp_path / "chain", progress=False)
    assert chain.manifest.better_than_source == [chain.anchors[1].name]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "chain")]).output
    assert f"warning: {chain.anchors[1].name} read it better than the source" in shown
