"""The end of a conversion of the profile `joint`, or of an average: the base that was trained along becomes a model of
its own.

Not here: the folder's files (`training/joint/model_folder.py`), what the artifact says of it (`publish.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from retrofit.hub import Base
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.joint.drift import Drift, drift, merge, refuse_drift
from retrofit.recipes.training.joint.model_folder import own_state, write_model
from retrofit.recipes.training.joint.trainer import JointTrainer
from retrofit.recipes.training.joint.weights import BaseWeights
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf.backend import HFBackend


@dataclass(frozen=True)
class OwnModel:
    """drift: its figures against the original.  moved: by how much merging moved logits.  size: its bytes, about."""

    drift: Drift
    moved: float | None
    size: int
    write: Callable[[Path], Mapping[str, Any]]

    def recorded(self) -> dict[str, Any]:
        """As `retrofit.json` has it."""
        return {**self.drift, **({} if self.moved is None else {"merge": self.moved})}


def own_model(
    trainer: Trainer, base: Base, plan: Recipe, first: Sequence[Document], held_out: Sequence[Document], step: int
) -> OwnModel | None:
    """Merge what was trained into the base, and measure its drift; None in the profile `frozen`.

    first: what the merge is tried on.  Raises GateError where merging moved the model, or it drifted too far.
    """
    if not isinstance(trainer, JointTrainer):
        return None
    moved = merge(trainer.backend, trainer.weights, first)
    return measured_model(trainer.backend, trainer.weights, base, plan, held_out, step, moved)


def measured_model(
    backend: HFBackend,
    weights: BaseWeights,
    base: Base,
    plan: Recipe,
    held_out: Sequence[Document],
    step: int | None,
    moved: float | None = None,
) -> OwnModel:
    """The model as it is, its drift measured; step: of its training, None for a mean of several.

    Raises GateError where it drifted too far.
    """
    found = drift(backend, weights, held_out)
    refuse_drift(found, plan.joint.max_drift, step)
    assert base.tokenizer is not None
    size = sum(tensor.nbytes for tensor in own_state(base.model).values())
    return OwnModel(found, moved, size, partial(write_model, model=base.model, tokenizer=base.tokenizer))
