"""How a text begins and ends: found in the tokenizer, written by packing, and measured on the source."""

import pytest
from tiny_text import make_documents, tokenizer_with_beginning
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from cbd_hub.errors import RecipeError
from cbd_hub.text.packing import train_tokenizer
from cbd_hub.text.text_ends import TextEnds, find_ends


@pytest.fixture(scope="module")
def begun() -> PreTrainedTokenizerFast:
    return tokenizer_with_beginning(make_documents(), more=("<|endoftext|>", "<|im_end|>"))


def ids(tokenizer: PreTrainedTokenizerFast, *tokens: str) -> list[int]:
    return [tokenizer.get_vocab()[token] for token in tokens]


def test_a_text_begins_as_the_tokenizer_begins_it(begun: PreTrainedTokenizerFast) -> None:
    assert begun("cat")["input_ids"][0] == begun.bos_token_id
    assert find_ends(begun) == TextEnds(*ids(begun, "<s>", "</s>"))
    plain = train_tokenizer(make_documents(), 320)  # as GPT-2's: a bos_token that is never written
    assert plain.bos_token_id == 0
    assert find_ends(plain) == TextEnds(None, 0)


@pytest.mark.parametrize(
    ("begin", "end", "expected"),
    [
        ("none", "auto", (None, "</s>")),
        ("<|endoftext|>", "auto", ("<|endoftext|>", "</s>")),
        ("auto", "<|endoftext|>", ("<s>", "<|endoftext|>")),
        ("none", "eos", (None, "</s>")),
    ],
)
def test_a_recipe_may_say_otherwise(
    begun: PreTrainedTokenizerFast, begin: str, end: str, expected: tuple[str | None, str]
) -> None:
    vocabulary = begun.get_vocab()
    assert find_ends(begun, begin, end) == tuple(None if name is None else vocabulary[name] for name in expected)


@pytest.mark.parametrize(
    ("turn", "others", "expected"),
    [
        ("<|im_end|>", ("<|endoftext|>",), "<|endoftext|>"),  # Qwen, SmolLM2
        ("<|eot_id|>", ("<|end_of_text|>",), "<|end_of_text|>"),  # Llama 3
        ("<end_of_turn>", ("<eos>",), "<eos>"),  # Gemma
        ("<|im_end|>", (), "</s>"),  # Mistral with ChatML
    ],
)
def test_documents_end_as_in_pretraining_and_not_as_a_turn(turn: str, others: tuple[str, ...], expected: str) -> None:
    rules = tokenizer_with_beginning(make_documents(), more=(turn, *others)).backend_tokenizer
    vocabulary = {token: id for token, id in rules.get_vocab().items() if token != "<|endoftext|>" or token in others}
    chat = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token=turn)
    if "<|endoftext|>" not in others:  # the tiny tokenizer has one of its own
        chat.get_vocab = lambda: vocabulary  # type: ignore[method-assign]
    assert find_ends(chat).end == chat.convert_tokens_to_ids(expected)
    assert find_ends(chat, end="eos").end == chat.convert_tokens_to_ids(turn)


def test_a_token_that_is_none_is_refused(begun: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RecipeError, match=r"data.begin_of_text is '<S>', which is no token .* Did you mean '<s>'"):
        find_ends(begun, begin="<S>")
    with pytest.raises(RecipeError, match=r"data.end_of_text is 'stop'"):
        find_ends(begun, end="stop")
    bare = PreTrainedTokenizerFast(tokenizer_object=begun.backend_tokenizer)
    with pytest.raises(RecipeError, match="no eos_token"):
        find_ends(bare)
    assert find_ends(bare, "none", "</s>") == TextEnds(None, begun.eos_token_id)


def test_several_tokens_before_a_text_are_refused() -> None:
    rules = tokenizer_with_beginning(make_documents(), more=("<mask>",)).backend_tokenizer
    special = [(name, rules.token_to_id(name)) for name in ("<mask>", "<s>")]
    rules.post_processor = processors.TemplateProcessing(single="<mask> <s> $A", special_tokens=special)
    both = PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>")
    with pytest.raises(RecipeError, match=r"puts 2 tokens before a text .*begin_of_text"):
        find_ends(both)
    assert find_ends(both, begin="<s>").begin == both.bos_token_id
