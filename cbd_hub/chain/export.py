"""Writing a made model as a ready folder: weights, config, generation config, tokenizer and card."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cbd_hub.chain.assemble import assemble_into
from cbd_hub.files import clear_full_disk, copy_files, whole_folder
from cbd_hub.hub import cards
from cbd_hub.interpolation.plan import Plan

if TYPE_CHECKING:
    from cbd_hub.chain.chain import Chain

__all__ = ["write_model"]


_ONE_FILE = 50 * 10**9
"""Bytes up to which transformers writes one file."""


def write_model(
    chain: "Chain",
    plan: Plan,
    folder: str | Path,
    dtype: str | torch.dtype = "auto",
    progress: bool = True,
    *,
    refine: bool = False,
    repo_id: str | None = None,
) -> None:
    """Carries out a plan and writes the model; the folder appears whole or not at all.

    Args:
        chain: The chain.
        plan: From ``chain.plan``.
        folder: A new or empty folder.
        dtype: ``"auto"`` keeps the anchors'.
        progress: Show a progress bar.
        refine: Compare other ways to make it and keep the best (:mod:`cbd_hub.chain.refine`).
        repo_id: Where the folder will be published (:func:`cbd_hub.hub.publish.publish_folder`); its card says so.

    Memory: a tensor at a time; the whole model where it is refined, or takes several files (above 50 GB in float32).

    Raises:
        OutputExistsError: The folder is not empty.
        IntegrityError: The chain's files are not what its manifest says.
    """
    with clear_full_disk(Path(folder)), whole_folder(folder) as temporary:
        if refine or 4 * plan.num_parameters > _ONE_FILE:
            model = chain.initialize(plan, refine, dtype=dtype, progress=progress)
            model.save_pretrained(temporary)
            config = model.config
        else:
            config = assemble_into(chain, plan, temporary, dtype, progress)
        copy_files(chain.tokenizer_files, temporary)
        _suit_older_readers(temporary, config.get_text_config().max_position_embeddings)
        origin = config.cbd_hub
        card = cards.model_card(
            chain.manifest,
            plan,
            chain=origin["chain"],
            revision=origin["revision"],
            repo_id=repo_id,
            refine=origin.get("refine"),
        )
        card.save(temporary / "README.md")


_NO_LENGTH = 10**9
"""A ``model_max_length`` above this is transformers' way to say that there is none."""


def _suit_older_readers(folder: Path, positions: int | None) -> None:
    """Lets transformers 4 read the folder: the rotary base under its older key, and a tokenizer class that it has.

    transformers 5 reads both alike. In a config with that class, a ``model_max_length`` that says nothing becomes the
    model's number of positions.
    """

    def mend_config(config: dict[str, Any]) -> None:
        rope = config.get("rope_parameters") or {}
        if "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
            if rope.get("rope_type", "default") != "default":
                config.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})

    def mend_tokenizer(config: dict[str, Any]) -> None:
        if config.get("tokenizer_class") == "TokenizersBackend":  # any other is left as it is, to the byte
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            if positions and config.get("model_max_length", 0) > _NO_LENGTH:
                config["model_max_length"] = positions

    _edit(folder / "config.json", mend_config)
    _edit(folder / "tokenizer_config.json", mend_tokenizer)


def _edit(path: Path, mend: Callable[[dict[str, Any]], None]) -> None:
    """Changes a JSON file where there is something to mend."""
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    after = dict(before)
    mend(after)
    if after != before:
        path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
