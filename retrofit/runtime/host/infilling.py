"""Fill the gap between two texts: gaps of several lengths are denoised, and the base says which is likeliest.

    position      0 .. p-1 | p     p+1 .. p+g   p+g+1 ..
    base rows     prefix   |
    a gap block            | seed  M  ..  M     suffix      draft rows: every row sees the prefix and the whole block
    judged by     prefix   | seed  filled       suffix      base rows: log p of what is filled and of the suffix

The suffix goes in as known rows of the block, at their true places and with the adapter on: base rows never see it, so
whatever the adapter does, they are the original's.  All lengths are blocks of one forward.  What is filled in each, and
what the base would have written without seeing the suffix, cut to the same lengths, are judged alike, and as texts
of different length with the same end they compare.
Not here: `Engine.infill`, which this is; the command line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.errors import UsageError
from retrofit.runtime.asking import ENCODING
from retrofit.runtime.backends.interface import Backend, Cache, Output
from retrofit.runtime.host.diffusion import best_of_slot
from retrofit.runtime.options import whole
from retrofit.runtime.plan import Limits
from retrofit.runtime.prompts import Prompt, encode
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.run import Run
from retrofit.runtime.text import Detokenizer

JUDGED = 24
"""Tokens of the suffix that a filled gap is judged by, at most."""
CERTAIN = 0.9
"""Confidence from which a slot of a gap is filled in beside the surest."""


class Model(Protocol):
    """What an engine has that filling a gap needs."""

    backend: Backend
    layout: DraftLayout
    limits: Limits
    tokenizer: PreTrainedTokenizerBase | None
    config: dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """One way to fill the gap."""

    tokens: list[int]
    origin: str
    """`filled`: by the drafter, which saw the suffix; `ar`: by the base, which did not; `given`: by whoever asked."""
    log_probability: float
    """Of its tokens and of the beginning of the suffix, behind the prefix, by the base.  Unit: nats."""


@dataclass
class Filled:
    """The likeliest way to fill a gap, and what it cost."""

    tokens: list[int]
    text: str | None = None
    candidates: list[Candidate] = field(default_factory=list)
    """All that were judged, the likeliest first."""
    forwards: dict[str, int] = field(default_factory=dict)
    """By kind: prefill, denoise, ar, judge."""


@dataclass
class Gap:
    """A gap of an engine's model: what stands before and behind it, and the K/V of the former."""

    backend: Backend
    cache: Cache
    layout: DraftLayout
    limits: Limits
    prefix: list[int]
    suffix: list[int]
    rows: int
    """Of a gap block: the seed, the gap, and what fits of the suffix."""
    threshold: float = CERTAIN
    forwards: dict[str, int] = field(default_factory=dict)

    def prefill(self) -> None:
        """K/V of the prefix but its last token, which begins the block."""
        known, done = self.prefix[:-1], 0
        room = min(self.backend.prefill_rows, self.cache.most_rows or self.backend.prefill_rows)
        while done < len(known):
            part = known[done : done + room]
            self._forward("prefill", SequenceRows(0, done, part, last_logits_only=True))
            done += len(part)

    def denoised(self, lengths: Sequence[int]) -> list[list[int]]:
        """What the drafter fills gaps of these lengths with, surest slots first."""
        start = len(self.prefix) - 1
        run = Run(
            self.backend, self.cache, Processing(), self.layout, self.limits, "diffusion", threshold=self.threshold
        )
        requests = []
        for length in lengths:
            request = Request(0, self.prefix, 0, length, frozenset())
            request.block = [self.prefix[-1], *[MASK] * length, *self.suffix[: self.rows - 1 - length]]
            requests.append(request)
        while still_open := [r for r in requests if MASK in r.block]:
            blocks = [Block(start, list(r.block)) for r in still_open]
            out = self._forward("denoise", SequenceRows(0, start, blocks=blocks))
            sizes = [len(block.inputs) for block in blocks]
            for request, hidden in zip(still_open, out.draft_hidden.split(sizes), strict=True):
                fill_surest(run, request, hidden)
        return [r.block[1 : 1 + length] for r, length in zip(requests, lengths, strict=True)]

    def continued(self, length: int) -> list[int]:
        """What the base writes behind the prefix, greedily, without seeing the suffix."""
        tokens: list[int] = []
        for n in range(length):
            last = tokens[-1] if tokens else self.prefix[-1]
            out = self._forward("ar", SequenceRows(0, len(self.prefix) - 1 + n, [last]))
            tokens.append(int(out.base_logits[-1].argmax()))
        return tokens

    def judged(self, tokens: list[int], origin: str) -> Candidate:
        """How likely the base finds these tokens and the suffix behind them."""
        text = [*tokens, *self.suffix[:JUDGED]]
        out = self._forward("judge", SequenceRows(0, len(self.prefix) - 1, [self.prefix[-1], *text[:-1]]))
        chosen = torch.tensor(text, device=out.base_logits.device)[:, None]
        logs = torch.log_softmax(out.base_logits.float(), dim=-1).gather(-1, chosen)
        return Candidate(tokens, origin, float(logs.double().sum()))

    def _forward(self, kind: str, rows: SequenceRows) -> Output:
        self.forwards[kind] = self.forwards.get(kind, 0) + 1
        out: Output = self.backend.forward(self.backend.row_plan([rows]), self.cache)
        return out


def fill_surest(run: Run, r: Request, hidden_KH: Tensor) -> None:
    """Fill every masked slot of the block whose confidence reaches the threshold, left to right, and the surest in any
    case.

    A slot's token goes through the Markov head behind the one to its left, if that is known by then.
    """
    surest: tuple[float, int, int] | None = None
    filled = False
    open_slots = [i for i, token in enumerate(r.block) if token == MASK]
    trunk = run.backend.head(hidden_KH[[i - run.layout.shift for i in open_slots]])
    for slot, logits in zip(open_slots, trunk, strict=True):
        token, sure = best_of_slot(run, r, slot, logits[None])
        if sure >= run.threshold:
            r.block[slot], filled = token, True
        elif surest is None or sure > surest[0]:
            surest = sure, slot, token
    if not filled and surest is not None:
        r.block[surest[1]] = surest[2]


def fill_gap(gap: Gap, lengths: Sequence[int], given: list[int] | None = None) -> Filled:
    """The likeliest text of one of these lengths between prefix and suffix; given: tokens that stand there now."""
    with torch.inference_mode():
        gap.prefill()
        written = gap.continued(max(lengths))
        ways = [(tokens, "filled") for tokens in gap.denoised(lengths)]
        ways += [(written[:length], "ar") for length in lengths]
        ways += [] if given is None else [(given, "given")]
        found: list[Candidate] = []
        for tokens, origin in ways:
            if all(tokens != other.tokens for other in found):
                found.append(gap.judged(tokens, origin))
    found.sort(key=lambda one: -one.log_probability)
    return Filled(found[0].tokens, candidates=found, forwards=gap.forwards)


def infill(
    engine: Model,
    prefix: Prompt,
    suffix: Prompt,
    *,
    longest: int | None = None,
    lengths: Sequence[int] | None = None,
    given: Prompt | None = None,
) -> Filled:
    """As `Engine.infill` has it."""
    rows = rows_of(engine)
    backend, most = engine.backend, rows // 2
    before = _tokens(engine, prefix, "prefix")
    behind = _tokens(engine, suffix, "suffix", alone=False)
    now = None if given is None else _tokens(engine, given, "what stands there now", alone=False)
    if lengths is None:
        lengths = range(1, 1 + (most if longest is None else _length(longest, most)))
    lengths = sorted({_length(length, most) for length in lengths})
    if not lengths:
        raise UsageError("lengths is empty; a gap has at least one token")
    filled = max([*lengths, len(now or [])])
    end = len(before) + max(filled + min(JUDGED, len(behind)), rows - 1)
    limit = min(engine.limits.context, engine.limits.boundary or engine.limits.context)
    if end > limit:
        raise UsageError(
            f"the prefix has {len(before)} tokens, and the gap with what is read of the suffix {end - len(before)}; "
            f"the model reads {limit}",
            "shorten the prefix",
        )
    with backend.turns.turn():
        cache = backend.new_cache(1, end)
        try:
            cache.open(0, end)
            gap = Gap(backend, cache, engine.layout, engine.limits, before, behind, rows)
            found = fill_gap(gap, lengths, now)
        finally:
            cache.release()
    if engine.tokenizer is not None:
        found.text = Detokenizer(engine.tokenizer).decode(found.tokens)
    return found


def rows_of(engine: Model) -> int:
    """Rows of the gap blocks that an engine's adapter has learned.  Raises UsageError where it can fill none."""
    backend = engine.backend
    if backend.name != "hf":
        raise UsageError(
            f"gaps are filled on the hf backend alone; this is {backend.name}, whose kernels were never held against "
            "blocks longer than draft.block",
            "load it with backend hf",
        )
    if getattr(backend, "recurrent", ()):
        raise UsageError(
            "this model has layers with a state, which run a block from its first row to its last: the rows of a gap "
            "come before the suffix and would not know it",
        )
    learned = engine.config.get("infill")
    if learned is None:
        raise UsageError(
            "this artifact has not learned to fill a gap: no block of its training saw the text behind one",
            "convert with objective.infill_share above 0, such as 0.5",
        )
    return int(learned["rows"])


def _length(value: int, most: int) -> int:
    """Raises UsageError for a gap of no length, or longer than was learned."""
    return whole("the length of a gap", value, 1, most)


def _tokens(engine: Model, given: Prompt, name: str, alone: bool = True) -> list[int]:
    """Token ids; alone: of a text by itself, with what the tokenizer puts before one.  Raises UsageError."""
    if isinstance(given, str) and given and not alone and engine.tokenizer is not None:
        with ENCODING:
            given = list(engine.tokenizer(given, add_special_tokens=False)["input_ids"])
    with ENCODING:
        return encode(given, name, engine.tokenizer, engine.backend.input_vocab)
