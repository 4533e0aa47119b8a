"""The rows of one forward: where each stands, and what it sees.

A forward is a list of `SequenceRows`.  Its rows are laid out as [all base rows | all draft rows], so that the adapter
and the draft rows' own attention work on slices and nothing of a draft row can reach a base row:

    sequence 0: base 5 6 7 | block at 6: M M M     sequence 1: base 9 | block at 10: M M M
    row         0  1  2   3   4  5  6   7  8  9
    sequence    0  0  0   1   0  0  0   1  1  1
    position    5  6  7   9   6  7  8   10 11 12
    kind        b  b  b   b   d  d  d   d  d  d

Filler rows may stand between the two kinds, where a forward has to have some number of rows; nobody reads them.

Visibility is two ranges per row: base K/V below a limit, and (draft rows) the row's own block.  Only where drafts
branch it takes a matrix: several base rows then stand at one position, so none of this forward is in the cache yet, a
row sees the cache below the sequence's start and its own ancestors, and the accepted path is stored afterwards.
Used by training and decoding alike.  Not here: the ranges and matrices themselves (`visibility.py`), choosing which
rows to run (`runtime/plan.py`), and the attention call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from retrofit.adapters.given import Given, seen_until
from retrofit.adapters.visibility import (
    BlockRows,
    Group,
    Paths,
    Window,
    base_visibility,
    block_visibility,
    first_seen,
    hiding,
    path_visibility,
)

MASK = -1
"""Input of a draft row that has no token: the mask vector stands in."""


@dataclass(frozen=True)
class Block:
    """Draft rows at positions start, start + 1, ...; they see base K/V of positions < start and each other."""

    start: int
    inputs: Sequence[int]
    """Token id of each row, or `MASK`."""
    anchor: int = -1
    """Tree: the base row of this forward it hangs on; it sees that row's path."""


@dataclass(frozen=True)
class SequenceRows:
    """What one sequence runs in one forward."""

    slot: int
    """Which cache slot holds its base K/V."""
    start: int
    """Position of its first base row, i.e. how many positions are committed."""
    tokens: Sequence[int] = ()
    blocks: Sequence[Block] = ()
    last_logits_only: bool = False
    """Prefill: only the last base row's logits are wanted."""
    parents: Sequence[int] | None = None
    """Tree: which base row of this forward each one follows, -1 for the committed prefix.  None: the one before it."""
    given: Given | None = None
    """A prompt with images, which the text begins with."""
    whole: int | None = None
    """Prefill: how many tokens the prompt has of which these are a part; None: it ends with them."""

    @property
    def follows(self) -> Sequence[int]:
        """Which base row of this forward each one follows, -1: the committed prefix."""
        return range(-1, len(self.tokens) - 1) if self.parents is None else self.parents


class FlatRows:
    """The rows of one forward in their order, filler aside: what both backends lay out.

    Attributes: `ids`, `positions` and `slots` of all rows, base rows first; `num_base`; `logit_rows`, base rows whose
    logits are wanted, None: all.
    """

    def __init__(self, sequences: Sequence[SequenceRows]):
        self.sequences = list(sequences)
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        wanted: list[int] = []
        for seq in self.sequences:
            first = len(self.ids)
            self._add(seq.slot, seq.tokens, base_positions(seq))
            end = len(self.ids)
            wanted.extend(range(end - 1 if seq.last_logits_only else first, end))
        self.num_base = len(self.ids)
        self.logit_rows = None if len(wanted) == self.num_base else wanted
        for seq in self.sequences:
            for block in seq.blocks:
                self._add(seq.slot, block.inputs, range(block.start, block.start + len(block.inputs)))

    def _add(self, slot: int, tokens: Sequence[int], positions: Sequence[int]) -> None:
        self.ids.extend(tokens)
        self.positions.extend(positions)
        self.slots.extend([slot] * len(tokens))

    @property
    def tree(self) -> bool:
        """Whether drafts branch."""
        return any(s.parents is not None for s in self.sequences)

    @property
    def prefill(self) -> bool:
        return is_prefill(self.sequences)


class RowPlan:
    """The rows of one forward as tensors.

    Attributes: `ids` [N] token ids (0 where the mask vector goes), `masked` [M] row numbers of those, `positions`
    [1, N], `num_base`, `first_draft` (behind the base rows and the filler), `base` and `draft` groups (None when there
    are no such rows), `logit_rows` [R] base rows whose logits are wanted, `base_slots` and `base_positions` [num_base]
    where base K/V goes.
    """

    def __init__(
        self,
        sequences: Sequence[SequenceRows],
        device: torch.device | str = "cpu",
        causal_blocks: bool = False,
        least_rows: int = 1,
    ):
        """least_rows: filler makes up what is missing to so many rows."""
        self.sequences = list(sequences)
        self.device = torch.device(device)
        self.causal_blocks = causal_blocks
        self.least_rows = least_rows
        self.tree = any(s.parents is not None for s in self.sequences)
        self.logit_rows: Tensor | None
        self.masked: Tensor | None
        self.draft: Group | None
        self.alone = len(self.sequences) == 1 and not self.tree and not self.sequences[0].blocks
        """Base rows of one sequence, nothing else: plain decoding and prefill."""
        bare = all(s.tokens and not s.blocks for s in self.sequences)
        self.prompts = bare and not self.tree and is_prefill(self.sequences)
        """Base rows of prompts, nothing else."""
        if self.alone and len(self.sequences[0].tokens) == 1:
            self._one_row(self.sequences[0])
            return
        ids, positions = self._flat_rows()
        ids_array = np.asarray(ids, dtype=np.int64)
        masked = np.flatnonzero(ids_array == MASK)
        self.ids = self._tensor(np.maximum(ids_array, 0))
        self.masked = self._tensor(masked) if len(masked) else None
        self.max_position = max(positions)
        self.positions = self._tensor(np.asarray(positions, dtype=np.int64))[None]
        self.base = self._base_group()
        self.draft = self._draft_group()

    def _one_row(self, seq: SequenceRows) -> None:
        """What `__init__` would make of a single base row, without the detours: the step of plain decoding."""
        p, rows = seq.start, self.least_rows
        self.num_rows, self.first_draft, self.num_base = rows, rows, 1
        self.max_position = p
        self.ids = torch.tensor([seq.tokens[0]] * rows, device=self.device)
        self.positions = torch.tensor([[p] * rows], device=self.device)
        self.base_slots = torch.tensor([seq.slot], device=self.device)
        self.base_positions = self.positions[0, :1]
        self.logit_rows = self.masked = self.draft = None
        one = np.ones((1, 1), dtype=np.int64)
        self.base = Group([seq.slot], 1, None, None, one * p, one * (p + 1), one * 0, keys=p + 1, last=p)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _flat_rows(self) -> tuple[list[int], list[int]]:
        flat = FlatRows(self.sequences)
        n = self.num_base = flat.num_base
        self.logit_rows = None if flat.logit_rows is None else self._tensor(np.asarray(flat.logit_rows))
        self.base_slots = self._tensor(np.asarray(flat.slots[:n], dtype=np.int64))
        self.base_positions = self._tensor(np.asarray(flat.positions[:n], dtype=np.int64))
        drafts = len(flat.ids) - n
        self.num_rows = max(n + drafts, self.least_rows)
        self.first_draft = self.num_rows - drafts
        # A token and a position that this forward has anyway: a model may look at the largest of them.
        filler = self.first_draft - n
        ids = [*flat.ids[:n], *[flat.ids[0] if n else 0] * filler, *flat.ids[n:]]
        return ids, [*flat.positions[:n], *[self.sequences[0].start] * filler, *flat.positions[n:]]

    def _base_group(self) -> Group | None:
        seqs = [s for s in self.sequences if s.tokens]
        if not seqs:
            return None
        query = [base_positions(s) for s in seqs]
        limit = [[s.start] * len(q) if self.tree else seen_until(s.given, q) for s, q in zip(seqs, query, strict=True)]
        group = self._group(seqs, query, limit, [[0] * len(q) for q in query])
        if self.tree:
            group.ancestors = np.zeros((len(seqs), group.width, group.width), dtype=bool)
            for n, s in enumerate(seqs):
                group.ancestors[n, : len(s.tokens), : len(s.tokens)] = _ancestors(s)
        else:
            group.plain_causal = all(s.start == 0 and s.given is None for s in seqs)
        return group

    def _draft_group(self) -> Group | None:
        # In a tree forward draft rows also read the base rows' rectangle, so both cover the same sequences.
        seqs = [s for s in self.sequences if s.blocks or (self.tree and s.tokens)]
        if not any(s.blocks for s in seqs):
            return None
        query, limit, number = [], [], []
        for s in seqs:
            query.append([b.start + i for b in s.blocks for i in range(len(b.inputs))])
            limit.append([s.start if self.tree else b.start for b in s.blocks for _ in b.inputs])
            number.append([n for n, b in enumerate(s.blocks) for _ in b.inputs])
        group = self._group(seqs, query, limit, number)
        if self.tree:
            assert self.base is not None
            group.keys = self.base.keys
            group.ancestors = np.zeros((len(seqs), group.width, self.base.width), dtype=bool)
            for n, s in enumerate(seqs):
                seen = _ancestors(s)
                anchors = [b.anchor for b in s.blocks for _ in b.inputs]
                group.ancestors[n, : len(anchors), : len(s.tokens)] = seen[anchors] if anchors else False
        return group

    def _group(
        self,
        seqs: list[SequenceRows],
        query: Sequence[Sequence[int]],
        limit: Sequence[Sequence[int]],
        block: Sequence[Sequence[int]],
    ) -> Group:
        counts = [len(q) for q in query]
        width = max(counts)
        ragged = any(n != width for n in counts)
        shape = (len(seqs), width)
        arrays = {"query": np.full(shape, -1), "limit": np.full(shape, 1), "block": np.full(shape, -1)}
        gather = np.zeros(shape, dtype=np.int64) if ragged else None
        row = 0
        for s, n in enumerate(counts):
            arrays["query"][s, :n] = query[s]
            arrays["limit"][s, :n] = limit[s]
            arrays["block"][s, :n] = block[s]
            if gather is not None:
                gather[s, :n] = np.arange(row, row + n)
                row += n
        return Group(
            slots=[s.slot for s in seqs],
            width=width,
            gather=None if gather is None else self._tensor(gather.ravel()),
            scatter=self._tensor(np.flatnonzero(arrays["block"].ravel() >= 0)) if ragged else None,
            keys=int(max(1, arrays["limit"].max())),
            last=int(arrays["query"].max()),
            query=arrays["query"],
            limit=arrays["limit"],
            block=arrays["block"],
        )

    @cached_property
    def block_rows(self) -> BlockRows:
        """The draft rows, where none of them branch."""
        found = [(s.slot, b.start, len(b.inputs)) for s in self.sequences for b in s.blocks if b.inputs]
        slots, starts, lengths = (list(column) for column in zip(*found, strict=True))
        K = max(lengths)
        gather = scatter = None
        if any(n != K for n in lengths):
            count = np.asarray(lengths)
            there = np.arange(K) < count[:, None]
            first = np.cumsum(count) - count
            gather = self._tensor(np.where(there, first[:, None] + np.arange(K), 0).ravel())
            scatter = self._tensor(np.flatnonzero(there.ravel()))
        return BlockRows(slots, starts, lengths, K, self.device, gather, scatter)

    @cached_property
    def paths(self) -> Paths:
        """The base rows' paths, where drafts branch."""
        group = self.base
        assert group is not None and group.ancestors is not None
        starts = [s.start for s in self.sequences if s.tokens]
        depth = int(group.ancestors.sum(2).max())
        # Ancestors in the order of their numbers, which is that of their depth.
        rows = np.argsort(~group.ancestors, axis=2, kind="stable")[:, :, :depth]
        there = np.arange(depth) < group.ancestors.sum(2, keepdims=True)
        places = np.broadcast_to(np.asarray(starts)[:, None, None] + np.arange(depth), rows.shape)
        return Paths(
            self._tensor(np.where(there, rows, 0)),
            self._tensor(np.array(places)),
            self._tensor(there),
            self._tensor(group.query),
            starts,
            max(starts) + depth,
        )

    def counted_from(self, begins: Sequence[int]) -> RowPlan:
        """The same rows for a cache whose keys of slot s begin at position begins[s]; not for blocks with gradients."""
        first = [begins[seq.slot] for seq in self.sequences]
        if not any(first):
            return self
        other = copy.copy(self)
        other.__dict__.pop("paths", None)
        other.sequences = [replace(s, start=s.start - begin) for s, begin in zip(self.sequences, first, strict=True)]
        by_slot = torch.tensor(begins, device=self.device)
        other.base_positions = self.base_positions - by_slot[self.base_slots]
        if self.base is not None:
            other.base = self.base.counted_from([begins[slot] for slot in self.base.slots])
        if self.draft is not None:
            other.draft = self.draft.counted_from([begins[slot] for slot in self.draft.slots])
            if self.tree and other.base is not None:
                other.draft.keys = other.base.keys
        return other

    def base_part(self, window: Window | None, first: int, stop: int) -> tuple[int, int, Tensor]:
        """What base rows `first` to `stop` of each sequence see of the keys `low` to `high`: (low, high, [S, T, keys]).

        For sequences so long that a mask of all rows and keys is too large.
        """
        group = self.base
        assert group is not None and group.ancestors is None
        query, limit = group.query[:, first:stop], group.limit[:, first:stop]
        there = query >= 0
        low = 0 if window is None or not there.any() else max(0, first_seen(int(query[there].min()), window))
        high = max(int(limit.max()), low + 1)
        query_ST1, limit_ST1 = (self._tensor(np.ascontiguousarray(a))[:, :, None] for a in (query, limit))
        keys = torch.arange(low, high, device=self.device)
        seen = keys < limit_ST1
        if window is not None:
            seen &= keys >= first_seen(query_ST1, window)
        seen[:, :, 0] |= query_ST1[:, :, 0] < 0  # padding: nobody reads it, but it has to be finite
        return low, high, seen

    def base_mask(self, window: Window | None, dtype: torch.dtype) -> tuple[Tensor | None, bool]:
        """(additive mask [S, 1, T, keys] or None, whether plain causal attention does instead)."""
        group = self.base
        assert group is not None
        window = hiding(window, group.last)
        if group.width == 1 and len(group.slots) == 1 and not self.tree and window is None:
            return None, False
        if group.plain_causal and window is None:
            return None, group.width > 1
        key = (window, dtype)
        if key not in group.masks:
            seen = base_visibility(group, key[0])
            if group.ancestors is not None:
                seen = np.concatenate([seen, path_visibility(group, group, key[0])], axis=2)
            group.masks[key] = self._additive(seen, dtype)
        return group.masks[key], False

    def draft_mask(self, window: Window | None, dtype: torch.dtype) -> Tensor | None:
        """Additive mask [S, 1, T, keys (+ R) + T] of `draft_visibility`."""
        group = self.draft
        assert group is not None
        key = (hiding(window, group.last), dtype)
        if key not in group.masks:
            group.masks[key] = self._additive(self.draft_visibility(key[0]), dtype)
        return group.masks[key]

    def draft_visibility(self, window: Window | None) -> np.ndarray:
        """[S, T, keys (+ R) + T] what draft rows see: base positions, a tree's base rows, the sequence's draft rows."""
        group = self.draft
        assert group is not None
        parts = [base_visibility(group, window)]
        if self.tree:
            assert self.base is not None
            parts.append(path_visibility(group, self.base, window))
        parts.append(block_visibility(group, self.causal_blocks, window))
        return np.concatenate(parts, axis=2)

    def _additive(self, seen_STK: np.ndarray, dtype: torch.dtype) -> Tensor | None:
        if seen_STK.all():
            return None
        mask = torch.zeros(seen_STK.shape, dtype=dtype)
        mask.masked_fill_(torch.from_numpy(~seen_STK), float("-inf"))
        return mask[:, None].to(self.device)


def is_prefill(sequences: Sequence[SequenceRows]) -> bool:
    return any(s.last_logits_only for s in sequences)


def base_positions(seq: SequenceRows) -> list[int]:
    positions: list[int] = []
    for parent in seq.follows:
        positions.append(seq.start if parent < 0 else positions[parent] + 1)
    return positions


def _ancestors(seq: SequenceRows) -> np.ndarray:
    """[T, T] whether base row t sees base row r: itself and what it follows."""
    seen = np.eye(len(seq.tokens), dtype=bool)
    for t, parent in enumerate(seq.follows):
        if parent >= 0:
            seen[t] |= seen[parent]
    return seen
