"""Text that a tiny real model writes: prompts, filters, shards, and a real process that is killed."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from pydantic import ValidationError
from tiny_models import tiny_config, tiny_model
from tiny_text import make_documents, make_text
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.text.generators import Continuation, LocalGenerator
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.served_model import ServerGenerator
from cbd_hub.text.settings import DatasetSource, GenerationConfig, Sampling, ServerConfig
from cbd_hub.text.synthesis import SHARD, corpus_prompts, fingerprint, keep, make_generator, read_prompts, synthesize

SAMPLING = Sampling(max_new_tokens=6)
CONFIG = GenerationConfig(documents=150, prompt_tokens=3, sampling=SAMPLING)
TEXTS = [make_text(number, 1) for number in range(40)]


def rows(texts: Sequence[str]) -> Iterator[dict[str, str]]:
    return ({"text": text} for text in texts)


def make_pair() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    tokenizer = train_tokenizer(make_documents(), 300)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return tiny_model(tiny_config("llama", vocab_size=len(tokenizer), **ids)), tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_pair()[1]


@pytest.fixture(scope="module")
def writer() -> LocalGenerator:
    return LocalGenerator(*make_pair(), batch_size=32)


class Counting:
    """A real generator that notes what it is asked for."""

    def __init__(self, writer: LocalGenerator) -> None:
        self.writer = writer
        self.identity = writer.identity
        self.asked: list[tuple[int, int]] = []

    def generate(self, prompts: Sequence[str], sampling: Sampling, first: int = 0) -> Iterator[Continuation]:
        self.asked.append((first, len(prompts)))
        return self.writer.generate(prompts, sampling, first)


class Reading:
    """Writes what it is told to, as a generator from outside this library would."""

    def __init__(self, texts: Sequence[str], **identity: Any) -> None:
        self.texts = texts
        self.identity = {"kind": "reading", **identity}

    def generate(self, prompts: Sequence[str], sampling: Sampling, first: int = 0) -> Iterator[Continuation]:
        for text in self.texts[first : first + len(prompts)]:
            yield Continuation(text, len(text.split()))


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompts_are_the_first_tokens_of_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    config = GenerationConfig(documents=40, prompt_tokens=5)
    prompts = corpus_prompts(rows(TEXTS), tokenizer, config)
    assert len(prompts) == 40
    for prompt, text in zip(prompts, TEXTS, strict=True):
        assert text.startswith(prompt)
        assert tokenizer(prompt)["input_ids"] == tokenizer(text)["input_ids"][:5]


def test_a_stream_is_read_no_further_than_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    def stream() -> Iterator[dict[str, str]]:
        yield from rows(TEXTS[:3])
        raise AssertionError("a fourth document was read")

    assert len(corpus_prompts(stream(), tokenizer, GenerationConfig(documents=3))) == 3


def test_a_character_is_not_cut_in_two(tokenizer: PreTrainedTokenizerFast) -> None:
    assert corpus_prompts(rows(["a€€"]), tokenizer, GenerationConfig(documents=1, prompt_tokens=6)) == ["a€"]


def test_too_few_prompts_are_used_again_unless_decoding_is_greedy(tokenizer: PreTrainedTokenizerFast) -> None:
    greedy = Sampling(temperature=0)
    prompts = corpus_prompts(rows(["one two", " ", "three"]), tokenizer, GenerationConfig(documents=5))
    assert prompts == ["one two", "three", "one two", "three", "one two"]
    once = GenerationConfig(documents=5, sampling=greedy)
    assert corpus_prompts(rows(["one two", " "]), tokenizer, once) == ["one two"]
    assert corpus_prompts([], tokenizer, GenerationConfig(documents=3, prompt_tokens=0)) == ["", "", ""]


def test_prompts_from_a_file_and_from_a_dataset(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon\r\n\n  The end\n", encoding="utf-8-sig")
    config = GenerationConfig(prompts="prompts.txt", documents=3)
    assert read_prompts(config, [], tokenizer, tmp_path) == ["Once upon", "The end", "Once upon"]
    (tmp_path / "rows").mkdir()
    Dataset.from_dict({"ask": ["Why?", "", "How?"]}).to_parquet(tmp_path / "rows" / "train.parquet")
    config = GenerationConfig(prompts=DatasetSource(name="rows", column="ask"), documents=2)
    assert read_prompts(config, [], tokenizer, tmp_path) == ["Why?", "How?"]
    assert read_prompts(GenerationConfig(documents=1, prompt_tokens=2), rows(TEXTS), tokenizer) == ["The cat"]


def test_prompts_that_cannot_be_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = GenerationConfig(prompts="prompts.txt", documents=3)
    with pytest.raises(RecipeError, match=r"The prompts .*prompts\.txt cannot be read: No such file"):
        read_prompts(config, [], tokenizer, tmp_path)
    (tmp_path / "prompts.txt").write_bytes(b"\n \n")
    with pytest.raises(RecipeError, match="There are no prompts; give documents"):
        read_prompts(config, [], tokenizer, tmp_path)
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9")
    with pytest.raises(RecipeError, match=r"is not UTF-8 \(byte 3\)"):
        read_prompts(config, [], tokenizer, tmp_path)
    with pytest.raises(RecipeError, match="There are no prompts; give documents"):
        corpus_prompts(rows([" \n"]), tokenizer, config)


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"documents": 0}, "documents"),
        ({"max_repetition": 1.5}, "max_repetition"),
        ({"prompt_tokens": -1}, "prompt_tokens"),
        ({"server": {"base_url": "localhost", "model": "m"}}, "base_url"),
        ({"server": {"base_url": "http://localhost/v1", "model": "m", "api_key": "sk"}}, "api_key"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GenerationConfig.model_validate({"documents": 5, **fields})


@pytest.mark.parametrize("model", [GenerationConfig, ServerConfig])
def test_every_field_is_documented(model: type) -> None:
    assert all(field.description for field in model.model_fields.values())


def test_the_config_names_the_generator(writer: LocalGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    local = make_generator(CONFIG, writer.model, writer.tokenizer)
    assert isinstance(local, LocalGenerator) and local.batch_size == 8
    with pytest.raises(RecipeError, match="neither a server nor a model with its tokenizer"):
        make_generator(CONFIG, writer.model)
    server = ServerConfig(base_url="http://localhost:1/v1", model="m", api_key_env="CBD_TEST_KEY", start="<s>")
    config = GenerationConfig(documents=1, server=server, chat=True)
    monkeypatch.delenv("CBD_TEST_KEY", raising=False)
    with pytest.raises(RecipeError, match="The environment variable CBD_TEST_KEY is not set"):
        make_generator(config)
    monkeypatch.setenv("CBD_TEST_KEY", "sk-secret")
    remote = make_generator(config)
    assert isinstance(remote, ServerGenerator)
    assert remote.identity == {"kind": "server", "model": "m", "chat": True, "start": "<s>", "extra": {}}
    assert remote._client.api_key == "sk-secret"


# -- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens", "reason"),
    [
        ("", 0, "empty"),
        (" \n", 5, "empty"),
        ("one two", None, "too short"),
        ("one two three", None, None),
        ("one two", 3, None),
        ("a b c d " * 6, None, "repetitive"),
        ("a b c d e f g h a b c d e f g h", None, None),  # 5 of 13 runs came before
        ("seen  before,\nall of it", None, "duplicate"),
    ],
)
def test_filters(text: str, tokens: int | None, reason: str | None) -> None:
    config = GenerationConfig(documents=1, min_tokens=3)
    seen: set[str] = set()
    assert keep("seen before, all of it", config, seen) is None
    assert keep(text, config, seen, tokens) == reason
    assert len(seen) == (2 if reason is None else 1)


def test_filters_can_be_switched_off() -> None:
    config = GenerationConfig(documents=1, max_repetition=1, deduplicate=False)
    seen: set[str] = set()
    assert [keep("a b c d " * 6, config, seen) for _ in range(2)] == [None, None]
    assert keep("a b c d e a b c d", GenerationConfig(documents=1, max_repetition=0), set()) == "repetitive"


# -- writing ----------------------------------------------------------------------------------------------------------


def prompts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    return corpus_prompts(rows(TEXTS), tokenizer, CONFIG)


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*/*.jsonl")}


def test_rows_tell_the_text_and_where_it_came_from(tmp_path: Path, writer: LocalGenerator) -> None:
    asked = prompts(writer.tokenizer)
    config = CONFIG.model_copy(update={"deduplicate": False, "max_repetition": 1.0})
    made = synthesize(writer, asked, config, tmp_path, progress=False)
    assert made.column_names == ["text", "prompt", "number"]
    expected = [w.text.rstrip("\ufffd") for w in writer.generate(asked, SAMPLING)]
    assert made["text"] == [p + t for p, t in zip(asked, expected, strict=True) if t.strip()]
    assert all(row["prompt"] == asked[row["number"]] for row in made)
    place = tmp_path / fingerprint(writer, asked, SAMPLING)
    origin = json.loads((place / "origin.json").read_text())
    assert origin["generator"] == writer.identity
    assert origin["sampling"] == SAMPLING.model_dump()
    assert origin["filters"] == {"min_tokens": 0, "max_repetition": 1.0, "deduplicate": False}
    assert origin["texts"]["written"] == 150 == origin["texts"]["kept"] + sum(origin["texts"]["dropped"].values())
    assert origin["texts"]["kept"] == len(made)
    assert 0 < origin["tokens"]["kept"] <= origin["tokens"]["written"] <= 150 * 6
    assert origin["seconds"] > 0
    assert {"cbd_hub", "transformers", "torch"} <= set(origin["versions"])
    assert {p.name.split("-")[0] for p in place.glob("*.jsonl")} == {"00000", "00001", "00002"}
    assert not list(place.glob("*.partial"))


def test_a_rerun_writes_nothing_even_with_other_filters(tmp_path: Path, writer: LocalGenerator) -> None:
    counting, asked = Counting(writer), prompts(writer.tokenizer)
    first = synthesize(counting, asked, CONFIG, tmp_path, progress=False)
    assert counting.asked == [(0, SHARD), (SHARD, SHARD), (2 * SHARD, 150 - 2 * SHARD)]
    counting.asked.clear()
    seconds = json.loads(next(tmp_path.glob("*/origin.json")).read_text())["seconds"]
    assert synthesize(counting, asked, CONFIG, tmp_path, progress=False).to_list() == first.to_list()
    stricter = CONFIG.model_copy(update={"min_tokens": 6})
    fewer = synthesize(counting, asked, stricter, tmp_path, progress=False)
    assert 0 < len(fewer) < len(first)
    assert counting.asked == []
    origin = json.loads(next(tmp_path.glob("*/origin.json")).read_text())
    assert origin["seconds"] == seconds
    assert origin["texts"]["kept"] == len(fewer) and origin["texts"]["dropped"]["too short"] > 0


def test_what_decides_the_text_decides_the_folder(writer: LocalGenerator) -> None:
    names = {
        fingerprint(writer, ["a"], SAMPLING),
        fingerprint(writer, ["b"], SAMPLING),
        fingerprint(writer, ["a"], SAMPLING.model_copy(update={"seed": 1})),
        fingerprint(LocalGenerator(writer.model, train_tokenizer(make_documents(), 280)), ["a"], SAMPLING),
    }
    assert len(names) == 4
    assert fingerprint(LocalGenerator(writer.model, writer.tokenizer, 3), ["a"], SAMPLING) in names


@pytest.mark.parametrize("damage", ["truncated", "flipped", "gone", "empty"])
def test_a_damaged_shard_is_written_again(tmp_path: Path, writer: LocalGenerator, damage: str) -> None:
    counting, asked = Counting(writer), prompts(writer.tokenizer)
    first = synthesize(counting, asked, CONFIG, tmp_path, progress=False).to_list()
    before = shards(tmp_path)
    path = next(tmp_path.glob("*/00001-*.jsonl"))
    data = path.read_bytes()
    flipped = data[:50] + bytes([data[50] ^ 1]) + data[51:]
    path.write_bytes({"truncated": data[:-20], "flipped": flipped, "gone": b"", "empty": b""}[damage])
    if damage == "gone":
        path.unlink()
    path.with_name("origin.json").write_text("{")
    counting.asked.clear()
    assert synthesize(counting, asked, CONFIG, tmp_path, progress=False).to_list() == first
    assert counting.asked == [(SHARD, SHARD)]
    assert shards(tmp_path) == before
    assert json.loads(path.with_name("origin.json").read_text())["generator"] == writer.identity


def test_a_killed_run_goes_on_with_the_same_bytes(tmp_path: Path, writer: LocalGenerator) -> None:
    killed, unbroken = tmp_path / "killed", tmp_path / "unbroken"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = subprocess.run([sys.executable, __file__, str(killed)], env=environment)
    assert process.returncode == -signal.SIGKILL
    assert {name[:5] for name in shards(killed)} == {"00000", "00001"}
    asked, counting = prompts(writer.tokenizer), Counting(writer)
    resumed = synthesize(counting, asked, CONFIG, killed, progress=False)
    assert counting.asked == [(2 * SHARD, 150 - 2 * SHARD)]
    assert resumed.to_list() == synthesize(writer, asked, CONFIG, unbroken, progress=False).to_list()
    assert shards(killed) == shards(unbroken)
    assert not list(killed.glob("*/*.partial"))


def test_a_failure_keeps_the_shards_before_it(tmp_path: Path) -> None:
    class Failing(Reading):
        def generate(self, prompts: Sequence[str], sampling: Sampling, first: int = 0) -> Iterator[Continuation]:
            yield from super().generate(prompts[:5] if first else prompts, sampling, first)
            if first:
                raise RecipeError("the server is gone")

    said = [f"text number {number}" for number in range(100)]
    with pytest.raises(RecipeError, match="the server is gone"):
        synthesize(Failing(said), ["p "] * 100, CONFIG, tmp_path, progress=False)
    assert [len(data.splitlines()) for data in shards(tmp_path).values()] == [SHARD]
    assert len(synthesize(Reading(said), ["p "] * 100, CONFIG, tmp_path, progress=False)) == 100


def test_a_chat_keeps_the_answer_alone(tmp_path: Path) -> None:
    made = synthesize(Reading(["It is."], chat=True), ["Is it?"], CONFIG, tmp_path, progress=False)
    assert made.to_list() == [{"text": "It is.", "prompt": "Is it?", "number": 0}]
    made = synthesize(Reading([" was.\ufffd"], chat=False), ["It"], CONFIG, tmp_path, progress=False)
    assert made["text"] == ["It was."]


def test_nothing_to_write_and_nothing_left(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no prompts to write text from"):
        synthesize(Reading([]), [], CONFIG, tmp_path, progress=False)
    said = ["", "a b c d " * 9, "short", "brief"]
    strict = CONFIG.model_copy(update={"min_tokens": 2})
    with pytest.raises(RecipeError, match=r"None of the 4 texts .*\(2 too short, 1 empty, 1 repetitive\)"):
        synthesize(Reading(said), ["p"] * 4, strict, tmp_path, progress=False)
    assert json.loads(next(tmp_path.glob("*/origin.json")).read_text())["texts"]["dropped"]["too short"] == 2
    assert len(synthesize(Reading(said), ["p"] * 4, CONFIG, tmp_path, progress=False)) == 2


class Deadly(Counting):
    """Kills its own process in the middle of the third shard."""

    def generate(self, prompts: Sequence[str], sampling: Sampling, first: int = 0) -> Iterator[Continuation]:
        for number, written in enumerate(super().generate(prompts, sampling, first), first):
            if number == 2 * SHARD + 9:
                os.kill(os.getpid(), signal.SIGKILL)
            yield written


if __name__ == "__main__":  # the process that is killed
    deadly = Deadly(LocalGenerator(*make_pair(), batch_size=32))
    synthesize(deadly, prompts(deadly.writer.tokenizer), CONFIG, sys.argv[1], progress=False)
