"""How a text begins and ends in tokens: as the tokenizer begins it, and as the model was pretrained to see it end.

A model that was trained with a begin-of-text token (Llama 2 and 3, Mistral, Gemma) has never seen text without it: one
of 268M parameters has 4.05 nats a token on a text that it reads at 2.86 with the token. A chat model's tokenizer names
the token that ends a *turn* as its end of text, while another kept documents apart when the model was pretrained.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from cbd_hub.errors import RecipeError, did_you_mean

__all__ = ["TextEnds", "find_ends"]

_ENDS_OF_TURN = frozenset("<|im_end|> <|eot_id|> <|eot|> <|eom_id|> <|end|> <end_of_turn> <turn|> <|return|>".split())
"""Tokens that chat models end a turn with, and that their tokenizers name ``eos_token``."""

_ENDS_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>")
"""Tokens that pretraining keeps documents apart by, the likelier ones first."""


class TextEnds(NamedTuple):
    """The tokens around a text."""

    begin: int | None
    """Begins every block; None where the tokenizer puts nothing before a text."""
    end: int
    """Ends every document."""


def find_ends(tokenizer: PreTrainedTokenizerBase, begin: str = "auto", end: str = "auto") -> TextEnds:
    """The tokens that a text begins and ends with.

    Args:
        tokenizer: The model's.
        begin: ``auto``: what the tokenizer itself puts before a text, if anything; ``none``; or a token.
        end: ``auto``: the end of text of pretraining, which is the ``eos_token`` but for chat models that end a turn
            with it; ``eos``: the ``eos_token`` whatever it means; or a token.

    Raises:
        RecipeError: There is no such token, there is no ``eos_token``, or the tokenizer puts several tokens before a
            text.
    """
    if begin == "auto":
        first = _put_before(tokenizer)
    else:
        first = None if begin == "none" else _token_id(tokenizer, begin, "begin_of_text")
    if end not in ("auto", "eos"):
        return TextEnds(first, _token_id(tokenizer, end, "end_of_text"))
    if tokenizer.eos_token_id is None:
        raise RecipeError("The tokenizer has no eos_token, which ends a document; set tokenizer.eos_token.")
    last = str(tokenizer.eos_token)
    if end == "auto" and last in _ENDS_OF_TURN:
        vocabulary = tokenizer.get_vocab()
        last = next((token for token in _ENDS_OF_TEXT if token in vocabulary), last)
    return TextEnds(first, _token_id(tokenizer, last, "end_of_text"))


def _put_before(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id that the tokenizer puts before a text; None where it puts none."""
    alone: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: Any = tokenizer("a")["input_ids"]
    before: list[int] = next((whole[:i] for i in range(len(whole)) if whole[i : i + len(alone)] == alone), [])
    if len(before) > 1:
        raise RecipeError(
            f"The tokenizer puts {len(before)} tokens before a text ({tokenizer.decode(before)!r}), and a block "
            "begins with one; set data.begin_of_text to the token that matters, or to none."
        )
    return before[0] if before else None


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str, key: str) -> int:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        hint = did_you_mean(token, tokenizer.all_special_tokens)
        raise RecipeError(f"data.{key} is {token!r}, which is no token of the tokenizer.{hint}")
    return int(vocabulary[token])
