"""Which draft blocks a training batch runs: anchors, masks and noise, as rows and as index tensors.

    base layout, shift 1, K = 4        position   p  | p+1 p+2 p+3 p+4
      L_draft block of anchor p        input         |  M   M   M   M
      each row's teacher is the        source        | p+1 p+2 p+3 p+4     clean row at the row's own position
      next token from its source       previous      | x1  x2  x3  x4      (x_i = x_{p+i}), for the Markov head
                                       target        | x2  x3  x4  x5
      L_diff block, x3 x4 masked       input         | x1  x2  M   M
      (the loss sits LEFT of a mask)   weight        | 0   w   w   -       w = (K-1)/m
                                       previous      | x1  x2  ?   -       ? = still masked, "unknown"
      gap block of 4 K rows, for       input         | x1  x2  M   M   x5  x6 .. x16
      infilling: x2..x4 to be filled,  weight        | 0   w   w   -   -   -      tokens behind the gap stay known
      x3 x4 of them still masked

With shift 0 a row's source is the position before its own, and the first row drafts nothing.  Everything random is
keyed by (seed, epoch, document id), so neither packing nor the number of processes changes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows


@dataclass
class BlockBatch:
    """The blocks of one group, sequence by sequence: rows to run, and per drafting row [B, D] what it is judged by."""

    layout: DraftLayout
    unknown: int
    sequences: list[list[Block]] = field(default_factory=list)
    source: list[np.ndarray] = field(default_factory=list)
    previous: list[np.ndarray] = field(default_factory=list)
    target: list[np.ndarray] = field(default_factory=list)
    eligible: list[np.ndarray] = field(default_factory=list)
    weight: list[np.ndarray] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.source)

    def rows(self) -> list[SequenceRows]:
        return [SequenceRows(slot=s, start=0, blocks=blocks) for s, blocks in enumerate(self.sequences) if blocks]

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        names = ("source", "previous", "target", "eligible", "weight")
        return {name: torch.from_numpy(np.stack(getattr(self, name))).to(device) for name in names}

    def rectangle(self, hidden_NH: Tensor) -> Tensor:
        """[N, H] rows of the blocks, some cut at the end of a document, to [B, K, H]; what is missing is zero."""
        K = self.layout.block
        lengths = [len(block.inputs) for blocks in self.sequences for block in blocks]
        if all(n == K for n in lengths):
            return hidden_NH.view(len(lengths), K, -1)
        where = torch.cat([torch.arange(n) + b * K for b, n in enumerate(lengths)]).to(hidden_NH.device)
        full = hidden_NH.new_zeros(len(lengths) * K, hidden_NH.shape[1])
        return full.index_copy(0, where, hidden_NH).view(len(lengths), K, -1)


def shares(anchors: int, diffusion_share: float, block: int) -> tuple[int, int, int]:
    """How many of a sequence's blocks go to anchors drawn uniformly, to anchors just missed, and to L_diff."""
    diffusion = round(diffusion_share * anchors) if block > 1 else 0
    uniform = math.ceil((anchors - diffusion) / 2)
    return uniform, anchors - diffusion - uniform, diffusion


GAP_BLOCK = 4
"""How many times as long as a draft block a gap block is: half of it for the gap, the rest for the text behind."""


def gap_layout(layout: DraftLayout) -> DraftLayout:
    """Of blocks that train to fill a gap with the text behind it in view."""
    return replace(layout, block=GAP_BLOCK * layout.block)


def longest_gap(rows: int) -> int:
    """Most tokens that are missing in a gap block of so many rows.  Unit: tokens."""
    return rows // 2


def gaps(diffusion: int, share: float) -> tuple[int, int]:
    """(gap blocks, L_diff blocks of the usual length) in the rows of `diffusion` of the latter; a share > 0 has one."""
    count = max(1, round(share * diffusion / GAP_BLOCK)) if share and diffusion else 0
    return count, max(0, diffusion - GAP_BLOCK * count)


def eligible_anchors(response: Sequence[bool]) -> np.ndarray:
    """Positions p whose next token is a response token: response tokens and the last prompt token."""
    return np.flatnonzero(np.asarray(response[1:], dtype=bool))


def teaches(response: Sequence[bool], layout: DraftLayout) -> bool:
    """Whether a block that hangs on one of these tokens has a response token to predict."""
    anchors, flags = eligible_anchors(response), np.asarray(response, dtype=bool)
    rows = np.arange(layout.first_drafting_row, layout.block)
    targets = anchors[:, None] + int(layout.anchored) + rows + layout.shift
    return bool(flags[targets[targets < len(flags)]].any())


def choose_anchors(candidates: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Up to `count` distinct candidates, sorted."""
    return np.sort(rng.choice(candidates, size=min(count, len(candidates)), replace=False))


def add_sequence(
    batch: BlockBatch,
    tokens: Sequence[int],
    response: Sequence[bool],
    anchors: Sequence[int],
    first_clean_row: int,
    rng: np.random.Generator,
    vocab: int,
    diffusion: bool,
    gap: bool = False,
) -> None:
    """Append one document's blocks.  first_clean_row: where its tokens begin among the clean rows of the batch.

    gap: of `diffusion`, what is masked lies in one stretch at the beginning, and the rest is there.
    """
    layout, T = batch.layout, len(tokens)
    x, is_response = np.asarray(tokens), np.asarray(response, dtype=bool)
    blocks: list[Block] = []
    for anchor in anchors:
        start = int(anchor) + 1 if layout.anchored else int(anchor)
        if start >= T:
            continue
        known = np.zeros(layout.block, dtype=bool)
        known[0] = diffusion or not layout.anchored
        weight = np.zeros(layout.block)
        if diffusion:
            masked = _gap_slots(layout.block, rng) if gap else _masked_slots(layout.block, rng)
            known[1:] = ~masked
            weight = _loss_rows(masked, layout.shift)
        position = start + np.arange(layout.block)
        inside = position < T
        inputs = np.where(known & inside, x[np.minimum(position, T - 1)], MASK)
        if layout.input == "noise":
            inputs = np.where(inputs == MASK, rng.integers(0, vocab, layout.block), inputs)
        blocks.append(Block(start, inputs[inside].tolist()))
        _add_targets(batch, x, is_response, position, known, weight, first_clean_row, diffusion)
    batch.sequences.append(blocks)


def _add_targets(
    batch: BlockBatch,
    x: np.ndarray,
    is_response: np.ndarray,
    position: np.ndarray,
    known: np.ndarray,
    weight: np.ndarray,
    first_clean_row: int,
    diffusion: bool,
) -> None:
    layout, T = batch.layout, len(x)
    rows = slice(layout.first_drafting_row, None)
    source = position[rows] - (1 - layout.shift)
    target = np.minimum(source + 1, T - 1)
    eligible = (source + 1 < T) & is_response[target]
    safe = np.minimum(source, T - 1)
    previous = x[safe]
    if diffusion:
        # The token left of the one being predicted may itself still be masked.
        slot = source - position[0]
        previous = np.where(known[np.maximum(slot, 0)], previous, batch.unknown)
        eligible &= source + 1 < position[0] + layout.block
    batch.source.append(safe + first_clean_row)
    batch.previous.append(previous)
    batch.target.append(x[target])
    batch.eligible.append(eligible)
    batch.weight.append(weight[rows].astype(np.float32))


def _masked_slots(block: int, rng: np.random.Generator) -> np.ndarray:
    """[K-1] which of the tokens after the first are masked: m ~ U{1..K-1} of them."""
    masked = np.zeros(block - 1, dtype=bool)
    if block > 1:
        m = int(rng.integers(1, block))
        masked[rng.choice(block - 1, size=m, replace=False)] = True
    return masked


def _gap_slots(block: int, rng: np.random.Generator) -> np.ndarray:
    """[block-1] which are masked: some, U{1..g}, of a gap of g ~ U{1..longest} tokens behind the first."""
    masked = np.zeros(block - 1, dtype=bool)
    gap = int(rng.integers(1, longest_gap(block) + 1))
    masked[rng.choice(gap, size=int(rng.integers(1, gap + 1)), replace=False)] = True
    return masked


def _loss_rows(masked: np.ndarray, shift: int) -> np.ndarray:
    """[K] weight (K-1)/m on the row that predicts each masked token: left of it with shift 1, its own with shift 0."""
    weight = np.zeros(len(masked) + 1)
    count = masked.sum()
    if count:
        value = len(masked) / count
        weight[np.flatnonzero(masked) + (1 - shift)] = value
    return weight


def missed_anchors(batch: BlockBatch, best_BD: np.ndarray, documents: int) -> list[list[int]]:
    """Per document the anchors p whose next token the drafter just missed: the first miss of each block.

    Decoding hangs its next block exactly there after a rejection (slots are judged on the true prefix).
    """
    missed: list[set[int]] = [set() for _ in range(documents)]
    number = 0
    for s, blocks in enumerate(batch.sequences):
        for block in blocks:
            wrong = batch.eligible[number] & (best_BD[number] != batch.target[number])
            if wrong.any():
                slot = int(np.argmax(wrong))
                missed[s].add(block.start + batch.layout.first_drafting_row + slot - (1 - batch.layout.shift))
            number += 1
    return [sorted(m) for m in missed]
