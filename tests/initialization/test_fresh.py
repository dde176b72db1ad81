"""Configs and models that nobody has trained, for a real tokenizer."""

import pytest
import torch
from tiny_models import FAMILIES

from cbd_hub.errors import RecipeError, UnknownArchitectureError
from cbd_hub.initialization.fresh import fresh_config, fresh_model
from cbd_hub.text.packing import train_tokenizer

TOKENIZER = train_tokenizer([{"text": "peace and war " * 9}], 270)
SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}


def test_the_recipe_comes_before_the_tokenizer_and_that_before_the_base() -> None:
    base = {"n_positions": 64, "vocab_size": 9, "eos_token_id": 7, "n_layer": 3}
    config = fresh_config("gpt2", TOKENIZER, SIZES, base, key="k")
    assert (config.vocab_size, config.eos_token_id) == (len(TOKENIZER), TOKENIZER.eos_token_id)
    assert (config.n_positions, config.n_layer) == (32, 1)
    assert fresh_config("gpt2", TOKENIZER, {"vocab_size": 320}, key="k").vocab_size == 320  # padded


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_one(family: str) -> None:
    fields = {k: v for k, v in FAMILIES[family].items() if k not in ("vocab_size", "pad_token_id", "bos_token_id")}
    model = fresh_model(fresh_config(family, TOKENIZER, fields, key="k"), seed=0)
    assert model.config.model_type == family and model.dtype == torch.float32
    assert len(model.get_input_embeddings().weight) == len(TOKENIZER)


def test_the_seed_decides() -> None:
    config = fresh_config("gpt2", TOKENIZER, SIZES, key="k")
    a, b, c = (fresh_model(config, seed).get_input_embeddings().weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_what_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"bridge\.config is no gpt2 config"):
        fresh_config("gpt2", TOKENIZER, {"n_embd": "wide"}, key="bridge.config")
    with pytest.raises(RecipeError, match=r"k\.vocab_size is 99, and the tokenizer has"):
        fresh_config("gpt2", TOKENIZER, {"vocab_size": 99}, key="k")
    with pytest.raises(UnknownArchitectureError, match="bloom"):
        fresh_config("bloom", TOKENIZER, {}, key="k")
