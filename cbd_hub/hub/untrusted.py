"""Reading what a repository says without believing it: configs, generation configs, tokenizers.

transformers reads more than it is shown (other files of the folder, code that a config names) and allocates lists as
long as a config claims. So it sees a config only after its sizes were compared with the manifest's, as values and not
as a folder, and a tokenizer only in a folder that holds the files that the manifest vouches for. Code of a repository
is never run. Whatever a reader makes of nonsense becomes one clear error.
"""

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PreTrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.axes.axis_map import AxisMap
from cbd_hub.errors import CbdError, ManifestError
from cbd_hub.manifest.json_files import read_json

__all__ = [
    "guarded",
    "has_chat_template",
    "is_tokenizer_file",
    "mend_generation_config",
    "read_config",
    "read_generation_config",
    "read_tokenizer",
]

T = TypeVar("T")

_MOST_ENTRIES = 10_000
_COUNTS = re.compile(r".*layers?|.*_labels")
_TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|encoder|tekken|chat_template)\.json|merges\.txt"
    r"|vocab\.(txt|bpe)|[A-Za-z0-9_][\w.-]*\.(model|tiktoken|spm)|chat_template\.jinja"
    r"|additional_chat_templates/[A-Za-z0-9_][\w.-]*\.jinja"
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
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
    config = guarded(str(path), lambda: GenerationConfig.from_dict(values))
    guarded(str(path), lambda: mend_generation_config(config))
    return config


def mend_generation_config(config: GenerationConfig) -> list[str]:
    """Mends what transformers would refuse to save, in place; returns what was done, in words.

    Many published models set a temperature without ``do_sample``: transformers then decodes greedily, warns, and
    refuses to save the config. Sampling is switched on, as the values ask for it; impossible token ids are dropped.
    """
    done = []
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value < 0:
            setattr(config, name, None)
            done.append(f"{name} {value} was dropped")
    try:
        config.validate(strict=True)
    except ValueError:
        asked = [n for n in _SAMPLING if getattr(config, n, None) not in (None, getattr(GenerationConfig(), n, None))]
        if asked and not config.do_sample:
            config.do_sample = True
            done.append(f"do_sample was set, which {', '.join(asked)} asks for")
        try:
            config.validate(strict=True)
        except ValueError as error:
            ids = {n: getattr(config, n, None) for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
            config.__dict__.update(GenerationConfig(**ids).__dict__)
            done.append(f"all but the token ids was dropped ({' '.join(str(error).split())[:200]})")
    return done


def is_tokenizer_file(name: str) -> bool:
    """Whether transformers would read a file of this name, relative to its folder, when it loads a tokenizer."""
    return _TOKENIZER_FILE.fullmatch(name) is not None


def has_chat_template(files: Mapping[str, Path]) -> bool | None:
    """Whether a tokenizer has a chat template, by its files alone; None where there is no tokenizer.

    Args:
        files: Name in the chain → file.

    Raises:
        IntegrityError: ``tokenizer_config.json`` is no JSON object.
    """
    if not files:
        return None
    if any(name.endswith(".jinja") for name in files):
        return True
    config = files.get("tokenizer_config.json")
    return config is not None and bool(read_json(config, 1 << 24).get("chat_template"))


def read_tokenizer(files: Mapping[str, Path], name: str) -> Tokenizer:
    """Reads a tokenizer from the files that the manifest names, and from no other.

    Args:
        files: Name in the chain → file, already checked against the manifest's hashes.
        name: What the tokenizer is to call its origin.

    Raises:
        ManifestError: The files make no tokenizer, or need code of the repository.
    """
    with tempfile.TemporaryDirectory() as folder:
        for inner, path in files.items():
            link = Path(folder) / inner
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.resolve())
        load = AutoTokenizer.from_pretrained
        tokenizer: Tokenizer = guarded("the chain's tokenizer", lambda: load(folder, trust_remote_code=False))
    tokenizer.name_or_path = name
    return tokenizer
