"""Writing a made model as a ready folder: weights, config, generation config, tokenizer and card."""

from pathlib import Path

import torch

from cbd_hub.chain.chain import Chain
from cbd_hub.files import clear_full_disk, copy_files, whole_folder
from cbd_hub.hub import cards
from cbd_hub.interpolation.plan import Plan

__all__ = ["write_model"]


def write_model(
    chain: Chain,
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

    Raises:
        OutputExistsError: The folder is not empty.
        IntegrityError: The chain's files are not what its manifest says.
    """
    with clear_full_disk(Path(folder)), whole_folder(folder) as temporary:
        model = chain.initialize(plan, refine, dtype=dtype, progress=progress)
        model.save_pretrained(temporary)
        copy_files(chain.tokenizer_files, temporary)
        origin = model.config.cbd_hub
        card = cards.model_card(
            chain.manifest,
            plan,
            chain=origin["chain"],
            revision=origin["revision"],
            repo_id=repo_id,
            refine=origin.get("refine"),
        )
        card.save(temporary / "README.md")
