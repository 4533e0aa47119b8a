"""Drift: how far the base has come from the original while it was trained along, on held-out text.

    kl          KL(original || own) of the next token, mean over tokens, in nats
    agreement   share of tokens where both have the same most likely next one
    perplexity  of either on the text itself

All teacher-forced, of base rows that a response token follows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from retrofit.errors import GateError, UsageError
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.blocks import eligible_anchors
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.recipes.training.joint.weights import BaseWeights
from retrofit.recipes.training.objective import chunk_rows
from retrofit.runtime.backends.hf.backend import HFBackend

Drift = dict[str, Any]
LARGEST_MERGE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
"""By how much logits may move where a LoRA is merged, as a share of the largest: rounding, and no more."""


@torch.no_grad()
def drift(backend: HFBackend, weights: BaseWeights, documents: Sequence[Document]) -> Drift:
    """Figures of the model as it is against the original.  Raises UsageError where there is no text to measure on."""
    totals = torch.zeros(4, dtype=torch.float64)
    count = 0
    for document in documents:
        judged = torch.from_numpy(eligible_anchors(document.response)).to(backend.device)
        if not len(judged):
            continue
        targets = torch.tensor(document.tokens, device=backend.device)[judged + 1]
        own = clean_forward(backend, [document])[1][judged]
        with weights.original():
            before = clean_forward(backend, [document])[1][judged]
        size = chunk_rows(backend.head.vocab, backend.device)
        for rows, others, target in zip(own.split(size), before.split(size), targets.split(size), strict=True):
            log_q = torch.log_softmax(backend.head(rows).float(), dim=-1)
            with weights.original():
                log_p = torch.log_softmax(backend.head(others).float(), dim=-1)
            kl = (log_p.exp() * (log_p - log_q)).sum()
            same = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            nll = [-one.gather(-1, target[:, None]).sum() for one in (log_q, log_p)]
            totals += torch.stack([kl, same.to(kl.dtype), *nll]).double().cpu()
        count += len(judged)
    if not count:
        raise UsageError(
            "profile joint measures drift on held-out text, and there is none", "raise data.held_out, or give more text"
        )
    kl_mean, agreement, own_nll, nll = (totals / count).tolist()
    return {
        "kl": round(max(kl_mean, 0.0), 6),
        "agreement": round(agreement, 6),
        "perplexity": round(math.exp(own_nll), 4),
        "original_perplexity": round(math.exp(nll), 4),
        "tokens": count,
    }


def refuse_drift(found: Mapping[str, Any], most: float | None, step: int | None) -> None:
    """Raises GateError for more than `joint.max_drift`.  step: of the training; None: a mean of several models."""
    if most is not None and found["kl"] > most:
        which, at = ("model", f" at step {step}") if step is not None else ("mean", "")
        hint = "raise joint.kl_weight, lower joint.lr, or train fewer steps, with --restart; or raise joint.max_drift"
        raise GateError(
            f"the {which} drifted: KL {found['kl']:.4f} nats per token from the original{at}, "
            f"joint.max_drift is {most:g}",
            hint if step is not None else "raise joint.max_drift, or average others",
        )


def with_drift(
    probe: Callable[[], dict[str, Any]],
    backend: HFBackend,
    weights: BaseWeights,
    documents: Sequence[Document],
    most: float | None,
    step: Callable[[], int],
) -> Callable[[], dict[str, Any]]:
    """A probe that measures drift too, and raises GateError where that is too large."""

    def both() -> dict[str, Any]:
        found = drift(backend, weights, documents)
        refuse_drift(found, most, step())
        return {**probe(), "kl": found["kl"], "agreement": found["agreement"]}

    return both


def merge(backend: HFBackend, weights: BaseWeights, documents: Sequence[Document]) -> float | None:
    """Put the LoRA into the weights; returns by how much that moved logits, as a share of the largest one, None where
    nothing was merged.

    Raises GateError where it moved them by more than rounding explains: the model that is written would not be the one
    that was trained.
    """
    before = _logits(backend, documents)
    weights.merge()
    if weights.kind == "full":
        return None
    after = _logits(backend, documents)
    moved = float((after - before).abs().max() / before.abs().max())
    most = LARGEST_MERGE.get(backend.dtype, 0.05)
    if not moved <= most:
        raise GateError(
            f"merging the LoRA into the base moved its logits by {moved:.2g} of the largest, rounding by {most:.2g} at "
            "most",
            "this is a bug; please report it",
        )
    return moved


@torch.no_grad()
def _logits(backend: HFBackend, documents: Sequence[Document]) -> Tensor:
    """Of the first rows of a batch."""
    return backend.head(clean_forward(backend, documents)[1][:256]).float()
