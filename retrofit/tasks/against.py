"""Results of several models on the same items, held against the original's: statistics by category and metric.

Not here: the statistics (`pairing.py`), what an answer is worth (`scoring.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from retrofit.tasks.pairing import compared

Scored = dict[str, Any]
"""One model's result on one item.  `scores`: metric -> number; `weight`: in means over items, 1 where it is left out;
`text`: what was written, if anything was; whatever else is worth keeping."""
Results = Mapping[str, Mapping[str, Scored]]
"""Model -> item id -> result."""
ALL = "all"
"""Stands for every category where items are right or wrong."""


def by_category(
    categories: Mapping[str, str],
    results: Results,
    original: str,
    lower_is_better: Callable[[str, str], bool],
    right_or_wrong: Sequence[str] = (),
) -> dict[str, dict[str, Any]]:
    """Category -> metric -> `lower_is_better` and `models`: model -> what `compared` says, and `same_text`.

    categories: item id -> category.  right_or_wrong: metrics that say whether an item is right; the first of them that
    an item has goes into the category `all`, under `accuracy`.  `same_text`: on how many items the model wrote what
    the original wrote, None where nothing is written.  A model stands where it and the original share an item.
    """
    found: dict[str, dict[str, Any]] = {}
    for category in dict.fromkeys(categories.values()):
        ids = [id for id, own in categories.items() if own == category]
        for metric in _metrics(ids, results[original]):
            models = _models(ids, results, original, (metric,))
            lower = lower_is_better(category, metric)
            found.setdefault(category, {})[metric] = {"lower_is_better": lower, "models": models}
    models = _models(list(categories), results, original, right_or_wrong)
    if models:
        found[ALL] = {"accuracy": {"lower_is_better": False, "models": models}}
    return found


def _metrics(ids: Sequence[str], results: Mapping[str, Scored]) -> list[str]:
    return list(dict.fromkeys(metric for id in ids if id in results for metric in results[id]["scores"]))


def _first(scores: Mapping[str, float], metrics: Sequence[str]) -> float | None:
    return next((scores[metric] for metric in metrics if metric in scores), None)


def _models(ids: Sequence[str], results: Results, original: str, metrics: Sequence[str]) -> dict[str, Any]:
    """Model -> statistics, by the first of the metrics that an item has."""
    found: dict[str, Any] = {}
    for name, own in results.items():
        mine: list[float] = []
        theirs: list[float] = []
        weights: list[float] = []
        same: list[bool] = []
        for id in ids:
            if id not in own or id not in results[original]:
                continue
            here, there = own[id], results[original][id]
            value, other = _first(here["scores"], metrics), _first(there["scores"], metrics)
            if value is None or other is None:
                continue
            mine.append(value)
            theirs.append(other)
            weights.append(there.get("weight", 1))
            if "text" in here and "text" in there:
                same.append(here["text"] == there["text"])
        if mine:
            found[name] = compared(mine, theirs, weights) | {"same_text": sum(same) if same else None}
    return found
