"""Reading real files and datasets."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from pydantic import ValidationError
from tiny_text import make_documents, make_files, texts
from transformers import PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.text.documents import load_documents, read_source
from cbd_hub.text.packing import pack, train_tokenizer
from cbd_hub.text.settings import DataConfig, DatasetSource, SourceConfig

# -- config ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one of text_files and dataset, or a list of sources, got none"),
        ({"text_files": []}, "got none"),
        ({"text_files": "a.txt", "dataset": {"name": "x"}}, "got text_files and dataset"),
        ({"text_files": "a.txt", "held_out_fraction": 0.6}, "held_out_fraction"),
        ({"text_files": "a.txt", "held_out_fraction": 0}, "held_out_fraction"),
        ({"text_files": "a.txt", "sequence_length": 1}, "sequence_length"),
        ({"text_files": "a.txt", "sequence_lenght": 5}, "sequence_lenght"),
        ({"dataset": {"name": "x", "spilt": "train"}}, "spilt"),
    ],
)
def test_a_wrong_config_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(fields)


@pytest.mark.parametrize("model", [DataConfig, DatasetSource])
def test_every_field_is_documented(model: type) -> None:
    assert all(field.description for field in model.model_fields.values())


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_files_are_documents_in_the_order_of_their_paths(tmp_path: Path, streaming: bool) -> None:
    make_files(tmp_path, b="second", a="first\r\nline", c="third")
    (tmp_path / "deep").mkdir()
    make_files(tmp_path / "deep", a="deep\ffed")
    config = DataConfig(text_files=["c.txt", "*.txt", "./b.txt", "deep/**/*.txt"], streaming=streaming)
    documents = load_documents(config, tmp_path)
    assert isinstance(documents, IterableDataset if streaming else Dataset)
    assert texts(documents) == ["first\nline", "second", "third", "deep\ffed"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_single_file_is_cut_at_form_feeds(tmp_path: Path, streaming: bool) -> None:
    make_files(tmp_path, a="\ufeffone\f\n \ftwo\n\fthree")
    documents = load_documents(DataConfig(text_files="a.txt", streaming=streaming), tmp_path)
    assert texts(documents) == ["one", "two\n", "three"]


def test_an_absolute_path_needs_no_base_folder(tmp_path: Path) -> None:
    make_files(tmp_path, a="one")
    assert texts(load_documents(DataConfig(text_files=str(tmp_path / "*.txt")), "/")) == ["one"]


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_files(tmp_path, empty=" \n", good="text")
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "folder").mkdir()
    for pattern, message in {
        "missing*.txt": r"No text file matches 'missing\*.txt' in .*check the path",
        "folder": "'folder' in .*it is a folder",
        "empty.txt": "empty.txt is empty",
        "latin.txt": r"latin.txt is not UTF-8 \(byte 2\)",
        "dangling.txt": "dangling.txt cannot be read: No such file",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_documents(DataConfig(text_files=["good.txt", pattern]), tmp_path)


def make_dataset_folder(folder: Path) -> Path:
    (folder / "rows").mkdir()
    lines = [
        '{"body": "first", "id": 1}',
        '{"body": " ", "id": 2}',
        '{"body": null, "id": 3}',
        '{"body": "last", "id": 4}',
    ]
    (folder / "rows" / "data.jsonl").write_text("\n".join(lines))
    return folder


def test_a_dataset_is_streamed(tmp_path: Path) -> None:
    source = DatasetSource(name="rows", column="body")
    documents = load_documents(DataConfig(dataset=source, streaming=True), make_dataset_folder(tmp_path))
    assert texts(documents) == ["first", "last"]
    assert list(next(iter(documents))) == ["text"]


def test_a_dataset_is_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    make_dataset_folder(tmp_path)
    code = (
        "import sys; from cbd_hub.text.documents import *\n"
        "from cbd_hub.text.settings import DataConfig, DatasetSource\n"
        "config = DataConfig(dataset=DatasetSource(name='rows', column='body'))\n"
        "print(load_documents(config, sys.argv[1])['text'][:])"
    )
    env = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    env |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "['first', 'last']", done.stderr
    assert "examples/s" not in done.stderr  # datasets would show bars of its own


def test_a_dataset_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    make_dataset_folder(tmp_path)
    (tmp_path / "nothing").mkdir()
    for source, message in {
        DatasetSource(name="rows", column="bodi"): "no column 'bodi', only body, id. Did you mean 'body'",
        DatasetSource(name="rows", split="tset", column="body"): "'rows' cannot be loaded: .*tset",
        DatasetSource(name="nothing"): "'nothing' cannot be loaded",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load_documents(DataConfig(dataset=source, streaming=True), tmp_path)


# -- several sources -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sources": []}, "sources"),
        ({"sources": [{"text_files": "a"}], "text_files": "a"}, "got text_files and sources"),
        ({"sources": [{"text_files": "a", "dataset": {"name": "x"}}]}, "got both"),
        ({"sources": [{"weight": 1}]}, "got neither"),
        ({"sources": [{"text_files": "a", "weight": 0}]}, "weight"),
        ({"sources": [{"text_files": "a", "weight": float("inf")}]}, "weight"),
        ({"sources": [{"text_files": "a", "wieght": 1}]}, "wieght"),
    ],
)
def test_wrong_sources_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(fields)


def test_weights_become_shares() -> None:
    assert DataConfig(text_files="a").shares == [1.0]
    sources = [SourceConfig(text_files="a", weight=3), SourceConfig(dataset=DatasetSource(name="b"))]
    assert DataConfig(sources=sources).shares == [0.75, 0.25]


def test_a_config_without_newer_fields_dumps_as_ever() -> None:
    config = DataConfig(text_files="a.txt")
    assert set(config.model_dump()) == {
        "text_files", "dataset", "sequence_length", "held_out_fraction", "streaming", "seed", "begin_of_text",
        "end_of_text",
    }  # fmt: skip
    older = DataConfig(text_files="a.txt", begin_of_text="none", end_of_text="eos")  # as a build of before was packed
    assert set(older.model_dump()) == set(config.model_dump()) - {"begin_of_text", "end_of_text"}
    newer = DataConfig(sources=[SourceConfig(text_files="a")], document_boundaries=True)
    assert DataConfig.model_validate_json(newer.model_dump_json()) == newer
    assert DataConfig.model_validate(config.model_dump()) == config


def test_one_of_several_sources_is_read_at_a_time(tmp_path: Path) -> None:
    make_files(tmp_path, a="one", b="two")
    config = DataConfig(sources=[SourceConfig(text_files=name) for name in ("a.txt", "b.txt")])
    with pytest.raises(RecipeError, match="names 2 sources"):
        load_documents(config, tmp_path)
    assert [texts(read_source(source, tmp_path)) for source in config.each_source()] == [["one"], ["two"]]
    alone = DataConfig(sources=[SourceConfig(text_files="b.txt")])
    assert texts(load_documents(alone, tmp_path)) == ["two"]


# -- conversations ---------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no such role: ' + m.role) }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}{% if 'tool' in m %} [{{ m.tool }}]{% endif %}{{ eos_token }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(make_documents(), 320)
    tokenizer.chat_template = CHATML
    return tokenizer


def make_chats(folder: Path, *chats: Any) -> DatasetSource:
    (folder / "chats").mkdir()
    lines = [json.dumps({"messages": chat, "id": number}) for number, chat in enumerate(chats)]
    (folder / "chats" / "data.jsonl").write_text("\n".join(lines))
    return DatasetSource(name="chats", column="messages")


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


@pytest.mark.parametrize("streaming", [False, True])
def test_conversations_go_through_the_chat_template(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    tooled = [{"role": "user", "content": "time?", "tool": "clock"}, {"role": "assistant", "content": "noon"}]
    source = make_chats(tmp_path, said("hi", "ho"), [], tooled)
    config = DataConfig(dataset=source, streaming=streaming)
    documents = load_documents(config, tmp_path, chat_tokenizer)
    end = "<|endoftext|>"
    assert texts(documents) == [
        f"<|start|>user\nhi{end}\n<|start|>assistant\nho",  # the last end of text is the packer's
        f"<|start|>user\ntime? [clock]{end}\n<|start|>assistant\nnoon",
    ]
    (row,) = list(pack(documents, chat_tokenizer, len(chat_tokenizer(texts(documents)[0])["input_ids"]) + 1))[:1]
    whole = chat_tokenizer.apply_chat_template(said("hi", "ho"), tokenize=False).rstrip()
    assert row["input_ids"] == chat_tokenizer(whole)["input_ids"]


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    config = DataConfig(dataset=make_chats(tmp_path, said("hi", "ho")))
    for tokenizer in (None, train_tokenizer(make_documents(), 320)):
        with pytest.raises(RecipeError, match="'chats' holds conversations and the tokenizer has no chat template"):
            load_documents(config, tmp_path, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([{"role": "user"}], "Message 0 in row 1 of the dataset 'chats' is no {role, content}"),
        ([*said("hi"), {"role": "assistant", "content": None}], "Message 1 in row 1 .* two strings"),
        ([{"role": "robot", "content": "hi"}], "refuses row 1 of the dataset 'chats': no such role: robot"),
    ],
)
def test_a_malformed_conversation_is_named(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, chat: Any, message: str, streaming: bool
) -> None:
    config = DataConfig(dataset=make_chats(tmp_path, said("hi", "ho"), chat), streaming=streaming)
    with pytest.raises(RecipeError, match=message):
        list(load_documents(config, tmp_path, chat_tokenizer))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_list_of_anything_else_is_no_conversation(
    tmp_path: Path, chat_tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    config = DataConfig(dataset=make_chats(tmp_path, ["hi", "ho"]), streaming=streaming)
    with pytest.raises(RecipeError, match=r"Message 0 in row 0 .* it has 'hi'"):
        list(load_documents(config, tmp_path, chat_tokenizer))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "data.jsonl").write_text('{"messages": {"role": "user"}}')
    other = DataConfig(dataset=DatasetSource(name="other", column="messages"), streaming=streaming)
    with pytest.raises(RecipeError, match="holds dict values; name one that holds text or conversations"):
        load_documents(other, tmp_path, chat_tokenizer)


# -- JSON lines, odd paths and columns --------------------------------------------------------------------------------


def test_packed_files_read_as_what_they_hold(tmp_path: Path) -> None:
    """Line ends, the byte order mark, form feeds and JSON lines as ever; a damaged archive is named."""
    plain = {"a.txt": "\ufeffone\r\ntwo", "b.jsonl": '{"text": "three"}\n{"text": "four"}\n'}
    for name, content in plain.items():
        (tmp_path / name).write_bytes(content.encode())
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    for streaming in (False, True):
        got = [
            texts(load_documents(DataConfig(text_files=names, streaming=streaming), tmp_path))
            for names in (["*.txt", "*.jsonl"], ["*.gz"])
        ]
        assert got[0] == got[1] == ["one\ntwo", "three", "four"]
    whole = (tmp_path / "a.txt.gz").read_bytes()
    for damaged in (whole[:-9], b"no archive", whole[:12] + b"\xff\xff" + whole[14:]):
        (tmp_path / "a.txt.gz").write_bytes(damaged)
        with pytest.raises(RecipeError, match=r"a\.txt\.gz cannot be read: "):
            load_documents(DataConfig(text_files="a.txt.gz"), tmp_path)


def lines(folder: Path, *rows: object, name: str = "a.jsonl") -> Path:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_json_lines_hold_a_document_each(tmp_path: Path) -> None:
    lines(tmp_path, {"text": "one\ntwo", "id": 3}, "", {"text": ""}, {"text": None}, json.dumps("three"))
    assert texts(load_documents(DataConfig(text_files="*.jsonl"), tmp_path)) == ["one\ntwo", "three"]
    streamed = load_documents(DataConfig(text_files="*.jsonl", streaming=True), tmp_path)
    assert texts(streamed) == ["one\ntwo", "three"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "cut', "line 3, is no JSON .*is the line cut off"),
        ({"text": 5}, "line 3, holds an object with text; every line"),
        ({"body": "x"}, "line 3, holds an object with body; every line"),
        ([1], "line 3, holds .1.; every line"),
        ("NaN,", "line 3, is no JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    lines(tmp_path, {"text": "a"}, {"text": "b"}, row, {"text": "c"})
    with pytest.raises(RecipeError, match=rf"a\.jsonl, {message}"):
        load_documents(DataConfig(text_files="a.jsonl"), tmp_path)


def test_a_broken_line_of_a_dataset_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    lines(tmp_path / "rows", {"text": "a"}, '{"text": "cut', {"text": "b"})
    with pytest.raises(RecipeError, match=r"a\.jsonl, line 2, is no JSON"):
        load_documents(DataConfig(dataset=DatasetSource(name="rows")), tmp_path)


@pytest.mark.parametrize("values", [[1, 2], [0.5, 1.5], [True, False]])
def test_a_column_that_holds_no_text_is_named(tmp_path: Path, values: list[object]) -> None:
    (tmp_path / "rows").mkdir()
    lines(tmp_path / "rows", *({"text": value} for value in values))
    with pytest.raises(RecipeError, match=r"The column 'text' of the dataset 'rows' holds \w+ values"):
        load_documents(DataConfig(dataset=DatasetSource(name="rows")), tmp_path)


@pytest.mark.parametrize("name", ["run[1]", "what?", "a*b", "[!x]"])
def test_what_is_there_by_its_name_is_no_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "t[2].txt").write_text("one")
    (tmp_path / name / "u.txt").write_text("two")
    for pattern in (f"{name}/t[2].txt", str(tmp_path / name / "t[2].txt")):
        assert texts(load_documents(DataConfig(text_files=pattern), tmp_path)) == ["one"]
    assert texts(load_documents(DataConfig(text_files=f"{name}/*.txt"), tmp_path)) == ["one", "two"]
    assert texts(load_documents(DataConfig(text_files=f"{name}/[u].txt"), tmp_path)) == ["two"]
