"""Where it stops paying, and what it costs: both follow from the section of speed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from retrofit.report.setting import Data, Earlier, Setting, Skipped

PER_HOUR = 3600
MILLION = 1_000_000


def break_even(setting: Setting, earlier: Earlier) -> Data:
    """Of every way but `ar`, by context and temperature: up to which batch size it is no slower than `ar`."""
    cells = _cells(earlier)
    found = []
    for context, temperature in dict.fromkeys((cell["context_tokens"], cell["temperature"]) for cell in cells):
        some = [cell for cell in cells if (cell["context_tokens"], cell["temperature"]) == (context, temperature)]
        names = dict.fromkeys(name for cell in some for name in cell["ratio_to_ar"] if name != "ar")
        curves = {
            name: [(cell["batch_size"], cell["ratio_to_ar"][name]) for cell in some if name in cell["ratio_to_ar"]]
            for name in names
        }
        ways = {name: break_even_batch(curve) for name, curve in curves.items()}
        found.append({"context_tokens": context, "temperature": temperature, "ways": ways})
    return {"by_context": found}


def break_even_batch(curve: Sequence[tuple[int, float]]) -> Data:
    """(batch size, seconds per token over those of `ar`) of each measured batch -> where the ratio passes 1.

    `pays_up_to`: the largest measured batch before the first that is slower, None where the smallest is slower;
    `stops_at`: that first one, None where none is; `batch_size`: where the ratio is 1 between the two, on a line over
    the logarithm of the batch.
    """
    points = sorted(curve)
    slower = next((number for number, (_, ratio) in enumerate(points) if ratio > 1), None)
    if slower is None:
        return {"pays_up_to": points[-1][0] if points else None, "stops_at": None, "batch_size": None}
    if slower == 0:
        return {"pays_up_to": None, "stops_at": points[0][0], "batch_size": None}
    (low, below), (high, above) = points[slower - 1], points[slower]
    share = (1 - below) / (above - below)
    crossing = math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return {"pays_up_to": low, "stops_at": high, "batch_size": round(crossing, 2)}


def cost(setting: Setting, earlier: Earlier) -> Data:
    """US dollars for a million output tokens at the stated price, and relative to `ar`."""
    cells = []
    for cell in _cells(earlier):
        ways = {
            name: {
                "usd_per_million_tokens": usd_per_million(setting.price, way["tokens_per_s_total"]),
                "relative_to_ar": cell["ratio_to_ar"][name],
            }
            for name, way in cell["ways"].items()
        }
        where = {key: cell[key] for key in ("batch_size", "context_tokens", "temperature")}
        cells.append({**where, "ways": ways})
    return {"price_usd_per_hour": setting.price, "cells": cells}


def usd_per_million(price: float | None, rate: float | None) -> float | None:
    """price: of an hour.  rate: tokens per second.  None where either is unknown."""
    return None if price is None or not rate else round(price / PER_HOUR / rate * MILLION, 4)


def _cells(earlier: Earlier) -> list[Data]:
    if "speed" not in earlier:
        raise Skipped("speed was not measured")
    cells: list[Data] = earlier["speed"]["cells"]
    return cells
