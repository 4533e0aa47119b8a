"""The auditor: recomputes what an engine should have emitted, from the base-row logits of its own forwards.

It shares no code with the engine's modes, acceptance or sampling: forwards are recorded as they pass, then
replayed by a loop of its own, with transformers' processors and a noise function written from the
specification a second time.

    rows      every base row stands right after the committed prefix, and its input is the newest token
    length    how many drafts are verified follows from what precedes them: all that the block proposed, cut
              to the budget and the context (so fixed strategies only; `auto` asks its cost model)
    token     every emitted token is the target of its row on the row's own path; nothing else is emitted

and classes where the text differs from token-by-token decoding in the type the engine runs in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from retrofit.adapters.rows import RowPlan, SequenceRows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retrofit.runtime.backends.hf import Output
    from retrofit.runtime.cache import KVCache
    from retrofit.runtime.engine import Engine

TIE_ULP, NEAR_ULP = 2, 8
CLASSES = ("match", "tie", "near", "bug")
_WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Sampling:
    """The options of one audited run, by the names `Engine.generate` gives them."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    def options(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
        }

    def processors(self) -> LogitsProcessorList:
        """transformers' own, in its order; temperature 0 leaves the penalty only."""
        made: list[LogitsProcessor] = []
        if self.repetition_penalty is not None:
            made.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature > 0:
            made.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k is not None:
                made.append(TopKLogitsWarper(self.top_k))
            if self.top_p is not None:
                made.append(TopPLogitsWarper(self.top_p))
        return LogitsProcessorList(made)


@dataclass
class Recorded:
    """One forward: its rows, and the logits [R, V] of its base rows, on the CPU."""

    sequences: list[SequenceRows]
    logits: Tensor
    cache: int


@contextmanager
def recording(engine: Engine) -> Iterator[list[Recorded]]:
    """Collect the forwards of the generation inside.  Those on other caches (timing probes) are left out."""
    forwards: list[Recorded] = []
    caches: list[KVCache] = []  # kept alive, so that an id is one cache's only
    forward = engine.backend.forward

    def recorded(plan: RowPlan, cache: KVCache) -> Output:
        out = forward(plan, cache)
        caches.append(cache)
        forwards.append(Recorded(plan.sequences, out.base_logits.detach().cpu().clone(), id(cache)))
        return out

    engine.backend.forward = recorded  # type: ignore[method-assign]
    try:
        yield forwards
    finally:
        del engine.backend.forward
        last = forwards[-1].cache if forwards else 0
        forwards[:] = [f for f in forwards if f.cache == last]


@dataclass
class _Sequence:
    number: int
    prompt: list[int]
    tokens: list[int]
    limit: int
    drafts: int = 0
    """Drafts proposed for what comes next."""

    @property
    def emitted(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def remaining(self) -> int:
        return self.limit - len(self.emitted)


@dataclass
class Auditor:
    """Replays recorded forwards.  problems: what broke a rule; checked: how many tokens were recomputed."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    seeds: Sequence[int]
    limit: int
    context: int
    boundary: int | None
    """Where longrope re-runs a sequence; drafts are dropped there and no forward spans it."""
    first_drafting_row: int
    problems: list[str] = field(default_factory=list)
    checked: int = 0

    def replay(self, forwards: Sequence[Recorded]) -> list[list[int]]:
        """The texts that follow from the recorded logits, one per prompt; tokens after the limit are none."""
        slots: dict[int, _Sequence] = {}
        started: list[_Sequence] = []
        for forward in forwards:
            row = 0
            for rows in forward.sequences:
                if rows.last_logits_only:
                    self._prefill(rows, forward.logits[row], slots, started)
                    row += 1
                elif rows.slot in slots:
                    self._step(rows, forward.logits[row : row + len(rows.tokens)], slots[rows.slot])
                    row += len(rows.tokens)
                else:
                    self.problems.append(f"slot {rows.slot}: rows before any prompt")
                    row += len(rows.tokens)
        return [sequence.emitted for sequence in started]

    def _prefill(
        self, rows: SequenceRows, logits_V: Tensor, slots: dict[int, _Sequence], started: list[_Sequence]
    ) -> None:
        running = slots.get(rows.slot)
        if rows.start == 0 and (running is None or running.remaining <= 0):
            if len(started) == len(self.prompts):
                self.problems.append(f"slot {rows.slot}: a prompt nobody gave")
                return
            prompt = list(self.prompts[len(started)])
            running = _Sequence(len(started), prompt, list(prompt), min(self.limit, self.context - len(prompt)))
            started.append(running)
            slots[rows.slot] = running
        assert running is not None
        end = rows.start + len(rows.tokens)
        if list(rows.tokens) != running.tokens[rows.start : end]:
            self.problems.append(f"prompt {running.number}: rows at {rows.start} do not hold the text so far")
        if end == len(running.tokens):
            self._emit(running, self._target(logits_V, running, []))
            running.drafts = 0

    def _step(self, rows: SequenceRows, logits_TV: Tensor, running: _Sequence) -> None:
        position, drafts = len(running.tokens) - 1, list(rows.tokens[1:])
        where = f"prompt {running.number}, token {len(running.emitted)}"
        end = self.context
        if self.boundary is not None and position < self.boundary:
            end = min(end, self.boundary)
        expected = max(0, min(running.drafts, running.remaining - 1, end - 1 - position))
        if len(drafts) != expected:
            self.problems.append(f"{where}: {len(drafts)} drafts verified, {expected} by what precedes them (length)")
        if rows.tokens:
            if rows.start != position:
                self.problems.append(f"{where}: base rows start at position {rows.start}, not {position} (rows)")
            if rows.tokens[0] != running.tokens[-1]:
                self.problems.append(f"{where}: the first base row does not hold the newest token (rows)")
            path: list[int] = []
            targets = []
            for j, logits_V in enumerate(logits_TV):
                targets.append(self._target(logits_V, running, path))
                if j == len(drafts) or drafts[j] != targets[-1]:
                    break
                path = [*path, drafts[j]]
            for token in targets:
                self._emit(running, token)
        # The block that came true begins where the newest token stands now, hung on a base row or not.
        blocks = [b for b in rows.blocks if b.start == len(running.tokens) - 1]
        running.drafts = len(blocks[0].inputs) - self.first_drafting_row if blocks else 0

    def _emit(self, running: _Sequence, token: int) -> None:
        if running.remaining > 0:
            running.tokens.append(token)
            self.checked += 1

    def _target(self, logits_V: Tensor, running: _Sequence, path: list[int]) -> int:
        ids = torch.tensor([[*running.tokens, *path]])
        scores = self.sampling.processors()(ids, logits_V.float()[None])[0]
        if self.sampling.temperature > 0:
            index = len(running.emitted) + len(path)
            scores = scores + gumbel(self.seeds[running.number], index, len(scores))
        return int(scores.argmax())


def gumbel(seed: int, index: int, vocab: int) -> Tensor:
    """Gumbel noise of all tokens of one row, fp32 [V], keyed by (request seed, output index, token id).

    The noise of this format: 32-bit words, every operation modulo 2^32; x is hashed by
    x ^= x >> 16; x *= 21f0aaad; x ^= x >> 15; x *= d35a2d97; x ^= x >> 15, u = (top 23 bits + 1/2) / 2^23.
    """

    def key(start: int) -> int:
        x = seed + start & _WORD
        x = ((x ^ x >> 16) * 0x21F0AAAD & _WORD) ^ (seed >> 32 & _WORD)
        x = ((x ^ x >> 15) * 0xD35A2D97 & _WORD) ^ (index & _WORD)
        x = (x ^ x >> 16) * 0x21F0AAAD & _WORD
        x = (x ^ x >> 15) * 0xD35A2D97 & _WORD
        return x ^ x >> 15

    first, second = np.uint32(key(0x9E3779B9)), np.uint32(key(0x6A09E667))
    m1, m2, s15, s16 = np.uint32(0x21F0AAAD), np.uint32(0xD35A2D97), np.uint32(15), np.uint32(16)
    x = np.arange(vocab, dtype=np.uint32) + np.uint32(0xBB67AE85)
    x = (x ^ (x >> s16)) * m1
    x = (x ^ (x >> s15)) * m2
    x = (x ^ (x >> s15)) ^ first
    x = ((x ^ (x >> s16)) * m1) ^ second
    x = (x ^ (x >> s15)) * m2
    bits = (x ^ (x >> s15)) >> np.uint32(9)
    uniform = torch.from_numpy((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23))
    return -torch.log(-torch.log(uniform))


def audit_run(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    limit: int,
    sampling: Sampling,
    **options: Any,
) -> tuple[Auditor, list[list[int]]]:
    """Generate, replay, compare.  Returns the auditor, with every problem found, and the emitted texts."""
    seeds = [1000 + i for i in range(len(prompts))]
    with recording(engine) as forwards:
        results = engine.generate(
            prompts,
            "self_spec",
            max_new_tokens=limit,
            seed=seeds,
            ignore_eos=True,
            **sampling.options(),
            **options,
        )
    limits = engine.limits
    auditor = Auditor(
        prompts, sampling, seeds, limit, limits.context, limits.boundary, engine.layout.first_drafting_row
    )
    texts = auditor.replay(forwards)
    wrong = []
    for number, result in enumerate(results):
        want = texts[number] if number < len(texts) else []
        at = first_difference(want, result.tokens)
        if at is not None:
            wrong.append(
                f"prompt {number}, token {at}: emitted {_at(result.tokens, at)}, the target is {_at(want, at)} (token)"
            )
    auditor.problems[:0] = wrong  # first: a wrong token makes the rows after it look wrong too
    return auditor, [result.tokens for result in results]


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ, None when they are equal."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _at(tokens: Sequence[int], at: int | None) -> int | None:
    return tokens[at] if at is not None and at < len(tokens) else None


def ulp(size: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of `dtype` at magnitude `size`: eps * 2^floor(log2 size)."""
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(size, 2.0**-14))))


def classify(margin_ulp: float) -> str:
    """match: the token is the likeliest; tie, near: rounding can explain it; bug: it cannot."""
    if margin_ulp <= 0:
        return "match"
    if margin_ulp <= TIE_ULP:
        return "tie"
    return "near" if margin_ulp <= NEAR_ULP else "bug"


@torch.inference_mode()
def margins(model: PreTrainedModel, prompt: Sequence[int], text: Sequence[int], dtype: torch.dtype) -> list[float]:
    """By how many ulp of `dtype` each token of a text falls short of the likeliest, teacher-forced."""
    ids = torch.tensor([[*prompt, *text[:-1]]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    rows = logits[len(prompt) - 1 :]
    chosen = rows.gather(1, torch.tensor(text, device=rows.device)[:, None])[:, 0]
    short = (rows.amax(dim=1) - chosen).tolist()
    sizes = rows.abs().amax(dim=1).tolist()
    return [s / ulp(size, dtype) for s, size in zip(short, sizes, strict=True)]


def class_differences(
    model: Callable[[], PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Positions of `texts` by class, and every first difference from `expected` with its margin.

    model: gives the base in a wider type; called when a difference is there.  Before the first difference a
    position is a match by definition; after it prefixes differ and only margins can speak.
    """
    counts = dict.fromkeys(CLASSES, 0)
    firsts: list[dict[str, Any]] = []
    for number, (prompt, want, got) in enumerate(zip(prompts, expected, texts, strict=True)):
        at = first_difference(want, got)
        counts["match"] += len(got) if at is None else min(at, len(got))
        if at is None:
            continue
        if at == len(got) or at == len(want):
            counts["bug"] += 1
            firsts.append({"prompt": number, "token": at, "expected": _at(want, at), "got": _at(got, at)})
            continue
        short = margins(model(), prompt, got, dtype)
        # At the first difference both tokens are on trial: whichever of them is the less likely tells.
        gap = max(short[at], margins(model(), prompt, [*got[:at], want[at]], dtype)[at])
        for value in (gap, *short[at + 1 :]):
            counts[classify(value)] += 1
        firsts.append(
            {
                "prompt": number,
                "token": at,
                "expected": want[at],
                "got": got[at],
                "ulp": round(gap, 3),
                "class": classify(gap),
            }
        )
    return {**counts, "first_differences": firsts}
