"""Recovery pre-training: a model from a chain, trained on for as long as the text is worth it.

A made model starts where its anchors stood, so a few tokens go a long way: that is what a chain is for. This module
trains it with cross-entropy on text, with a larger model as a teacher if one is at hand (the chain's largest anchor
has the same vocabulary and is a good one), and records the *recovery curve*, held-out loss over training tokens.
The yardstick is the same shape trained from random weights on the same tokens in the same order: how far apart the
two curves lie is what the chain was worth.

Three parts of the text take part: one is trained on, ``validation`` draws the curve and chooses the weights that are
kept, and ``test`` is measured twice, at the start and at the end, and used for nothing else.
"""

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from pydantic import Field, ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from cbd_hub.axes.sizing import format_count
from cbd_hub.chain.chain import Chain
from cbd_hub.devices import on_accelerator
from cbd_hub.errors import ChainNotFoundError, RecipeError
from cbd_hub.evaluation.held_out import evaluate_loss
from cbd_hub.evaluation.plots import plot_recovery
from cbd_hub.files import whole_folder
from cbd_hub.hub.cards import recovered_card
from cbd_hub.hub.load import load_model
from cbd_hub.hub.read import Location
from cbd_hub.manifest.manifest import MANIFEST_NAME, Training
from cbd_hub.settings import Settings
from cbd_hub.text.documents import Documents
from cbd_hub.text.packing import mix, pack_as
from cbd_hub.text.settings import DataConfig
from cbd_hub.text.splits import load_splits
from cbd_hub.training.distill import distill
from cbd_hub.training.settings import DistillationConfig
from cbd_hub.training.trackers import check_trackers

__all__ = [
    "RecoverConfig",
    "Recovery",
    "recover",
    "recover_folder",
    "recover_on_text",
]

_CARD_KEYS = ("license", "license_name", "license_link", "language", "datasets", "base_model", "base_model_relation")


class RecoverConfig(Settings):
    """What a recovery does: the text, the training, and what it is compared with."""

    data: DataConfig
    """The text; relative paths start from the working directory. Blocks are as long as it says, and where it does not
    say, 512 tokens or the model's context if that is less."""
    training: DistillationConfig = DistillationConfig()
    """How the model is trained. `kl` weighs the teacher, if there is one; `hidden` has no meaning here."""
    teacher: str | None = None
    """A model, or a chain, whose largest anchor it then is; it needs the model's vocabulary."""
    scratch_learning_rate: float | None = Field(default=None, gt=0)
    """Train the same shape from random weights as well, with this peak learning rate; None does not. What suits a
    pretrained model is too little for random weights: 1e-3 is usual for small ones."""


@dataclass(frozen=True)
class Recovery:
    """How one model was trained."""

    start_loss: float
    """Loss on the test text before the first step, nats a token."""
    final_loss: float
    """Loss on the test text with the weights that were kept, nats a token."""
    test_tokens: int
    """Predicted tokens that both are the mean of."""
    curve: list[tuple[int, float]]
    """(training tokens seen, loss on the validation text), the start first."""
    training: Training
    """What was spent, and which step was kept."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return {**asdict(self), "training": self.training.model_dump(mode="json", exclude_none=True)}


def recover(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    data: DataConfig,
    training: DistillationConfig,
    teacher: PreTrainedModel | None = None,
    *,
    scratch: bool = False,
    work_dir: Path,
    progress: bool = True,
) -> Recovery:
    """Trains a model in place and leaves it with its best weights, in float32 and ``eval()`` mode.

    The same data, seed and sizes draw the same text in the same order, whatever the weights.

    Args:
        model: The model; a copy with random weights is trained in its place with `scratch`, and it stays as it is.
        tokenizer: Its tokenizer.
        data: The text; relative paths start from the working directory.
        training: How to train.
        teacher: A larger model of the same vocabulary: the divergence from it joins the loss, weighted by
            ``training.kl``. Hidden states are not compared.
        scratch: Train the model's config from random weights (drawn with ``training.seed``) instead.
        work_dir: Folder for files of the training (:func:`cbd_hub.training.distill.distill`); made if need be.
        progress: Show progress bars.

    Cost: that of the training, the teacher's forward pass included, and of a measurement of the validation text every
        ``training.eval_every`` steps (11 in all if that is None).

    Raises:
        RecipeError: No text or too little, no tokens to train on, a tracker that is not installed, blocks longer
            than the model's context, or a vocabulary that differs between model, tokenizer and teacher.
    """
    check_trackers(training.report_to, "training.report_to")
    if training.tokens == 0:
        raise RecipeError("training.tokens is 0: a recovery trains; give it tokens, such as '5M'.")
    _check(model, tokenizer, data, teacher)
    blocks = _blocks(data, tokenizer)
    if scratch:
        with torch.random.fork_rng():
            torch.manual_seed(training.seed)
            model = AutoModelForCausalLM.from_config(deepcopy(model.config), dtype=torch.float32)
    with on_accelerator(model):
        start = evaluate_loss(model, blocks["test"], progress=progress)
    done = distill(
        model, teacher, blocks["train"], blocks["validation"], training, work_dir=work_dir, progress=progress
    )
    with on_accelerator(model):
        final = evaluate_loss(model, blocks["test"], progress=progress)
    return Recovery(start.loss, final.loss, final.num_tokens, _curve(work_dir, done.tokens), done)


def recover_folder(
    model: str | Path, config: RecoverConfig, output: str | Path, *, progress: bool = True
) -> dict[str, Recovery]:
    """Recovers a model and writes it as a ready folder, whole or not at all.

    Beside weights, in the dtype that they had, config, tokenizer and card, the folder holds ``recovery.json`` and
    ``recovery.png``, the curve. ``config.cbd_hub`` keeps what it said of the model's origin and gets a key
    ``recovered``.

    Args:
        model: Folder or repo id of a transformers model with its tokenizer.
        config: What to do.
        output: A new or empty folder.
        progress: Show progress bars.

    Returns:
        ``"recovered"``, and where it was asked for ``"from scratch"``: how each was trained.

    Raises:
        OutputExistsError: The output folder is not empty; nothing was trained.
        ChainNotFoundError: No such model or teacher.
        RecipeError: As :func:`recover` says.
    """
    check_trackers(config.training.report_to, "training.report_to")
    with whole_folder(output) as folder, TemporaryDirectory() as work:
        start, tokenizer = _open(str(model))
        dtype, data = start.dtype, config.data
        if "sequence_length" not in data.model_fields_set:
            data = data.model_copy(update={"sequence_length": min(512, _context(start.config))})
        teacher = None if config.teacher is None else _open_teacher(config.teacher, tokenizer)
        options: dict[str, Any] = {"work_dir": Path(work), "progress": progress}
        recoveries = {}
        if config.scratch_learning_rate is not None:
            training = config.training.model_copy(update={"learning_rate": config.scratch_learning_rate})
            recoveries["from scratch"] = recover(start, tokenizer, data, training, teacher, scratch=True, **options)
        recoveries["recovered"] = recovery = recover(start, tokenizer, data, config.training, teacher, **options)
        start.to(dtype=dtype)  # type: ignore[call-arg]
        start.config.dtype = dtype
        origin: dict[str, Any] = getattr(start.config, "cbd_hub", None) or {}
        start.config.cbd_hub = {
            **origin,
            "recovered": {
                **{name: getattr(recovery, name) for name in ("start_loss", "final_loss", "test_tokens")},
                **{name: getattr(recovery.training, name) for name in ("tokens", "best_step", "seed")},
                "teacher": _public_name(config.teacher) if config.teacher else None,
                "version": version("cbd_hub"),
            },
        }
        start.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record = {"config": config.model_dump(mode="json")} | {
            name: each.as_dict() for name, each in recoveries.items()
        }
        (folder / "recovery.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        title = f"Recovery of {format_count(start.num_parameters())} parameters"
        plot_recovery({name: each.curve for name, each in recoveries.items()}, folder / "recovery.png", title)
        (folder / "README.md").write_text(_card(start, str(model), config.teacher, origin, recovery), encoding="utf-8")
    return recoveries


def recover_on_text(
    model: str | Path,
    text: Sequence[str | Path],
    output: str | Path,
    *,
    tokens: int | str = "1M",
    learning_rate: float = 1e-4,
    teacher: str | None = None,
    against_scratch: bool = False,
    scratch_learning_rate: float = 1e-3,
    sequence_length: int | None = None,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, Recovery]:
    """Recovers a model on text files: what ``cbd-hub recover`` does. See :func:`recover_folder`.

    Args:
        model: Folder or repo id of a transformers model with its tokenizer.
        text: UTF-8 files or patterns.
        output: A new or empty folder.
        tokens: Training tokens, an int or a string such as ``"5M"``.
        learning_rate: Peak learning rate; 1e-4 suits models of 100M parameters, 1e-3 tiny ones.
        teacher: As in :class:`RecoverConfig`.
        against_scratch: Train the same shape from random weights as well, with `scratch_learning_rate`.
        scratch_learning_rate: Its peak learning rate.
        sequence_length: Tokens a block; None is 512, or the model's context where that is less.
        batch_size: Blocks a step.
        progress: Show progress bars.

    Raises:
        OutputExistsError: The output folder is not empty; nothing was trained.
        ChainNotFoundError: No such model or teacher.
        RecipeError: No text is given, a number is out of range, or as :func:`recover` says.
    """
    if not text:
        raise RecipeError("give text to train on: --text FILE (UTF-8)")
    length = {} if sequence_length is None else {"sequence_length": sequence_length}
    values = {
        "data": {"text_files": [str(name) for name in text], **length},
        "training": {"tokens": tokens, "learning_rate": learning_rate, "batch_size": batch_size},
        "teacher": teacher,
        "scratch_learning_rate": scratch_learning_rate if against_scratch else None,
    }
    try:
        config = RecoverConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}.") from None
    return recover_folder(model, config, output, progress=progress)


# -- what is read --------------------------------------------------------------------------------------------------


def _blocks(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Documents]:
    """The packed blocks of each split."""
    packed = {}
    splits = load_splits(data, tokenizer=tokenizer)
    for name in ("train", "validation", "test"):
        blocks = [pack_as(data, getattr(split, name), tokenizer) for split in splits]
        packed[name] = mix(blocks, data.shares, data.seed, repeat=name == "train")
    return packed


def _context(config: PreTrainedConfig) -> int:
    """Positions that a config allows; a family without a limit has any."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31)


def _check(model: PreTrainedModel, tokenizer: Tokenizer, data: DataConfig, teacher: PreTrainedModel | None) -> None:
    """Checks what would fail late, or not at all."""
    if data.sequence_length > (context := _context(model.config)):
        raise RecipeError(f"sequence_length is {data.sequence_length} and the model's context {context}; lower it.")
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise RecipeError(
            f"The tokenizer has {len(tokenizer)} entries, the model {size}; use the model's own tokenizer."
        )
    if teacher is not None and (other := teacher.config.get_text_config().vocab_size) != size:
        raise RecipeError(
            f"The teacher's vocabulary has {other} entries and the model's {size}; take one with the same, such as "
            "the largest anchor of the model's own chain."
        )


def _open(place: str) -> tuple[PreTrainedModel, Tokenizer]:
    """A model in its own dtype, and its tokenizer."""
    if (Path(place) / MANIFEST_NAME).is_file():
        raise RecipeError(f"{place!r} is a chain; make a model from it first, with cbd-hub from-chain.")
    try:
        model = load_model(Location(place), "auto")
        return model, AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (RecipeError, OSError, ValueError) as error:
        raise ChainNotFoundError(f"{place!r} is no model that can be loaded, tokenizer included: {error}") from error


def _open_teacher(place: str, tokenizer: Tokenizer) -> PreTrainedModel:
    """A model, or the largest anchor of a chain; its vocabulary has to be that of `tokenizer`."""
    chain = None
    if not (Path(place) / "config.json").is_file():
        try:
            chain = Chain.from_pretrained(place)
        except ChainNotFoundError:
            if Path(place).exists():
                raise
    teacher, teacher_tokenizer = _open(place) if chain is None else (chain.anchors[0].load(), chain.tokenizer)
    if teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise RecipeError(
            f"The teacher {place!r} has another vocabulary than the model ({len(teacher_tokenizer)} and "
            f"{len(tokenizer)} entries); take one with the same, such as the largest anchor of the model's own chain."
        )
    return teacher


# -- what is written -----------------------------------------------------------------------------------------------


def _curve(work_dir: Path, tokens: int) -> list[tuple[int, float]]:
    """(tokens seen, validation loss) of the training that left its state in a folder."""
    state = json.loads((work_dir / "trainer_state.json").read_text(encoding="utf-8"))
    a_step = tokens // state["global_step"]
    return [(log["step"] * a_step, log["eval_loss"]) for log in state["log_history"] if "eval_loss" in log]


def _public_name(place: str) -> str:
    """The name of a folder, or a repo id, in characters that mean nothing in Markdown."""
    return re.sub(r"[^\w./-]", "-", Path(place).resolve().name if Path(place).is_dir() else place)


def _card_metadata(place: str) -> dict[str, Any]:
    """License, data and bases, as the card of the starting model states them."""
    path = Path(place) / "README.md"
    if not Path(place).is_dir():
        return {"base_model": place, "base_model_relation": "finetune"}
    head = re.match(r"---\n(.*?)\n---\n", path.read_text(encoding="utf-8"), re.DOTALL) if path.is_file() else None
    try:
        values = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        values = {}
    return {name: value for name, value in values.items() if name in _CARD_KEYS} if isinstance(values, dict) else {}


def _card(
    model: PreTrainedModel, place: str, teacher: str | None, origin: Mapping[str, Any], recovery: Recovery
) -> str:
    chain = origin.get("chain")
    card = recovered_card(
        _public_name(place),
        model.num_parameters(),
        model.config.model_type,
        tokens=recovery.training.tokens,
        losses=(recovery.start_loss, recovery.final_loss),
        test_tokens=recovery.test_tokens,
        chain=_public_name(str(chain)) if chain else None,
        teacher=_public_name(teacher) if teacher else None,
        metadata=_card_metadata(place),
    )
    return str(card)
