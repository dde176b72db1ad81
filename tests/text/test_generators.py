"""Writers of text: real models in this process."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from tiny_text import GREEDY, PROMPTS, SAMPLED, make_documents, written
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.text.generators import LocalGenerator, _RowSampler
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.settings import Sampling


def test_greedy_text_is_the_models_own(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("The cat")["input_ids"]
    for _ in range(GREEDY.max_new_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert written(LocalGenerator(model, tokenizer), GREEDY)[0] == whole.removeprefix("The cat")


@pytest.mark.parametrize(
    "sampling", [GREEDY, SAMPLED, Sampling(max_new_tokens=9, temperature=0.7, top_p=0.9, top_k=20)]
)
def test_text_depends_on_neither_batch_nor_cut(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sampling: Sampling
) -> None:
    whole = written(LocalGenerator(model, tokenizer, batch_size=8), sampling)
    generator = LocalGenerator(model, tokenizer, batch_size=2)
    assert written(generator, sampling) == whole
    assert written(generator, sampling, PROMPTS[3:], first=3) == whole[3:]
    assert written(generator, sampling, PROMPTS[5:6], first=5) == whole[5:6]


def test_number_and_seed_decide_a_sampled_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = LocalGenerator(model, tokenizer)
    first = written(generator, SAMPLED, ["The cat"] * 4)
    assert len(set(first)) == 4
    assert written(generator, SAMPLED.model_copy(update={"seed": 1}), ["The cat"] * 4) != first
    assert len(set(written(generator, GREEDY, ["The cat"] * 4))) == 1


def test_a_token_is_chosen_as_often_as_it_is_likely() -> None:
    likely = torch.tensor([0.5, 0.0, 0.3, 0.2])
    numbers = 1 - torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    scores = _RowSampler(numbers, 3)(torch.zeros(20_000, 3, dtype=torch.long), likely.log().expand(20_000, 4))
    assert (scores.isfinite().sum(1) == 1).all()
    torch.testing.assert_close(scores.argmax(1).bincount(minlength=4) / 20_000, likely, atol=0.01, rtol=0)


def test_top_k_of_one_is_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = LocalGenerator(model, tokenizer)
    assert written(generator, Sampling(max_new_tokens=12, top_k=1)) == written(generator, GREEDY)
    assert written(generator, Sampling(max_new_tokens=12, top_p=1e-6)) == written(generator, GREEDY)


def test_text_ends_at_end_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    long = Sampling(max_new_tokens=40, temperature=2.0)  # a random model ends its text now and then
    written = list(LocalGenerator(model, tokenizer).generate(["The cat"] * 32, long))
    ended = [w for w in written if w.tokens < 40]
    assert ended and len(ended) < 32
    assert all("<|endoftext|>" not in w.text for w in written)
    assert all(bool(w.text) == bool(w.tokens) for w in written)


def test_the_model_is_left_as_it_was(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    before, state = model.generation_config.to_dict(), torch.get_rng_state()
    model.train()
    try:
        written(LocalGenerator(model, tokenizer), SAMPLED)
        assert model.training
    finally:
        model.eval()
    assert model.generation_config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_the_models_own_generation_config_holds(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    generator = LocalGenerator(model, tokenizer)
    plain, identity = written(generator, GREEDY), generator.identity
    model.generation_config.repetition_penalty = 5.0
    try:
        assert written(generator, GREEDY) != plain
        assert LocalGenerator(model, tokenizer).identity != identity
    finally:
        model.generation_config.repetition_penalty = None


def test_chat_sends_a_users_message(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    message = "<user>The cat\n<assistant>"  # what CHAT makes of it
    answer = written(LocalGenerator(model, tokenizer, chat=True), GREEDY, ["The cat"])
    assert answer == written(LocalGenerator(model, tokenizer), GREEDY, [message])


def test_a_model_without_head_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    headless = AutoModel.from_config(model.config)
    with pytest.raises(RecipeError, match=r"LlamaModel cannot write.*AutoModelForCausalLM"):
        LocalGenerator(headless, tokenizer)


def test_what_cannot_be_done_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RecipeError, match="max_new_tokens 63 exceed the 64 tokens"):
        written(LocalGenerator(model, tokenizer), Sampling(max_new_tokens=63))
    with pytest.raises(RecipeError, match="batch_size must be 1 or more, got 0"):
        LocalGenerator(model, tokenizer, batch_size=0)
    plain = train_tokenizer(make_documents(), 300)
    with pytest.raises(RecipeError, match="no chat template"):
        LocalGenerator(model, plain, chat=True)
    plain.bos_token = plain.eos_token = None
    with pytest.raises(RecipeError, match="neither bos_token nor eos_token to begin with"):
        written(LocalGenerator(model, plain), GREEDY)


def test_identity_is_that_of_the_content(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    identity = LocalGenerator(model, tokenizer).identity
    tokenizer(PROMPTS, padding=True)  # leaves its padding in the tokenizer
    loaded = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert LocalGenerator(*loaded, batch_size=3).identity == identity
    assert LocalGenerator(*loaded, chat=True).identity != identity
    with torch.no_grad():
        loaded[0].lm_head.weight[0, 0] += 1
    assert LocalGenerator(*loaded).identity["model"] != identity["model"]
    assert LocalGenerator(model, train_tokenizer(make_documents(), 299)).identity["tokenizer"] != identity["tokenizer"]
    assert json.loads(json.dumps(identity)) == identity


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"top_q": 1}, "top_q"),
    ],
)
def test_wrong_sampling_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Sampling.model_validate(fields)


def test_every_field_is_documented() -> None:
    assert all(field.description for field in Sampling.model_fields.values())
