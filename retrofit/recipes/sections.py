"""What every section of a recipe is, and the section of the profile `joint`.

Not here: the other sections, and how they agree (`schema.py`).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from retrofit.artifact.schema import MOST_ALPHA, MOST_RANKS

MOST = 10**9
"""Of steps, documents and tokens: what is more was not meant, and would never end."""


class Section(BaseModel):
    """A frozen group of keys that knows no others, and reads `true` or `"3"` as neither number."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Joint(Section):
    """The base's own weights, where `profile` is `joint`; without meaning where it is `frozen`."""

    weights: Literal["lora", "full"] = "lora"
    """What moves: a LoRA on the projections that `adapter.targets` names, for all rows, merged at the end; or every
    weight of the base."""
    rank: int = Field(32, ge=1, le=MOST_RANKS)
    """Rank of that LoRA."""
    alpha: float = Field(64.0, gt=0, le=MOST_ALPHA)
    """Its scale: the update is multiplied by alpha / rank."""
    lr: float = Field(1e-4, gt=0, le=1)
    """Peak learning rate of the base's weights or their LoRA; `train.lr` is that of the adapter and the heads."""
    anchor: Literal["ce", "kl", "both"] = "both"
    """What L_AR holds base rows to: the next token of the text (`ce`), the original's own distribution (`kl`), both."""
    ce_weight: float = Field(1.0, ge=0, le=100)
    """Weight of the cross-entropy to the text."""
    kl_weight: float = Field(1.0, ge=0, le=100)
    """Weight of the KL divergence from the original's distribution."""
    gated: bool = True
    """Train the gated LoRA of draft rows beside it; without it only the heads and the base's weights are trained."""
    max_drift: float | None = Field(None, gt=0)
    """Largest KL divergence from the original on held-out text that is allowed; more at a probe ends the training, and
    more at the end is not published.  Unit: nats per token."""

    @model_validator(mode="after")
    def _anchored(self) -> Self:
        if not any(self.anchors):
            raise ValueError(
                f"joint.anchor: {self.anchor} has weight 0, so nothing would hold the base to anything; "
                f"raise joint.{'kl' if self.anchor == 'kl' else 'ce'}_weight"
            )
        return self

    @property
    def anchors(self) -> tuple[float, float]:
        """Weights in L_AR of the cross-entropy to the text, and of the KL divergence from the original."""
        return (0.0 if self.anchor == "kl" else self.ce_weight), (0.0 if self.anchor == "ce" else self.kl_weight)
