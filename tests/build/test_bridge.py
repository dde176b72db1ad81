"""BridgeInputs a chain on a source of another architecture and vocabulary, with real small models and real text."""

import copy
import functools
import json
import math
import re
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from serve import serving
from test_build import start_build, wait_for
from tiny_models import VARIANTS, tiny_config, tiny_model
from tiny_recipe import TEXT, built_chain, digests
from tokenizers import Tokenizer as Backend
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub import Chain, from_chain
from cbd_hub.build.bridge import BridgeInputs, build_anchor_zero, choose
from cbd_hub.build.build import build_chain
from cbd_hub.build.check import check_recipe
from cbd_hub.build.recipe import load_recipe
from cbd_hub.build.settings import BridgeConfig
from cbd_hub.errors import RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.hub.cards import anchor_card, chain_card
from cbd_hub.manifest.manifest import Bridge
from cbd_hub.text.documents import load_documents
from cbd_hub.text.packing import pack, train_tokenizer
from cbd_hub.text.settings import DataConfig
from cbd_hub.training.settings import DistillationConfig

GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 64}
TRAINING = {"tokens": 2048, "learning_rate": 3e-3, "batch_size": 4, "hidden": 0}


@pytest.fixture(scope="module")
def source() -> tuple[PreTrainedModel, Tokenizer]:
    folder = built_chain()
    model = AutoModelForCausalLM.from_pretrained(folder / "anchors" / Chain.from_pretrained(folder).anchors[0].name)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def documents() -> list[dict[str, str]]:
    rows = load_documents(DataConfig(text_files=str(TEXT / "180*.txt")), Path("/"))
    return [{"text": row["text"]} for row in rows]


@pytest.fixture(scope="module")
def founding(source: tuple[PreTrainedModel, Tokenizer], documents: list[dict[str, str]]) -> BridgeInputs:
    tokenizer = train_tokenizer(documents, 420)
    blocks = pack(Dataset.from_list(documents), tokenizer, 32)

    def rows() -> Iterator[Mapping[str, str]]:
        return iter(documents)

    return BridgeInputs(
        tokenizer=tokenizer,
        train=blocks.select(range(200)),
        validation=blocks.select(range(200, 216)),
        calibration=torch.tensor(blocks[216:232]["input_ids"]),
        documents=rows,
        data=DataConfig(text_files=str(TEXT / "180*.txt"), sequence_length=32),
        source_name="tiny",
        source=source[0],
        source_tokenizer=source[1],
    )


def setting(tmp_path: Path, **changes: Any) -> BridgeConfig:
    base = {"architecture": "gpt2", "config": GPT2, "training": TRAINING, "cache": str(tmp_path / "cache")}
    generation = {"documents": 24, "prompt_tokens": 8, "sampling": {"max_new_tokens": 24}}
    return BridgeConfig.model_validate({**base, "generation": generation, **changes})


def test_auto_takes_what_the_models_allow(founding: BridgeInputs, source: tuple[PreTrainedModel, Tokenizer]) -> None:
    ways, why, report = choose(BridgeConfig(), founding)
    assert ways == ["transplant", "logits"] and "%" in why and report is not None
    assert 0.3 < report.student_frequency < 1

    same = replace(founding, tokenizer=source[1])
    ways, why, _ = choose(BridgeConfig(), same)
    assert ways == ["transplant", "logits"] and "one vocabulary" in why
    served = replace(founding, source=None, source_tokenizer=None)
    assert choose(BridgeConfig(), served)[0] == ["seqkd"]
    with pytest.raises(RecipeError, match="only text"):
        choose(BridgeConfig(use=["logits"]), served)


@pytest.mark.parametrize("use", [[], ["transplant"], ["logits"], ["seqkd"], ["transplant", "logits", "seqkd"]])
def test_every_way_founds_a_model_of_the_new_kind(founding: BridgeInputs, tmp_path: Path, use: list[str]) -> None:
    said: list[str] = []
    model, training, made = build_anchor_zero(
        setting(tmp_path, use=use), founding, tmp_path / "work", log=said.append, progress=False
    )
    assert model.config.model_type == "gpt2" and model.config.vocab_size == len(founding.tokenizer)
    assert training.start_loss is not None and training.best_loss is not None
    assert training.best_loss < training.start_loss
    assert evaluate_loss(model, founding.validation).loss == pytest.approx(training.best_loss, abs=1e-4)
    assert made.use == use and made.source_architecture == "llama"
    assert ("embeddings" in made.carried) is ("transplant" in use)
    assert (made.generated_documents > 0) is ("seqkd" in use)
    assert any("because" in text for text in said)
    assert any("groups" in text for text in said) is ("logits" in use)


def test_blocks_go_along_where_the_form_is_the_same(founding: BridgeInputs, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "intermediate_size": 64}
    kinds = {}
    for use in ([], ["transplant"]):
        config = setting(tmp_path, use=use, architecture=None, config=small)
        model, training, made = build_anchor_zero(config, founding, tmp_path / "work", progress=False)
        assert model.config.num_hidden_layers == 2 and model.config.intermediate_size == 64
        kinds[tuple(made.carried)] = training.start_loss
    fresh, carried = kinds[()], kinds["embeddings", "blocks"]
    assert fresh is not None and carried is not None and carried < fresh - 0.3


LLAMA = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
REASONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "form": ("gpt2", GPT2, r"gpt2 blocks have another form than llama's"),
    "form of norms": ("olmo2", LLAMA, r"olmo2 blocks have another form than llama's"),
    "width": ("llama", {"hidden_size": 48}, r"hidden_size 48 is above the source's 32"),
    "depth": ("llama", {"num_hidden_layers": 4}, r"num_hidden_layers 4 is above the source's 3"),
    "head_dim": ("llama", {"head_dim": 4}, r"head_dim 4 is not the source's 8"),
    "ratio": ("llama", {"num_key_value_heads": 1}, r"num_attention_heads / num_key_value_heads 4 is above .* 2"),
    "field": ("mistral", {**LLAMA, "rms_norm_eps": 1e-3}, r"rms_norm_eps is 0\.001 in the mistral config and 1e-06"),
    "window": ("mistral", {**LLAMA, "rms_norm_eps": 1e-6, "sliding_window": 5}, r"sliding_window is \[5, 5, 5\]"),
}


@pytest.mark.parametrize(("architecture", "config", "reason"), REASONS.values(), ids=list(REASONS))
def test_fresh_blocks_say_why(
    founding: BridgeInputs, tmp_path: Path, architecture: str, config: dict[str, Any], reason: str
) -> None:
    said: list[str] = []
    wanted = setting(tmp_path, use=["transplant"], architecture=architecture, config=config, training={"tokens": 0})
    _, _, made = build_anchor_zero(wanted, founding, tmp_path / "work", log=said.append, progress=False)
    assert made.carried == ["embeddings"] and made.fresh_blocks is not None
    assert re.search(reason, made.fresh_blocks)
    assert f"its blocks are fresh: {made.fresh_blocks}" in said and "\n" not in made.fresh_blocks


def test_a_source_whose_head_is_untied(founding: BridgeInputs, tmp_path: Path) -> None:
    model = tiny_model(tiny_config("llama", vocab_size=len(founding.source_tokenizer), tie_word_embeddings=False))
    wanted = setting(tmp_path, use=["transplant"], architecture=None, training={"tokens": 0})
    wanted = wanted.model_copy(update={"config": {"tie_word_embeddings": True}})
    _, _, made = build_anchor_zero(wanted, replace(founding, source=model), tmp_path / "work", progress=False)
    assert "source's head is untied" in str(made.fresh_blocks)


@pytest.mark.parametrize("use", [[], ["seqkd"]])
def test_nothing_was_to_be_carried(founding: BridgeInputs, tmp_path: Path, use: list[str]) -> None:
    wanted = setting(tmp_path, use=use, training={"tokens": 0})
    said: list[str] = []
    _, _, made = build_anchor_zero(wanted, founding, tmp_path / "work", log=said.append, progress=False)
    assert made.fresh_blocks is None and not any("fresh" in text for text in said)
    assert Bridge.model_validate_json(made.model_dump_json(exclude={"fresh_blocks"})) == made  # an older manifest


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_lists_of_an_entry_a_layer_follow_the_depth(founding: BridgeInputs, tmp_path: Path, family: str) -> None:
    fields = dict(VARIANTS[f"{family}-sliding" if family == "qwen2" else family][1])
    config = tiny_config(family, **{**fields, "vocab_size": len(founding.source_tokenizer)})
    on = replace(founding, source=tiny_model(config))
    wanted = setting(tmp_path, use=["transplant"], architecture=None, config={"num_hidden_layers": 2})
    model, _, made = build_anchor_zero(wanted, on, tmp_path / "work", progress=False)
    assert made.carried == ["embeddings", "blocks"] and model.config.num_hidden_layers == 2
    assert len(model.config.layer_types) == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("padding", [(23, 0), (0, 9), (23, 9)])
def test_padded_vocabularies(founding: BridgeInputs, tmp_path: Path, family: str, padding: tuple[int, int]) -> None:
    """Rows behind the tokenizer's tokens, as Qwen has them: of anchor zero, of the source, of both."""
    assert founding.source is not None and founding.source_tokenizer is not None
    source = copy.deepcopy(founding.source)
    source.resize_token_embeddings(len(founding.source_tokenizer) + padding[1], mean_resizing=False)
    with torch.no_grad():
        source.get_input_embeddings().weight[len(founding.source_tokenizer) :] = 0.01
    size = len(founding.tokenizer) + padding[0]
    fields = {"vocab_size": size, **(GPT2 if family == "gpt2" else {"num_hidden_layers": 2})}
    use = ["transplant", "logits", "seqkd"]
    wanted = setting(tmp_path, use=use, architecture=family, config=fields)
    said: list[str] = []
    on = replace(founding, source=source)
    model, training, made = build_anchor_zero(wanted, on, tmp_path / "work", log=said.append, progress=False)
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == size
    assert made.carried == (["embeddings"] if family == "gpt2" else ["embeddings", "blocks"]), made.fresh_blocks
    assert training.best_loss is not None and training.best_loss < math.log(size) and made.generated_documents > 0
    with torch.no_grad():
        probabilities = model(founding.calibration).logits.softmax(-1)
    assert probabilities[..., len(founding.tokenizer) :].sum(-1).mean() < 0.2  # rows of no token claim little


def test_a_vocabulary_below_the_tokenizer_is_refused(founding: BridgeInputs, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"bridge\.config\.vocab_size is 99, and the tokenizer has"):
        build_anchor_zero(
            setting(tmp_path, config={**GPT2, "vocab_size": 99}), founding, tmp_path / "work", progress=False
        )


def test_text_that_the_source_alters_is_counted_and_said(founding: BridgeInputs, tmp_path: Path) -> None:
    state = json.loads(founding.source_tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"}
    backend = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(state)), eos_token="<|endoftext|>")
    text = [{"text": "A cafe\u0301 in Vie\u0302\u0301t Nam. "}, {"text": "A caf\u00e9 and a war. " * 3}] * 40
    blocks = pack(Dataset.from_list(text), founding.tokenizer, 32)
    on = replace(founding, source_tokenizer=backend, train=blocks, documents=lambda: iter(text))
    said: list[str] = []
    build_anchor_zero(setting(tmp_path, use=["logits"]), on, tmp_path / "work", log=said.append, progress=False)
    (line,) = [text for text in said if text.startswith("of the text")]
    assert int(re.search(r"([\d,]+) skipped segments", line)[1].replace(",", "")) > 0
    assert int(re.search(r"([\d,]+) groups", line)[1].replace(",", "")) > 100


def test_one_vocabulary_is_plain_distillation(
    founding: BridgeInputs, source: tuple[PreTrainedModel, Tokenizer], documents: list[dict[str, str]], tmp_path: Path
) -> None:
    blocks = pack(Dataset.from_list(documents), source[1], 32)
    on = replace(founding, tokenizer=source[1], train=blocks.select(range(200)), validation=blocks.select(range(8)))
    config = setting(tmp_path, use=["logits"], training={**TRAINING, "ce": 0})
    model, _, made = build_anchor_zero(config, on, tmp_path / "work", progress=False)
    assert made.vocabulary is not None and math.isclose(made.vocabulary["student_frequency"], 1.0)
    rows = torch.tensor(blocks[300:316]["input_ids"])
    with torch.no_grad():
        p = source[0](rows).logits.log_softmax(-1)
        near = (p.exp() * (p - model(rows).logits.log_softmax(-1))).sum(-1).mean()
        far = (p.exp() * (p + math.log(len(source[1])))).sum(-1).mean()
    assert near < 0.8 * far  # nearer to the source than knowing nothing


def recipe(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    bridge = {"use": ["transplant", "logits"], "architecture": "gpt2", "config": GPT2, "training": TRAINING}
    folder = built_chain() / "anchors" / Chain.from_pretrained(built_chain()).anchors[0].name
    return {
        "name": "bridged",
        "license": "apache-2.0",
        "source": {"model": str(folder)},
        "tokenizer": {"vocab_size": 400},
        "bridge": bridge,
        "data": {"text_files": str(TEXT / "179*.txt"), "sequence_length": 32, "held_out_fraction": 0.2},
        "anchors": [0.8],
        "distillation": {"tokens": 1024, "learning_rate": 3e-3, "batch_size": 4},
        "calibration_tokens": 512,
        "evaluation": {"tokens": 600, "curve_points": 1},
        **changes,
    }


def test_a_bridged_chain_gives_models_of_any_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chain = build_chain(recipe(tmp_path), tmp_path / "chain")
    shown = capsys.readouterr()
    assert "because the recipe says so" in shown.err and not shown.out
    assert chain.manifest.architecture == "gpt2" and chain.manifest.bridge is not None
    assert chain.manifest.bridge.use == ["transplant", "logits"]
    assert chain.tokenizer is not None and chain.manifest.anchors[0].shape["vocab_size"] == len(chain.tokenizer)
    small, large = (a.num_parameters for a in reversed(chain.manifest.anchors))
    model = from_chain(str(tmp_path / "chain"), num_parameters=(small + large) // 2, tolerance=0.1)
    assert model.config.model_type == "gpt2" and small < model.num_parameters() < large
    for card in (str(chain_card(chain.manifest)), str(anchor_card(chain.manifest, chain.manifest.anchors[0]))):
        assert "bridge" in card and "transplant" in card and "llama" in card
    assert "its blocks are fresh: gpt2 blocks have another form" in shown.err
    assert "its blocks were fresh (gpt2 blocks have another form" in str(chain_card(chain.manifest))
    before = digests(tmp_path / "chain")
    build_chain(recipe(tmp_path), tmp_path / "chain", progress=False)  # finished: nothing is made again
    assert digests(tmp_path / "chain") == before
    with pytest.raises(Exception, match="another recipe"):
        changed = recipe(tmp_path, bridge={**recipe(tmp_path)["bridge"], "k": 3})
        build_chain(changed, tmp_path / "chain", progress=False)


# -- killed and gone on with


def kill_recipe(place: Path) -> Path:
    """A bridge that writes text, learns it and compares predictions, then an anchor; some twenty steps each."""
    bridge = {
        "use": ["transplant", "logits", "seqkd"],
        "architecture": "gpt2",
        "config": GPT2,
        "training": {**TRAINING, "eval_every": 4},
        "generation": {"documents": 70, "prompt_tokens": 8, "sampling": {"max_new_tokens": 12}},
        "cache": "text",  # beside the recipe, so that two places have one recipe
    }
    distillation = {"tokens": 2048, "learning_rate": 3e-3, "batch_size": 4, "eval_every": 4}
    told = recipe(place, bridge=bridge, distillation=distillation, evaluation={"tokens": 600, "curve_points": 0})
    place.mkdir(exist_ok=True)
    (place / "recipe.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    return place / "recipe.yaml"


def shards(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.jsonl"))


def best_of(folder: Path) -> bool:
    """Whether training is under way: its best weights are in a file, which goes when it ends."""
    return (folder / ".build" / "work" / "best.safetensors").is_file()


def recorded(folder: Path, index: int) -> bool:
    return (folder / ".build" / f"step-{index}.json").is_file()


MOMENTS: dict[str, Callable[[Path, Path], bool]] = {
    "the first text is written": lambda folder, cache: len(shards(cache)) == 1,
    "anchor zero is trained": lambda folder, cache: best_of(folder) and not recorded(folder, 0),
    "its record is written": lambda folder, cache: (folder / ".build" / "bridge.json").is_file(),
    "between the anchors": lambda folder, cache: recorded(folder, 0),
    "the next anchor is trained": lambda folder, cache: best_of(folder) and recorded(folder, 0),
    "all anchors are there": lambda folder, cache: recorded(folder, 1),
}


@functools.cache
def undisturbed() -> tuple[dict[str, str], list[str], dict[str, str]]:
    """The same chain, built without a kill: digests, records, and the text by name."""
    with tempfile.TemporaryDirectory(prefix="cbd-hub-test-") as name:
        place = Path(name)
        build_chain(kill_recipe(place), place / "chain", progress=False)
        records = sorted(p.name for p in (place / "chain" / ".build").iterdir())
        text = {p.name: p.read_text() for p in shards(place / "text")}
        return digests(place / "chain"), records, text


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_bridge_goes_on_and_ends_with_the_same_chain(moment: str, tmp_path: Path) -> None:
    told, folder, cache = kill_recipe(tmp_path), tmp_path / "chain", tmp_path / "text"
    process = start_build(told, folder)
    try:
        wait_for(lambda folder: MOMENTS[moment](folder, cache), folder, process)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL and not (folder / "chain.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in shards(cache)}
    build_chain(told, folder, progress=False)
    expected, records, text = undisturbed()
    assert digests(folder) == expected
    assert sorted(p.name for p in (folder / ".build").iterdir()) == records
    assert {path.name: path.read_text() for path in shards(cache)} == text
    after = {path.name: path.stat().st_mtime_ns for path in shards(cache)}
    assert before.items() <= after.items()  # what was written whole is not written again
    assert not [path for root in (folder, cache) for path in root.rglob("*") if "partial" in path.name]


def test_a_server_that_is_down_loses_nothing(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    server = {"base_url": "http://127.0.0.1:9/v1", "model": "m", "retries": 0, "timeout": 2}
    generation = {"documents": 4, "sampling": {"max_new_tokens": 4}, "server": server}
    bridge = {"architecture": "gpt2", "config": GPT2, "training": TRAINING, "generation": generation}
    served = recipe(tmp_path, source={"served": "m"}, bridge=bridge, tokenizer=str(built_chain()))
    with pytest.raises(RecipeError, match=r"127\.0\.0\.1"):
        build_chain(served, tmp_path / "chain", progress=False)
    assert not (tmp_path / "chain" / "chain.json").exists()
    build_chain(
        recipe(tmp_path, name="other"), tmp_path / "chain", resume=False, progress=False
    )  # the folder is still a build's own
    assert Chain.from_pretrained(tmp_path / "chain").manifest.name == "other"


@pytest.mark.slow
def test_a_served_source_founds_the_same_chain(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    folder, reader = str(tmp_path / "source"), AutoTokenizer.from_pretrained(built_chain())
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    tiny_model(tiny_config("llama", vocab_size=len(reader), **ids)).save_pretrained(
        folder
    )  # it babbles, never the same
    reader.save_pretrained(folder)
    data = {"text_files": str(TEXT / "18[0-2]*.txt"), "sequence_length": 32}
    words = "the a this our one two war law trade peace money order people duty".split()
    (tmp_path / "prompts.txt").write_text("\n".join(f"{word} of the" for word in words))
    sampling = {"max_new_tokens": 48, "temperature": 0}
    generation = {"documents": 40, "prompts": str(tmp_path / "prompts.txt"), "sampling": sampling, "max_repetition": 1}
    bridge = {"use": ["seqkd"], "architecture": "gpt2", "config": GPT2, "training": TRAINING}
    tokenizer = str(built_chain())  # for both: a served source's prompts are cut with the chain's own
    weights = []
    with serving(Path(folder), tmp_path / "serve.log") as base_url:
        for name, source in (("here", {"model": folder}), ("served", {"served": folder})):
            server = {"server": {"base_url": base_url, "model": folder}} if name == "served" else {}
            bridge |= {"generation": {**generation, **server}, "cache": str(tmp_path / f"text-{name}")}
            told = recipe(tmp_path, source=source, tokenizer=tokenizer, bridge=bridge, data=data)
            chain = build_chain(told, tmp_path / name, progress=False)
            assert chain.manifest.bridge is not None and chain.manifest.bridge.generated_documents > 10
            weights.append({k: v for k, v in digests(tmp_path / name).items() if k.endswith(".safetensors")})
    assert weights[0] == weights[1]
    texts = [sorted(p.read_text() for p in (tmp_path / f"text-{n}").rglob("*.jsonl")) for n in ("here", "served")]
    assert texts[0] == texts[1] and texts[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bridge": "never"}, ["bridge", "auto"]),
        ({"bridge": ["transplant", "transplant"]}, ["twice"]),
        ({"bridge": {"usee": "auto"}}, ["bridge.usee", "use"]),
        ({"source": {"served": "m"}, "bridge": None}, ["bridge"]),
        ({"source": {"served": "m"}, "bridge": "auto"}, ["bridge.generation.server"]),
        ({"source": {"train": {}}, "bridge": "auto"}, ["bridge", "trained from scratch"]),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(tmp_path, **changes))
    assert all(word in str(error.value) for word in words), error.value


def test_recipes_write_it_short(tmp_path: Path) -> None:
    for short, use in (("auto", "auto"), (["logits"], ["logits"])):
        loaded, _ = load_recipe(recipe(tmp_path, bridge=short))
        assert loaded.bridge is not None and loaded.bridge.use == use
    assert json.loads(loaded.model_dump_json())["bridge"]["use"] == ["logits"]


def test_what_the_models_do_not_allow(founding: BridgeInputs, tmp_path: Path) -> None:
    no_tokenizer = replace(founding, source_tokenizer=None)
    with pytest.raises(RecipeError, match="no tokenizer"):
        build_anchor_zero(setting(tmp_path, use=["logits"]), no_tokenizer, tmp_path / "work", progress=False)
    with pytest.raises(RecipeError, match="no gpt2 config"):
        wrong = setting(tmp_path, use=[], config={"n_embd": "wide"})
        build_anchor_zero(wrong, founding, tmp_path / "work", progress=False)
    assert DistillationConfig(**TRAINING).tokens == 2048


def test_a_check_knows_the_sizes_of_a_bridge(tmp_path: Path) -> None:
    told = recipe(tmp_path)
    plan = check_recipe(told, tmp_path / "chain")
    assert plan.problems == [] and len(plan.anchors) == 2
    chain = build_chain(told, tmp_path / "chain", progress=False)
    assert [a.num_parameters for a in plan.anchors] == [a.num_parameters for a in chain.anchors]
    assert plan.anchors[0].tokens == TRAINING["tokens"]
    too_long = check_recipe({**told, "data": {**told["data"], "sequence_length": 4096}}).problems
    assert any("learned positions" in text for text in too_long)
    unknown = check_recipe({**told, "bridge": {**told["bridge"], "config": {**GPT2, "n_heads": 2}}}).problems
    assert any("bridge.config" in text and "n_heads" in text for text in unknown)
