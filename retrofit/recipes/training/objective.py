"""The four loss terms of a conversion, with hand-written gradients on the draft logits.

    L = L_AR + alpha L_diff + beta L_draft + gamma L_conf

L_draft: all-masked blocks against the base's own distribution p at the same positions, teacher-forced prefix; a row's
         loss is one of `losses/rows.py`, a slot's share one of `losses/slots.py`.
L_diff:  partly masked blocks against the data: CE weighted (K-1)/m, m of K-1 tokens masked (MDLM-style ELBO weight).
L_conf:  BCE of the confidence head to the greedy hit 1[argmax q = argmax p] and to the sampled one, 1 - TV(p, q).
L_AR:    next-token CE of the base rows; no gradient in the `frozen` profile, and `joint/` has what `joint` makes of it.

Every term is a sum over its tokens and a denominator of its own; the caller divides once all sums are in, so that
accumulation steps and ranks add up exactly.  Rows meet the vocabulary in chunks, so [rows, V] never exists whole.

Shapes: B blocks, D drafting rows per block, N = B * D, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.recipes.training.losses.rows import data_loss, dot, draft_loss
from retrofit.recipes.training.losses.slots import SLOT_WEIGHTS
from retrofit.runtime.backends.hf.backend import VocabHead
from retrofit.runtime.backends.sizes import size_for

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits per chunk: five copies of this many fp32 numbers are alive at a time."""
FEWEST_ROWS = 96
"""Rows per chunk, at least: with fewer, matrix products wait for the vocabulary head's weights to be read."""
KEPT_BYTES = {"cpu": 1 << 29, "cuda": 1 << 30}
"""Of teachers that a batch's first group of blocks leaves to its second; the others are projected again."""


@dataclass
class Sums:
    """Sums and denominators of the terms, and what the progress bar shows.  Add them up over steps and ranks."""

    ar: float = 0.0
    ar_count: int = 0
    kl: float = 0.0
    """Divergence of base rows from the original's; of the `joint` profile, where it has the denominator of `ar`."""
    diff: float = 0.0
    diff_count: int = 0
    draft: float = 0.0
    draft_weight: float = 0.0
    conf: float = 0.0
    conf_count: int = 0
    accept: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[D, 3] per slot: sum of (1 - TV), greedy hits, eligible rows."""

    def loss(
        self, alpha: float, beta: float, gamma: float, anchors: tuple[float, float] | None = None
    ) -> dict[str, float]:
        """The four terms and their weighted sum, each divided by its own denominator.

        anchors: of the `joint` profile, the weights in L_AR of `ar` and of `kl`, which is then among the terms.
        """
        parts = {
            "ar": self.ar / max(self.ar_count, 1),
            "diff": self.diff / max(self.diff_count, 1),
            "draft": self.draft / max(self.draft_weight, 1e-9),
            "conf": self.conf / max(self.conf_count, 1),
        }
        first = parts["ar"]
        if anchors is not None:
            parts["kl"] = self.kl / max(self.ar_count, 1)
            first = anchors[0] * parts["ar"] + anchors[1] * parts["kl"]
        parts["total"] = first + alpha * parts["diff"] + beta * parts["draft"] + gamma * parts["conf"]
        return parts


@dataclass(frozen=True)
class Blocks:
    """Draft blocks of one group, on the device.

    hidden [B, D, H] of the drafting rows; source [B, D] index into the clean rows: the base row at the position whose
    next token the slot predicts; previous [B, D] token the Markov head is given; target [B, D] true next token;
    eligible [B, D] whether the slot counts; weight [B, D] L_diff's (K-1)/m.
    """

    hidden: Tensor
    source: Tensor
    previous: Tensor
    target: Tensor
    eligible: Tensor
    weight: Tensor | None = None


def backward_draft(
    blocks: Blocks,
    teacher: Teacher,
    heads: Heads,
    sums: Sums,
    kind: str,
    slot_weights: str,
) -> tuple[Tensor, Tensor]:
    """L_draft and L_conf over all blocks: fills parameter gradients of the heads and adds to `sums`.

    The teacher may have judged other blocks of the same batch before.
    Returns (gradient of the undivided L_draft sum with respect to blocks.hidden, [B, D] argmax of q).
    Divide gradients by sums.draft_weight (confidence head: sums.conf_count) at the end.
    """
    B, D, H = blocks.hidden.shape
    device = blocks.hidden.device
    gradient = torch.zeros_like(blocks.hidden)
    best = torch.zeros(B, D, dtype=torch.long, device=device)
    accept = torch.zeros(B, D, 2, device=device)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    parts = _chunks(B, D, heads.vocab, device)
    memory = Memory(max(p.stop - p.start for p in parts) * D, heads.vocab, device)
    sources = blocks.source.cpu().numpy()
    teacher.make_room(sources, memory.rows)
    for part in parts:
        previous, eligible = blocks.previous[part].flatten(), blocks.eligible[part]
        count = previous.shape[0]
        target = blocks.target[part].flatten()
        p, top, negentropy = teacher.rows(sources[part].ravel(), target, memory.p(count))
        drafts = Drafts(blocks.hidden[part].flatten(0, 1), previous, teacher.project, heads)
        loss, grad, tv, chosen = draft_loss(drafts.logits, p, kind, top, negentropy, memory.q(count), target)
        weight = SLOT_WEIGHTS[slot_weights](tv.view(-1, D), eligible, (chosen == top).view(-1, D))
        gradient[part] = drafts.backward(grad, weight.flatten()).view(-1, D, H)
        best[part] = chosen.view(-1, D)
        accept[part] = torch.stack([1 - tv, (chosen == top).float()], -1).view(-1, D, 2)
        totals += torch.stack([(loss.view(-1, D) * weight).sum(), weight.sum()])
    draft, draft_weight, ar, ar_count = torch.cat([totals, teacher.loss(blocks.source[blocks.eligible])]).tolist()
    sums.draft, sums.draft_weight = sums.draft + draft, sums.draft_weight + draft_weight
    sums.ar, sums.ar_count = sums.ar + ar, sums.ar_count + round(ar_count)
    seen = torch.cat([accept, torch.ones_like(accept[..., :1])], -1) * blocks.eligible[..., None]
    seen = seen.sum(0, dtype=torch.float64).cpu()
    sums.accept = seen if sums.accept.numel() == 0 else sums.accept + seen
    _backward_confidence(blocks, accept, heads, sums)
    return gradient, best


def _backward_confidence(blocks: Blocks, accept_BD2: Tensor, heads: Heads, sums: Sums) -> None:
    """L_conf: how well it is known, from hidden state and previous token, which drafts are accepted."""
    confidence = heads.confidence_logits(blocks.hidden.detach().flatten(0, 1), blocks.previous.flatten())
    if confidence is None:
        return
    want = accept_BD2.flip(-1).flatten(0, 1)  # greedy first, then sampled
    bce = F.binary_cross_entropy_with_logits(confidence, want, reduction="none").sum(-1)
    total = (bce * blocks.eligible.flatten()).sum()
    total.backward()
    sums.conf += float(total.detach())
    sums.conf_count += int(blocks.eligible.sum())


def backward_diffusion(blocks: Blocks, project: Callable[[Tensor], Tensor], heads: Heads, sums: Sums) -> Tensor:
    """L_diff over all blocks: fills the Markov head's gradients, adds to `sums`, returns the gradient of blocks.hidden.

    Rows with weight 0 (their token is not masked) carry no loss; the denominator counts all eligible slots.
    """
    assert blocks.weight is not None
    gradient = torch.zeros_like(blocks.hidden).flatten(0, 1)
    hidden, previous, target = (t.detach().flatten(0, 1) for t in (blocks.hidden, blocks.previous, blocks.target))
    weight = torch.where(blocks.eligible, blocks.weight, 0.0).flatten()
    sums.diff_count += int(blocks.eligible.sum())
    live = weight.nonzero()[:, 0]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    parts = live.split(chunk_rows(heads.vocab, hidden.device)) if len(live) else ()
    memory = Memory(len(parts[0]) if parts else 0, heads.vocab, hidden.device)
    for rows in parts:
        drafts = Drafts(hidden[rows], previous[rows], project, heads)
        loss, grad = data_loss(drafts.logits, target[rows], memory.q(len(rows)))
        gradient[rows] = drafts.backward(grad, weight[rows])
        total += (loss * weight[rows]).sum()
    sums.diff += float(total)
    return gradient.view_as(blocks.hidden)


class Memory:
    """Room for [rows, V] numbers, used again for every chunk: fresh memory costs more than the arithmetic on it."""

    def __init__(self, rows: int, vocab: int, device: torch.device):
        self.rows, self._vocab, self._device = rows, vocab, device
        self._kept: dict[str, Tensor] = {}

    def _rows(self, name: str, count: int) -> Tensor:
        if name not in self._kept:
            self._kept[name] = torch.empty(self.rows, self._vocab, device=self._device)
        return self._kept[name][:count]

    def q(self, count: int) -> Tensor:
        """[count, V] of the drafts."""
        return self._rows("q", count)

    def p(self, count: int) -> Tensor:
        """[count, V] of the rows' teachers."""
        return self._rows("p", count)


class Drafts:
    """Draft logits of some rows, and the way back from their gradient.

    The Markov head's part is done by hand, on top of the trunk's logits and in place: autograd would make full-size
    tensors of its bias, of the sum, and of W1's and W2's gradients.
    """

    def __init__(self, hidden_NH: Tensor, previous_N: Tensor, project: Callable[[Tensor], Tensor], heads: Heads):
        self.hidden, self.previous, self.heads = hidden_NH.detach().requires_grad_(), previous_N, heads
        self.trunk = project(self.hidden)
        self._projection = project.trained() if isinstance(project, VocabHead) else []
        self.logits = self.trunk.detach().float()
        """[N, V] in fp32."""
        self.first: Tensor | None = None
        if heads.markov_w1 is not None and heads.markov_w2 is not None:
            self.first = heads.markov_w1.detach()[previous_N]
            self.logits.addmm_(self.first, heads.markov_w2.detach().T)

    def backward(self, gradient_NV: Tensor, weight_N: Tensor) -> Tensor:
        """Gradient of the hidden states, row n's times weight[n]; adds the Markov head's to its parameters'."""
        w1, w2, weight = self.heads.markov_w1, self.heads.markov_w2, weight_N[:, None]
        if self.first is not None and w1 is not None and w2 is not None:
            _gradient(w2).addmm_(gradient_NV.T, self.first * weight)
            _gradient(w1).index_add_(0, self.previous, (gradient_NV @ w2.detach()) * weight)
        if self._projection:  # of the `joint` profile: the vocabulary's weights get theirs
            self.trunk.backward((gradient_NV * weight).to(self.trunk.dtype))
            assert self.hidden.grad is not None
            return self.hidden.grad
        (got,) = torch.autograd.grad(self.trunk, self.hidden, gradient_NV.to(self.trunk.dtype))
        return got * weight.to(got.dtype)


def _gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient, to add to."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class Teacher:
    """The base's own distribution at the positions that the blocks of one batch are judged by, chunk after chunk.

    Blocks overlap, and a batch's two groups share most positions: each is projected to the vocabulary once.  Kept for
    the second group are the first group's positions, in their order, as far as KEPT_BYTES reach; of the others only
    what a chunk shares with the one before it, which is much, since blocks come in order of their positions.

        rows of _p:   0 .. kept: kept positions | kept .. : of the last chunk, what is not among them
    """

    def __init__(self, clean_PH: Tensor, project: Callable[[Tensor], Tensor], vocab: int, with_entropy: bool):
        self.clean, self.project, self._vocab, self._with_entropy = clean_PH, project, vocab, with_entropy
        count, device = len(clean_PH), clean_PH.device
        self._loss = torch.zeros(count, dtype=torch.float64, device=device)
        self._top = torch.zeros(count, dtype=torch.long, device=device)
        self._negentropy = torch.zeros(count if with_entropy else 0, device=device)
        self._row = np.full(count, -1)
        """Of each position, its row of `_p`."""
        self._kept = self._used = 0
        self._p: Tensor | None = None

    def make_room(self, sources: np.ndarray, chunk: int) -> None:
        """For blocks with these positions, of which a chunk has at most so many."""
        if self._p is not None and len(self._p) >= self._kept + chunk:
            return
        budget = size_for(KEPT_BYTES, self.clean.device) // (4 * self._vocab)
        self._kept, self._used = min(budget, len(np.unique(sources))), 0
        self._row[:] = -1
        self._p = torch.empty(self._kept + chunk, self._vocab, device=self.clean.device)

    def forget(self) -> None:
        """Give the memory back."""
        self._p = None

    @torch.no_grad()
    def rows(self, source_N: np.ndarray, target_N: Tensor, out_NV: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """p [N, V], argmax p [N] and, where it was asked for, sum p log p [N] at positions that these tokens follow."""
        assert self._p is not None
        distinct, first, where = np.unique(source_N, return_index=True, return_inverse=True)
        row = self._row[distinct]
        passing, new = np.flatnonzero(row >= self._kept), np.flatnonzero(row < 0)
        carried = self._p[self._index(row[passing])]
        stay, begin = new[: self._kept - self._used], self._kept + len(passing)
        parts = ((stay, self._used), (new[len(stay) :], begin))
        row[passing] = np.arange(self._kept, begin)
        for which, at in parts:
            row[which] = np.arange(at, at + len(which))
        self._row[self._row >= self._kept] = -1
        self._row[distinct] = row
        self._used += len(stay)
        self._p[self._kept : begin] = carried
        if len(new):
            logits = self.project(self.clean[self._index(distinct[new])]).float()
            targets = target_N[self._index(first[new])]
            for (which, at), some, target in zip(
                parts, logits.split([len(w) for w, _ in parts]), targets.split([len(w) for w, _ in parts]), strict=True
            ):
                self._learn(self._index(distinct[which]), some, target, self._p[at : at + len(which)])
        source, found = self._index(source_N), self._index(row[where.ravel()])
        p = torch.index_select(self._p, 0, found, out=out_NV)
        return p, self._top[source], self._negentropy[source] if self._with_entropy else None

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self.clean.device)

    def _learn(self, positions: Tensor, logits: Tensor, target: Tensor, p: Tensor) -> None:
        """Fill p, and what is known of these positions; logits are overwritten."""
        top = logits.argmax(-1, keepdim=True)
        torch.softmax(logits, dim=-1, out=p)
        log_sum = logits.gather(-1, top) - p.gather(-1, top).log()
        self._loss[positions] = (log_sum - logits.gather(-1, target[:, None]))[:, 0].double()
        self._top[positions] = top[:, 0]
        if self._with_entropy:
            self._negentropy[positions] = dot(p, logits.sub_(log_sum))

    def loss(self, positions: Tensor) -> Tensor:
        """[2] L_AR's sum over these positions, each counted once, and their number."""
        counted = torch.zeros_like(self._loss).index_fill_(0, positions, 1)
        return torch.stack([(self._loss * counted).sum(), counted.sum()])


def chunk_rows(vocab: int, device: torch.device) -> int:
    """How many rows meet the vocabulary at once."""
    return max(size_for(CHUNK_ELEMENTS, device) // vocab, FEWEST_ROWS)


def _chunks(B: int, D: int, vocab: int, device: torch.device) -> list[slice]:
    """Slices of whole blocks (D-PACE weights need a block's slots together) of at most `chunk_rows` rows."""
    size = max(1, chunk_rows(vocab, device) // D)
    return [slice(i, min(i + size, B)) for i in range(0, B, size)]
