"""Perplexity of a model, or of every anchor of a chain, on a user's own text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from cbd_hub.assemble import Chain
from cbd_hub.chain import MANIFEST_NAME
from cbd_hub.data import pack
from cbd_hub.documents import DataConfig, load_documents
from cbd_hub.errors import ChainNotFoundError, RecipeError
from cbd_hub.evaluation import evaluate_loss

__all__ = ["evaluate_on_text"]


def evaluate_on_text(
    model: str,
    text: Sequence[str | Path],
    *,
    sequence_length: int = 512,
    max_tokens: int | None = None,
    progress: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
) -> list[dict[str, Any]]:
    """Measures next-token loss and perplexity on text files.

    Args:
        model: Folder or repo id of a chain or of a plain transformers model.
        text: UTF-8 files; a chain built from text can be measured on any other text this way.
        sequence_length: Tokens a block.
        max_tokens: Stop after so many predicted tokens.
        progress: Show progress bars.
        revision: Branch, tag or commit.
        token: Hub token.
        cache_dir: Another cache than ``HF_HOME``'s.
        local_files_only: Use the cache alone.

    Returns:
        One row a model: name, num_parameters, loss (nats a token), perplexity, num_tokens.

    Raises:
        RecipeError: No text is given, or it is too short.
        ChainNotFoundError: There is no such model or chain.
    """
    if not text:
        raise RecipeError("give text to measure on: --text FILE (UTF-8), text that no training used")
    where: dict[str, Any] = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    documents = load_documents(
        DataConfig(text_files=[str(Path(t).absolute()) for t in text], sequence_length=sequence_length)
    )
    plain = (Path(model) / "config.json").is_file() and not (Path(model) / MANIFEST_NAME).is_file()
    chain: Chain | None = None
    if not plain:
        try:
            chain = Chain.from_pretrained(model, **where)
        except ChainNotFoundError:
            if Path(model).exists():
                raise
    if chain is not None:
        blocks = pack(documents, chain.tokenizer, sequence_length)
        rows = []
        for anchor in chain.anchors:
            result = evaluate_loss(anchor.load(), blocks, progress=progress, max_tokens=max_tokens)
            rows.append({"name": anchor.name, "num_parameters": anchor.num_parameters, **result.as_dict()})
        return rows
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **where)
        loaded = AutoModelForCausalLM.from_pretrained(model, use_safetensors=True, **where)
    except (OSError, ValueError) as error:
        raise ChainNotFoundError(f"{model!r} is neither a chain nor a model that can be loaded: {error}") from error
    result = evaluate_loss(
        loaded, pack(documents, tokenizer, sequence_length), progress=progress, max_tokens=max_tokens
    )
    return [{"name": model, "num_parameters": loaded.num_parameters(), **result.as_dict()}]
