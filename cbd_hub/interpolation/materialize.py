"""Carrying out a plan: from operations to tensors, from tensors to a transformers model.

:func:`make_tensor` knows neither files nor the Hub: it is given functions that read a tensor by name, and so serves
assembly (anchors on disk) and building (a student cut out of a teacher in memory) alike.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.axes.sizing import Sizes
from cbd_hub.errors import AxisMapError, PrecisionError, SizeError
from cbd_hub.interpolation.checkpoints import DTYPES
from cbd_hub.interpolation.control_points import factor_names, leading_rows
from cbd_hub.interpolation.operations import TensorOp, list_operations
from cbd_hub.interpolation.pair import Pair
from cbd_hub.interpolation.tensors import Bend, combine, expand, rescale
from cbd_hub.manifest.index_maps import IndexMap
from cbd_hub.progress import transformers_bars_off

__all__ = [
    "Read",
    "bend_of",
    "blend",
    "blend_models",
    "build_model",
    "check_fits",
    "cut",
    "empty_model",
    "make_tensor",
    "parse_dtype",
    "plain_defaults",
    "saved_names",
    "target_config",
]

Read = Callable[[str], torch.Tensor]
"""Reads one parameter of an anchor by its transformers name; the tensor is neither changed nor kept."""


def make_tensor(
    op: TensorOp,
    pair: Pair,
    target: Sizes,
    read_large: Read,
    read_small: Read,
    dtype: torch.dtype,
    read_control: Read | None = None,
) -> torch.Tensor:
    """Carries out one operation of a plan.

    Args:
        op: The operation.
        pair: The two anchors.
        target: Sizes of the target.
        read_large: Reads a tensor of the large anchor.
        read_small: Reads a tensor of the small anchor.
        dtype: What the result is cast to, once.
        read_control: Reads a tensor of the pair's control point; None where no operation has a ``bend``.

    Returns:
        A contiguous tensor of shape ``op.shape`` in fresh memory; what was read is not kept.
    """
    axis_map = pair.axis_map
    layout = axis_map.layout(op.pattern)
    offset = 1.0 if axis_map.norm == "rms+1" and op.pattern in axis_map.norms else 0.0
    addition = rescale(read_small(op.small_name), op.small_scale, offset) if op.small_name else None
    if not op.large_name:
        out = torch.empty(op.shape, dtype=dtype, device=None if addition is None else addition.device)
        return (
            out.zero_() if addition is None else out.copy_(expand(addition, layout, pair.small, target, op.mean_axis))
        )
    taken = pair.taken(op, target)
    base, factors, placed = read_large(op.large_name), [(op.large_scale, offset)], pair.small
    out = torch.empty(op.shape, dtype=dtype, device=base.device)
    if addition is None:  # the paper's rule takes a block without a partner for one whose partner is zero
        factors.append((op.large_only_weight, offset) if op.masked else (1 - op.alpha, 0.0))
    elif not op.masked:
        addition, placed = expand(addition, layout, placed, target), target
    bend = None if read_control is None else bend_of(op, pair, target, read_control)
    return combine(
        out, base, layout, pair.large, taken, target, factors, addition, placed, op.alpha, op.large_only_weight, bend
    )


def bend_of(op: TensorOp, pair: Pair, target: Sizes, read_control: Read) -> Bend | None:
    """Returns what the pair's control point adds to the tensor of one operation; None where it is not bent."""
    if not op.bend or op.large_name is None:
        return None
    taken = []
    for dim, name in enumerate(factor_names(pair.axis_map, op.pattern, op.large_name)):
        factor, rows = read_control(name), leading_rows(pair, op.pattern, dim, target)
        taken.append(factor if rows is None else factor[torch.from_numpy(rows).to(factor.device)])
    return op.bend, taken[0], taken[1].T if len(taken) == 2 else None


def blend(
    operations: Iterable[TensorOp],
    pair: Pair,
    target: Sizes,
    read_large: Read,
    read_small: Read,
    dtype: torch.dtype,
    read_control: Read | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Carries out the operations of a plan over two readers, one tensor at a time.

    Args:
        operations: One a tensor, as :func:`cbd_hub.interpolation.operations.list_operations` gives them.
        pair: The two anchors.
        target: Sizes of the target.
        read_large: Reads a tensor of the large anchor.
        read_small: Reads a tensor of the small anchor.
        dtype: What each result is cast to, once.
        read_control: Reads a tensor of the pair's control point; None where no operation has a ``bend``.

    Yields:
        Parameter name and tensor, in the order of the operations.
    """
    for op in operations:
        made = make_tensor(op, pair, target, read_large, read_small, dtype, read_control)
        if dtype == torch.float16:
            exact = partial(make_tensor, op, pair, target, read_large, read_small, torch.float32)
            check_fits(op.name, made, exact)
        yield op.name, made


def check_fits(name: str, cast: torch.Tensor, exact: Callable[[], torch.Tensor]) -> None:
    """Refuses a tensor whose cast to its dtype overflowed.

    Args:
        name: Of the tensor.
        cast: After the cast.
        exact: Returns it before; called only where the cast is not finite.

    Cost: one pass over the cast tensor.

    Raises:
        PrecisionError: A value is larger than the dtype holds, or not finite from the start.
    """
    if bool(torch.isfinite(cast).all()):
        return
    largest, most = float(exact().abs().max()), torch.finfo(cast.dtype).max
    short = str(cast.dtype).removeprefix("torch.")
    raise PrecisionError(
        f"{name} reaches {largest:.4g}, and {short} holds no more than {most:.6g}: it would become inf; take bfloat16 "
        "or float32 instead"
    )


@contextmanager
def plain_defaults() -> Iterator[None]:
    """Makes tensors on the CPU and in float32 where nothing else is said, whatever default the caller has set."""
    dtype = torch.get_default_dtype()
    if torch.get_default_device() == torch.device("cpu") and dtype == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def blend_models(
    operations: Iterable[TensorOp],
    pair: Pair,
    target: Sizes,
    large: PreTrainedModel,
    small: PreTrainedModel,
    control: Mapping[str, torch.Tensor] | None = None,
) -> PreTrainedModel:
    """Carries out the operations of a plan on two models in memory; neither is changed, and no tensor is shared.

    Args:
        operations: One a tensor, as :func:`cbd_hub.interpolation.operations.list_operations` gives them.
        pair: The two models' sizes and correspondence.
        target: Sizes of the target.
        large: The large model; the result has its dtype.
        small: The small model.
        control: The pair's control point, name → tensor; None where no operation has a ``bend``.
    """
    states = large.state_dict(), small.state_dict()
    read_large, read_small = [lambda name, state=state: state[name].detach().cpu() for state in states]
    read_control = None if control is None else lambda name: control[name].detach().cpu()
    tensors = dict(blend(operations, pair, target, read_large, read_small, large.dtype, read_control))
    return build_model(target_config(large.config, pair, target), tensors, large.dtype)


def target_config(config: PreTrainedConfig, pair: Pair, target: Sizes) -> PreTrainedConfig:
    """Returns the config of the target: the large anchor's, with the target's sizes and per-layer lists cut along.

    Raises:
        SizeError: transformers refuses the sizes.
    """
    values = config.to_dict()
    axis_map = pair.axis_map
    shape = axis_map.config_fields(target)
    values.update(shape)
    layers = pair.layers(target["layers"])
    for name in axis_map.layer_lists:
        if values.get(name):
            values[name] = [values[name][i] for i in layers]
    if "head_dim" in axis_map.fields:
        values["head_dim"] = target["head_dim"]
    for name in ("cbd_hub", "auto_map"):  # its own origin is written later; code of a repository is never passed on
        values.pop(name, None)
    try:
        return type(config).from_dict(values)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise SizeError(f"transformers refuses the shape {dict(shape)}: {error}") from error


def build_model(config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """Makes a transformers model around tensors (which it then shares, without a copy), in eval mode.

    Raises:
        AxisMapError: No causal language model class for this config, or a parameter that was not loaded.
    """
    model_class = _model_class(config)
    with transformers_bars_off():  # nothing is loaded here: the tensors are there
        loaded: Any = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    model: Any = loaded[0]
    info: dict[str, Any] = loaded[1]
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if problems := {k: sorted(set(v) - tied) for k, v in info.items() if k.endswith("_keys") and set(v) - tied}:
        raise AxisMapError(f"the axis map does not cover {model_class.__name__}: {problems}")
    model.config.dtype = dtype
    model._weight_conversions = None  # saved under the keys of published checkpoints (GPT-NeoX's embed_out)
    made: PreTrainedModel = model.eval()
    return made


def empty_model(config: PreTrainedConfig, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> PreTrainedModel:
    """Returns a transformers model without weights (on the meta device) that has exactly the parameters named.

    Args:
        config: Of the model.
        shapes: Name → shape of every parameter; tied ones once.
        dtype: Of the parameters.

    Raises:
        AxisMapError: No causal language model class for this config, or it has other parameters.
    """
    model_class: Any = _model_class(config)
    with torch.device("meta"):
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype)
    model.tie_weights()
    own = {name: list(parameter.shape) for name, parameter in model.named_parameters()}  # tied ones once
    given = {name: list(shape) for name, shape in shapes.items()}
    if own != given:
        names = sorted(name for name in {**own, **given} if own.get(name) != given.get(name))
        raise AxisMapError(f"the axis map does not cover {model_class.__name__}: {names}")
    return model


def saved_names(model: PreTrainedModel) -> dict[str, str]:
    """Returns under which key ``save_pretrained`` writes each parameter: its name, but for GPT-NeoX's head.

    Raises:
        AxisMapError: The model's weights are not written one by one.
    """
    state = dict(model.named_parameters())
    keys = {id(tensor): key for key, tensor in revert_weight_conversion(model, dict(state)).items()}
    if len(keys) != len(state) or not all(id(tensor) in keys for tensor in state.values()):
        raise AxisMapError(f"transformers merges weights of {type(model).__name__} when it saves them")
    return {name: keys[id(tensor)] for name, tensor in state.items()}


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    try:
        found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise AxisMapError(f"transformers has no causal language model for {type(config).__name__}") from None
    model_class: type[PreTrainedModel] = found
    return model_class


def cut(model: PreTrainedModel, axis_map: AxisMap, large: Sizes, small: Sizes, index_map: IndexMap) -> PreTrainedModel:
    """Returns a student that is a subset of a model: the units that an index map puts first.

    Args:
        model: The larger neighbor; not changed, and no tensor is shared with it.
        axis_map: Its resolved map.
        large: Its sizes.
        small: Sizes of the student.
        index_map: Which units are kept.

    Raises:
        AxisMapError: The sizes break a rule of the family.
    """
    axis_map.check_sizes(small)
    pair = Pair(axis_map, small, large, index_map)
    return blend_models(list_operations(pair, small, "prune", 0.0), pair, small, model, model)


_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
"""What people call some dtypes."""


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns the torch dtype of a name such as ``"bfloat16"``.

    Raises:
        SizeError: Not a floating-point dtype that weights are published in.
    """
    allowed = {str(value).removeprefix("torch."): value for value in DTYPES.values()}
    name = _SHORT.get(str(dtype), str(dtype))
    found = dtype if isinstance(dtype, torch.dtype) else allowed.get(name)
    if found is None or found not in allowed.values():
        raise SizeError(f"dtype is {dtype!r}; allowed: 'auto', {', '.join(allowed)}")
    return found
