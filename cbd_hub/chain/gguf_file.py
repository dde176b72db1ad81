"""A model and its tokenizer as one GGUF file, which llama.cpp and what is built on it read, by the ``gguf`` package.

Matrices become float32, float16 or Q8_0 (32 numbers share a scale, 8.5 bits a weight); vectors stay float32.
Smaller kinds, such as Q4_K_M, are made of the file by llama.cpp's own ``llama-quantize``.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.errors import CbdError, OutputExistsError, RecipeError
from cbd_hub.progress import progress_bar
from cbd_hub.text.text_ends import find_ends

__all__ = ["KINDS", "Kind", "write_gguf"]

Kind = Literal["f32", "f16", "q8_0"]
"""What the matrices of a file are stored as."""

KINDS: tuple[Kind, ...] = ("f32", "f16", "q8_0")
"""All of them, the largest first."""

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' name of a family → GGUF's. Families whose rotary pairs or norms GGUF stores otherwise are not here."""

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (rf"{_LETTERS}|\p{{N}}|{_REST}", "ByteLevel"): "qwen2",
    (rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", "ByteLevel"): "llama-bpe",
}
"""How a byte-level BPE tokenizer cuts text before it merges → GGUF's name of it."""


def write_gguf(
    model: PreTrainedModel, tokenizer: Tokenizer, path: str | Path, kind: Kind = "f16", progress: bool = True
) -> int:
    """Writes a model and its tokenizer as one GGUF file.

    Args:
        model: Of a Llama, Qwen2 or Qwen3 family, with plain rotary embeddings and without sliding windows.
        tokenizer: Its tokenizer: byte-level BPE.
        path: The file; its folder is made. It appears whole or not at all.
        kind: Of the matrices; with ``q8_0`` those whose rows are no multiple of 32 become float16.
        progress: Show a progress bar.

    Returns:
        The size of the file in bytes.

    Cost: one pass over the weights, and a copy of them in memory in the kind that is written.

    Raises:
        OutputExistsError: There is such a file.
        RecipeError: The family or the tokenizer is none of those that are written here.
        CbdError: The ``gguf`` package is missing.
    """
    gguf, path = _library(), Path(path)
    if kind not in KINDS:
        raise RecipeError(f"a GGUF file of kind {kind!r} is not written here; allowed: {', '.join(KINDS)}")
    if path.exists():
        raise OutputExistsError(f"{path} exists; name another file (nothing was changed)")
    parts, pre = _check(model, tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, _FAMILIES[model.config.model_type])
    try:
        writer.add_name(path.stem)
        writer.add_file_type(int(getattr(gguf.LlamaFileType, _FILE_TYPES[kind])))
        _add_shape(writer, model)
        _add_tokenizer(gguf, writer, tokenizer, parts, pre, model.config.vocab_size)
        for name, weight in progress_bar(list(model.named_parameters()), "gguf", unit="tensor", enabled=progress):
            _add_tensor(gguf, writer, model, name, weight.detach(), kind)  # a tied head is not among them
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path.stat().st_size


_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}


def _library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise CbdError("GGUF files need the package gguf: pip install 'cbd_hub[gguf]'") from None
    return gguf


def _check(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """Refuses what is not written here; returns the tokenizer's own JSON and the name of its pre-tokenizer."""
    config, elsewhere = model.config, "are not written here; llama.cpp's convert_hf_to_gguf.py writes more of them"
    if config.model_type not in _FAMILIES:
        raise RecipeError(f"GGUF files of {config.model_type} models (other than {', '.join(_FAMILIES)}) {elsewhere}")
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kind != "default" or windows:
        what = f"{kind} rotary embeddings" if kind != "default" else "sliding windows"
        raise RecipeError(f"GGUF files of models with {what} {elsewhere}")
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    parts: dict[str, Any] = {} if backend is None else json.loads(backend.to_str())
    cuts = parts.get("pre_tokenizer") or {"type": "none"}
    names = tuple(
        cut["pattern"].get("Regex", "") if cut["type"] == "Split" else cut["type"]
        for cut in cuts.get("pretokenizers", [cuts])  # a Sequence, or a single one
    )
    normal = (parts.get("normalizer") or {}).get("type")
    pre = _PRE_TOKENIZERS.get(names)
    if not parts or parts["model"]["type"] != "BPE" or pre is None or normal not in (None, "NFC"):
        raise RecipeError(
            f"GGUF files with such a tokenizer (cut by {', '.join(names)}) are not written here; {elsewhere}"
        )
    return parts, pre


def _add_shape(writer: Any, model: PreTrainedModel) -> None:
    """The config, under GGUF's names."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(
    gguf: Any, writer: Any, tokenizer: Tokenizer, parts: dict[str, Any], pre: str, vocab_size: int
) -> None:
    """Vocabulary, merges, special tokens and chat template; entries that only the model has are marked unused."""
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    special = {token["id"]: token["special"] for token in parts["added_tokens"]}
    normal, control, user, unused = (
        int(getattr(gguf.TokenType, kind)) for kind in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED")
    )
    kinds = {index: control if is_special else user for index, is_special in special.items()}
    ids = range(vocab_size)
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in parts["model"]["merges"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([by_id.get(index, f"[PAD{index}]") for index in ids])
    writer.add_token_types([kinds.get(index, normal if index in by_id else unused) for index in ids])
    writer.add_token_merges(list(merges))
    for name in ("bos", "eos", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(find_ends(tokenizer, end=str(tokenizer.eos_token)).begin is not None)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensor(gguf: Any, writer: Any, model: PreTrainedModel, name: str, weight: torch.Tensor, kind: Kind) -> None:
    """One parameter, under its GGUF name and in its kind."""
    config = model.config
    if config.model_type == "llama":  # whose rotary pairs llama.cpp keeps side by side
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        found = next((count for projection, count in heads.items() if projection in name), None)
        weight = weight if found is None else _interleaved(weight, found)
    array = weight.float().cpu().contiguous().numpy()
    if kind == "f32" or array.ndim == 1:
        writer.add_tensor(_gguf_name(name), array)
    elif kind == "f16" or array.shape[-1] % 32:
        writer.add_tensor(_gguf_name(name), array.astype("float16"))
    else:
        blocks = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(_gguf_name(name), gguf.quantize(array, blocks), raw_dtype=blocks)


def _gguf_name(name: str) -> str:
    """The GGUF name of a parameter: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{_NAMES[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{_NAMES[inner]}.{kind}"


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * D, ...) in llama.cpp's rotary order: pairs (0, D/2), (1, D/2 + 1), ... side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)
