"""Train the adapter: one clean forward without gradient per batch, many draft blocks on it.

    clean forward (base rows, no gradient)  ->  K/V of every layer, and the teacher's hidden states
    draft rows of three groups, each forward + backward over the same K/V:
        uniform anchors -> L_draft, L_conf     their misses become
        missed anchors  -> L_draft, L_conf
        masked blocks   -> L_diff

A batch is packed: its documents run end to end in one forward, without padding, each a sequence of its own whose
positions begin at 0 and whose rows see nothing of the others; so how they are grouped changes no loss and no gradient.
Each term keeps gradient buffers of its own until its global denominator is known, so accumulation is exact.
Not here: where documents come from, checkpoints, the artifact.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrofit.adapters.attach import Attached
from retrofit.adapters.rows import SequenceRows
from retrofit.errors import DataError
from retrofit.recipes.blocks import (
    BlockBatch,
    add_sequence,
    choose_anchors,
    document_rng,
    eligible_anchors,
    missed_anchors,
    shares,
)
from retrofit.recipes.data import Document
from retrofit.recipes.objective import Blocks, Sums, backward_diffusion, backward_draft
from retrofit.recipes.schema import Recipe
from retrofit.runtime.backends.hf import HFBackend
from retrofit.runtime.cache import KVCache

SHUFFLE_BUFFER = 256
"""Windows held for shuffling; documents come in random order already."""


@dataclass
class StepResult:
    """One optimizer step: loss parts, per-slot acceptance, and how many rows it ran."""

    loss: dict[str, float]
    sums: Sums
    clean_rows: int
    draft_rows: int


class Trainer:
    """Holds the optimizer; `step(batches)` does one optimizer step over the accumulation batches given."""

    def __init__(self, attached: Attached, backend: HFBackend, recipe: Recipe):
        self.attached, self.backend, self.recipe = attached, backend, recipe
        self.trained = [p for p in attached.parameters() if p.requires_grad]
        confidence = {
            id(attached.heads.confidence_weight),
            id(getattr(attached.heads, "confidence_bias", None)),
        }
        self.is_confidence = [id(p) in confidence for p in self.trained]
        # Vectors and head tables are not matrices acting on activations: no weight decay anywhere, plain AdamW.
        self.optimizer = torch.optim.AdamW(self.trained, lr=recipe.train.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.steps_done = 0

    def step(self, batches: list[list[tuple[Document, int]]]) -> StepResult:
        """batches: accumulation batches of (document, epoch)."""
        sums = Sums()
        draft_gradients = [torch.zeros_like(p) for p in self.trained]
        diff_gradients = [torch.zeros_like(p) for p in self.trained]
        clean_rows = draft_rows = 0
        for batch in batches:
            rows = self._accumulate(batch, sums, draft_gradients, diff_gradients)
            clean_rows, draft_rows = clean_rows + rows[0], draft_rows + rows[1]
        self._set_gradients(sums, draft_gradients, diff_gradients)
        nn.utils.clip_grad_norm_(self.trained, self.recipe.train.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.steps_done)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        objective = self.recipe.objective
        return StepResult(sums.loss(objective.alpha, objective.beta, objective.gamma), sums, clean_rows, draft_rows)

    def _accumulate(
        self,
        batch: list[tuple[Document, int]],
        sums: Sums,
        draft_gradients: list[Tensor],
        diff_gradients: list[Tensor],
    ) -> tuple[int, int]:
        recipe, layout, backend = self.recipe, self.attached.layout, self.backend
        documents = [document for document, _ in batch]
        rngs = [document_rng(recipe.train.seed, epoch, document.id) for document, epoch in batch]
        cache, clean_hidden = clean_forward(backend, documents)
        candidates = [eligible_anchors(document.response) for document in documents]
        uniform, again, diffusion = shares(recipe.train.anchors, recipe.objective.diffusion_share, layout.block)

        def run(count: int, wanted: list[list[int]] | None, masked: bool) -> tuple[BlockBatch, Tensor | None]:
            group = BlockBatch(layout, self.attached.heads.unknown)
            first = 0
            for s, document in enumerate(documents):
                pool = candidates[s] if wanted is None or not wanted[s] else np.intersect1d(wanted[s], candidates[s])
                anchors = choose_anchors(pool if len(pool) else candidates[s], count, rngs[s])
                add_sequence(
                    group,
                    document.tokens,
                    document.response,
                    anchors.tolist(),
                    first,
                    rngs[s],
                    self.attached.heads.vocab,
                    masked,
                )
                first += len(document.tokens)
            if not len(group):
                return group, None
            return group, self._group(group, cache, clean_hidden, sums, masked)

        rows = 0
        first_group, best = run(uniform, None, False)
        rows += len(first_group) * layout.block
        if again and best is not None:
            missed = missed_anchors(first_group, best.cpu().numpy(), len(documents))
            rows += len(run(again, missed, False)[0]) * layout.block
        _take(self.trained, draft_gradients)
        if diffusion:
            rows += len(run(diffusion, None, True)[0]) * layout.block
            _take(self.trained, diff_gradients)
        return int(clean_hidden.shape[0]), rows

    def _group(
        self, group: BlockBatch, cache: KVCache, clean_hidden: Tensor, sums: Sums, masked: bool
    ) -> Tensor | None:
        """Forward and backward of one group's draft rows; [B, D] argmax of q for L_draft groups."""
        layout, heads, objective = self.attached.layout, self.attached.heads, self.recipe.objective
        hidden = self.backend.run_trunk(self.backend.plan(group.rows()), cache)
        drafting = group.rectangle(hidden)[:, layout.first_drafting_row :]
        blocks = Blocks(hidden=drafting, **group.tensors(hidden.device))
        if masked:
            gradient, best = backward_diffusion(blocks, self.backend.head, heads, sums), None
        else:
            gradient, best = backward_draft(
                blocks,
                clean_hidden,
                self.backend.head,
                heads,
                sums,
                objective.draft_loss,
                objective.slot_weights,
            )
        drafting.backward(gradient)
        return best

    def _set_gradients(self, sums: Sums, draft_gradients: list[Tensor], diff_gradients: list[Tensor]) -> None:
        objective = self.recipe.objective
        draft = objective.beta / max(sums.draft_weight, 1e-9)
        diff = objective.alpha / max(sums.diff_count, 1)
        confidence = objective.gamma / max(sums.conf_count, 1)
        for p, from_draft, from_diff, is_confidence in zip(
            self.trained, draft_gradients, diff_gradients, self.is_confidence, strict=True
        ):
            p.grad = from_draft * confidence if is_confidence else from_draft * draft + from_diff * diff


def clean_forward(backend: HFBackend, documents: list[Document]) -> tuple[KVCache, Tensor]:
    """K/V of every layer and the last hidden states [P, H] of all documents' base rows, without gradient."""
    rows = [SequenceRows(slot=s, start=0, tokens=document.tokens) for s, document in enumerate(documents)]
    cache = KVCache(len(documents), max(len(document.tokens) for document in documents))
    with torch.no_grad():
        hidden = backend.run_trunk(backend.plan(rows), cache)
    return cache, hidden


def _take(parameters: list[nn.Parameter], buffers: list[Tensor]) -> None:
    """Move gradients into the buffers of the term they belong to."""
    for p, buffer in zip(parameters, buffers, strict=True):
        if p.grad is not None:
            buffer += p.grad
            p.grad = None


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine or linear decay to 5 % or constant."""
    train = recipe.train
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    progress = (step - train.warmup) / max(1, train.steps - train.warmup)
    factor = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }[train.schedule]
    return train.lr * (0.05 + 0.95 * factor)


def batches(
    epochs: Callable[[int], Iterator[Document]], batch_size: int, seed: int
) -> Iterator[list[tuple[Document, int]]]:
    """Endless batches of (document, epoch), shuffled within a buffer; documents without a response are passed over."""
    rng = np.random.default_rng([seed, 0x5EED])
    buffer: list[tuple[Document, int]] = []

    def stream() -> Iterator[tuple[Document, int]]:
        epoch = 0
        while True:
            seen = False
            for document in epochs(epoch):
                if len(eligible_anchors(document.response)):
                    seen = True
                    yield document, epoch
            if not seen:
                raise DataError("the training text holds no document with a response token to learn from")
            epoch += 1

    source = stream()
    while True:
        while len(buffer) < SHUFFLE_BUFFER:
            buffer.append(next(source))
        batch = []
        for _ in range(batch_size):
            pick = int(rng.integers(len(buffer)))
            buffer[pick], last = buffer[-1], buffer[pick]
            buffer.pop()
            batch.append(last)
        yield batch


def slot_report(sums: Sums) -> dict[str, list[float]]:
    """Acceptance estimates by slot, each given that all slots before it were right: sampled (1 - TV) and greedy."""
    if sums.accept.numel() == 0:
        return {"sampled": [], "greedy": []}
    counts = sums.accept[:, 2].clamp(min=1)
    return {
        "sampled": [round(v, 4) for v in (sums.accept[:, 0] / counts).tolist()],
        "greedy": [round(v, 4) for v in (sums.accept[:, 1] / counts).tolist()],
    }


def expected_tau(accept: list[float]) -> float:
    """1 + sum_k prod_{i<=k} a_i: tokens per verify cycle if slots were accepted at these rates."""
    return 1.0 + float(np.cumprod(accept).sum()) if accept else 1.0


def train(
    trainer: Trainer,
    source: Iterator[list[tuple[Document, int]]],
    metrics: Path,
    on_step: Callable[[int, dict[str, Any]], None],
) -> list[dict[str, Any]]:
    """Run all steps of the recipe; one JSON line a step goes to `metrics`, and to `on_step`.

    Raises DataError when the loss is not finite, naming the step and the documents of its batch.
    """
    recipe, history = trainer.recipe, []
    with metrics.open("w", encoding="utf-8") as out:
        while trainer.steps_done < recipe.train.steps:
            begin = time.perf_counter()
            picked = [next(source) for _ in range(recipe.train.accumulation)]
            result = trainer.step(picked)
            if not math.isfinite(result.loss["total"]):
                names = ", ".join(sorted({d.id for b in picked for d, _ in b})[:4])
                raise DataError(
                    f"loss is not finite at step {trainer.steps_done} (documents {names})", "lower train.lr"
                )
            slots = slot_report(result.sums)
            record = {
                "step": trainer.steps_done,
                "loss": {k: round(v, 6) for k, v in result.loss.items()},
                "accept": slots,
                "tau": round(expected_tau(slots["sampled"]), 4),
                "lr": learning_rate(recipe, trainer.steps_done - 1),
                "rows": {"clean": result.clean_rows, "draft": result.draft_rows},
                "seconds": round(time.perf_counter() - begin, 4),
            }
            out.write(json.dumps(record) + "\n")
            out.flush()
            history.append(record)
            on_step(trainer.steps_done, record)
    return history
