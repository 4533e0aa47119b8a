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

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.adapters.heads import Heads

TV_SHARE = 0.9
CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits per chunk: a few copies of this many fp32 numbers are alive at a time."""


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


def draft_loss(logits_NV: Tensor, p_NV: Tensor, kind: str = "tv_ce") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row and its gradient with respect to the draft logits.

    kind: `tv_ce` = 0.9 TV + 0.1 CE(q, argmax p), `tv` = TV, `kl` = KL(p || q).
    Returns (loss [N], gradient [N, V], TV [N], argmax q [N]).
    With s = sign(q - p):  dTV/dz = q (s - <s, q>) / 2;  dCE/dz = q - onehot;  dKL/dz = q - p.
    """
    log_q = F.log_softmax(logits_NV.float(), dim=-1)
    q = log_q.exp()
    difference = q - p_NV
    tv = 0.5 * difference.abs().sum(-1)
    best = logits_NV.argmax(-1)
    if kind == "kl":
        kl = torch.special.xlogy(p_NV, p_NV).sum(-1) - (p_NV * log_q).sum(-1)
        return kl, difference, tv, best
    sign = difference.sign_()
    gradient = (sign - (sign * q).sum(-1, keepdim=True)).mul_(q).mul_(0.5)
    if kind == "tv":
        return tv, gradient, tv, best
    top = p_NV.argmax(-1, keepdim=True)
    ce = -log_q.gather(-1, top).squeeze(-1)
    gradient = gradient.mul_(TV_SHARE).add_(q, alpha=1 - TV_SHARE)
    gradient.scatter_add_(-1, top, torch.full_like(top, -(1 - TV_SHARE), dtype=gradient.dtype))
    return TV_SHARE * tv + (1 - TV_SHARE) * ce, gradient, tv, best


def data_loss(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy to the data and its gradient: (loss [N], gradient [N, V])."""
    log_q = F.log_softmax(logits_NV.float(), dim=-1)
    loss = -log_q.gather(-1, target_N[:, None]).squeeze(-1)
    gradient = log_q.exp_()
    gradient.scatter_add_(-1, target_N[:, None], gradient.new_full((len(target_N), 1), -1.0))
    return loss, gradient


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
    clean_hidden_PH: Tensor,
    project: Callable[[Tensor], Tensor],
    heads: Heads,
    sums: Sums,
    kind: str,
    slot_weights: str,
) -> tuple[Tensor, Tensor]:
    """L_draft and L_conf over all blocks: fills parameter gradients of the heads and adds to `sums`.

    Returns (gradient of the undivided L_draft sum with respect to blocks.hidden, [B, D] argmax of q).
    Divide gradients by sums.draft_weight (confidence head: sums.conf_count) at the end.
    """
    B, D, H = blocks.hidden.shape
    gradient = torch.zeros_like(blocks.hidden)
    best = torch.zeros(B, D, dtype=torch.long, device=gradient.device)
    if sums.accept.numel() == 0:
        sums.accept = torch.zeros(D, 3, dtype=torch.float64)
    for part in _chunks(B, D, heads.vocab, gradient.device):
        rows = len(range(*part.indices(B))) * D
        hidden = blocks.hidden[part].detach().reshape(rows, H).requires_grad_()
        previous, eligible = blocks.previous[part].reshape(rows), blocks.eligible[part]
        p, top, ce, distinct_targets = _teacher(blocks, part, clean_hidden_PH, project)
        logits = heads.draft_logits(project(hidden), previous)
        loss, grad, tv, chosen = draft_loss(logits.detach(), p, kind)
        weight = SLOT_WEIGHTS[slot_weights](tv.view(-1, D), eligible)
        logits.backward(grad.mul_(weight.view(rows, 1)))
        gradient[part] = hidden.grad.view(-1, D, H)  # type: ignore[union-attr]
        best[part] = chosen.view(-1, D)
        sums.draft += float((loss.view(-1, D) * weight).sum())
        sums.draft_weight += float(weight.sum())
        sums.ar += ce
        sums.ar_count += distinct_targets
        hit = (chosen == top).float()
        accept = torch.stack([1 - tv, hit, torch.ones_like(tv)], -1).view(-1, D, 3) * eligible[..., None]
        sums.accept += accept.sum(0).double().cpu()
        confidence = heads.confidence_logits(hidden.detach(), previous)
        if confidence is not None:
            want = torch.stack([hit, 1 - tv], dim=-1)
            bce = F.binary_cross_entropy_with_logits(confidence, want, reduction="none").sum(-1)
            bce = (bce.view(-1, D) * eligible).sum()
            bce.backward()
            sums.conf += float(bce.detach())
            sums.conf_count += int(eligible.sum())
    return gradient, best


def backward_diffusion(blocks: Blocks, project: Callable[[Tensor], Tensor], heads: Heads, sums: Sums) -> Tensor:
    """L_diff over all blocks: fills the Markov head's gradients, adds to `sums`, returns the gradient of blocks.hidden.

    Rows with weight 0 (their token is not masked) carry no loss; the denominator counts all eligible slots.
    """
    assert blocks.weight is not None
    B, D = blocks.hidden.shape[:2]
    gradient = torch.zeros_like(blocks.hidden)
    for part in _chunks(B, D, heads.vocab, gradient.device):
        weight = torch.where(blocks.eligible[part], blocks.weight[part], 0.0)
        live = weight > 0
        sums.diff_count += int(blocks.eligible[part].sum())
        if not bool(live.any()):
            continue
        hidden = blocks.hidden[part].detach()[live].requires_grad_()
        logits = heads.draft_logits(project(hidden), blocks.previous[part][live])
        loss, grad = data_loss(logits.detach(), blocks.target[part][live])
        logits.backward(grad.mul_(weight[live][:, None]))
        gradient[part][live] = hidden.grad  # type: ignore[assignment]
        sums.diff += float((loss * weight[live]).sum())
    return gradient


def _teacher(
    blocks: Blocks, part: slice, clean_hidden_PH: Tensor, project: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, float, int]:
    """p [N, V], argmax p [N], and L_AR's sum and count over the chunk's distinct positions.

    Blocks of one sequence overlap, so each distinct position is projected to the vocabulary once.
    """
    distinct, where = blocks.source[part].reshape(-1).unique(return_inverse=True)
    with torch.no_grad():
        log_p = F.log_softmax(project(clean_hidden_PH[distinct]).float(), dim=-1)
        target = torch.zeros_like(distinct)
        counted = torch.zeros_like(distinct, dtype=torch.bool)
        eligible = blocks.eligible[part].reshape(-1)
        target[where[eligible]] = blocks.target[part].reshape(-1)[eligible]
        counted[where[eligible]] = True
        ce = -log_p.gather(-1, target[:, None]).squeeze(-1)[counted].sum()
        top = log_p.argmax(-1)
        return log_p.exp_()[where], top[where], float(ce), int(counted.sum())


def _chunks(B: int, D: int, vocab: int, device: torch.device) -> list[slice]:
    """Slices of whole blocks (D-PACE weights need a block's slots together) of at most CHUNK_ELEMENTS logits."""
    size = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cuda"]) // (D * vocab))
    return [slice(i, min(i + size, B)) for i in range(0, B, size)]
