"""A training step of the profile `joint`: as that of `frozen` (`step.py`), and the base's weights move too.

    L = L_AR + alpha L_diff + beta L_draft + gamma L_conf

    L_AR     ce_weight CE(next token) + kl_weight KL(original || own), of every base row that a response token follows
    L_draft  its teacher is the own clean half, detached: drafts follow the base, the base does not go to meet them

Each term is a sum divided by a denominator of its own, over all batches and processes, as everywhere here.  Published
codes differ: Megatron-Bridge divides the sum of both by the number of masked tokens plus that of all tokens, Automodel
each by its own.
Not here: the clean half's way back (`backward.py`), the weights (`weights.py`).
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.adapters.attach import Attached
from retrofit.recipes.processes import Processes
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.recipes.training.joint.backward import Clean, CleanBackward
from retrofit.recipes.training.joint.weights import BaseWeights
from retrofit.recipes.training.objective import Sums
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.cache import KVCache


class JointTrainer(Trainer):
    """A `Trainer` that trains the base along."""

    def __init__(self, attached: Attached, backend: HFBackend, recipe: Recipe, processes: Processes | None = None):
        self.weights = BaseWeights(attached, backend, recipe)
        super().__init__(attached, backend, recipe, processes)
        self.anchors = recipe.joint.anchors
        self.forwarded = [*self.trained[: len(self.trained) - len(self.weights.forwarded)], *self.weights.forwarded]
        self._halves: list[Clean] = []

    def _trained(self) -> dict[str, nn.Parameter]:
        return super()._trained() | self.weights.trained

    def _groups(self) -> list[dict[str, Any]]:
        rate = self.recipe.joint.lr / self.recipe.train.lr
        own = len(self.trained) - len(self.weights.trained)
        return [{"params": self.trained[:own], "rate": 1.0}, {"params": self.trained[own:], "rate": rate}]

    def follow(self) -> None:
        self.weights.follow()

    def _clean(self, documents: list[Document], sums: Sums) -> tuple[KVCache, Tensor]:
        original = None
        if self.anchors is not None and self.anchors[1]:
            with self.weights.original():
                original = clean_forward(self.backend, documents)[1]
        cache, hidden = clean_forward(self.backend, documents)
        half = Clean(documents, cache, original)
        half.watch()
        self._halves.append(half)
        return cache, hidden

    def _move_gradients(self, term: str, buffers: list[Tensor]) -> None:
        super()._move_gradients(term, buffers)
        self._halves[-1].take(term)

    def _original_logits(self, hidden_NH: Tensor) -> Tensor:
        with self.weights.original():
            return self.backend.head(hidden_NH)

    def _add_base_gradients(self, sums: Sums) -> None:
        """Needs the denominators of all batches and processes, which `sums` has by now."""
        begin = time.perf_counter()
        halves, self._halves = self._halves, []
        sums.ar, sums.ar_count = 0.0, self._everywhere(sum(half.targets for half in halves))
        before = [p.grad for p in self.trained]
        for p in self.trained:
            p.grad = None
        assert self.anchors is not None
        way_back = CleanBackward(self.backend, self.anchors, self._original_logits)
        while halves:
            half = halves.pop(0)
            way_back(half, half.weighted(self._weights_of_terms(sums)), sums)
        found = [torch.zeros_like(p) for p in self.trained]
        super()._move_gradients("clean", found)
        self._add_up(sums, found)
        for p, gradient, more in zip(self.trained, before, found, strict=True):
            p.grad = more if gradient is None else gradient.add_(more)
        self._seconds_clean += time.perf_counter() - begin

    def _weights_of_terms(self, sums: Sums) -> dict[str, float]:
        """By what the gradients of each term's undivided sum are multiplied."""
        objective = self.recipe.objective
        return {
            "draft": objective.beta / max(sums.draft_weight, 1e-9),
            "diff": objective.alpha / max(sums.diff_count, 1),
        }

    def _everywhere(self, count: int) -> int:
        """The sum over all processes."""
        return count if self.processes is None else sum(self.processes.exchange("rows of L_AR", count))

    def _add_up(self, sums: Sums, gradients: list[Tensor]) -> None:
        """Make L_AR and the gradients of clean halves those of all processes."""
        if self.processes is None:
            return
        numbers = torch.tensor([sums.ar, sums.kl], dtype=torch.float64, device=gradients[0].device)
        self.processes.add_up([numbers, *gradients])
        sums.ar, sums.kl = numbers.tolist()


def trainer_for(attached: Attached, backend: HFBackend, recipe: Recipe, processes: Processes | None = None) -> Trainer:
    """The trainer of the recipe's profile."""
    kind = JointTrainer if recipe.profile == "joint" else Trainer
    return kind(attached, backend, recipe, processes)
