"""How a draft block hangs on the sequence: the five `draft.*` settings and what follows from them.

    seed_row=base     position    p   | p+1 p+2 ... p+K        seed_row=draft    position   p    p+1 ... p+K-1
                      row        base | M   M   ... M                            row       seed  M   ... M
                      sees             | base K/V < p+1                          sees      base K/V < p

Every block starts at the first position whose base K/V it does not see, so one number places it.
A bidirectional block is so in attention layers only; through recurrent ones it runs from its first row to its last.
Not here: tensors.  This file imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class DraftLayout:
    """The `draft` section of a recipe, as the runtime needs it."""

    block: int = 8
    input: str = "mask"
    attention: str = "bidirectional"
    shift: int = 1
    seed_row: str = "base"

    @property
    def drafts(self) -> int:
        """Tokens one block proposes: with shift 0 the first row stands on a token that is known already."""
        return self.block if self.shift == 1 else self.block - 1

    @property
    def first_drafting_row(self) -> int:
        """Index of the row of a block whose logits propose the first draft."""
        return 0 if self.shift == 1 else 1

    @property
    def causal(self) -> bool:
        return self.attention == "causal"

    @property
    def anchored(self) -> bool:
        """Whether a block hangs on a base row (and so a drafting forward also emits a true AR token)."""
        return self.seed_row == "base"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
