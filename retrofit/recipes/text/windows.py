"""Documents cut into windows, which are what training runs: of one length, or of several mixed.

    data.max_length: 8192, a document of 13,000 tokens    8192 | 4808
    data.lengths: [512, 2048, 8192]                       2048 | 512 | 8192 | 2048 | 200    (say)

A window is a context of its own: its positions begin at 0.  Each has as many draft blocks as any other, wherever in it
they fall, so the mix of lengths is the mix of contexts that the drafter learns.  It is drawn anew in every epoch, keyed
by (seed, epoch, document id): neither packing, nor how many processes there are, nor an interruption changes it.
Not here: reading documents (`documents.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice

from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.sources import document_rng


def windows(
    documents: Iterable[Document], max_length: int, lengths: Sequence[int] = (), seed: int = 0, epoch: int = 0
) -> Iterator[Document]:
    """The windows of each document that teach something: those with a response token.  The others are as in `cut`.

    A document that the base has to answer first is one window, however long: it is its answers that are limited.
    """
    for document in documents:
        if document.to_answer:
            yield replace(document, id=f"{document.id}#0")
        else:
            yield from (window for window in cut(document, max_length, lengths, seed, epoch) if any(window.response))


def first_windows(documents: Iterable[Document], max_length: int, count: int) -> Iterator[Document]:
    """The first window of each document that has one, `count` at most: what is measured on."""
    firsts = (next(windows([document], max_length), None) for document in documents)
    return islice((window for window in firsts if window is not None), count)


def cut(
    document: Document, max_length: int, lengths: Sequence[int] = (), seed: int = 0, epoch: int = 0
) -> Iterator[Document]:
    """A document in consecutive windows of at most `max_length` tokens, ids `<id>#0`, `<id>#1`, ...

    lengths: what each window's length is drawn from instead, one as likely as the other.
    """
    rng = document_rng(seed, epoch, document.id) if lengths else None
    start = number = 0
    while start < len(document.tokens):
        stop = start + (max_length if rng is None else int(rng.choice(lengths)))
        tokens, response = document.tokens[start:stop], document.response[start:stop]
        yield replace(document, id=f"{document.id}#{number}", tokens=tokens, response=response)
        start, number = stop, number + 1
