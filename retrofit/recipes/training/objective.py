"""The four loss terms of a conversion, with hand-written gradients on the draft logits.

    L = L_AR + alpha L_diff + beta L_draft + gamma L_conf

L_draft: all-masked blocks against the base's own distribution p at the same positions, teacher-forced prefix:
    0.9 TV(p, q) + 0.1 CE(q, argmax p)   (DSpark); slot weights D-PACE, detached.
L_diff:  partly masked blocks against the data: CE weighted (K-1)/m, m of K-1 tokens masked (MDLM-style ELBO weight).
L_conf:  BCE of the confidence head to the greedy hit 1[argmax q = argmax p] and to the sampled one, 1 - TV(p, q).
L_AR:    next-token CE of the base rows; no gradient in the `frozen` profile.

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
from retrofit.runtime.backends.sizes import size_for

TV_SHARE = 0.9
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits per chunk: five copies of this many fp32 numbers are alive at a time."""
FEWEST_ROWS = 96
"""Rows per chunk, at least: with fewer, matrix products wait for the vocabulary head's weights to be read."""
KEPT_BYTES = {"cpu": 1 << 29, "cuda": 1 << 30}
"""Of teachers that a batch's first group of blocks leaves to its second; the others are projected again."""


def total_variation(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """[N] total variation distance, half the L1 distance; 1 - TV is the best possible acceptance probability."""
    return 0.5 * (p_NV - q_NV).abs().sum(-1)


def dpace_weights(tv_BD: Tensor, eligible_BD: Tensor) -> Tensor:
    """[B, D] D-PACE slot weights: how much the expected accepted length changes with each slot.

    a_i = .5 (1 - TV_i) + .5;  w_j = prod_{i<j} a_i * (1 + sum_{m>j} prod_{j<i<=m} a_i).  Ineligible slots weigh 0 and
    end the block.
    """
    a = torch.where(eligible_BD, 0.5 * (1 - tv_BD) + 0.5, torch.zeros_like(tv_BD))
    before = torch.cumprod(torch.cat([torch.ones_like(a[:, :1]), a[:, :-1]], dim=1), dim=1)
    after = torch.zeros_like(a)
    for j in range(a.shape[1] - 2, -1, -1):
        after[:, j] = a[:, j + 1] * (1 + after[:, j + 1])
    return torch.where(eligible_BD, before * (1 + after), torch.zeros_like(a))


def exponential_weights(tv_BD: Tensor, eligible_BD: Tensor, decay: float = 4.0) -> Tensor:
    """[B, D] exp(-(j-1)/decay), the fixed alternative (DFlash: decay 4 at block 8)."""
    slots = torch.arange(tv_BD.shape[1], device=tv_BD.device, dtype=tv_BD.dtype)
    return torch.exp(-slots / decay) * eligible_BD


def uniform_weights(tv_BD: Tensor, eligible_BD: Tensor) -> Tensor:
    """[B, D] 1 for every eligible slot."""
    return eligible_BD.to(tv_BD.dtype)


SLOT_WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dpace": dpace_weights,
    "exponential": exponential_weights,
    "uniform": uniform_weights,
}


def draft_loss(
    logits_NV: Tensor,
    p_NV: Tensor,
    kind: str = "tv_ce",
    top_N: Tensor | None = None,
    negentropy_N: Tensor | None = None,
    spare_NV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row and its gradient with respect to the fp32 draft logits, which are overwritten.

    kind: `tv_ce` = 0.9 TV + 0.1 CE(q, argmax p), `tv` = TV, `kl` = KL(p || q).
    top, negentropy: argmax p and sum p log p where they are known.  spare: memory to work in.
    Returns (loss [N], gradient [N, V], TV [N], argmax q [N]).
    With s = sign(q - p):  dTV/dz = q (s - <s, q>) / 2;  dCE/dz = q - onehot;  dKL/dz = q - p.
    """
    best = logits_NV.argmax(-1, keepdim=True)
    if kind == "kl":
        if negentropy_N is None:
            negentropy_N = torch.special.xlogy(p_NV, p_NV).sum(-1)
        log_q = torch.log_softmax(logits_NV, dim=-1, out=spare_NV)
        kl = negentropy_N - _dot(p_NV, log_q)
        gradient = log_q.exp_().sub_(p_NV)
        return kl, gradient, 0.5 * gradient.norm(p=1, dim=-1), best[:, 0]
    top = p_NV.argmax(-1, keepdim=True) if top_N is None else top_N[:, None]
    gap = (logits_NV.gather(-1, best) - logits_NV.gather(-1, top))[:, 0]
    q = torch.softmax(logits_NV, dim=-1, out=spare_NV)
    sign = torch.sub(q, p_NV, out=logits_NV)
    tv = 0.5 * sign.norm(p=1, dim=-1)
    mean = _dot(sign.sign_(), q)[:, None]
    if kind == "tv":
        return tv, sign.sub_(mean).mul_(q).mul_(0.5), tv, best[:, 0]
    ce = gap - q.gather(-1, best)[:, 0].log()
    # .45 q (s - <s, q>) + .1 (q - onehot)
    gradient = sign.mul_(TV_SHARE / 2).add_((1 - TV_SHARE) - TV_SHARE / 2 * mean).mul_(q)
    gradient.scatter_add_(-1, top, torch.full_like(top, -(1 - TV_SHARE), dtype=gradient.dtype))
    return TV_SHARE * tv + (1 - TV_SHARE) * ce, gradient, tv, best[:, 0]


def data_loss(logits_NV: Tensor, target_N: Tensor, spare_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy to the data and its gradient: (loss [N], gradient [N, V]).  spare: memory for the gradient."""
    log_q = torch.log_softmax(logits_NV, dim=-1, out=spare_NV)
    loss = -log_q.gather(-1, target_N[:, None]).squeeze(-1)
    gradient = log_q.exp_()
    gradient.scatter_add_(-1, target_N[:, None], gradient.new_full((len(target_N), 1), -1.0))
    return loss, gradient


def _dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """[N] inner products, without a tensor of all the products."""
    return torch.bmm(a_NV[:, None], b_NV[:, :, None])[:, 0, 0]


@dataclass
class Sums:
    """Sums and denominators of the terms, and what the progress bar shows.  Add them up over steps and ranks."""

    ar: float = 0.0
    ar_count: int = 0
    diff: float = 0.0
    diff_count: int = 0
    draft: float = 0.0
    draft_weight: float = 0.0
    conf: float = 0.0
    conf_count: int = 0
    accept: Tensor = field(default_factory=lambda: torch.zeros(0))
    """[D, 3] per slot: sum of (1 - TV), greedy hits, eligible rows."""

    def loss(self, alpha: float, beta: float, gamma: float) -> dict[str, float]:
        """The four terms and their weighted sum, each divided by its own denominator."""
        parts = {
            "ar": self.ar / max(self.ar_count, 1),
            "diff": self.diff / max(self.diff_count, 1),
            "draft": self.draft / max(self.draft_weight, 1e-9),
            "conf": self.conf / max(self.conf_count, 1),
        }
        parts["total"] = parts["ar"] + alpha * parts["diff"] + beta * parts["draft"] + gamma * parts["conf"]
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
        p, top, negentropy = teacher.rows(sources[part].ravel(), blocks.target[part].flatten(), memory.p(count))
        drafts = Drafts(blocks.hidden[part].flatten(0, 1), previous, teacher.project, heads)
        loss, grad, tv, chosen = draft_loss(drafts.logits, p, kind, top, negentropy, memory.q(count))
        weight = SLOT_WEIGHTS[slot_weights](tv.view(-1, D), eligible)
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
            self._negentropy[positions] = _dot(p, logits.sub_(log_sum))

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
