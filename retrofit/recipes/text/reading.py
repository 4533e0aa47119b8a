"""The text of one conversion: the windows it trains on, epoch by epoch, and those it is measured on.

They are what the recipe's `data` says, with the base's own responses where it wants those.
Not here: in which order windows come into batches (`training/order.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from retrofit.adapters.attach import Attached
from retrofit.hub import Base
from retrofit.recipes.processes import Processes
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.documents import Document, documents
from retrofit.recipes.text.faults import Skipped
from retrofit.recipes.text.regenerate import ResponseCache, regenerate, weights_key
from retrofit.recipes.text.sources import Part
from retrofit.recipes.text.windows import first_windows, windows
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.engine import Engine

Rewriter = Callable[[Iterable[Document]], Iterator[Document]]


@dataclass(frozen=True)
class Text:
    """What a recipe's `data` means for a base; `text_of` makes it.

    rewritten: documents with the base's own responses, or as they are.
    """

    plan: Recipe
    base: Base
    vocab: int
    offline: bool
    skipped: Skipped | None
    rewritten: Rewriter

    def epoch(self, number: int) -> Iterator[Document]:
        """Training windows of an epoch, always the same in the same order."""
        data, seed = self.plan.data, self.plan.train.seed
        read = self._read("train", seed + number)
        return self.rewritten(windows(read, data.max_length, data.lengths, seed, number))

    def held_out(self, most: int) -> list[Document]:
        """First windows of held-out documents, at most so many; errors in the data show here, before training."""
        if self.plan.data.held_out == 0:
            return []
        return list(self.rewritten(first_windows(self._read("held_out"), self.plan.data.max_length, most)))

    def _read(self, part: Part, seed: int = 0) -> Iterator[Document]:
        return documents(
            self.plan.data, self.base.tokenizer,
            part=part, seed=seed, skipped=self.skipped, vocab=self.vocab, offline=self.offline,
        )  # fmt: skip


def text_of(
    plan: Recipe,
    base: Base,
    attached: Attached,
    backend: HFBackend,
    *,
    offline: bool = False,
    quiet: bool = False,
    skipped: Skipped | None = None,
    processes: Processes | None = None,
) -> Text:
    """The text of a conversion of `base`, which writes the responses itself where the recipe wants that."""
    rewritten: Rewriter = iter
    if plan.data.responses == "regenerate":
        is_main = processes is None or processes.is_main
        rewritten = partial(
            regenerate,
            engine=Engine(backend, attached.layout, base.tokenizer, attached=attached),
            temperature=plan.data.temperature,
            seed=plan.train.seed,
            max_length=plan.data.max_length,
            max_new_tokens=plan.data.max_new_tokens,
            cache=ResponseCache(weights_key(attached), plan.data.temperature, backend.eos) if is_main else None,
            quiet=quiet,
            processes=processes,
            skipped=skipped,
        )
    return Text(plan, base, attached.heads.vocab, offline, skipped, rewritten)
