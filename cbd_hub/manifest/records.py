"""What a manifest records of how a chain was made and measured."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Barrier",
    "Bridge",
    "ControlPoint",
    "CurvePoint",
    "Evaluation",
    "FileEntry",
    "PositiveInt",
    "Strict",
    "Training",
]

PositiveInt = Annotated[int, Field(gt=0, lt=2**50)]
"""A count that no file can drive into the impossible."""


class Strict(BaseModel):
    """Takes the types that it names and no others, no unknown key, no NaN and no infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FileEntry(Strict):
    """Size and hash of one file."""

    size: Annotated[int, Field(ge=0)]
    """Bytes."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Evaluation(Strict):
    """Loss on text that took no part in training or selection."""

    loss: float
    """Nats a token."""
    perplexity: float
    """exp(loss)."""
    num_tokens: PositiveInt
    """Predicted tokens."""


class Training(Strict):
    """What was spent on an anchor."""

    tokens: Annotated[int, Field(ge=0)]
    """Training tokens seen; 0 for an anchor that was only cut out."""
    seed: int
    cut_loss: float | None = None
    """Validation loss of the subset as it was cut, before its refit, nats a token."""
    start_loss: float | None = None
    """Validation loss of the untrained start, nats a token."""
    best_loss: float | None = None
    """Validation loss of the checkpoint that was kept, nats a token."""
    best_step: int | None = None
    """Optimizer step of that checkpoint; 0 is the start."""


class Barrier(Strict):
    """Loss along the weight of the small anchor, at one shape halfway between it and its parent."""

    num_parameters: PositiveInt
    alphas: list[Annotated[float, Field(ge=0, le=1)]]
    """From 0 (the parent pruned) to 1 (the anchor expanded)."""
    losses: list[float]
    """Nats a token."""
    height: float
    """How far the losses rise above the straight line between the two ends; negative where they sag."""

    @model_validator(mode="after")
    def _pairs(self) -> "Barrier":
        if len(self.alphas) != len(self.losses):
            raise ValueError(f"a barrier has {len(self.alphas)} alphas and {len(self.losses)} losses")
        return self


class ControlPoint(Strict):
    """The learned bend between an anchor and its parent (:mod:`cbd_hub.interpolation.control_points`)."""

    file: FileEntry | None = None
    """``control_points/<anchor>.safetensors``; None where it was trained and the straight line was no worse."""
    rank: PositiveInt
    """Columns of the two factors of every matrix."""
    tokens: PositiveInt
    """Training tokens."""
    seed: int
    together: bool
    """Whether the anchor was trained along with it."""
    sizes: list[PositiveInt]
    """Parameters of the models that it was judged by."""
    losses: list[float]
    """Their validation loss on the curve, nats a token."""
    straight_losses: list[float]
    """Their validation loss on the straight line, nats a token."""

    @model_validator(mode="after")
    def _same_length(self) -> "ControlPoint":
        if not len(self.sizes) == len(self.losses) == len(self.straight_losses):
            raise ValueError("a control point has one loss and one straight loss for every size")
        return self


class CurvePoint(Strict):
    """Measured held-out loss of a model between two anchors."""

    num_parameters: PositiveInt
    loss: float
    """Nats a token."""
    method: str


class Bridge(Strict):
    """How the largest anchor was made from a source of another architecture or vocabulary."""

    source: str
    """Repo id, folder or name on a server."""
    source_revision: str | None = None
    source_architecture: str | None = None
    """Its ``model_type``; None where it was behind a server."""
    use: list[Literal["transplant", "logits", "seqkd"]]
    """The means, of those that :mod:`cbd_hub.build.bridge` has."""
    why: str
    carried: list[str] = Field(default_factory=list)
    """What of the source's weights it started with."""
    fresh_blocks: str | None = None
    """Where its blocks started at random beside the source's embeddings: the field or rule that kept the source's
    out."""
    vocabulary: dict[str, int | float | list[str]] | None = None
    """How the two vocabularies compare on the corpus."""
    generated_documents: Annotated[int, Field(ge=0)] = 0
    """Texts that the source wrote for it."""
