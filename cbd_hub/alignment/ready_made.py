"""An anchor that starts as a public checkpoint instead of a subset of its neighbor: the paper's own kind of chain."""

from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.alignment.align import align
from cbd_hub.alignment.learned import learn_maps
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.axes.axis_map import WITHOUT_EFFECT, AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import RecipeError
from cbd_hub.interpolation.pair import Pair
from cbd_hub.manifest.index_maps import IndexMap

__all__ = [
    "READING_SAMPLE",
    "check_layers",
    "check_neighbors",
    "check_tokenizers",
    "load_ready_made",
    "positional_map",
]

READING_SAMPLE = "The 3 quick brown foxes  aren't jumping over 12.5 lazy dogs;\n\tna\u00efve caf\u00e9s \u4e2d\u6587."
"""Text that tokenizers split in different ways."""

_SAME_ACTIVATION = {"swish": "silu"}
_WITHOUT_EFFECT = WITHOUT_EFFECT | {"pretraining_tp", "max_window_layers", "vocab_size", "head_dim"}
"""Config fields that leave the function alone, or that sizes and tensors settle already."""


def check_neighbors(
    small: PreTrainedConfig, large: PreTrainedConfig, name: str, *, sizes: Sizes | None = None
) -> None:
    """Refuses a checkpoint that cannot be the smaller neighbor of a model; their configs alone tell.

    Args:
        small: Config of the checkpoint.
        large: Config of the larger neighbor.
        name: How errors call the checkpoint.
        sizes: Sizes of the larger neighbor, where they are not its config's (an anchor that is yet to be cut).

    Raises:
        RecipeError: Another architecture, vocabulary or head size, larger on some axis, or a field that changes the
            function (norm's epsilon, rotary embedding, activation, soft capping, windows, multipliers ...). All that
            differs is listed.
    """
    own, other = axis_map_for(small), axis_map_for(large)
    if own.model_type != other.model_type or set(own.tensors) != set(other.tensors):
        raise RecipeError(
            f"{name!r} is a {own.model_type} model with other tensors than its neighbor, a {other.model_type} model; "
            "the anchors of a chain have one architecture"
        )
    mine, theirs = own.sizes(small), other.sizes(large) if sizes is None else sizes
    problems = []
    for axis, size in mine.items():
        if axis in own.frozen and size != theirs[axis]:
            problems.append(f"{axis} {size} (its neighbor has {theirs[axis]}, and a chain keeps one)")
        elif size > theirs[axis]:
            problems.append(f"{axis} {size} (more than its larger neighbor's {theirs[axis]})")
    values, others = (_function(config, own) for config in (small, large))
    for field in sorted({*values, *others}):
        if (value := values.get(field)) != (wanted := others.get(field)):
            problems.append(f"{field} {value!r} (its neighbor has {wanted!r}, and it changes the function)")
    for field in own.layer_lists:
        kinds, possible = getattr(small, field, None), iter(getattr(large, field, None) or ())
        if kinds and not all(kind in possible for kind in kinds):
            problems.append(f"{field} {kinds!r} (no layers of its neighbor have these in this order)")
    if problems:
        raise RecipeError(
            f"{name!r} cannot be an anchor of this chain: it has {'; '.join(problems)}. An average of two models of "
            "different functions is neither; name a checkpoint that agrees in these, or cut the anchor out of its "
            "neighbor (a fraction instead of init)"
        )


def _function(config: PreTrainedConfig, axis_map: AxisMap) -> dict[str, Any]:
    """What of a config decides the function that its weights stand for, beside sizes and lists of layers."""
    default = type(config)().to_dict()
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name in default and name not in _WITHOUT_EFFECT and name not in axis_map.fields
    }
    for name in axis_map.layer_lists:
        fields.pop(name, None)
    for name, value in fields.items():
        if name in ("hidden_act", "hidden_activation", "activation_function"):
            fields[name] = _SAME_ACTIVATION.get(str(value), value)
    return fields


def check_layers(small: PreTrainedConfig, large: PreTrainedConfig, index_map: IndexMap, name: str) -> None:
    """Refuses a pairing of layers of different kinds (sliding and full attention, rotary and none).

    Raises:
        RecipeError: A layer of the checkpoint would be averaged with one of another kind.
    """
    kept_layers = index_map.layers[: small.get_text_config().num_hidden_layers]
    for field in axis_map_for(small).layer_lists:
        own, other = getattr(small, field, None) or [], getattr(large, field, None) or []
        for layer, partner in enumerate(kept_layers) if own and other else ():
            if own[layer] != other[partner]:
                raise RecipeError(
                    f"layer {layer} of {name!r} would be averaged with layer {partner} of its neighbor, and their "
                    f"{field} differ ({own[layer]!r}, {other[partner]!r}); cut the anchor out of its neighbor instead"
                )


def check_tokenizers(own: Tokenizer, other: Tokenizer, name: str) -> None:
    """Refuses a checkpoint whose tokenizer gives other tokens than the chain's: rows of its embedding mean others.

    Args:
        own: The checkpoint's.
        other: The chain's.
        name: How errors call the checkpoint.

    Raises:
        RecipeError: The same id stands for another token, or the same text becomes other ids.
    """
    tokens = {i: token for token, i in own.get_vocab().items()}
    others = {i: token for token, i in other.get_vocab().items()}
    both = sorted(tokens.keys() & others.keys())
    wrong = [i for i in both if tokens[i] != others[i]]
    first, second = (tokenizer.encode(READING_SAMPLE, add_special_tokens=False) for tokenizer in (own, other))
    if not wrong and first == second:
        return
    shown = ", ".join(f"{i} is {tokens[i]!r} instead of {others[i]!r}" for i in wrong[:3])
    why = f"{len(wrong)} of {len(both)} ids stand for other tokens ({shown})" if wrong else "it splits text otherwise"
    raise RecipeError(
        f"the tokenizer of {name!r} is not the chain's: {why}. Averaging embeddings of different tokens makes noise; "
        "name a checkpoint with the same tokenizer"
    )


def load_ready_made(
    small: PreTrainedModel,
    large: PreTrainedModel,
    axis_map: AxisMap,
    blocks: Tensor | None,
    progress: bool = True,
    text: Tensor | None = None,
) -> tuple[PreTrainedModel, IndexMap]:
    """Makes a checkpoint the smaller neighbor of a model.

    Args:
        small: The checkpoint; its function is not changed.
        large: The larger neighbor.
        axis_map: The resolved map of both.
        blocks: (N, S) token ids to align it on (:func:`cbd_hub.alignment.align.align`); None takes its units in the
            order that they have, as the paper does.
        progress: Show a progress bar.
        text: (M, S) other token ids, to learn maps on top (:func:`cbd_hub.alignment.learned.learn_maps`); None leaves
            it at the matching.

    Raises:
        RecipeError: It cannot be aligned.
    """
    sizes = axis_map.sizes(large.config), axis_map.sizes(small.config)
    if blocks is not None:
        small, index_map = align(large, small, axis_map, *sizes, blocks, progress=progress)
        if text is not None:
            small = learn_maps(large, small, Pair(axis_map, sizes[1], sizes[0], index_map), text, blocks, progress)
        return small, index_map
    return small, positional_map(axis_map, *sizes)


def positional_map(axis_map: AxisMap, large: Sizes, small: Sizes) -> IndexMap:
    """Pairs units in the order that they have and layers evenly spread, first with first and last with last."""
    count, kept_count = large["layers"], small["layers"]
    kept_layers = np.unique(np.round(np.linspace(0, count - 1, kept_count)).astype(np.int64))
    rest = np.setdiff1d(np.arange(count), kept_layers)
    orders = {}
    for axis in large:
        if small[axis] != large[axis] and axis != "layers" and (axis == "hidden" or axis_map.consumers(axis)):
            plain = np.arange(large[axis], dtype=np.int32)
            orders[axis] = plain if axis == "hidden" else np.tile(plain, (count, 1))
    return IndexMap(np.concatenate([kept_layers, rest]), orders)
