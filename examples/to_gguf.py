"""Writes a Llama model folder as one GGUF file, which llama.cpp and its relatives read, with the `gguf` package alone.

Weights become float16 (or float32), norms stay float32, and a byte-level BPE tokenizer goes along. Quantize the file
afterwards with llama.cpp's own `llama-quantize`.

Example: python examples/to_gguf.py my-model --output my-model.gguf
"""

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a transformers parameter: model.layers.3.mlp.up_proj.weight is blk.3.ffn_up.weight."""
    stem, kind = name.rsplit(".", 1)
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.{kind}"
    _, _, layer, inner = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[inner]}.{kind}"


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows (heads * D, ...) in llama.cpp's rotary order: pairs (0, D/2), (1, D/2 + 1), ... side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(weight.shape)


def check(model: PreTrainedModel, tokenizer: Tokenizer) -> tuple[dict, str]:
    """Refuses what this script does not write; returns the tokenizer's own JSON and the name of its pre-tokenizer."""
    config, parts = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    if config.model_type != "llama" or config.rope_parameters["rope_type"] != "default":
        kind = f"{config.model_type} models with rope_type {config.rope_parameters['rope_type']!r}"
        raise SystemExit(f"{kind} are not written here; use llama.cpp's convert_hf_to_gguf.py")
    cuts = parts["pre_tokenizer"] or {"type": "none"}
    names = [cut["type"] for cut in cuts.get("pretokenizers", [cuts])]  # a Sequence, or a single one
    pre = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}.get(tuple(names))
    if parts["model"]["type"] != "BPE" or parts["normalizer"] or pre is None:
        raise SystemExit(f"a {parts['model']['type']} tokenizer that cuts text by {names} is not written here")
    return parts, pre


def add_shape(writer: gguf.GGUFWriter, model: PreTrainedModel, vocab_size: int) -> None:
    """The config, under GGUF's names."""
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocab_size)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, parts: dict, vocab_size: int, pre: str) -> None:
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
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            add(index)
    writer.add_add_bos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def main(folder: str, output: Path, dtype: str) -> None:
    """Converts a folder; one tensor at a time is cast, so memory stays near the model's own size."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    (parts, pre), config = check(model, tokenizer), model.config
    writer = gguf.GGUFWriter(output, "llama")
    writer.add_name(Path(folder).resolve().name)
    writer.add_file_type(int(gguf.LlamaFileType.MOSTLY_F16 if dtype == "float16" else gguf.LlamaFileType.ALL_F32))
    add_shape(writer, model, config.vocab_size)
    add_tokenizer(writer, tokenizer, parts, config.vocab_size, pre)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.named_parameters():  # a tied head is not among them, and GGUF leaves it out too
        found = next((n for projection, n in heads.items() if projection in name), None)
        array = (weight.detach() if found is None else interleaved(weight.detach(), found)).numpy()
        writer.add_tensor(
            gguf_name(name), array.astype(np.float16) if dtype == "float16" and array.ndim > 1 else array
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{model.num_parameters():,} parameters as {dtype}, {output.stat().st_size:,} bytes, written to {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repo id of a Llama model with its tokenizer")
    parser.add_argument("--output", type=Path, default=Path("model.gguf"))
    parser.add_argument("--dtype", choices=["float16", "float32"], default="float16")
    options = parser.parse_args()
    main(options.model, options.output, options.dtype)
