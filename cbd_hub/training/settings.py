"""What a user sets about the training of one model; the code that trains is :mod:`cbd_hub.training.distill`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from cbd_hub.axes.sizing import parse_count
from cbd_hub.losses.names import DivergenceName
from cbd_hub.settings import Settings

__all__ = ["AnchorDistillation", "ControlPointConfig", "DistillationConfig", "TokenCount"]

TokenCount = Annotated[int, BeforeValidator(lambda v: parse_count(v) if isinstance(v, str) else v), Field(ge=0)]
"""A number of tokens: an int, or a string such as ``"5M"``."""


class DistillationConfig(Settings):
    """How an anchor is trained."""

    tokens: TokenCount = 1_000_000
    """Training tokens, rounded up to whole steps; text is repeated if need be. 0 only cuts out and trains nothing."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate of AdamW. 1e-4 suits pretrained models; a tiny one trained from scratch takes 1e-3."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up: to 0 along a cosine or a line, or not at all."""
    warmup_fraction: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps over which the learning rate rises from 0, 0 to 1."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per forward pass and device."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step; the result is that of one large batch."""
    ce: float = Field(default=1.0, ge=0)
    """Weight of the cross-entropy with the text (nats a token)."""
    kl: float = Field(default=1.0, ge=0)
    """Weight of the divergence from the teacher (nats a token)."""
    divergence: DivergenceName = "forward_kl"
    """Which divergence that is (:meth:`cbd_hub.losses.divergences.Divergence.named`); logged as ``kl`` whichever it
    is."""
    skew: float = Field(default=0.1, ge=0, lt=1)
    """Share of the left distribution in the right one of the skewed divergences; the others ignore it."""
    hidden: float = Field(default=10.0, ge=0)
    """Weight of the distance between hidden states (relative, 0 when they agree)."""
    hidden_kind: Literal["mse", "cosine"] = "mse"
    """That distance: squared error over the teacher's squared norm, or 1 - cosine."""
    temperature: float = Field(default=1.0, gt=0)
    """Softens both distributions of the divergence; 1 leaves them as they are."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW, not applied to biases and norms."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are scaled down to this norm; 0 never does."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Arithmetic of both passes; weights and optimizer stay in float32. fp16 needs an accelerator."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about 20 % slower."""
    torch_compile: bool = False
    """Compile the student with ``torch.compile``; needs a C++ compiler."""
    report_to: str | list[str] = "none"
    """Experiment trackers to log to, as in ``TrainingArguments`` ("none", "tensorboard", "wandb", ...)."""
    eval_every: int | None = Field(default=None, ge=1)
    """Steps between two measurements of the held-out loss; None measures ten times a run."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides the order of the text and dropout."""

    @model_validator(mode="after")
    def _some_loss(self) -> "DistillationConfig":
        if self.tokens and not (self.ce or self.kl or self.hidden):
            raise ValueError("ce, kl and hidden are all 0: give at least one loss a weight")
        return self


class ControlPointConfig(Settings):
    """How the curve between an anchor and its larger neighbor is learned."""

    rank: int | None = Field(default=None, ge=1)
    """Columns of the two factors that stand for every matrix; null takes 32, or fewer where that would be more than
    7.5 % of the larger neighbor."""
    tokens: TokenCount | None = None
    """Training tokens on the curve, on top of the anchor's; null takes as many as the anchor's."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate of the control point; the anchor keeps its own. null takes 2e-3, more where there are few
    steps or narrow models."""
    together: bool = True
    """Train the anchor in the steps on the curve as well; false leaves it as it is."""


class AnchorDistillation(DistillationConfig):
    """How an anchor is trained, and the curve between it and its larger neighbor."""

    control_point: ControlPointConfig | None = ControlPointConfig()
    """The learned curve between the two; null keeps the straight line."""
