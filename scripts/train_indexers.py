"""Sparse attention learned as DeepSeek 3.2 learned it: dense at first, while indexers learn what attention looks at.

    steps before `dense`    every row sees all; each indexer's scores come closer to the mean weights of its layer's
                            heads (KL), which moves the indexer alone
    steps from then on      a row sees what its indexer picks, and indexers stay as they are

Their own code names the best keys without a gradient, so the scores are written out here once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb


def dense_at_first(model: PreTrainedModel, batches: Iterator[Tensor], dense: int) -> Iterator[Tensor]:
    """The batches; as they are taken, the model (eager attention) turns from dense to sparse before number `dense`."""
    attentions = [m for m in model.modules() if isinstance(getattr(m, "indexer", None), nn.Module)]
    picked = {attention.indexer: attention.indexer.index_topk for attention in attentions}
    hooks = [attention.register_forward_hook(_learn, with_kwargs=True) for attention in attentions]
    for indexer in picked:
        indexer.index_topk = model.config.max_position_embeddings
    for number, batch in enumerate(batches):
        if number == dense:
            for indexer, most in picked.items():
                indexer.index_topk = most
            for hook in hooks:
                hook.remove()
        yield batch


def _learn(attention: nn.Module, _: Any, named: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
    """Gradients of one layer's indexer; its inputs have none, so nothing else is moved."""
    if not torch.is_grad_enabled():
        return
    weights_BHTT = output[1].detach()
    with torch.no_grad():
        hidden = named["hidden_states"]
        residual = attention.q_a_layernorm(attention.q_a_proj(hidden))
    scores = index_scores(attention.indexer, hidden.detach(), residual, named["position_embeddings"])
    hidden_keys = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
    log_share = scores.masked_fill(hidden_keys, -1e30).log_softmax(-1)
    F.kl_div(log_share, weights_BHTT.mean(1), reduction="none").sum(-1).mean().backward()


def index_scores(indexer: nn.Module, hidden_BTC: Tensor, residual: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """[B, T, T] by which an indexer picks, as its `forward` makes them."""
    widths = [indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim]
    q = indexer.wq_b(residual).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    k = indexer.k_norm(indexer.wk(hidden_BTC)).unsqueeze(2)
    q_turned, q_plain = q.split(widths, -1)
    k_turned, k_plain = k.split(widths, -1)
    q_turned, k_turned = apply_rotary_pos_emb(q_turned, k_turned, *rotation, unsqueeze_dim=2)
    q, k = torch.cat([q_turned, q_plain], -1), torch.cat([k_turned, k_plain], -1)[:, :, 0]
    scores = F.relu(torch.einsum("bthd,bsd->bths", q, k) * indexer.softmax_scale)
    return torch.einsum("bth,bths->bts", indexer.weights_proj(hidden_BTC) * indexer.n_heads**-0.5, scores)
