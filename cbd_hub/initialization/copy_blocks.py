"""The blocks of one family in another: Llama, Mistral, Qwen2, Qwen3 and SmolLM3 compute nearly the same.

Families of one *form* have the same matrices under the same names and the same norms before them; they differ in
biases, in norms of queries and keys, in windows and in the fields of the config that enter the maths. So a model of
one is a model of another as soon as the tensors are matched by name and the fields agree:

- a bias that the source does not have starts at 0, which is exact;
- a norm of queries and keys, ``g x / rms(x)``, can not be undone. Its gain starts at the root mean square that the
  source's own queries (keys) have, so that their typical size, and with it the sharpness of attention, stays;
- a norm that the new family does not have is replaced by its mean effect, folded into the projection.

The norms are the costly part: SmolLM2-135M as a Mistral or a Qwen2 is the same model, as a Qwen3 it goes from 0.90 to
1.37 bits per byte of a speech, before any training.

Everything else that would change the function is refused, with the config field named.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import RecipeError

__all__ = ["CopyReport", "copy_blocks", "same_form"]

# Fields that may differ: they name things, belong to training, or are compared by what they do (see _differing_field).
_HARMLESS = frozenset(
    "_name_or_path architectures dtype torch_dtype transformers_version id2label label2id model_type use_cache "
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id initializer_range attention_dropout dropout "
    "resid_pdrop embd_pdrop attn_pdrop layerdrop hidden_dropout classifier_dropout tie_word_embeddings attention_bias "
    "mlp_bias max_position_embeddings sliding_window use_sliding_window max_window_layers layer_types no_rope_layers "
    "no_rope_layer_interval pretraining_tp rope_parameters head_dim return_dict output_hidden_states "
    "output_attentions task_specific_params cbd_hub tokenizer_class".split()
)
_NORMED = {"q_norm": "q_proj", "k_norm": "k_proj"}


@dataclass(frozen=True)
class CopyReport:
    """What :func:`copy_blocks` did with every tensor, by parameter name."""

    copied: tuple[str, ...]
    """Tensors of the new model that are the source's."""
    started: tuple[str, ...]
    """Tensors that the source does not have, started at 0 (biases) or from its activations (q/k norms)."""
    dropped: tuple[str, ...]
    """The source's tensors without a place: norms that were folded by their mean effect, and biases, left out."""
    fresh: tuple[str, ...]
    """Tensors of a new model of another form: drawn at random, all of them."""


@torch.no_grad()
def copy_blocks(
    source: PreTrainedModel, config: PreTrainedConfig, blocks: Tensor | None = None
) -> tuple[PreTrainedModel, CopyReport]:
    """Builds a model of another family's config with the tensors of a source.

    Exact, up to rounding, where nothing is dropped and no norm of queries and keys comes or goes. A family of another
    form than the source's (GPT-2 from Llama) gets a fresh model, and the report says so; its embedding can still be
    given a start (:func:`cbd_hub.initialization.transplant.embeddings_into`).

    Args:
        source: The model; left as it was.
        config: The new model's. All that enters the maths must be as in the source, and the vocabulary too.
        blocks: (N, S) token ids, a few hundred in all, to measure queries and keys on; needed where the one family
            has q/k norms and the other has none.

    Returns:
        the new model, in ``eval()`` mode, on the source's device and in its dtype, and what became of each tensor.

    Cost: one copy of the model; with `blocks` a forward pass over them.

    Raises:
        RecipeError: A field of `config` that the maths depends on differs (the message names it and the value to
            set), the source's head is untied and the new one tied, or `blocks` is missing.
    """
    ours, theirs = axis_map_for(source.config), axis_map_for(config)
    carried_over = same_form(ours, theirs)
    if carried_over:
        _check(source.config, config, ours, theirs)
    model = AutoModelForCausalLM.from_config(config, dtype=source.dtype).to(source.device).eval()
    if not carried_over:
        return model, CopyReport((), (), (), tuple(name for name, _ in model.named_parameters()))

    old, new = dict(source.named_parameters(remove_duplicate=False)), dict(model.named_parameters())
    copied = tuple(name for name in new if name in old)
    started = tuple(name for name in new if name not in old)
    dropped = tuple(name for name, _ in source.named_parameters() if name not in new)
    for name in copied:
        new[name].copy_(old[name])
    for name in started:
        if name.endswith(".bias"):
            new[name].zero_()
    gone = [name for name in dropped if _norm_of(name)]
    if come := [name for name in started if _norm_of(name)]:
        sizes = _projection_sizes(source, come, blocks)
        for name in come:
            new[name].fill_(sizes[name].square().mean().sqrt())
    elif gone:
        sizes = _projection_sizes(source, gone, blocks)
        for name in gone:
            projection = model.get_submodule(
                name.replace(_norm_of(name), _NORMED[_norm_of(name)]).removesuffix(".weight")
            )
            effect = (old[name].to(sizes[name].dtype) / sizes[name][:, None]).flatten().to(model.dtype)
            projection.weight.mul_(effect[:, None])
            if projection.bias is not None:
                projection.bias.mul_(effect)
    return model, CopyReport(copied, started, dropped, ())


def same_form(ours: AxisMap, theirs: AxisMap) -> bool:
    """Whether two families' blocks can be matched by name, whatever their sizes."""
    return bool(_form(ours) == _form(theirs))


def _form(axis_map: AxisMap) -> Any:
    """What families must share for tensors to be matched by name: norms of the stream, and the blocks' matrices."""
    blocks = {p: text for p, text in axis_map.tensors.items() if "*" in p and not p.endswith(".bias")}
    norms = {
        gain: set(readers) for gain, readers in axis_map.norms.items() if not _norm_of(gain, "head_dim", axis_map)
    }
    blocks = {p: text for p, text in blocks.items() if not _norm_of(p, "head_dim", axis_map)}
    return axis_map.norm, blocks, norms, axis_map.scaled


def _norm_of(name: str, layout: str = "", axis_map: AxisMap | None = None) -> str:
    """``q_norm`` or ``k_norm`` where a tensor is one (and, given a map, one over each head), else an empty string."""
    kind = next((kind for kind in _NORMED if name.endswith(f".{kind}.weight")), "")
    return kind if axis_map is None or axis_map.tensors.get(name) == layout else ""


def _check(source: PreTrainedConfig, config: PreTrainedConfig, ours: AxisMap, theirs: AxisMap) -> None:
    """Refuses a config that does not compute what the source's does."""
    if config.tie_word_embeddings and not source.tie_word_embeddings:
        raise RecipeError("The source's head is untied, so tie_word_embeddings must be false, not true.")
    differing = _differing_field(source, config, ours, theirs)
    if differing is not None:
        field, got, wanted = differing
        raise RecipeError(
            f"{field} is {got!r} in the {config.model_type} config and {wanted!r} in the {source.model_type} source; "
            f"set it to {wanted!r}, since the blocks would compute something else."
        )


def _differing_field(
    source: PreTrainedConfig, config: PreTrainedConfig, ours: AxisMap, theirs: AxisMap
) -> tuple[str, Any, Any] | None:
    """The first field that enters the maths and differs: its name, the config's value and the source's."""
    old, new = source.to_dict(), config.to_dict()
    for field in old.keys() & new.keys() - _HARMLESS if source.model_type == config.model_type else ():
        if old[field] != new[field]:
            return field, new[field], old[field]
    for field in ("vocab_size", *theirs.fields, "hidden_act", "rms_norm_eps"):
        if field in old and field in new and field != "head_dim" and old[field] != new[field]:
            return field, new[field], old[field]
    mine, other = ours.sizes(source)["head_dim"], theirs.sizes(config)["head_dim"]
    if mine != other:
        return "head_dim", other, mine
    for field, effect in (("rope_parameters", _rope), ("no_rope_layers", _rope_layers), ("sliding_window", _windows)):
        if effect(source) != effect(config):
            return field, effect(config), effect(source)
    return None


def _rope(config: PreTrainedConfig) -> Any:
    return {k: v for k, v in (getattr(config, "rope_parameters", None) or {}).items() if v is not None}


def _rope_layers(config: PreTrainedConfig) -> list[int]:
    return list(getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers)


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """How far back each layer sees, None for all the way (also where no position is farther)."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    if window is None or window >= config.max_position_embeddings:
        return [None] * layers
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _projection_sizes(source: PreTrainedModel, names: list[str], blocks: Tensor | None) -> dict[str, Tensor]:
    """Root mean square of each head's queries or keys before a norm, (heads,) float32, over all tokens of blocks."""
    if blocks is None or not blocks.numel():
        raise RecipeError("Norms of queries and keys come or go with this config; pass `blocks`, token ids (N, S).")
    head_dim = axis_map_for(source.config).sizes(source.config)["head_dim"]
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            squares = output.float().unflatten(-1, (-1, head_dim)).square().mean(-1)
            sums[name] = sums.get(name, 0.0) + squares.flatten(0, -2).sum(0)

        return hook

    handles = [
        source.get_submodule(name.replace(kind, _NORMED[kind]).removesuffix(".weight")).register_forward_hook(
            watch(name)
        )
        for name in names
        if (kind := _norm_of(name))
    ]
    was_training = source.training
    source.eval()
    try:
        for rows in blocks.to(source.device).split(8):
            source.base_model(input_ids=rows, use_cache=False)
    finally:
        source.train(was_training)
        for handle in handles:
            handle.remove()
    return {name: (total / blocks.numel()).sqrt() for name, total in sums.items()}
