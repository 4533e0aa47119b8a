"""The auditor: recomputes what an engine should have emitted, from the base-row logits of its own forwards.

It shares no code with the engine's modes, trees, acceptance or sampling: recorded forwards are replayed by a loop of
its own, with transformers' processors and a noise function written from the specification a second time.

    rows      every base row stands on its path: parents precede children, positions count along it, it sees it and no
              other row, and the first one holds the newest token right after the committed prefix
    draft     what is verified is what was drafted, or what prompt lookup finds, node by node
    length    how much of it is verified follows from what precedes it: all of it, cut to the budget, the context and
              the rows that fit.  `auto` asks its cost model, and `hybrid` its chances, so there: a beginning of it
    token     every emitted token is the target of its row on the row's own path; nothing else is emitted, nothing
              after the end, and no row runs after it

Not here: watching the engine (`recording.py`), which generations are audited (`audit.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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

from retrofit.adapters.rows import SequenceRows
from retrofit.eval.recording import Proposal, Recorded

LOOKUP = 3
"""Prompt lookup matches so many last tokens, then fewer."""
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


@dataclass(frozen=True)
class Asked:
    """What a run was asked for, and what the engine may do."""

    prompts: Sequence[Sequence[int]]
    seeds: Sequence[int]
    limits: Sequence[int]
    """New tokens of each prompt."""
    sampling: Sampling
    strategy: str
    eos: frozenset[int]
    """Tokens that end a text; empty: none does."""
    context: int
    boundary: int | None
    """Where longrope re-runs a sequence; drafts are dropped there and no forward spans it."""
    block: int
    first_drafting_row: int
    most_rows: int | None = None
    """Rows that fit into one decoding forward; None: any number."""

    @property
    def slots(self) -> int:
        """Drafts that a whole block proposes; prompt lookup takes so many."""
        return self.block - self.first_drafting_row


@dataclass
class _Sequence:
    number: int
    prompt: list[int]
    tokens: list[int]
    limit: int
    eos: frozenset[int]
    due: int = 0
    """Drafts that the block which came true proposes."""
    proposal: Proposal | None = None

    @property
    def emitted(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def remaining(self) -> int:
        return self.limit - len(self.emitted)

    @property
    def done(self) -> bool:
        return self.remaining <= 0 or (bool(self.emitted) and self.tokens[-1] in self.eos)

    @property
    def where(self) -> str:
        return f"prompt {self.number}, token {len(self.emitted)}"


@dataclass
class Auditor:
    """Replays recorded forwards.  problems: what broke a rule; checked: how many tokens were recomputed."""

    asked: Asked
    device: torch.device | str = "cpu"
    """Where the engine takes logarithms."""
    problems: list[str] = field(default_factory=list)
    checked: int = 0
    verified: int = 0
    """Drafted rows whose forwards were replayed."""
    accepted: int = 0
    branched: int = 0
    """Forwards of one sequence in which drafts branched."""
    telling: int = 0
    """Targets that would be others if the drafts on their path were not penalised."""
    _slots: dict[int, _Sequence] = field(default_factory=dict)
    _grafted: dict[tuple[int, int], Proposal] = field(default_factory=dict)
    """Trees of `hybrid` that wait for their forward, by seed and output index."""
    _started: dict[int, _Sequence] = field(default_factory=dict)
    """By number of the prompt."""
    _tree: tuple[Proposal, int] | None = None
    """The tree of the run, and how deep it has been seen."""

    def replay(self, forward: Recorded) -> None:
        """Judge the next forward."""
        logits = place = 0
        for rows in forward.sequences:
            count = len(rows.tokens)
            given = slice(place, place + count)
            paths = None if forward.paths is None else forward.paths[given]
            place += count
            if rows.last_logits_only:
                self._prefill(rows, forward.logits[logits], forward.positions[given])
                logits += 1
                continue
            running = self._slots.get(rows.slot)
            if running is None or running.done:
                self.problems.append(f"slot {rows.slot}: rows where no text is being written (rows)")
            else:
                most = self.asked.most_rows
                room = None if most is None else most // len(forward.sequences)
                own = forward.logits[logits : logits + count]
                self._step(rows, own, forward.positions[given], paths, room, running)
                key = self.asked.seeds[running.number], len(running.emitted)
                running.proposal = forward.proposals.get(key)
                self._check_proposal(running)
            logits += count
        self._grafted |= forward.grafted

    def texts(self) -> list[list[int]]:
        """What follows from the recorded logits, one text per prompt; tokens after its end are none."""
        started = self._started
        return [started[n].emitted if n in started else [] for n in range(len(self.asked.prompts))]

    def _prefill(self, rows: SequenceRows, logits_V: Tensor, positions: list[int]) -> None:
        running = self._slots.get(rows.slot)
        if rows.start == 0 and (running is None or running.done):
            number = self._prompt_number(rows.tokens)
            if number is None:
                self.problems.append(f"slot {rows.slot}: a prompt that nobody gave (rows)")
                return
            prompt = list(self.asked.prompts[number])
            limit = min(self.asked.limits[number], self.asked.context - len(prompt))
            running = _Sequence(number, prompt, list(prompt), limit, self.asked.eos)
            self._started[number] = self._slots[rows.slot] = running
        if running is None or running.done:
            self.problems.append(f"slot {rows.slot}: prompt rows where no text is being written (rows)")
            return
        end = rows.start + len(rows.tokens)
        if list(rows.tokens) != running.tokens[rows.start : end] or positions != list(range(rows.start, end)):
            self.problems.append(f"{running.where}: rows at {rows.start} do not hold the text so far (rows)")
        if end == len(running.tokens):
            self._emit(running, [self._target(logits_V, running, [])])
            running.due, running.proposal = 0, None

    def _prompt_number(self, tokens: Sequence[int]) -> int | None:
        """The prompt that begins with these rows: one they hold whole, else the first of those not yet started."""
        waiting = [n for n in range(len(self.asked.prompts)) if n not in self._started]
        begins = [n for n in waiting if list(self.asked.prompts[n][: len(tokens)]) == list(tokens)]
        whole = [n for n in begins if len(self.asked.prompts[n]) == len(tokens)]
        return next(iter(whole or begins), None)

    def _step(
        self,
        rows: SequenceRows,
        logits_TV: Tensor,
        positions: list[int],
        paths: list[list[int]] | None,
        room: int | None,
        running: _Sequence,
    ) -> None:
        where, position, parents = running.where, len(running.tokens) - 1, parents_of(rows)
        if not rows.tokens:
            self._expect_drafts(rows, running, None)
            return
        own = paths_of(parents)
        if own is None:
            self.problems.append(f"{where}: a row does not follow one before it: parents {parents} (rows)")
            return
        if rows.start != position:
            self.problems.append(f"{where}: base rows start at position {rows.start}, not {position} (rows)")
        if rows.tokens[0] != running.tokens[-1]:
            self.problems.append(f"{where}: the first base row does not hold the newest token (rows)")
        if positions != [position + len(path) - 1 for path in own]:
            self.problems.append(f"{where}: base rows stand at {positions}, which is not along their paths (rows)")
        if paths is not None and paths != own:
            self.problems.append(f"{where}: a base row does not see just its own path (rows)")
        self._drafts(rows, parents, room, running)
        tokens, path = rows.tokens, [0]
        targets = [self._target(logits_TV[0], running, [])]
        while True:
            ahead = range(path[-1] + 1, len(tokens))
            child = next((j for j in ahead if parents[j] == path[-1] and tokens[j] == targets[-1]), None)
            if child is None:
                break
            path.append(child)
            targets.append(self._target(logits_TV[child], running, [tokens[j] for j in path[1:]]))
        self.verified += len(tokens) - 1
        self.accepted += len(path) - 1
        self.branched += any(parents[j] != j - 1 for j in range(len(parents)))
        self._emit(running, targets)
        self._expect_drafts(rows, running, path[-1] if rows.parents is not None else None)

    def _expect_drafts(self, rows: SequenceRows, running: _Sequence, end: int | None) -> None:
        """The block that came true begins where the newest token stands now; in a tree it hangs on the path's end."""
        at = len(running.tokens) - 1
        blocks = [b for b in rows.blocks if b.start == at and (end is None or b.anchor == end)]
        running.due = len(blocks[0].inputs) - self.asked.first_drafting_row if blocks else 0

    def _check_proposal(self, running: _Sequence) -> None:
        """A block that came true proposes a draft for each slot that can be used, or the one tree of the run.

        Which tokens is the drafter's business.
        """
        wanted, made = min(running.due, self._usable(running)), running.proposal
        if running.done or wanted == 0 or self.asked.strategy in ("auto", "prompt_lookup", "hybrid"):
            return
        if made is None or not made.grown:
            count = 0 if made is None else len(made.tokens)
            if count < (wanted if self.asked.most_rows is None else 1):
                self.problems.append(f"{running.where}: {count} drafts proposed, {wanted} by its block (length)")
            return
        known, deep = self._tree or (made, wanted)
        if cut(known, min(deep, wanted))[1] != cut(made, min(deep, wanted))[1]:
            self.problems.append(f"{running.where}: another tree than before: {made.parents} (length)")
        if self._tree is None or wanted > deep:
            self._tree = (made, wanted)

    def _usable(self, running: _Sequence) -> int:
        """Drafts in a row that the budget, the context and longrope's boundary leave room for."""
        position, end = len(running.tokens) - 1, self.asked.context
        if self.asked.boundary is not None and position < self.asked.boundary:
            end = min(end, self.asked.boundary)
        return max(0, min(running.remaining - 1, end - 1 - position))

    def _drafts(self, rows: SequenceRows, parents: list[int], room: int | None, running: _Sequence) -> None:
        """What is verified against what was proposed."""
        strategy, deep = self.asked.strategy, self._usable(running)
        grafted = self._grafted.pop((self.asked.seeds[running.number], len(running.emitted)), None)
        if grafted is not None:
            tokens, tree = cut(grafted, deep)
        elif strategy == "prompt_lookup":
            found = looked_up(running.tokens, self.asked.slots)[:deep]
            tokens, tree = found, list(range(-1, len(found)))
        elif running.proposal is None:
            tokens, tree = [], [-1]
        else:
            tokens, tree = cut(running.proposal, min(running.due, deep))
        count = len(rows.tokens) - 1
        chain = list(range(-1, count))
        found = looked_up(running.tokens, self.asked.slots)[:deep][:count] if strategy == "auto" else []
        if found and parents == chain and list(rows.tokens[1:]) == found:
            return  # of the plans of `auto` one verifies what the text itself proposes
        if list(rows.tokens[1:]) != tokens[:count] or parents != tree[: count + 1]:
            self.problems.append(f"{running.where}: what is verified is not what was drafted (draft)")
        allowed = {len(tokens)}
        if strategy in ("auto", "hybrid"):
            allowed = set(range(len(tokens) + 1))
        elif room is not None:
            # A block that is to be hung takes its rows first.
            allowed = {min(len(tokens), room - 1), max(0, min(len(tokens), room - 1 - self.asked.block))}
            allowed -= set() if strategy == "fused" else {min(allowed)} - {max(allowed)}
        if count not in allowed:
            least = "up to " if strategy in ("auto", "hybrid") else ""
            self.problems.append(
                f"{running.where}: {count} drafts verified, {least}{max(allowed)} by what precedes them (length)"
            )

    def _emit(self, running: _Sequence, targets: Sequence[int]) -> None:
        for token in targets:
            if running.done:
                break
            running.tokens.append(token)
            self.checked += 1

    def _target(self, logits_V: Tensor, running: _Sequence, path: list[int]) -> int:
        sampling, index = self.asked.sampling, len(running.emitted) + len(path)
        noise: Tensor | float = 0.0
        if sampling.temperature > 0:
            noise = gumbel(self.asked.seeds[running.number], index, len(logits_V), self.device)

        def target(seen: list[int]) -> int:
            scores = sampling.processors()(torch.tensor([seen]), logits_V.float()[None])[0]
            return int((scores + noise).argmax())

        found = target([*running.tokens, *path])
        if path and sampling.repetition_penalty is not None:
            self.telling += found != target(running.tokens)
        return found


def parents_of(rows: SequenceRows) -> list[int]:
    """Which row of the forward each base row follows, -1: the committed prefix."""
    return list(range(-1, len(rows.tokens) - 1)) if rows.parents is None else list(rows.parents)


def paths_of(parents: Sequence[int]) -> list[list[int]] | None:
    """The rows on the way to each row, itself last; None where a row does not follow one before it."""
    paths: list[list[int]] = []
    for j, parent in enumerate(parents):
        if (parent != -1) if j == 0 else not 0 <= parent < j:
            return None
        paths.append([*(paths[parent] if j else []), j])
    return paths


def cut(proposal: Proposal, deep: int) -> tuple[list[int], list[int]]:
    """(tokens, parents) of the nodes of a proposal that are at most so deep."""
    paths = paths_of(proposal.parents) or []
    kept = [j for j, path in enumerate(paths) if len(path) - 1 <= deep]
    number = {j: n for n, j in enumerate(kept)}
    tokens = [proposal.tokens[j - 1] for j in kept if j]
    return tokens, [number[proposal.parents[j]] if j else -1 for j in kept]


def looked_up(tokens: Sequence[int], count: int) -> list[int]:
    """What followed the latest earlier place where the last three tokens stand, or else two, or one."""
    text = list(tokens)
    for size in range(LOOKUP, 0, -1):
        ends = [e for e in range(size, len(text)) if text[e - size : e] == text[-size:]]
        if ends:
            return text[ends[-1] : ends[-1] + count]
    return []


def gumbel(seed: int, index: int, vocab: int, device: torch.device | str = "cpu") -> Tensor:
    """Gumbel noise of all tokens of one row, fp32 [V], keyed by (request seed, output index, token id).

    The noise of this format: 32-bit words, every operation modulo 2^32; x is hashed by
    x ^= x >> 16; x *= 21f0aaad; x ^= x >> 15; x *= d35a2d97; x ^= x >> 15, u = (top 23 bits + 1/2) / 2^23.
    device: where the logarithms are taken; their last bit is its own.
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
    uniform = torch.from_numpy((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)).to(device)
    return -torch.log(-torch.log(uniform)).cpu()
