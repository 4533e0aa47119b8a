"""What the Markov head begins with: what the base itself expects behind a token, on average.

A draft row does not see the token to its left, only the Markov head does.  Let h(t) be the mean of the base's last
hidden states at the text's tokens t, beyond their mean over all tokens, and W the vocabulary head.  The head begins as
the best product W1 W2^T of its rank to h W^T, the base's mean logits behind t beyond those behind any token; a token
that the text does not have begins with nothing.  Found from two matrices of the hidden size:

    G = sum over tokens of n(t) h(t)^T h(t),  M = W^T W,  G^1/2 M^1/2 = U S V^T
    W1 = h G^-1/2 U S^1/2,                    W2 = W M^-1/2 V S^1/2

Shapes: V vocabulary, H hidden, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.quantised.linear import QuantisedLinear
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.runtime.backends.hf.backend import HFBackend, VocabHead

TOKENS = 1 << 14
"""Of text that are read for it, about: as many as a few steps train on."""
PRIOR = 1.0
"""Occurrences that the mean over all tokens counts for with each: what was seen once says little."""
TINY = 1e-6
"""Directions with less than this part of the largest one's weight are left out."""


@torch.no_grad()
def begin_with_pairs(heads: Heads, backend: HFBackend, documents: Sequence[Document]) -> None:
    """Fill the Markov head; it stays as it is where there is no text, or no plain projection to the vocabulary."""
    weight_VH = vocabulary(backend.head)
    if heads.markov_w1 is None or heads.markov_w2 is None or weight_VH is None or not documents:
        return
    mean_VH, count_V = mean_hidden(backend, documents, heads.vocab)
    first, second = factors(mean_VH, count_V, weight_VH, heads.markov_w1.shape[1])
    heads.markov_w1.zero_()[: len(first), : first.shape[1]] = first
    heads.markov_w2.zero_()[:, : second.shape[1]] = second


def mean_hidden(backend: HFBackend, documents: Sequence[Document], vocab: int) -> tuple[Tensor, Tensor]:
    """([V, H] last hidden state at each token, beyond the mean over all of them, [V] how often it was seen)."""
    total_VH, count_V = None, torch.zeros(vocab, device=backend.device)
    for document in documents:
        tokens = torch.tensor(document.tokens, device=backend.device)[1:]  # the first sees nothing before it
        hidden = clean_forward(backend, [document])[1][1:].float()
        total_VH = hidden.new_zeros(vocab, hidden.shape[1]) if total_VH is None else total_VH
        total_VH.index_add_(0, tokens, hidden)
        count_V.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float32))
    assert total_VH is not None
    middle = total_VH.sum(0) / count_V.sum().clamp(min=1)
    return (total_VH - count_V[:, None] * middle) / (count_V + PRIOR)[:, None], count_V


def vocabulary(head: VocabHead) -> Tensor | None:
    """[V, H] by how much each logit changes with a hidden state, beyond what all change by; soft caps are left out.

    None where other layers stand before the projection, as in BERT's family.
    """
    if head.project is not head.linear or head.before is not None:
        return None
    linear = head.linear
    weight_VH = linear.held.dense(torch.float32) if isinstance(linear, QuantisedLinear) else linear.weight
    assert isinstance(weight_VH, Tensor)
    weight_VH = weight_VH.detach().float() * head.scale
    return weight_VH - weight_VH.mean(0)


def factors(mean_VH: Tensor, count_V: Tensor, weight_VH: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(W1 [V, r], W2 [V, r]) of the best product of this rank, where tokens count as often as they were seen.

    The rows of W1 are 1 long on average, as those of an untrained head; of a rank beyond H less comes back.
    """
    weighted = mean_VH * count_V.sqrt()[:, None]
    left, left_inverse = _roots(weighted.T @ weighted)
    right, right_inverse = _roots(weight_VH.T @ weight_VH)
    u, s, vt = torch.linalg.svd(left @ right)
    root = s[:rank].sqrt()
    first = mean_VH @ (left_inverse @ u[:, :rank] * root).float()
    second = weight_VH @ (right_inverse @ vt[:rank].T * root).float()
    length = first[count_V > 0].norm(dim=1).mean().clamp(min=1e-12)
    return first / length, second * length


def _roots(matrix_HH: Tensor) -> tuple[Tensor, Tensor]:
    """(square root, its pseudo-inverse) of a symmetric matrix, in fp64."""
    values, vectors = torch.linalg.eigh(matrix_HH.double())
    kept = values > TINY * values[-1]
    root = values.clamp(min=0).sqrt()
    inverse = torch.where(kept, 1 / root.clamp(min=1e-300), 0.0)
    return (vectors * (root * kept)) @ vectors.T, (vectors * inverse) @ vectors.T
