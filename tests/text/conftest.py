"""A model that writes text, with its tokenizer, in memory and in a folder."""

from pathlib import Path

import pytest
from tiny_models import tiny_config, tiny_model
from tiny_text import make_documents
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cbd_hub.text.packing import train_tokenizer

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="package")
def tokenizer() -> PreTrainedTokenizerFast:
    trained = train_tokenizer(make_documents(), 300)
    trained.chat_template = CHAT
    return trained


@pytest.fixture(scope="package")
def model(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return tiny_model(tiny_config("llama", vocab_size=len(tokenizer), **ids))


@pytest.fixture(scope="package")
def folder(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    place = tmp_path_factory.mktemp("writer")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place
