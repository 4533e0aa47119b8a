"""Let the base write the responses itself: drafts are judged against the base, so its own text trains them best.

The prompt of a document is what stands before its first response token; plain text keeps a random first part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from retrofit.recipes.blocks import document_rng
from retrofit.recipes.data import Document
from retrofit.runtime.engine import Engine

BATCH = 64
"""Requests that are generated together."""
SHORTEST_PROMPT = 8


def regenerate(
    documents: Iterable[Document],
    engine: Engine,
    temperature: float,
    seed: int,
    epoch: int,
    max_length: int,
    passed: int = 0,
) -> Iterator[Document]:
    """Each document with its response written anew by `ar` at `temperature`, as long as it was, ids unchanged.

    The first `passed` ones are only counted by the caller; most come as they are, so as not to be generated again.
    """
    source = iter(documents)
    while chunk := list(islice(source, BATCH)):
        prompts = [_prompt_length(document, seed, epoch) for document in chunk]
        kept = [(d, n) for d, n in zip(chunk, prompts, strict=True) if 0 < n < min(len(d.tokens), max_length)]
        # Requests of one batch end together when they are equally long.
        kept.sort(key=lambda pair: len(pair[0].tokens) - pair[1])
        if len(kept) <= passed:
            passed -= len(kept)
            yield from (document for document, _ in kept)
            continue
        passed = 0
        results = engine.generate(
            [list(d.tokens[:n]) for d, n in kept],
            mode="ar",
            temperature=temperature,
            max_new_tokens=max((min(len(d.tokens), max_length) - n for d, n in kept), default=1),
            seed=[int(document_rng(seed, epoch, d.id).integers(1 << 31)) for d, _ in kept],
            batch_size=BATCH,
        )
        for (document, n), result in zip(kept, results, strict=True):
            response = result.tokens[: min(len(document.tokens), max_length) - n]
            yield Document(document.id, (*document.tokens[:n], *response), (False,) * n + (True,) * len(response))


def _prompt_length(document: Document, seed: int, epoch: int) -> int:
    """Tokens before the first response token; of plain text a random part up to one half."""
    first = int(np.argmax(document.response)) if any(document.response) else 0
    if first or len(document.tokens) <= 2 * SHORTEST_PROMPT:
        return first or len(document.tokens) // 2
    return int(document_rng(seed, epoch, document.id).integers(SHORTEST_PROMPT, len(document.tokens) // 2))
