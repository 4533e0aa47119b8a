"""Which documents a batch holds: endless, shuffled, and taken up again exactly where a checkpoint left it.

Documents go through a buffer out of which batches are drawn at random.  A `Place` is all that decides what comes
next: how far the source was read, what lies in the buffer, and the generator's state.
Not here: where documents come from, anchors and masks (those are keyed by the document and need no place).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import DataError, UsageError
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.blocks import teaches
from retrofit.recipes.training.checkpoint import RESTART

SHUFFLE_BUFFER = 256
"""Windows held for shuffling; documents come in random order already."""

Batch = list[tuple[Document, int]]
"""Documents, each with its epoch."""


@dataclass(frozen=True)
class Place:
    """Between two batches: `taken` documents of `epoch` were read, `digest` is a hash over them."""

    epoch: int
    taken: int
    digest: str
    generator: dict[str, Any]
    buffer: Batch

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """As JSON and tensors."""
        documents = [[d.id, epoch, len(d.tokens), d.source, d.where] for d, epoch in self.buffer]
        tokens = np.fromiter((t for d, _ in self.buffer for t in d.tokens), dtype=np.int64)
        response = np.fromiter((r for d, _ in self.buffer for r in d.response), dtype=np.uint8)
        plain = {
            "epoch": self.epoch,
            "taken": self.taken,
            "digest": self.digest,
            "generator": self.generator,
            "buffer": documents,
        }
        return plain, {"tokens": torch.from_numpy(tokens), "response": torch.from_numpy(response)}

    @classmethod
    def unpack(cls, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Place:
        tokens, response = tensors["tokens"].tolist(), tensors["response"].bool().tolist()
        buffer, first = [], 0
        for name, epoch, length, source, where in plain["buffer"]:
            span = slice(first, first + length)
            document = Document(name, tuple(tokens[span]), tuple(response[span]), source, where)
            buffer.append((document, epoch))
            first += length
        return cls(plain["epoch"], plain["taken"], plain["digest"], plain["generator"], buffer)


class Order:
    """Endless batches; documents that teach nothing are passed over, too short for a block of `layout` maybe.

    epochs(epoch) gives the documents of an epoch, always the same in the same order.
    `whole`: all their tokens come from the text, so a change of it is noticed by them; else only by the prompts, for
    responses that have to be generated once more, on another machine maybe, need not be the same to the last token.
    first: the epoch to begin with.
    """

    def __init__(
        self,
        epochs: Callable[[int], Iterator[Document]],
        batch_size: int,
        seed: int,
        *,
        layout: DraftLayout,
        whole: bool = True,
        first: int = 0,
    ):
        self._epochs, self._batch_size, self._layout, self._whole = epochs, batch_size, layout, whole
        self._generator = np.random.default_rng([seed, 0x5EED])
        self._buffer: Batch = []
        self._epoch, self._taken = first, 0
        self._digest = hashlib.sha256()
        self._source = self._stream(None)

    def batch(self) -> Batch:
        """The next batch.  Raises DataError for an epoch that teaches nothing, and what reading the text raises."""
        self._fill()
        batch = []
        for _ in range(self._batch_size):
            pick = int(self._generator.integers(len(self._buffer)))
            self._buffer[pick], last = self._buffer[-1], self._buffer[pick]
            self._buffer.pop()
            batch.append(last)
        return batch

    @property
    def epochs(self) -> int:
        """How many have been begun; what lies in the buffer counts."""
        return self._epoch + 1

    def upcoming(self, tokens: int = 0) -> list[Document]:
        """As many documents as a batch has, or with so many tokens, out of those that come soon; nothing is taken."""
        self._fill()
        count = held = 0
        while count < len(self._buffer) and (count < self._batch_size or held < tokens):
            held += len(self._buffer[count][0].tokens)
            count += 1
        return [document for document, _ in self._buffer[:count]]

    def place(self) -> Place:
        """Where this stands; does not change as batches are drawn."""
        state = dict(self._generator.bit_generator.state)
        return Place(self._epoch, self._taken, self._digest.hexdigest(), state, list(self._buffer))

    def go_to(self, place: Place, *, forced: bool = False) -> None:
        """Stand where `place` was taken.  Raises UsageError when the text is not the same, unless `forced`."""
        source = self._epochs(place.epoch)
        self._digest = hashlib.sha256()
        for _ in range(place.taken):
            document = next(source, None)
            if document is None:
                break
            self._note(document)
        if self._digest.hexdigest() != place.digest and not forced:
            raise UsageError(
                f"the training text is not the one the checkpoint was made with (epoch {place.epoch}, "
                f"the first {place.taken} documents)",
                f"put the text back, go on with the new one by --force-resume, or {RESTART}",
            )
        self._epoch, self._taken, self._buffer = place.epoch, place.taken, list(place.buffer)
        self._generator.bit_generator.state = place.generator
        self._source = self._stream(source)

    def _fill(self) -> None:
        while len(self._buffer) < max(SHUFFLE_BUFFER, self._batch_size):
            self._buffer.append(next(self._source))

    def _stream(self, rest: Iterator[Document] | None) -> Iterator[tuple[Document, int]]:
        """`rest`: what is left of the epoch that this stands in; None begins with the first."""
        documents = self._epochs(self._epoch) if rest is None else rest
        useful = rest is not None
        while True:
            for document in documents:
                self._taken += 1
                self._note(document)
                if teaches(document.response, self._layout):
                    useful = True
                    yield document, self._epoch
            if not useful:
                raise DataError(
                    f"nothing to train: of {self._taken:,} documents of the training text none has a token to draft",
                    "give longer text: a block first drafts a document's third token, or a response's second",
                )
            self._epoch, self._taken, self._digest, useful = self._epoch + 1, 0, hashlib.sha256(), False
            documents = self._epochs(self._epoch)

    def _note(self, document: Document) -> None:
        self._digest.update(document.id.encode() + b"\0")
        read = [t for t, new in zip(document.tokens, document.response, strict=True) if self._whole or not new]
        self._digest.update(np.asarray(read, dtype=np.int64).tobytes())


def describe(batches: Sequence[Batch], anchors: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The documents of accumulation batches as JSON, each with the anchors its blocks hung on."""
    documents = [(number, *entry) for number, batch in enumerate(batches) for entry in batch]
    return [
        {
            "batch": number,
            "document": document.id,
            "where": document.where,
            "epoch": epoch,
            "tokens": list(document.tokens),
            "response": [int(flag) for flag in document.response],
            "anchors": dict(found),
        }
        for (number, document, epoch), found in zip(documents, anchors, strict=True)
    ]
