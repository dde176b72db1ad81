"""What a user sets about the bridge from a source of another family or vocabulary (:mod:`cbd_hub.build.bridge`)."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from cbd_hub.initialization.names import Method
from cbd_hub.settings import Settings
from cbd_hub.text.settings import GenerationConfig
from cbd_hub.training.settings import DistillationConfig

__all__ = ["BridgeConfig", "BridgeSetting", "Way"]

Way = Literal["transplant", "logits", "seqkd"]
"""One means of founding anchor zero; see the top of this module."""


def _as_mapping(value: Any) -> Any:
    """``auto`` or a list of ways stands for a mapping with ``use``."""
    return {"use": value} if isinstance(value, str | list) else value


def _without_omp(value: Any) -> Any:
    if value == "omp":
        raise ValueError("embeddings: omp was measured worse than the mean of pieces and is gone; write pieces")
    return value


class BridgeConfig(Settings):
    """How anchor zero is made where the source is of another architecture or vocabulary."""

    use: Literal["auto"] | list[Way] = "auto"
    """Any of ``transplant``, ``logits`` and ``seqkd``; ``auto`` picks. An empty list trains from random weights on the
    corpus, without the source: the control."""
    architecture: str | None = None
    """``model_type`` of anchor zero; None is the source's."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Fields of its config; those left out are the source's, or for another architecture that config's defaults."""
    training: DistillationConfig = DistillationConfig(hidden=0)
    """How anchor zero is trained; ``ce`` and ``kl`` weigh the text and the source's predictions, ``hidden`` plays no
    part."""
    uld: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the distance between sorted probabilities of tokens that only one vocabulary has."""
    embeddings: Annotated[Method, BeforeValidator(_without_omp)] = "pieces"
    """How a token that the source lacks gets a row: the mean of the source's tokens that spell it, or at random
    (:func:`cbd_hub.initialization.transplant.transplant_vocabulary`)."""
    k: int = Field(default=8, ge=1)
    """Without effect: it belonged to ``embeddings: omp``, and recipes that name it still load."""
    generation: GenerationConfig = GenerationConfig(documents=1000)
    """What the source writes, for ``seqkd``."""
    generated_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the training tokens that are the source's own text, for ``seqkd``; the others are the corpus."""
    cache: str | None = None
    """Folder that generated text is kept in, for any later build too; None is one beside the datasets cache."""

    @model_validator(mode="after")
    def _once(self) -> "BridgeConfig":
        if len(set(self.use)) != len(self.use) and self.use != "auto":
            raise ValueError(f"use names a way twice: {self.use}")
        return self


BridgeSetting = Annotated[BridgeConfig, BeforeValidator(_as_mapping)]
"""A :class:`BridgeConfig` as recipes write it: ``auto``, a list of ways, or a mapping."""
