"""The clean forward: the base rows of a batch without gradient, in pieces, so that memory is linear in their number.

    documents of 8000, 300 and 500 tokens
    piece 1    300, 500            short documents together, as one rectangle of rows
    piece 2    8000: 0 .. 499      of a long one a part after the other, each over the K/V of those before
    piece 3    8000: 500 .. 999    and so on

What is kept of every row are its K/V, its last hidden state, and what recurrent layers need to make the state behind it
(`recurrent/anchors.py`); all else is forgotten from piece to piece.
Not here: what trains on it (`step.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from retrofit.adapters.rows import SequenceRows
from retrofit.recipes.text.documents import Document
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.recurrent.anchors import Record
from retrofit.runtime.backends.sizes import size_for

PIECE_ROWS = {"cpu": 1 << 11, "cuda": 1 << 14}
"""Rows of a piece, at most: enough that products do not wait for weights to be read."""
PIECE_MASK = {"cpu": 1 << 22, "cuda": 1 << 28}
"""Rows of a part of a longer document times its tokens, at most: on a CPU one mask of that serves all layers."""

Part = tuple[int, int, int]
"""Number of a document, and its rows: first, and behind the last."""


def clean_forward(backend: HFBackend, documents: Sequence[Document], forwards: int = 0) -> tuple[KVCache, Tensor]:
    """K/V of every layer and the last hidden states [P, H] of all documents' base rows, without gradient.

    forwards: how many are run at least, where processes have to run as many as each other; the first piece, which
    begins its documents, is then computed again.
    """
    lengths = [len(document.tokens) for document in documents]
    firsts = [sum(lengths[:number]) for number in range(len(lengths))]
    cache = KVCache(len(documents), max(lengths))
    pieces = pieces_of(lengths, backend.device)
    pieces += pieces[:1] * (forwards - len(pieces))
    if backend.recurrent:
        cache.states.record = Record(len(documents), max(lengths))
    hidden: Tensor | None = None
    with torch.no_grad():
        for piece in pieces:
            rows = [
                SequenceRows(n, start, documents[n].tokens[start:stop], last_logits_only=True)
                for n, start, stop in piece
            ]
            found = backend.run_trunk(backend.row_plan(rows), cache)
            hidden = found.new_empty(sum(lengths), found.shape[1]) if hidden is None else hidden
            for (n, start, stop), part in zip(piece, found.split([len(r.tokens) for r in rows]), strict=True):
                hidden[firsts[n] + start : firsts[n] + stop] = part
    assert hidden is not None
    return cache, hidden


def pieces_of(lengths: Sequence[int], device: torch.device, multiple: int = 1) -> list[list[Part]]:
    """The parts of documents of these lengths that each forward computes, shortest documents first.

    What counts is the rectangle that attention makes of a piece: its documents times the longest of them.  multiple:
    parts of a longer document begin at multiples of so many tokens.
    """
    most = size_for(PIECE_ROWS, device)
    pieces: list[list[Part]] = []
    together: list[Part] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        length = lengths[number]
        if length > most:
            rows = max(1, min(most, size_for(PIECE_MASK, device) // length))
            rows = max(rows // multiple, 1) * multiple
            pieces += [[(number, start, min(start + rows, length))] for start in range(0, length, rows)]
            continue
        if together and (len(together) + 1) * length > most:
            pieces.append(together)
            together = []
        together.append((number, 0, length))
    return [together, *pieces] if together else pieces
