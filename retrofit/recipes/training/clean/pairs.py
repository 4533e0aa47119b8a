"""What the Markov head begins with: what the base itself expects behind a token, on average.

A draft row does not see the token to its left, only the Markov head does.  Let h(t) be the mean of the base's last
hidden states at the text's tokens t, beyond their mean over all tokens, and W the vocabulary head.  The head begins as
the best product W1 W2^T of its rank to h W^T, the base's mean logits behind t beyond those behind any token; a token
that the text does not have begins with nothing.  Found from two matrices of the hidden size:

    G = sum over tokens of n(t) h(t)^T h(t),  M = W^T W,  G^1/2 M^1/2 = U S V^T
    W1 = h G^-1/2 U S^1/2,                    W2 = W M^-1/2 V S^1/2

Only tokens that the text has are held, and the vocabulary's rows are read in pieces: of a large model either matrix
would be gigabytes in fp32.  Shapes: V vocabulary, H hidden, r rank, n tokens that the text has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

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
PIECE = 1 << 13
"""Rows of the vocabulary's projection that are read at once."""


@dataclass(frozen=True)
class Vocabulary:
    """By how much each logit changes with a hidden state."""

    weight_VH: Tensor
    scale: float

    @cached_property
    def middle(self) -> Tensor:
        """[H] what all change by."""
        return torch.stack([piece.sum(0) for piece in self._pieces()]).sum(0) / len(self.weight_VH)

    def pieces(self) -> Iterator[Tensor]:
        """fp32 [PIECE or fewer, H] of all rows in turn, beyond what all change by; soft caps are left out."""
        yield from (piece - self.middle for piece in self._pieces())

    def _pieces(self) -> Iterator[Tensor]:
        yield from (piece.float() * self.scale for piece in self.weight_VH.split(PIECE))


@torch.no_grad()
def begin_with_pairs(heads: Heads, backend: HFBackend, documents: Sequence[Document]) -> None:
    """Fill the Markov head; it stays as it is where there is no text, or no plain projection to the vocabulary."""
    documents = [document for document in documents if len(document.tokens) > 1]
    if documents and heads.markov_w1 is not None:
        fill(heads, vocabulary(backend.head), mean_hidden(*hidden_states(backend, documents)))


def hidden_states(backend: HFBackend, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """(tokens [N], the base's last hidden states at them [N, H]) of all but the first of each document, which sees
    nothing before it."""
    seen = torch.cat([torch.tensor(document.tokens[1:], device=backend.device) for document in documents])
    return seen, torch.cat([clean_forward(backend, [document])[1][1:].float() for document in documents])


@torch.no_grad()
def fill(heads: Heads, projection: Vocabulary | None, means: tuple[Tensor, Tensor, Tensor]) -> None:
    """Put the best product into the head; means: as `mean_hidden` gives them."""
    if heads.markov_w1 is None or heads.markov_w2 is None or projection is None:
        return
    tokens_n, mean_nH, count_n = means
    first, second = factors(mean_nH, count_n, projection, heads.markov_w1.shape[1])
    heads.markov_w1.zero_()[tokens_n, : first.shape[1]] = first
    heads.markov_w2.zero_()[:, : second.shape[1]] = second


def mean_hidden(seen: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [n] that the text has, [n, H] last hidden state at each beyond the mean over all, [n] how often)."""
    tokens_n, place, count = torch.unique(seen, return_inverse=True, return_counts=True)
    total_nH = hidden.new_zeros(len(tokens_n), hidden.shape[1]).index_add_(0, place, hidden)
    count_n = count.float()
    return tokens_n, (total_nH - count_n[:, None] * hidden.mean(0)) / (count_n + PRIOR)[:, None], count_n


def vocabulary(head: VocabHead) -> Vocabulary | None:
    """None where other layers stand before the projection, as in BERT's family."""
    if head.project is not head.linear or head.before is not None:
        return None
    linear = head.linear
    weight_VH = linear.held.dense(torch.float32) if isinstance(linear, QuantisedLinear) else linear.weight
    assert isinstance(weight_VH, Tensor)
    return Vocabulary(weight_VH.detach(), head.scale)


def factors(mean_nH: Tensor, count_n: Tensor, projection: Vocabulary, rank: int) -> tuple[Tensor, Tensor]:
    """(W1 [n, r], W2 [V, r]) of the best product of this rank, where tokens count as often as they were seen.

    The rows of W1 are 1 long on average, as those of an untrained head; of a rank beyond H less comes back.
    """
    weighted = mean_nH * count_n.sqrt()[:, None]
    left, left_inverse = _roots(weighted.T @ weighted)
    right, right_inverse = _roots(sum((piece.T @ piece for piece in projection.pieces()), torch.zeros(())))
    u, s, vt = torch.linalg.svd(left @ right)
    root = s[:rank].sqrt()
    first = mean_nH @ (left_inverse @ u[:, :rank] * root).float()
    mixed = (right_inverse @ vt[:rank].T * root).float()
    second = torch.cat([piece @ mixed for piece in projection.pieces()])
    length = first.norm(dim=1).mean().clamp(min=1e-12)
    return first / length, second * length


def _roots(matrix_HH: Tensor) -> tuple[Tensor, Tensor]:
    """(square root, its pseudo-inverse) of a symmetric matrix, in fp64."""
    values, vectors = torch.linalg.eigh(matrix_HH.double())
    kept = values > TINY * values[-1]
    root = values.clamp(min=0).sqrt()
    inverse = torch.where(kept, 1 / root.clamp(min=1e-300), 0.0)
    return (vectors * (root * kept)) @ vectors.T, (vectors * inverse) @ vectors.T
