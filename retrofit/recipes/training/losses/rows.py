"""The loss of a draft row, and its gradient by hand with respect to the draft logits.

    tv      TV(p, q)
    tv_ce   0.9 TV(p, q) + 0.1 CE(q, argmax p)                                       (DSpark)
    kl      KL(p || q)
    lk      lam KL(p || q) + (1 - lam) TV(p, q) + CE(q, argmax p),  lam = exp(-(1 - TV) / 2), detached
                                            (arXiv 2602.23881; in this form arXiv 2607.05722, appendix B)
    ce      CE(q, the text's next token)

With s = sign(q - p):  dTV/dz = q (s - <s, q>) / 2;  dCE/dz = q - onehot;  dKL/dz = q - p.
p is the base's own distribution, q the draft row's.  Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

TV_SHARE = 0.9
WITH_ENTROPY = ("kl", "lk")
"""Losses that need sum p log p."""


def total_variation(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """[N] total variation distance, half the L1 distance; 1 - TV is the best possible acceptance probability."""
    return 0.5 * (p_NV - q_NV).abs().sum(-1)


def draft_loss(
    logits_NV: Tensor,
    p_NV: Tensor,
    kind: str = "tv_ce",
    top_N: Tensor | None = None,
    negentropy_N: Tensor | None = None,
    spare_NV: Tensor | None = None,
    target_N: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each row and its gradient with respect to the fp32 draft logits, which are overwritten.

    top, negentropy: argmax p and sum p log p where they are known.  spare: memory to work in.  target: the text's next
    tokens, which `ce` needs.
    Returns (loss [N], gradient [N, V], TV [N], argmax q [N]).
    """
    best = logits_NV.argmax(-1, keepdim=True)
    if kind == "ce":
        assert target_N is not None
        loss, gradient = data_loss(logits_NV, target_N, spare_NV)
        tv = _tv_of_text(gradient, p_NV, target_N, logits_NV)
        return loss, gradient, tv, best[:, 0]
    top = p_NV.argmax(-1, keepdim=True) if top_N is None else top_N[:, None]
    if kind in WITH_ENTROPY:
        if negentropy_N is None:
            negentropy_N = torch.special.xlogy(p_NV, p_NV).sum(-1)
        log_q = torch.log_softmax(logits_NV, dim=-1, out=spare_NV)
        kl = negentropy_N - dot(p_NV, log_q)
        if kind == "lk":
            return *_lk(kl, log_q, p_NV, top, logits_NV), best[:, 0]
        gradient = log_q.exp_().sub_(p_NV)
        return kl, gradient, 0.5 * gradient.norm(p=1, dim=-1), best[:, 0]
    gap = (logits_NV.gather(-1, best) - logits_NV.gather(-1, top))[:, 0]
    q = torch.softmax(logits_NV, dim=-1, out=spare_NV)
    sign = torch.sub(q, p_NV, out=logits_NV)
    tv = 0.5 * sign.norm(p=1, dim=-1)
    mean = dot(sign.sign_(), q)[:, None]
    if kind == "tv":
        return tv, sign.sub_(mean).mul_(q).mul_(0.5), tv, best[:, 0]
    ce = gap - q.gather(-1, best)[:, 0].log()
    # .45 q (s - <s, q>) + .1 (q - onehot)
    gradient = sign.mul_(TV_SHARE / 2).add_((1 - TV_SHARE) - TV_SHARE / 2 * mean).mul_(q)
    gradient.scatter_add_(-1, top, torch.full_like(top, -(1 - TV_SHARE), dtype=gradient.dtype))
    return TV_SHARE * tv + (1 - TV_SHARE) * ce, gradient, tv, best[:, 0]


def _lk(
    kl_N: Tensor, log_q_NV: Tensor, p_NV: Tensor, top_N1: Tensor, spare_NV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient, TV); log_q and spare are overwritten."""
    ce = -log_q_NV.gather(-1, top_N1)[:, 0]
    q = log_q_NV.exp_()
    gap = torch.sub(q, p_NV, out=spare_NV)
    tv = 0.5 * gap.norm(p=1, dim=-1)
    lam = torch.exp(-0.5 * (1 - tv))
    sign = gap.sign()
    mean = dot(sign, q)[:, None]
    # lam (q - p) + (1 - lam) / 2 q (s - <s, q>) + q - onehot
    slope = sign.sub_(mean).mul_(0.5 * (1 - lam)[:, None]).add_(1.0).mul_(q)
    gradient = gap.mul_(lam[:, None]).add_(slope)
    gradient.scatter_add_(-1, top_N1, gradient.new_full(top_N1.shape, -1.0))
    return lam * kl_N + (1 - lam) * tv + ce, gradient, tv


def _tv_of_text(gradient_NV: Tensor, p_NV: Tensor, target_N: Tensor, spare_NV: Tensor) -> Tensor:
    """[N] TV(p, q) of a cross-entropy's gradient, q - onehot; spare is overwritten."""
    gap = torch.sub(gradient_NV, p_NV, out=spare_NV)
    gap.scatter_add_(-1, target_N[:, None], gap.new_ones(len(target_N), 1))
    return 0.5 * gap.norm(p=1, dim=-1)


def data_loss(logits_NV: Tensor, target_N: Tensor, spare_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy to the data and its gradient: (loss [N], gradient [N, V]).  spare: memory for the gradient."""
    log_q = torch.log_softmax(logits_NV, dim=-1, out=spare_NV)
    loss = -log_q.gather(-1, target_N[:, None]).squeeze(-1)
    gradient = log_q.exp_()
    gradient.scatter_add_(-1, target_N[:, None], gradient.new_full((len(target_N), 1), -1.0))
    return loss, gradient


def dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    """[N] inner products, without a tensor of all the products."""
    return torch.bmm(a_NV[:, None], b_NV[:, :, None])[:, 0, 0]
