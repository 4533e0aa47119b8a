"""What all steps of one `generate` call share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.backends.interface import Backend, Cache
from retrofit.runtime.plan import Cycle, Limits
from retrofit.runtime.request import Request
from retrofit.runtime.rules.processors import Rules
from retrofit.runtime.rules.sampling import SamplingParams


@dataclass
class Run:
    """One `generate` call: what it runs with, and how it was asked to decode."""

    backend: Backend
    cache: Cache
    params: SamplingParams
    layout: DraftLayout
    limits: Limits
    strategy: str = "ar"
    """`ar`, `diffusion`, or the strategy of `self_spec`."""
    cycle: Cycle | None = None
    """The plans of a fixed strategy, for any number of rows; None: `auto`, which chooses, and `diffusion`."""
    threshold: float = 0.9
    """Diffusion: confidence from which a position is committed."""
    with_confidence: bool = False
    rules: Rules | None = None
    """What the base's own settings forbid and force; None: nothing."""

    @property
    def vocab(self) -> int:
        return self.backend.head.vocab

    @property
    def sampled(self) -> bool:
        return self.params.temperature > 0

    def rows_each(self, requests: int) -> int | None:
        """Rows that each of so many requests may have in a forward; None: any number."""
        return None if self.backend.most_rows is None else self.backend.most_rows // requests

    def watch(self, requests: Sequence[Request]) -> None:
        """Keep what a repetition penalty and the base's rules need to know of each text."""
        for request in requests:
            if self.rules is not None:
                request.guarded(self.rules)
        if self.params.repetition_penalty not in (None, 1.0):
            for request in requests:
                request.watch(self.vocab, self.backend.device)
