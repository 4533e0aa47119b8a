"""Bases with a recurrent state, which other programs do not roll back when drafts are refused."""

from __future__ import annotations

from transformers import PreTrainedModel

from retrofit.artifact.folder import Artifact
from retrofit.errors import UnsupportedModelError
from retrofit.runtime.backends.hf.refused import has_state


def refuse_state(artifact: Artifact, model: PreTrainedModel, format: str) -> None:
    """Raise UnsupportedModelError for such a base."""
    if has_state(model):
        raise UnsupportedModelError(
            f"{artifact.folder} cannot be exported as {format}: drafts that are refused stay in the state of a "
            f"{type(model).__name__} there",
            "decode it with retrofit: `retrofit generate`",
        )
