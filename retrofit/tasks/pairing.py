"""Two models on the same items: what the difference is, how sure it is, and whether chance explains it.

The interval is a paired bootstrap over items with a fixed seed (Efron and Tibshirani 1993, percentile interval); the
p-value is McNemar's exact test (McNemar 1947, two-sided binomial over the items on which only one of the two is right).
Pure functions of scores.  Not here: where scores come from (`scoring.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

RESAMPLES = 4000
SEED = 0
LEVEL = 0.95


def compared(
    own: Sequence[float], original: Sequence[float], weights: Sequence[float] | None = None, seed: int = SEED
) -> dict[str, Any]:
    """Scores of one model and of the original on the same items, in the same order, as one plain dict.

    weights: of each item in both means, such as its tokens where a score is a loss per token; None: all alike.
    `value`, `original` and `delta` are weighted means; `ci95` is that of `delta`, None below two items; `only_here`,
    `only_original` and `mcnemar_p` count items that are right, None where scores are not all 0 or 1.
    Raises ValueError for no items, or for unequal numbers of them.
    """
    if not own or len(own) != len(original) or (weights is not None and len(weights) != len(own)):
        raise ValueError("scores of both models on the same items, at least one, are needed")
    share = np.asarray(weights if weights is not None else [1.0] * len(own), dtype=np.float64)
    here, there = np.asarray(own, dtype=np.float64), np.asarray(original, dtype=np.float64)
    value, other = (float((scores * share).sum() / share.sum()) for scores in (here, there))
    found: dict[str, Any] = {"n": len(own), "value": value, "original": other, "delta": value - other}
    found["ci95"] = interval(here - there, share, seed)
    yes_or_no = set(own) | set(original) <= {0.0, 1.0}
    counts = only_one(own, original) if yes_or_no else (None, None)
    found["only_here"], found["only_original"] = counts
    found["mcnemar_p"] = None if counts[0] is None or counts[1] is None else mcnemar(counts[0], counts[1])
    return found


def interval(differences: np.ndarray, weights: np.ndarray, seed: int = SEED) -> list[float] | None:
    """The 95% interval of the weighted mean of differences, items drawn with replacement; None below two items."""
    count = len(differences)
    if count < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    means = (differences * weights)[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    tail = (1 - LEVEL) / 2
    return [float(bound) for bound in np.quantile(means, [tail, 1 - tail])]


def only_one(own: Sequence[float], original: Sequence[float]) -> tuple[int, int]:
    """(items that only the one has right, items that only the original has right)."""
    pairs = list(zip(own, original, strict=True))
    return sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)


def mcnemar(only_here: int, only_original: int) -> float:
    """The chance of a split at least as uneven, were each of these items as likely to fall on either side."""
    count, fewer = only_here + only_original, min(only_here, only_original)
    below = sum(math.comb(count, k) for k in range(fewer + 1))
    return min(1.0, 2 * below / 2**count)
