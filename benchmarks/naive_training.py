"""The training step as one would write it first: what `python -m benchmarks.train` is held against, and tests too.

Same documents, anchors and blocks as `Trainer`, and the same clean forward; from there on plain autograd.  Every draft
row attends through one dense mask over the clean keys and all draft rows of its sequence; a group's draft rows and
their teachers meet the vocabulary all at once; TV, CE, KL, slot weights and BCE are torch operations one after another.
Nothing is done twice or kept longer than this takes: where it is slow, it is because it is straightforward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.heads import Heads
from retrofit.adapters.rows import SequenceRows
from retrofit.recipes.training.blocks import BlockBatch
from retrofit.recipes.training.objective import Sums, Teacher
from retrofit.recipes.training.step import Trainer
from retrofit.runtime.backends.hf.answers import rows_now
from retrofit.runtime.backends.hf.attention import ATTENTION, layer_of
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine


class NaiveTrainer(Trainer):
    """A `Trainer` whose draft rows are run and judged by plain autograd."""

    def _group(self, group: BlockBatch, cache: KVCache, teacher: Teacher, sums: Sums, masked: bool) -> Tensor | None:
        layout, heads, objective = self.attached.layout, self.attached.heads, self.recipe.objective
        with dense_draft_rows():
            hidden = self.backend.run_trunk(self.backend.row_plan(group.rows()), cache)
        drafting = group.rectangle(hidden)[:, layout.first_drafting_row :]
        B, D, H = drafting.shape
        rows = drafting.reshape(B * D, H)
        targets = group.tensors(hidden.device)
        source, previous, target = (targets[name].flatten() for name in ("source", "previous", "target"))
        eligible = targets["eligible"]
        logits = heads.draft_logits(self.backend.head(rows), previous)
        log_q = F.log_softmax(logits, dim=-1)
        if masked:
            weight = torch.where(eligible, targets["weight"], 0.0)
            ce = -log_q.gather(-1, target[:, None]).view(B, D)
            loss = (ce * weight).sum()
            loss.backward()
            sums.diff += float(loss.detach())
            sums.diff_count += int(eligible.sum())
            return None
        with torch.no_grad():
            p = torch.softmax(self.backend.head(teacher.clean[source]).float(), dim=-1)
        q = log_q.exp()
        top = p.argmax(-1)
        tv = 0.5 * (p - q).abs().sum(-1)
        each = draft_term(objective.draft_loss, p, log_q, tv, top, target)
        hit = logits.argmax(-1) == top
        weight = slot_weights(objective.slot_weights, tv.detach().view(B, D), eligible, hit.view(B, D))
        draft = (each.view(B, D) * weight).sum()
        conf = confidence_term(heads, rows.detach(), previous, hit.float(), 1 - tv.detach(), eligible)
        (draft if conf is None else draft + conf).backward()
        add_up(sums, draft, weight, conf, eligible, torch.stack([1 - tv.detach(), hit.float()], -1).view(B, D, 2))
        first = {int(s): n for n, s in enumerate(source.tolist()) if eligible.flatten()[n]}
        where = torch.tensor(list(first.values()), dtype=torch.long, device=p.device)
        sums.ar -= float(p[where, target[where]].log().sum())
        sums.ar_count += len(first)
        return logits.argmax(-1).view(B, D)


def draft_term(kind: str, p: Tensor, log_q: Tensor, tv: Tensor, top: Tensor, target: Tensor) -> Tensor:
    """[N] loss of each row."""
    if kind == "ce":
        return F.nll_loss(log_q, target, reduction="none")
    if kind == "tv":
        return tv
    if kind == "kl":
        return F.kl_div(log_q, p, reduction="none").sum(-1)
    if kind == "lk":
        lam = torch.exp(-0.5 * (1 - tv.detach()))
        kl = F.kl_div(log_q, p, reduction="none").sum(-1)
        return lam * kl + (1 - lam) * tv + F.nll_loss(log_q, top, reduction="none")
    return 0.9 * tv + 0.1 * F.nll_loss(log_q, top, reduction="none")


def slot_weights(kind: str, tv_BD: Tensor, eligible_BD: Tensor, hit_BD: Tensor) -> Tensor:
    """[B, D], from the formulas."""
    D = tv_BD.shape[1]
    if kind == "reached":
        return torch.stack([(eligible_BD & hit_BD)[:, :j].all(1) for j in range(D)], dim=1) * eligible_BD.float()
    if kind == "uniform":
        return eligible_BD.float()
    if kind == "exponential":
        return torch.exp(-torch.arange(D, device=tv_BD.device) / 4.0) * eligible_BD
    a = (0.5 * (1 - tv_BD) + 0.5) * eligible_BD
    weights = []
    for j in range(D):
        tail = torch.cumprod(a[:, j + 1 :], dim=1).sum(1)
        weights.append(a[:, :j].prod(dim=1) * (1 + tail))
    return torch.stack(weights, dim=1) * eligible_BD


def confidence_term(
    heads: Heads, rows: Tensor, previous: Tensor, hit: Tensor, accept: Tensor, eligible: Tensor
) -> Tensor | None:
    confidence = heads.confidence_logits(rows, previous)
    if confidence is None:
        return None
    wanted = torch.stack([hit, accept], dim=-1)
    bce = F.binary_cross_entropy_with_logits(confidence, wanted, reduction="none").sum(-1)
    return (bce * eligible.flatten()).sum()


def add_up(sums: Sums, draft: Tensor, weight: Tensor, conf: Tensor | None, eligible: Tensor, accept: Tensor) -> None:
    sums.draft += float(draft.detach())
    sums.draft_weight += float(weight.sum())
    if conf is not None:
        sums.conf += float(conf.detach())
        sums.conf_count += int(eligible.sum())
    seen = torch.cat([accept, torch.ones_like(accept[..., :1])], -1) * eligible[..., None]
    total = seen.sum(0).double().cpu()
    sums.accept = total if sums.accept.numel() == 0 else sums.accept + total


@contextmanager
def dense_draft_rows() -> Iterator[None]:
    """Let draft rows attend by one call over all there is, and LoRA be plain autograd, for the duration."""
    registered = AttentionInterface._global_mapping
    before = registered[ATTENTION]
    registered[ATTENTION] = dense_attention
    GatedLoraLinear.by_hand = False
    try:
        yield
    finally:
        registered[ATTENTION] = before
        GatedLoraLinear.by_hand = True


def rows_and_gradients(
    engine: Engine, rows: list[SequenceRows], cache: KVCache, weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states of draft rows, and gradients of their squares: by one dense call of attention, and as we train."""
    results = []
    for how in (dense_draft_rows(), nullcontext()):
        with how:
            hidden = engine.backend.run_trunk(engine.backend.row_plan(rows), cache)
        taken = torch.autograd.grad(hidden.square().sum(), list(weights), allow_unused=True)
        results.append([hidden.detach(), *(t for t in taken if t is not None)])
    return results[0], results[1]


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    retrofit_rows: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Draft rows alone: query [1, Hq, N, D], key and value [1, Hkv, N, .] -> [1, N, Hq, Dv]."""
    context = rows_now() if retrofit_rows is None else retrofit_rows
    group = context.plan.draft
    window = context.chunks.get(layer_of(module)) if sliding_window is None else sliding_window
    context.calls.append((layer_of(module), window))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    q, k, v = (group.rectangle(t[0].transpose(0, 1)) for t in (query, key, value))
    clean_k, clean_v = context.cache.read(layer_of(module), group.slots, group.keys)
    k, v = torch.cat([clean_k, k], dim=2), torch.cat([clean_v, v], dim=2)
    mask = context.plan.draft_mask(window, query.dtype)
    if softcap is None and s_aux is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] > k.shape[1])
    else:
        repeats = q.shape[1] // k.shape[1]
        scores = q @ k.repeat_interleave(repeats, 1).transpose(2, 3) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores if mask is None else scores + mask
        if s_aux is not None:
            scores = torch.cat([scores, s_aux[:, None, None].expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)[..., : k.shape[2]]
        out = weights @ v.repeat_interleave(repeats, 1)
    return group.flatten(out)[None], None
