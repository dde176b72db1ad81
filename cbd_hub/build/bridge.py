"""Anchor zero: a chain of one architecture and vocabulary, founded on a source of another.

A chain is distilled anchor by anchor, which needs a largest anchor of the chain's own architecture and vocabulary.
Where the source is another model, that *anchor zero* is made first, by any of three means, which add up:

``transplant``
    The start: the source's embeddings written for the new vocabulary (:mod:`cbd_hub.initialization.transplant`), and
    its blocks too where both architectures have the same form. Without it, anchor zero starts from random weights.
``logits``
    The loss: the divergence from the source's predictions, over groups of tokens whose ends meet
    (:mod:`cbd_hub.losses.cross_vocabulary`); plain KL where both have one vocabulary.
``seqkd``
    The text: the source writes it (:mod:`cbd_hub.text.synthesis`), and anchor zero learns it through its own
    tokenizer. This is the paper's way (Chain-based Distillation, arXiv 2605.07783), and the only one for a source
    behind a server.

``auto`` takes what the two models allow, and says why.
"""

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import datasets
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.alignment.basis import rotate
from cbd_hub.alignment.ranking import rank
from cbd_hub.axes.architectures import axis_map_for
from cbd_hub.build.settings import BridgeConfig, Way
from cbd_hub.devices import on_accelerator
from cbd_hub.errors import AxisMapError, RecipeError
from cbd_hub.initialization.copy_blocks import copy_blocks, same_form
from cbd_hub.initialization.fresh import fresh_config, fresh_model
from cbd_hub.initialization.refit import can_refit, refit
from cbd_hub.initialization.transplant import embeddings_into, transplant_vocabulary
from cbd_hub.interpolation.materialize import cut
from cbd_hub.losses.cross_vocabulary import Across
from cbd_hub.losses.heads import kept_hidden
from cbd_hub.manifest.manifest import Bridge, Training
from cbd_hub.text.documents import Documents
from cbd_hub.text.packing import mix, pack_as
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.synthesis import make_generator, read_prompts, synthesize
from cbd_hub.text.token_groups import TokenAligner
from cbd_hub.text.vocabulary import Pairs, Vocabulary, VocabularyReport, compare_vocabularies
from cbd_hub.training.distill import distill

__all__ = ["BridgeInputs", "anchor_zero_config", "build_anchor_zero", "choose"]


SHARED_ENOUGH = 0.3
"""Share of the corpus's tokens that the source must know too, for ``auto`` to compare predictions."""

_SAMPLE = 2_000_000  # characters of training text that vocabularies are compared on
_RATIOS = {"q_per_kv": "num_attention_heads / num_key_value_heads"}  # axes without a config field
_OF_A_CHECKPOINT = ("architectures", "dtype", "torch_dtype", "model_type", "transformers_version", "_name_or_path")


@dataclass(frozen=True)
class BridgeInputs:
    """What anchor zero is founded on."""

    tokenizer: Tokenizer
    """The chain's."""
    train: Documents
    """Packed blocks of the chain's tokenizer."""
    validation: Documents | None
    """Packed blocks that choose the best weights."""
    calibration: Tensor | None
    """(N, S) token ids of the chain's tokenizer, to rank what is cut."""
    documents: Callable[[], Iterable[Mapping[str, str]]]
    """The rows, with a column ``text``, that `train` was packed from, from the first on."""
    data: DataConfig
    """How they were packed."""
    source_name: str
    """Repo id, folder or name on the server."""
    source: PreTrainedModel | None = None
    """In float32; None where it is behind a server."""
    source_tokenizer: Tokenizer | None = None
    """The source's own; None where there is none."""
    source_revision: str | None = None
    """Commit, tag or branch."""
    base: Path = Path()
    """Folder that relative paths start from."""

    @cached_property
    def sample(self) -> list[str]:
        """The first two million characters of the training text, by document."""
        taken, total = [], 0
        for row in self.documents():
            taken.append(row["text"])
            total += len(row["text"])
            if total >= _SAMPLE:
                break
        return taken

    @cached_property
    def pairs(self) -> Pairs:
        """The tokens that chain and source both have.

        Raises:
            RecipeError: The source has no tokenizer, or one of the two cannot spell every text.
        """
        if self.source_tokenizer is None:
            raise RecipeError(f"the source {self.source_name!r} has no tokenizer")
        return Pairs.between(Vocabulary.of(self.tokenizer), Vocabulary.of(self.source_tokenizer))

    def compare(self) -> VocabularyReport:
        """How the two vocabularies compare on the sample.

        Raises:
            RecipeError: As :attr:`pairs`.
        """
        if self.source_tokenizer is None:
            raise RecipeError(f"the source {self.source_name!r} has no tokenizer")
        return compare_vocabularies(self.tokenizer, self.source_tokenizer, self.sample)


def choose(config: BridgeConfig, inputs: BridgeInputs) -> tuple[list[Way], str, VocabularyReport | None]:
    """Decides which ways are taken, and says why.

    Returns:
        The ways, a sentence, and how the vocabularies compare (None where they cannot be compared).

    Raises:
        RecipeError: A way was asked for that these two models do not allow.
    """
    requested = None if config.use == "auto" else list(config.use)
    if inputs.source is None:
        if requested not in (None, ["seqkd"], []):
            raise RecipeError(
                f"the source is behind a server, which gives only text; bridge.use is {requested} and can be [seqkd]"
            )
        return (
            ["seqkd"] if requested is None else requested,
            "the source is behind a server, which gives only text",
            None,
        )
    try:
        pairs, report = inputs.pairs, inputs.compare()
    except RecipeError as error:
        if inputs.source_tokenizer is None or (requested and set(requested) & {"logits", "transplant"}):
            raise
        return ["seqkd"] if requested is None else requested, f"the vocabularies cannot be compared ({error})", None
    if requested is not None:
        return requested, "the recipe says so", report
    shared = report.student_frequency
    if pairs.identical:
        return ["transplant", "logits"], "source and chain have one vocabulary", report
    if shared >= SHARED_ENOUGH:
        return ["transplant", "logits"], f"the source knows {shared:.0%} of the corpus's tokens", report
    why = f"the source knows only {shared:.0%} of the corpus's tokens (below {SHARED_ENOUGH:.0%})"
    return ["seqkd"], why, report


def build_anchor_zero(
    config: BridgeConfig,
    inputs: BridgeInputs,
    work_dir: Path,
    *,
    log: Callable[[str], object] = str,
    progress: bool = True,
) -> tuple[PreTrainedModel, Training, Bridge]:
    """Makes anchor zero.

    Args:
        config: How.
        inputs: Source, tokenizers and text.
        work_dir: Folder for what training writes.
        log: Called with a sentence or a table: what was chosen, and how the vocabularies compare.
        progress: Show progress bars.

    Returns:
        The model in ``eval()`` mode, its training, and the record that the manifest keeps.

    Cost: of training on ``training.tokens``; with ``logits`` the source's forward pass on them too, and with ``seqkd``
    its writing, once for any number of builds.

    Raises:
        RecipeError: The models do not allow the requested ways, the config is none of the architecture's, the source
            cannot generate, or a server gave no text.
    """
    ways, why, report = choose(config, inputs)
    log(f"bridge from {inputs.source_name}: {' + '.join(ways) or 'nothing but the corpus'}, because {why}")
    if report is not None:
        log(str(report))
    target_config = anchor_zero_config(
        config, None if inputs.source is None else inputs.source.config, inputs.tokenizer
    )
    model, copied, fresh_blocks = _start(config, inputs, target_config, "transplant" in ways, progress)
    log(f"anchor zero starts with {', '.join(copied) or 'random weights'}")
    if fresh_blocks is not None:
        log(f"its blocks are fresh: {fresh_blocks}")
    train, generated = inputs.train, 0
    if "seqkd" in ways:
        train, generated = _generated_blocks(config, inputs, progress)
    across, teacher = None, None
    if "logits" in ways and inputs.source is not None and inputs.source_tokenizer is not None:
        teacher = inputs.source
        rows = inputs.source.config.get_text_config().vocab_size
        if not (inputs.pairs.identical and rows == target_config.get_text_config().vocab_size):
            across = Across(TokenAligner(inputs.tokenizer, inputs.source_tokenizer), inputs.pairs, config.uld)
    training = distill(
        model,
        teacher,
        train,
        inputs.validation if inputs.validation is not None else train,
        config.training,
        across=across,
        work_dir=work_dir,
        progress=progress,
    )
    if across is not None and (counts := {k: n for k, n in across.aligner.counts.items() if n}):
        log("of the text: " + ", ".join(f"{n:,} {name.replace('_', ' ')}" for name, n in counts.items()))
    record = Bridge(
        source=inputs.source_name,
        source_revision=inputs.source_revision,
        source_architecture=None if inputs.source is None else inputs.source.config.model_type,
        use=ways,
        why=why,
        carried=copied,
        fresh_blocks=fresh_blocks,
        vocabulary=None if report is None else json.loads(json.dumps(report.to_dict())),
        generated_documents=generated,
    )
    return model.eval(), training, record


def anchor_zero_config(config: BridgeConfig, own: PreTrainedConfig | None, tokenizer: Tokenizer) -> PreTrainedConfig:
    """Returns anchor zero's config.

    Args:
        config: How it is made.
        own: The source's config; None where it is behind a server.
        tokenizer: The chain's.

    Raises:
        RecipeError: There is no architecture to take, or a field that it does not have.
    """
    architecture = config.architecture or (own.model_type if own is not None else None)
    if architecture is None:
        raise RecipeError("bridge.architecture is missing, and a source behind a server has none to take over")
    base = {}
    if own is not None and architecture == own.model_type:
        base = {k: v for k, v in own.to_dict().items() if k not in _OF_A_CHECKPOINT}
        axis_map = axis_map_for(own)
        depth = next(field for field, axis in axis_map.fields.items() if axis == "layers")
        if config.config.get(depth, base[depth]) != base[depth]:  # lists of one entry a layer no longer fit
            base = {k: v for k, v in base.items() if k not in axis_map.layer_lists}
    return fresh_config(architecture, tokenizer, config.config, base, key="bridge.config")


def _start(
    config: BridgeConfig, inputs: BridgeInputs, target_config: PreTrainedConfig, transplant: bool, progress: bool
) -> tuple[PreTrainedModel, list[str], str | None]:
    """Anchor zero before training, which parts of the source it has, and why its blocks are not among them."""
    fresh = fresh_model(target_config, config.training.seed)
    if not transplant or inputs.source is None or inputs.source_tokenizer is None:
        return fresh, [], None
    transplanted, _ = transplant_vocabulary(
        inputs.source,
        inputs.source_tokenizer,
        inputs.tokenizer,
        rows=target_config.get_text_config().vocab_size,
        method=config.embeddings,
    )
    try:
        with_blocks = _blocks_under(transplanted, target_config, inputs.calibration)
    except (AxisMapError, RecipeError) as error:
        if inputs.calibration is None:
            raise RecipeError(
                "transplant needs calibration_tokens above 0, to know which tokens are frequent"
            ) from error
        embeddings_into(fresh, transplanted, inputs.calibration)
        return fresh, ["embeddings"], str(error)
    return _cut_to(with_blocks, target_config, inputs.calibration, progress), ["embeddings", "blocks"], None


def _blocks_under(source: PreTrainedModel, wanted: PreTrainedConfig, blocks: Tensor | None) -> PreTrainedModel:
    """The source with its blocks under another config, before it is cut to that one's sizes.

    Raises:
        AxisMapError, RecipeError: A field or a rule does not allow it; the message says which.
    """
    large_map, axis_map = axis_map_for(source.config), axis_map_for(wanted)
    if not same_form(large_map, axis_map):
        raise RecipeError(f"{wanted.model_type} blocks have another form than {source.config.model_type}'s")
    large, small = large_map.sizes(source.config), axis_map.sizes(wanted)
    fields = _RATIOS | {axes: field for field, axes in axis_map.fields.items()}
    for axis, size in small.items():
        if axis != "vocab" and axis in axis_map.frozen and size != large[axis]:
            raise RecipeError(f"{fields.get(axis, axis)} {size} is not the source's {large[axis]}")
        if size > large[axis]:
            raise RecipeError(f"{fields.get(axis, axis)} {size} is above the source's {large[axis]}")
    full = copy.deepcopy(wanted)
    for field, value in axis_map.config_fields({**large, "vocab": small["vocab"]}).items():
        setattr(full, field, value)
    for field in axis_map.layer_lists:
        entries, source_entries = getattr(full, field, None), getattr(source.config, field, None)
        if entries and len(entries) != large["layers"]:  # those of the smaller model
            if source_entries is None and len(set(entries)) > 1:
                raise RecipeError(f"{field} differs from layer to layer, and the source's layers are all alike")
            setattr(full, field, list(source_entries or entries[:1] * large["layers"]))
    return copy_blocks(source, full, blocks=None if blocks is None else blocks[:8])[0]


def _cut_to(
    model: PreTrainedModel, wanted: PreTrainedConfig, blocks: Tensor | None, progress: bool
) -> PreTrainedModel:
    """A model cut to the sizes of a config of its family, and refitted."""
    axis_map = axis_map_for(model.config)
    large, small = axis_map.sizes(model.config), axis_map.sizes(wanted)
    if small == large:
        return model
    if blocks is None:
        raise RecipeError("transplant needs calibration_tokens above 0, to rank the units of the source that are kept")
    rotated = axis_map.rotatable and small["hidden"] != large["hidden"]
    with on_accelerator(model, float64=True):
        if rotated:
            rotate(model, axis_map, large, blocks)
        index_map = rank(model, axis_map, large, small, blocks, rotated, progress)
        student = cut(model, axis_map, large, small, index_map)
        if can_refit(axis_map):
            kept_units = kept_hidden(index_map, small["hidden"], large["hidden"])
            layers = index_map.layers_of(small["layers"])
            with on_accelerator(student, float64=True):
                refit(student, model, axis_map, layers, kept_units, blocks, progress=progress)
    return student


def _generated_blocks(config: BridgeConfig, inputs: BridgeInputs, progress: bool) -> tuple[Documents, int]:
    """Packed blocks of what the source writes, and of how many texts."""
    generator = make_generator(config.generation, inputs.source, inputs.source_tokenizer)
    prompts = read_prompts(
        config.generation, inputs.documents(), inputs.source_tokenizer or inputs.tokenizer, inputs.base
    )
    cache = inputs.base / config.cache if config.cache else Path(datasets.config.HF_DATASETS_CACHE).parent / "cbd_hub"
    texts = synthesize(generator, prompts, config.generation, cache, progress=progress)
    blocks = pack_as(inputs.data, texts.select_columns(["text"]), inputs.tokenizer)
    if config.generated_share == 1:
        return blocks, len(texts)
    share, seed = config.generated_share, config.training.seed
    needed = math.ceil(config.training.tokens / inputs.data.sequence_length)
    corpus = inputs.train if not isinstance(inputs.train, datasets.IterableDataset) else None
    if corpus is None:
        corpus = datasets.Dataset.from_list(list(islice(inputs.train, needed)))
    return mix([blocks, corpus], [share, 1 - share], seed), len(texts)
