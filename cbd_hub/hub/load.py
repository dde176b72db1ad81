"""The door through which whole models come in: what was loaded is what was stored, or it is refused.

transformers fills in what a checkpoint lacks with random weights and drops what it does not know, with no more than a
warning. A source or a ready-made anchor that is loaded so would be another model without a word.
"""

import tempfile
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.errors import IntegrityError, RecipeError, did_you_mean
from cbd_hub.hub.read import Location
from cbd_hub.hub.untrusted import mend_generation_config
from cbd_hub.interpolation.checkpoints import Checkpoint, find_files

__all__ = ["check_headers", "load_again", "load_config", "load_model"]

_LFS = b"version https://git-lfs"
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
_NAMED = 3  # tensors that an error lists


def load_config(location: Location) -> PreTrainedConfig:
    """Loads the config of a model, and refuses what no chain can be made from.

    Args:
        location: A folder or a repository.

    Raises:
        RecipeError: It cannot be read, belongs to an adapter or a quantized model, or names a special token outside
            the vocabulary.
    """
    place, folder = location.place, Path(location.place)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise RecipeError(f"{place!r} is an adapter, not a model: merge it into its base model first and save that")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(place, trust_remote_code=False, **location.options)
    except (OSError, ValueError) as error:
        raise RecipeError(f"the config of {place!r} cannot be loaded: {_one_line(error)}") from error
    if getattr(config, "quantization_config", None):
        raise RecipeError(f"{place!r} is a quantized model; name the full-precision model that it was made from")
    size = getattr(config.get_text_config(), "vocab_size", None)
    for name in _SPECIAL:
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        if size is not None and any(isinstance(i, int) and i >= size for i in ids):
            raise RecipeError(
                f"{place!r} has {name} {value}, outside its vocabulary of {size}; correct config.json, or resize the "
                "embedding to the tokenizer"
            )
    return config


def check_headers(location: Location, config: PreTrainedConfig) -> None:
    """Compares the headers of a model's weights with its config, without reading a weight.

    Args:
        location: A folder, or a repository (not asked while offline).
        config: Of a family that has an axis map.

    Cost: reading the headers; from the Hub, two requests a file.

    Raises:
        RecipeError: A file is damaged or only a pointer to one, or weights are missing, left over or of another shape.
    """
    place, axis_map = location.place, axis_map_for(config)
    sizes = axis_map.sizes(config)
    expected = axis_map.shapes(sizes)
    if (shapes := location.stored_shapes()) is not None:
        named = {axis_map.parameter_name(key): shape for key, shape in shapes.items()}
        stored = {name: shape for name, shape in named.items() if name is not None}
    elif location.is_local:
        folder = Path(place).expanduser()
        try:
            files = [folder / name for name in find_files(folder)]
            _refuse_pointers(path for path in files if path.is_file())
            checkpoint = Checkpoint(files, axis_map)
        except IntegrityError as error:
            raise RecipeError(str(error)) from error
        stored = {name: info.shape for name, info in checkpoint.tensors.items()}
    else:
        return
    others = [name for name in stored if name not in expected]
    if missing := [name for name in expected if name not in stored]:
        raise _differing_names(place, "lacks", missing, others)
    if others:
        raise _differing_names(place, "has, and the model does not,", others)
    for name, shape in stored.items():
        if shape != expected[name]:
            raise RecipeError(
                f"{name} of {place!r} has shape {list(shape)}, and config.json says {list(expected[name])}; take the "
                "config that was saved with these weights"
            )


def load_model(location: Location, dtype: torch.dtype | str = torch.float32) -> PreTrainedModel:
    """Loads a causal language model in eval mode, every parameter from its safetensors files.

    Args:
        location: A folder or a repository.
        dtype: Of the model; ``"auto"`` is the one that it was saved in.

    Cost: beside the load itself, one pass over the weights.

    Raises:
        RecipeError: As :func:`load_config`; a file that is damaged or only a pointer to one; weights that are missing,
            left over, of another shape or not finite; a stored head that differs from the embedding it is tied to.
    """
    place, config = location.place, load_config(location)
    _refuse_pointers(sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else [])
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **location.options,
        )
    except SafetensorError as error:
        raise RecipeError(
            f"a safetensors file of {place!r} is damaged or incomplete ({_one_line(error)}); fetch it again"
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"the model {place!r} cannot be loaded: {_one_line(error)}") from error
    except RuntimeError as error:  # what transformers raises where shapes differ
        raise RecipeError(
            f"the weights of {place!r} do not have the shape and size that its config.json says: {_one_line(error)}"
        ) from error
    model: PreTrainedModel = loaded[0].eval()
    _check_report(place, model, loaded[1])
    _check_tied_head(location, model)
    if model.generation_config is not None and (mended := mend_generation_config(model.generation_config)):
        warnings.warn(
            f"the generation config of {place!r} could not be saved again: {'; '.join(mended)}", stacklevel=2
        )
    for name, parameter in model.named_parameters():
        low, high = parameter.detach().aminmax()
        if not (low.isfinite() and high.isfinite()):
            raise RecipeError(f"{name} of {place!r} holds values that are not finite (NaN or inf): it diverged")
    return model


_LOADING = frozenset(
    "device_map max_memory offload_folder offload_buffers attn_implementation quantization_config tp_plan "
    "low_cpu_mem_usage experts_implementation use_kernels kernel_config".split()
)


def load_again(model: PreTrainedModel, **loading: Any) -> PreTrainedModel:
    """Returns a model as ``from_pretrained`` loads it with further arguments; it goes through a temporary folder.

    Args:
        model: Of any family, on the CPU.
        **loading: ``device_map``, ``attn_implementation``, ``quantization_config`` and the like.

    Cost: writing and reading the model once.

    Raises:
        TypeError: An argument that is none of these.
    """
    for name in loading:
        if name not in _LOADING:
            hint = did_you_mean(name, _LOADING)
            raise TypeError(f"from_chain() got an unexpected keyword argument {name!r}.{hint}")
    with tempfile.TemporaryDirectory(prefix="cbd-hub-") as folder:
        model.save_pretrained(folder)
        kind: Any = type(model)
        loaded, report = kind.from_pretrained(folder, dtype=model.dtype, output_loading_info=True, **loading)
    _check_report("the made model", loaded, report)
    loaded.config._name_or_path = loaded.name_or_path = str(model.name_or_path or "")
    again: PreTrainedModel = loaded
    return again


def _refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuses weights of which only the Git LFS pointers were fetched."""
    for path in paths:
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise RecipeError(
                    f"{path.name} in {path.parent} is a Git LFS pointer, not weights; fetch the file: git lfs pull"
                )


def _differing_names(place: str, what: str, names: Sequence[str], others: Sequence[str] = ()) -> RecipeError:
    """The error of a checkpoint that ``lacks`` parameters, or ``has, and the model does not,`` some."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    other = f"; it has others instead, such as {others[0]}" if others else ""
    return RecipeError(
        f"the checkpoint {place!r} {what} {', '.join(names[:_NAMED])}{more}{other}; save it again as transformers "
        "does, without prefixes of a wrapper and with all its shards"
    )


def _check_report(place: str, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Refuses a model of which something was filled in, left over or of another shape."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for kind, what in (("missing_keys", "lacks"), ("unexpected_keys", "has, and the model does not,")):
        if names := sorted(set(report[kind]) - tied):
            left = sorted(report["unexpected_keys"]) if kind == "missing_keys" else ()
            raise _differing_names(place, what, names, left)
    if report["mismatched_keys"]:
        first = sorted(map(str, report["mismatched_keys"]))[0]
        raise RecipeError(f"weights of {place!r} have another shape than its config.json says: {first}")


def _check_tied_head(location: Location, model: PreTrainedModel) -> None:
    """Refuses a model whose config ties the head to the embedding while its files hold another head."""
    head, embedding, place = model.get_output_embeddings(), model.get_input_embeddings(), location.place
    if head is None or not model.config.get_text_config().tie_word_embeddings:
        return
    name = _name_of(model, head)
    for path in (location.file(n) for n in location.names() if fnmatch(n, "*.safetensors") and "/" not in n):
        with safe_open(path, "pt") as file:
            if name not in file.keys():  # noqa: SIM118 (a reader, not a dict)
                continue
            stored = file.get_tensor(name).float()
        if not torch.equal(stored, model.get_parameter(_name_of(model, embedding)).detach().float()):
            raise RecipeError(
                f"config.json of {place!r} ties {name} to the embedding, and its files hold another head; set "
                "tie_word_embeddings to false, or save the model without the head"
            )


def _name_of(model: PreTrainedModel, wanted: Any) -> str:
    return next(f"{name}.weight" for name, module in model.named_modules() if module is wanted)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
