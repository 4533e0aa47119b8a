"""A drafter that knows the truth and is wrong at a stated rate: acceptance without a trained adapter.

The step does all the work of drafting; then the oracle puts its own tokens in place of those drafted.  It runs on the
device, inside the recorded step, and is a function of (request seed, output index): the same at any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.runtime.backends.fused.backend import FusedGQA
from retrofit.runtime.device.loop import DeviceLoop
from retrofit.runtime.engine import Engine
from retrofit.runtime.kernels.reference import hash_bits
from retrofit.runtime.kernels.state import State
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import DraftTree

PLACE = (1 << 31) - 1
"""Stands for the token id in the noise's key: no vocabulary reaches it, so the noise is no sampler's."""


class Oracle:
    """Called with the state after a step has drafted.

    The candidate of rank 0 is the truth with probability `acceptance`; where drafts branch, that of rank 1 is in half
    of the other cases.
    """

    def __init__(self, truth: Tensor, acceptance: float, vocab: int, depths: Sequence[int], ranks: Sequence[int]):
        """truth: int64 [requests, tokens], what request `seed` emits; depths, ranks: of the draft nodes 1, 2, ..."""
        self.truth, self.acceptance, self.vocab = truth, acceptance, vocab
        self.ahead = torch.tensor([depth - 1 for depth in depths], device=truth.device)
        self.ranks = torch.tensor(list(ranks), device=truth.device)

    def __call__(self, state: State) -> None:
        requests, tokens = self.truth.shape
        seed = state.seed.clamp(0, requests - 1)[:, None]
        index = (state.length - state.origin)[:, None] + self.ahead
        known = self.truth[seed, index.clamp(0, tokens - 1)]
        chance = hash_bits(seed, index, torch.full_like(index, PLACE)).double() / 2.0**32
        second = self.acceptance + (1 - self.acceptance) / 2
        right = torch.where(chance < self.acceptance, 0, torch.where(chance < second, 1, -1))
        wrong = (known + 1 + self.ranks) % self.vocab
        state.drafts[:, : len(self.ahead)] = torch.where(right == self.ranks, known, wrong)


def let_oracle_draft(
    engine: Engine,
    truth: Sequence[Sequence[int]],
    acceptance: float,
    *,
    batch: int,
    longest: int,
    params: Processing,
    tree: DraftTree | None = None,
) -> None:
    """From now on, drafts of `generate` with these parameters come from an oracle.

    truth: tokens of the requests with seeds 0, 1, ...  batch, longest: how many run together, and prompt plus output of
    the longest, as that `generate` will have them.  tree: that the drafts hang on, where they branch.
    """
    backend = engine.backend
    assert isinstance(backend, FusedGQA)
    depths = range(1, engine.layout.drafts + 1) if tree is None else tree.depths[1:]
    ranks = [0] * engine.layout.drafts if tree is None else tree.ranks[1:]
    known = torch.tensor([list(tokens) for tokens in truth], device=backend.device)
    oracle = Oracle(known, acceptance, backend.head.vocab, depths, ranks)
    cache = backend.new_cache(batch, longest)
    cache.loops.clear()
    cache.loops[params] = DeviceLoop(backend, cache, params, oracle)
    cache.release()  # `generate` takes the same one, and with it the steps recorded over it
