"""What a base's own processor and towers made of a prompt with images: base rows that no token id stands for.

Not here: making it (`runtime/backends/hf/given/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Given:
    """A prompt of L positions as the text decoder takes it in."""

    embeds: Tensor
    """[L, H]"""
    positions: Tensor | None = None
    """[P, L] what RoPE goes by, P numbers of each position (M-RoPE: time, height and width); None: the position."""
    shift: int = 0
    """What RoPE goes by behind the prompt, less the position."""
    limits: Sequence[int] | None = None
    """[L] each position sees those below this; None: those up to itself.  Of an image, some families see all."""
    marked: Tensor | None = None
    """bool [L] positions of images, where layers add to them."""
    added: Sequence[Tensor] = ()
    """[M, H] what the first layers add to those, layer by layer (DeepStack)."""
    per_layer: Tensor | None = None
    """[L, layers, width] the second input of each layer (Gemma 3n, 4)."""

    def __len__(self) -> int:
        return len(self.embeds)

    def whole(self, start: int, most: int) -> int:
        """How many rows from `start` on may run in one forward, up to `most`: as many as split no image; 0: none."""
        if self.limits is None or start + most >= len(self):
            return most
        return next((n for n in range(most, 0, -1) if max(self.limits[start : start + n]) <= start + n), 0)


def seen_until(given: Given | None, positions: Sequence[int]) -> list[int]:
    """Below which positions of base K/V each row sees."""
    if given is None or given.limits is None:
        return [t + 1 for t in positions]
    return [given.limits[t] if t < len(given) else t + 1 for t in positions]
