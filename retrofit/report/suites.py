"""How much each suite runs.  This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("ar", "self_spec", "diffusion")


@dataclass(frozen=True)
class Suite:
    """Sizes of everything that is measured."""

    prompts: int
    """Of acceptance, and of the diffusion sweep."""
    tokens: int
    """New tokens of each."""
    lossless_prompts: int
    lossless_tokens: int
    speed_tokens: int
    repeats: int
    """Turns in which every way of decoding is timed once."""
    temperatures: tuple[float, ...] = (0.8, 1.0, 0.0)
    """Sampling first: small models loop under greedy decoding, and on loops every drafter looks brilliant."""
    batches: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (128,)
    """Tokens that stand before the output; those the model has no room for are listed as skipped."""
    thresholds: tuple[float, ...] = (0.5, 0.7, 0.9, 0.99)
    timed_at: tuple[float, ...] = (0.8, 0.0)
    """Temperatures that speed is measured at."""
    quality_items: int | None = 30
    """Of each task, evenly over it; None: all."""
    step_rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Requests that run together where steps are timed by their rows."""


SUITES = {
    "quick": Suite(
        prompts=8, tokens=32, lossless_prompts=6, lossless_tokens=32, speed_tokens=48, repeats=2,
        timed_at=(0.8,), quality_items=6,
    ),
    "standard": Suite(
        prompts=35, tokens=96, lossless_prompts=16, lossless_tokens=96, speed_tokens=96, repeats=5,
        contexts=(128, 1024, 4096),
    ),
    "full": Suite(
        prompts=80, tokens=256, lossless_prompts=64, lossless_tokens=128, speed_tokens=128, repeats=9,
        batches=(1, 2, 4, 8, 16, 32, 64, 128), contexts=(128, 1024, 4096, 16384, 32768, 65536, 131072),
        thresholds=(0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99), quality_items=None,
    ),
}  # fmt: skip
