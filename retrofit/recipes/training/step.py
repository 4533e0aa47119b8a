"""Train the adapter: one clean forward without gradient per batch, many draft blocks on it.

    clean forward (base rows, no gradient)  ->  K/V of every layer, and the teacher's hidden states (`clean/`)
    draft rows of these groups, each forward + backward over the same K/V:
        uniform anchors -> L_draft, L_conf     their misses become
        missed anchors  -> L_draft, L_conf
        masked blocks   -> L_diff
        gap blocks      -> L_diff              where the recipe asks for them

A batch is packed: its documents run end to end in one forward, without padding, each a sequence of its own whose
positions begin at 0 and whose rows see nothing of the others; so how they are grouped changes no loss and no gradient.
Each term keeps gradient buffers of its own until its global denominator is known, so accumulation is exact.
Not here: which documents come (`order.py`), the loop over steps and its checkpoints (`session.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retrofit.adapters.attach import Attached
from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UsageError
from retrofit.machine import give_back
from retrofit.recipes.processes import Processes
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.sources import document_rng
from retrofit.recipes.training.blocks import (
    BlockBatch,
    add_sequence,
    choose_anchors,
    eligible_anchors,
    gap_layout,
    gaps,
    missed_anchors,
    shares,
)
from retrofit.recipes.training.checkpoint import RESTART
from retrofit.recipes.training.clean.forward import clean_forward, pieces_of
from retrofit.recipes.training.losses.rows import WITH_ENTROPY
from retrofit.recipes.training.objective import Blocks, Sums, Teacher, backward_diffusion, backward_draft
from retrofit.recipes.training.schedule import block_of, learning_rate
from retrofit.recipes.training.shares import Shares
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.cache import KVCache

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


@dataclass
class StepResult:
    """One optimizer step: loss parts, norm of the gradient, per-slot acceptance, and how many rows it ran."""

    loss: dict[str, float]
    gradient_norm: float
    sums: Sums
    clean_rows: int
    draft_rows: int
    anchors: list[dict[str, list[int]]]
    """Of each document, in order: what its blocks of each kind hung on."""
    seconds_clean: float | None = None
    """What its clean forwards took, here; unknown where asking would mean to wait for the device."""


class Trainer:
    """Holds the optimizer.  `gradients(batches)`, then `update()`, are one optimizer step.

    Between two steps, and until `update` is called, all that the training has learned is in `state()`.
    """

    anchors: tuple[float, float] | None = None
    """Weights in L_AR of the cross-entropy to the text and of the divergence from the original; None: not trained."""

    def __init__(self, attached: Attached, backend: HFBackend, recipe: Recipe, processes: Processes | None = None):
        self.attached, self.backend, self.recipe, self.processes = attached, backend, recipe, processes
        trained = self._trained()
        self.names, self.trained = list(trained), list(trained.values())
        self.forwarded = self.trained
        """What the model computes with and gets gradients, of each parameter that the optimizer moves."""
        confidence = {
            id(attached.heads.confidence_weight),
            id(getattr(attached.heads, "confidence_bias", None)),
        }
        self.is_confidence = [id(p) in confidence for p in self.trained]
        # Vectors and head tables are not matrices acting on activations: no weight decay anywhere, plain AdamW.
        groups = self._groups()
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.train.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.steps_done = 0
        self._seconds_clean = 0.0

    def _trained(self) -> dict[str, nn.Parameter]:
        """All that the optimizer moves, by name."""
        return {name: p for name, p in self.attached.named().items() if p.requires_grad}

    def _groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, in the order of `trained`; `rate`: what the learning rate is multiplied by."""
        return [{"params": self.trained, "rate": 1.0}]

    def follow(self) -> None:
        """Let the model compute with what was moved, or read."""

    @property
    def layout(self) -> DraftLayout:
        """Of the next step's blocks."""
        return replace(self.attached.layout, block=block_of(self.recipe, self.steps_done))

    def step(self, batches: list[list[tuple[Document, int]]]) -> StepResult:
        """One optimizer step, whatever the loss is."""
        result = self.gradients(batches)
        self.update()
        return result

    def gradients(self, batches: list[list[tuple[Document, int]]]) -> StepResult:
        """Loss and clipped gradients of the next step over its accumulation batches of (document, epoch).

        In several processes each computes its share of every batch, and all get the result of all.
        """
        shares = None
        if self.processes is not None:
            shares = Shares(batches, self.processes, self.recipe.train.anchors * self.attached.layout.block)
            batches = shares.own_batches()
        sums, self._seconds_clean = Sums(), 0.0
        draft_gradients = [torch.zeros_like(p) for p in self.trained]
        diff_gradients = [torch.zeros_like(p) for p in self.trained]
        clean_rows = draft_rows = 0
        anchors: list[dict[str, list[int]]] = []
        for batch in batches:
            rows = self._accumulate(batch, sums, draft_gradients, diff_gradients, anchors)
            clean_rows, draft_rows = clean_rows + rows[0], draft_rows + rows[1]
        if shares is not None:
            anchors = shares.merge_anchors(self.trained, anchors)
            both, drafts = [*draft_gradients, *diff_gradients], self.layout.drafts
            clean_rows, draft_rows = shares.add_up(sums, drafts, (clean_rows, draft_rows), both)
        self.set_gradients(sums, draft_gradients, diff_gradients)
        self._add_base_gradients(sums)
        norm = float(nn.utils.clip_grad_norm_(self.trained, self.recipe.train.clip))
        objective = self.recipe.objective
        loss = sums.loss(objective.alpha, objective.beta, objective.gamma, self.anchors)
        seconds = self._seconds_clean if self.backend.device.type == "cpu" else None
        return StepResult(loss, norm, sums, clean_rows, draft_rows, anchors, seconds)

    def update(self) -> None:
        """Move the weights by the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, self.steps_done) * group["rate"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.follow()
        self.steps_done += 1

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Trained weights, and the optimizer's moments under `KIND/NAME`; not copied."""
        moments = {
            f"{kind}/{name}": self.optimizer.state[p][kind]
            for name, p in zip(self.names, self.trained, strict=True)
            for kind in MOMENTS
        }
        return {"weights": {n: p.detach() for n, p in zip(self.names, self.trained, strict=True)}, "optimizer": moments}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], steps_done: int) -> None:
        """Raises UsageError when the tensors are not those of this adapter."""
        weights, moments = state["weights"], state["optimizer"]
        shapes = {name: tuple(p.shape) for name, p in zip(self.names, self.trained, strict=True)}
        found = {name: tuple(t.shape) for name, t in weights.items()}
        if shapes != found or len(moments) != len(MOMENTS) * len(found):
            wrong = sorted(set(shapes.items()) ^ set(found.items()))
            what = f"tensor {wrong[0][0]}" if wrong else "the optimizer's state"
            raise UsageError(f"the checkpoint does not fit this adapter: {what}", RESTART)
        with torch.no_grad():
            for name, p in zip(self.names, self.trained, strict=True):
                p.copy_(weights[name])
        optimizer = self.optimizer.state_dict()
        # cloned: what is read lies in a mapping of the file
        optimizer["state"] = {
            number: {kind: moments[f"{kind}/{name}"].clone() for kind in MOMENTS}
            for number, name in enumerate(self.names)
        }
        self.optimizer.load_state_dict(optimizer)
        self.follow()
        self.steps_done = steps_done

    def _accumulate(
        self,
        batch: list[tuple[Document, int]],
        sums: Sums,
        draft_gradients: list[Tensor],
        diff_gradients: list[Tensor],
        anchors: list[dict[str, list[int]]],
    ) -> tuple[int, int]:
        recipe, layout, backend = self.recipe, self.layout, self.backend
        documents = [document for document, _ in batch]
        rngs = [document_rng(recipe.train.seed, epoch, document.id) for document, epoch in batch]
        give_back()
        begin = time.perf_counter()
        cache, clean_hidden = self._clean(documents, sums)
        self._seconds_clean += time.perf_counter() - begin
        with_entropy = recipe.objective.draft_loss in WITH_ENTROPY
        teacher = Teacher(clean_hidden, backend.head, self.attached.heads.vocab, with_entropy)
        candidates = [eligible_anchors(document.response) for document in documents]
        blocks = recipe.train.anchors * recipe.draft.block // layout.block
        uniform, again, diffusion = shares(blocks, recipe.objective.diffusion_share, layout.block)
        filling, masked = gaps(diffusion, recipe.objective.infill_share)
        used: list[dict[str, list[int]]] = [{} for _ in documents]
        anchors.extend(used)

        def run(kind: str, count: int, wanted: list[list[int]] | None = None) -> tuple[BlockBatch, Tensor | None]:
            masked, gap = kind in ("masked", "gap"), kind == "gap"
            group = BlockBatch(gap_layout(layout) if gap else layout, self.attached.heads.unknown)
            first = 0
            for s, document in enumerate(documents):
                pool = candidates[s] if wanted is None or not wanted[s] else np.intersect1d(wanted[s], candidates[s])
                chosen = choose_anchors(pool if len(pool) else candidates[s], count, rngs[s]).tolist()
                used[s][kind] = chosen
                add_sequence(
                    group, document.tokens, document.response, chosen, first, rngs[s], self.attached.heads.vocab,
                    masked, gap,
                )  # fmt: skip
                first += len(document.tokens)
            if not len(group):
                return group, None
            return group, self._group(group, cache, teacher, sums, masked)

        rows = 0
        first_group, best = run("uniform", uniform)
        rows += len(first_group) * layout.block
        if again and best is not None:
            missed = missed_anchors(first_group, best.cpu().numpy(), len(documents))
            rows += len(run("missed", again, missed)[0]) * layout.block
        teacher.forget()
        self._move_gradients("draft", draft_gradients)
        for kind, count in (("masked", masked), ("gap", filling)):
            if count:
                group, _ = run(kind, count)
                rows += len(group) * group.layout.block
                self._move_gradients("diff", diff_gradients)
        return int(clean_hidden.shape[0]), rows

    def _clean(self, documents: list[Document], sums: Sums) -> tuple[KVCache, Tensor]:
        """The clean half of a batch: what `clean_forward` returns."""
        return clean_forward(self.backend, documents, self._forwards(documents))

    def _add_base_gradients(self, sums: Sums) -> None:
        """Of the weights that base rows run through; they have none in the `frozen` profile."""

    def _forwards(self, documents: list[Document]) -> int:
        """How many the clean rows of a batch take at least: as many as another process runs that shares the layers."""
        if self.processes is None or not self.processes.sharded:
            return 0
        own = len(pieces_of([len(document.tokens) for document in documents], self.backend.device))
        return int(max(self.processes.exchange("clean forwards", own)))

    def _group(self, group: BlockBatch, cache: KVCache, teacher: Teacher, sums: Sums, masked: bool) -> Tensor | None:
        """Forward and backward of one group's draft rows; [B, D] argmax of q for L_draft groups."""
        give_back()  # what the rows before left behind: small blocks of many sizes, of which few fit again
        layout, heads, objective = self.attached.layout, self.attached.heads, self.recipe.objective
        hidden = self.backend.run_trunk(self.backend.row_plan(group.rows()), cache)
        drafting = group.rectangle(hidden)[:, layout.first_drafting_row :]
        blocks = Blocks(hidden=drafting, **group.tensors(hidden.device))
        if masked:
            gradient, best = backward_diffusion(blocks, self.backend.head, heads, sums), None
        else:
            gradient, best = backward_draft(blocks, teacher, heads, sums, objective.draft_loss, objective.slot_weights)
        drafting.backward(gradient)
        return best

    def _move_gradients(self, term: str, buffers: list[Tensor]) -> None:
        """Move gradients into the buffers of the term they belong to."""
        for p, buffer in zip(self.forwarded, buffers, strict=True):
            if p.grad is not None:
                buffer += p.grad
                p.grad = None

    def set_gradients(self, sums: Sums, draft_gradients: list[Tensor], diff_gradients: list[Tensor]) -> None:
        """The gradients of the whole loss, each term's divided by its denominator."""
        objective = self.recipe.objective
        draft = objective.beta / max(sums.draft_weight, 1e-9)
        diff = objective.alpha / max(sums.diff_count, 1)
        confidence = objective.gamma / max(sums.conf_count, 1)
        for p, from_draft, from_diff, is_confidence in zip(
            self.trained, draft_gradients, diff_gradients, self.is_confidence, strict=True
        ):
            p.grad = from_draft * confidence if is_confidence else from_draft * draft + from_diff * diff


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
