"""Reading what a repository says without believing it: configs, generation configs, tokenizers.

transformers reads more than it is shown (other files of the folder, code that a config names) and allocates lists as
long as a config claims. So it sees a config only after its sizes were compared with the manifest's, as values and not
as a folder, and a tokenizer only in a folder that holds the files that the manifest vouches for. Code of a repository
is never run. Whatever a reader makes of nonsense becomes one clear error.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import CbdError, ManifestError
from cbd_hub.manifest.json_files import read_json

__all__ = ["guarded", "read_config", "read_generation_config", "read_tokenizer"]

T = TypeVar("T")

_MOST_ENTRIES = 10_000
_COUNTS = re.compile(r".*layers?|.*_labels")
_UNWANTED = ("auto_map", "id2label", "label2id", "num_labels", "configuration_files", "problem_type")
_REFUSED = ("quantization_config", "fusion_config", "distributed_config", "per_layer_config")


def guarded(what: str, work: Callable[[], T]) -> T:
    """Returns what ``work`` returns; whatever it raises becomes one error that names the culprit.

    Raises:
        ManifestError: ``work`` raised something.
    """
    try:
        return work()
    except CbdError:
        raise
    except Exception as error:  # a foreign reader of foreign bytes: `tokenizers` raises plain Exception itself
        raise ManifestError(f"{what} cannot be used: {type(error).__name__}: {error}") from error


def read_config(
    path: Path, what: str, architecture: str, axis_map: AxisMap, shape: Mapping[str, int]
) -> PreTrainedConfig:
    """Reads an anchor's ``config.json``; sizes are compared before transformers makes lists of their length.

    Args:
        path: The file, already checked against the manifest's hash.
        what: How errors call it.
        architecture: ``model_type`` that the manifest names.
        axis_map: The resolved map of the family.
        shape: What the manifest says.

    Raises:
        ManifestError: Another shape or family than the manifest's, or values that transformers refuses.
        IntegrityError: The file is no JSON object.
    """
    values = read_json(path, 1 << 22)
    if values.get("model_type") != architecture or architecture not in CONFIG_MAPPING:
        raise ManifestError(
            f"{what} is of the family {values.get('model_type')!r}; the manifest says {architecture!r}"
            + ("" if architecture in CONFIG_MAPPING else ", which this transformers does not know")
        )
    if refused := [name for name in _REFUSED if values.get(name)]:
        raise ManifestError(f"{what} has {refused[0]!r}, which no anchor may have: its weights are plain floats")
    for name, value in values.items():
        if isinstance(value, list | dict) and len(value) > _MOST_ENTRIES:
            raise ManifestError(f"{what}: {name!r} has {len(value)} entries; at most {_MOST_ENTRIES} are read")
        if _COUNTS.fullmatch(name) and isinstance(value, int) and value > _MOST_ENTRIES:
            raise ManifestError(f"{what}: {name!r} is {value}; at most {_MOST_ENTRIES} are allowed")
        if name in axis_map.fields and value is not None and name in shape and value != shape[name]:
            raise ManifestError(f"{what}: {name!r} is {value!r}, which contradicts the shape in the manifest")
    known = {name: value for name, value in values.items() if name not in _UNWANTED and not name.startswith("_")}
    known = {name: value for name, value in known.items() if not callable(getattr(PreTrainedConfig, name, None))}
    config: PreTrainedConfig = guarded(what, lambda: CONFIG_MAPPING[architecture].from_dict(known))
    if config.model_type != architecture or guarded(what, lambda: axis_map.sizes(config)) != axis_map.sizes(shape):
        raise ManifestError(f"{what} contradicts the shape in the manifest")
    return config


def read_generation_config(path: Path) -> GenerationConfig:
    """Reads ``generation_config.json``.

    Raises:
        ManifestError: Values that transformers refuses.
        IntegrityError: The file is no JSON object.
    """
    values = read_json(path, 1 << 20)
    return guarded(str(path), lambda: GenerationConfig.from_dict(values))


def read_tokenizer(paths: Iterable[Path], name: str) -> Tokenizer:
    """Reads a tokenizer from the files that the manifest names, and from no other.

    Args:
        paths: The files, already checked against the manifest's hashes.
        name: What the tokenizer is to call its origin.

    Raises:
        ManifestError: The files make no tokenizer, or need code of the repository.
    """
    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            (Path(folder) / path.name).symlink_to(path.resolve())
        load = AutoTokenizer.from_pretrained
        tokenizer: Tokenizer = guarded("the chain's tokenizer", lambda: load(folder, trust_remote_code=False))
    tokenizer.name_or_path = name
    return tokenizer
