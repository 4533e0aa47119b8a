"""What training would see of a source: counts and lengths of its documents, and the draft blocks of one of them.

Not here: reading (`text/documents.py`), and how it is shown (`retrofit/cli/data.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.sources import document_rng
from retrofit.recipes.text.windows import cut
from retrofit.recipes.training.blocks import BlockBatch, add_sequence, choose_anchors, eligible_anchors, shares

PERCENTILES = (5, 25, 50, 75, 95)


class _Counts:
    """Of one source."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.responses = self.cut = self.windows = self.dropped = self.anchors = self.unusable = self.to_answer = 0

    def add(self, document: Document, recipe: Recipe) -> None:
        self.lengths.append(len(document.tokens))
        self.responses += sum(document.response)
        every, kept = [document], [document]
        if document.to_answer:
            self.to_answer += 1
        else:
            every = list(cut(document, recipe.data.max_length, recipe.data.lengths, recipe.train.seed))
            kept = [window for window in every if any(window.response)]
        self.windows += len(kept)
        self.dropped += len(every) - len(kept)
        self.cut += len(every) > 1
        anchors = sum(len(eligible_anchors(window.response)) for window in kept)
        self.anchors += anchors
        self.unusable += anchors == 0 and not document.to_answer

    def report(self) -> dict[str, Any]:
        tokens = sum(self.lengths)
        found = np.percentile(self.lengths or [0], PERCENTILES).round().astype(int).tolist()
        return {
            "documents": len(self.lengths),
            "tokens": tokens,
            "response_tokens": self.responses,
            "lengths": {
                "min": min(self.lengths, default=0),
                **{f"p{rank}": value for rank, value in zip(PERCENTILES, found, strict=True)},
                "max": max(self.lengths, default=0),
                "mean": round(tokens / max(1, len(self.lengths)), 1),
            },
            "cut": self.cut,
            "windows": self.windows,
            "dropped_windows": self.dropped,
            "unusable": self.unusable,
            "anchors": self.anchors,
            "to_answer": self.to_answer,
        }


def survey(documents: Iterable[Document], recipe: Recipe) -> dict[str, Any]:
    """Statistics of documents, and for a mixture of each source.

    cut: documents longer than their first window; dropped_windows: without a response token; unusable: documents on
    which no draft block can hang; anchors: places for one; to_answer: documents that the base is to answer first, each
    counted as it stands now.  Of a source, `weight` is its share of the documents of
    training and `token_share` what part of the tokens that makes.
    """
    whole, sources = _Counts(), {}
    if not isinstance(recipe.data.source, str):
        sources = {one.source: _Counts() for one in recipe.data.source}
    for document in documents:
        whole.add(document, recipe)
        if sources:
            sources[document.source].add(document, recipe)
    report = whole.report()
    if sources:
        reports = {name: counts.report() for name, counts in sources.items()}
        weights = dict.fromkeys(sources, 0.0)
        for one in recipe.data.source:
            weights[one.source] += one.weight  # type: ignore[union-attr]
        total = sum(weights.values())
        flow = {name: weights[name] / total * found["lengths"]["mean"] for name, found in reports.items()}
        report["sources"] = {
            name: {
                "weight": round(weights[name] / total, 4),
                "token_share": round(flow[name] / max(sum(flow.values()), 1e-9), 4),
                **found,
            }
            for name, found in reports.items()
        }
    return report


def draft_blocks(document: Document, recipe: Recipe, vocab: int) -> list[dict[str, Any]]:
    """The draft blocks that training hangs on a document in its first epoch: those at anchors drawn uniformly.

    Each has its anchor, its first position, its inputs (None is the mask vector), and what each of its drafting rows
    has to predict (None: nothing, as beyond the end or where no response stands).
    """
    layout = DraftLayout(**recipe.draft.model_dump())
    batch = BlockBatch(layout, vocab)
    rng = document_rng(recipe.train.seed, 0, document.id)
    count = shares(recipe.train.anchors, recipe.objective.diffusion_share, layout.block)[0]
    anchors = choose_anchors(eligible_anchors(document.response), count, rng).tolist()
    add_sequence(batch, document.tokens, document.response, anchors, 0, rng, vocab, False)
    before = 1 if layout.anchored else 0
    return [
        {
            "anchor": block.start - before,
            "start": block.start,
            "inputs": [None if token == MASK else int(token) for token in block.inputs],
            "targets": [int(t) if counts else None for t, counts in zip(target, eligible, strict=True)],
        }
        for block, target, eligible in zip(batch.sequences[0], batch.target, batch.eligible, strict=True)
    ]
