"""What all steps of one `generate` call share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.backends.interface import Backend, Cache
from retrofit.runtime.plan import Cycle, Limits
from retrofit.runtime.prefixes.pieces import Pieces
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing


@dataclass
class Run:
    """One `generate` call: what it runs with, and how it was asked to decode."""

    backend: Backend
    cache: Cache
    params: Processing
    """How tokens are chosen, of all requests; of those that differ, what plans are timed by and trees grown for."""
    layout: DraftLayout
    limits: Limits
    strategy: str = "ar"
    """`ar`, `diffusion`, or the strategy of `self_spec`."""
    cycle: Cycle | None = None
    """The plans of a fixed strategy, for any number of rows; None: `auto`, which chooses, and `diffusion`."""
    threshold: float = 0.9
    """Diffusion: confidence from which a position is filled."""
    tolerance: float = math.inf
    """Diffusion: by how much a token may fall short of the base's own choice, in log-probability, to be kept."""
    with_confidence: bool = False
    mixed: bool = False
    """Whether requests differ in processing or rules, so that rows are processed group by group."""
    ruled: bool = False
    """Whether anything is forbidden or forced in any text."""
    seen: bool = False
    """Whether any text is under a repetition penalty, where they differ."""
    counts: bool = False
    """Whether any text is under a presence or frequency penalty, where they differ."""
    told: bool = False
    """Whether any request asks for log-probabilities."""
    pieces: Pieces | None = None
    """What the engine keeps of finished texts; None: nothing."""

    @property
    def vocab(self) -> int:
        return self.backend.head.vocab

    @property
    def sampled(self) -> bool:
        return self.params.temperature > 0

    def rows_each(self, requests: int) -> int | None:
        """Rows that each of so many requests may have in a forward; None: any number."""
        return None if self.backend.most_rows is None else self.backend.most_rows // requests

    @property
    def warps_only(self) -> bool:
        """Whether all tokens are chosen alike, by nothing but temperature, top-k and top-p, and only they are told."""
        return self.params.warps_only and not (self.mixed or self.ruled or self.told)

    def watch(self, requests: Sequence[Request]) -> None:
        """Keep what penalties and rules need to know of each text: of all where any has them, so that rows line up."""
        seen, counts = self.seen or self.params.needs_seen, self.counts or self.params.needs_counts
        for request in requests:
            if self.ruled:
                request.guarded()
            request.watch(self.vocab, self.backend.device, seen, counts)
