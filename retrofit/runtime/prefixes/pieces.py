"""Base K/V of texts that are through, in pieces of PIECE positions, each kept once for all texts that begin alike.

    text A    [ piece | piece | piece ]
    text B    [  A's  |  A's  | piece | piece ]        it parts from A in its third piece

A piece is found by every token up to its end, compared as they are: the pieces form a tree, in which a piece hangs on
the one before it.  Beyond the budget the piece goes that nobody has used for longest; whoever uses a piece uses those
before it, so a piece goes before the one it hangs on, and what is kept always begins at a text's beginning.

Several threads may use it at once.  Not here: when texts are kept and copied (`host/prefixes.py`), and where a copy has
the bits of what would be computed (`reuse.py`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

PIECE = 32
"""Positions of a piece: so much of what two texts share may have to be computed again."""
AUTO_POSITIONS = 8192
"""As many positions are kept where no budget of bytes is given."""

Kept = dict[int, tuple[Tensor, Tensor]]
"""Layer -> K and V of neighbouring positions, as a cache gives them out."""


@dataclass(eq=False)
class _Piece:
    kept: Kept
    tokens: tuple[int, ...]
    before: _Piece | None
    """What it hangs on."""
    after: dict[tuple[int, ...], _Piece] = field(default_factory=dict)
    nbytes: int = 0


class Pieces:
    """The pieces that one engine keeps."""

    def __init__(self, budget: int | None = None, size: int = PIECE):
        """budget: bytes of K/V; None: those of AUTO_POSITIONS positions, by the first piece.  size: of a piece."""
        self.budget, self.size = budget, size
        self.nbytes = 0
        self._begins: dict[Hashable, _Piece] = {}
        """Condition under which K/V were computed -> what the first pieces hang on."""
        self._by_use: OrderedDict[_Piece, None] = OrderedDict()
        """All pieces, the one not used for longest first.  A piece always comes before the one that it hangs on."""
        self._made_by: Hashable = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._by_use)

    def clear(self) -> None:
        """Keep nothing of what there is."""
        with self._lock:
            self._clear()

    def made_by(self, model: Hashable) -> None:
        """Keep nothing of what another model than this one made."""
        with self._lock:
            if model != self._made_by:
                self._clear()
                self._made_by = model

    def find(self, tokens: Sequence[int], condition: Hashable = None) -> list[Kept]:
        """The pieces that a text begins with, as many as there are."""
        with self._lock:
            found = list(self._along(tokens, condition))
            self._use(found)
            return [piece.kept for piece in found]

    def keep(
        self, tokens: Sequence[int], take: Callable[[int, int], Kept], condition: Hashable = None, since: int = 0
    ) -> None:
        """Keep the whole pieces of a text.

        take: K/V of its positions from one on and before another.  since: positions whose pieces were offered before:
        what has gone of them is not offered again, or texts beyond the budget would be copied over and over.
        """
        with self._lock:
            first = self._length(tokens, condition)
        taken: dict[int, Kept] = {}  # copies take a while: others need not wait
        for start in range(first, len(tokens) - self.size + 1, self.size) if first >= since else ():
            kept = take(start, start + self.size)
            if any(len(keys) < self.size for keys, _ in kept.values()):
                break  # a layer that slides has let go of it
            taken[start] = kept
        with self._lock:
            pieces = list(self._along(tokens, condition))
            for start in range(len(pieces) * self.size, len(tokens) - self.size + 1, self.size):
                if start not in taken:
                    break  # not there, or what it would hang on has gone meanwhile
                before = pieces[-1] if pieces else self._begins.setdefault(condition, _Piece({}, (), None))
                pieces.append(self._add(taken[start], tuple(tokens[start : start + self.size]), before))
            self._use(pieces)
            self._drop()

    def _along(self, tokens: Sequence[int], condition: Hashable) -> Iterator[_Piece]:
        """The pieces that a text begins with."""
        piece = self._begins.get(condition)
        for start in range(0, len(tokens) - self.size + 1, self.size):
            piece = None if piece is None else piece.after.get(tuple(tokens[start : start + self.size]))
            if piece is None:
                return
            yield piece

    def _length(self, tokens: Sequence[int], condition: Hashable) -> int:
        """Positions of a text that are kept."""
        return sum(self.size for _ in self._along(tokens, condition))

    def _add(self, kept: Kept, tokens: tuple[int, ...], before: _Piece) -> _Piece:
        nbytes = sum(tensor.nbytes for layer in kept.values() for tensor in layer)
        piece = before.after[tokens] = _Piece(kept, tokens, before, nbytes=nbytes)
        self.nbytes += nbytes
        if self.budget is None:
            self.budget = nbytes * (AUTO_POSITIONS // self.size)
        return piece

    def _use(self, pieces: list[_Piece]) -> None:
        """Pieces of one text, from its beginning."""
        for piece in reversed(pieces):
            self._by_use[piece] = None
            self._by_use.move_to_end(piece)

    def _drop(self) -> None:
        """Keep to the budget."""
        while self.budget is not None and self.nbytes > self.budget:
            piece, _ = self._by_use.popitem(last=False)
            assert piece.before is not None and not piece.after
            del piece.before.after[piece.tokens]
            self.nbytes -= piece.nbytes

    def _clear(self) -> None:
        self._begins.clear()
        self._by_use.clear()
        self.nbytes = 0
