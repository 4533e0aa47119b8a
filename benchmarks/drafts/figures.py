"""What runs of several recipes and seeds come to: means, spreads, the better of two ways, ratios.

A run holds, by temperature and way of decoding, the figures of `retrofit.eval.trace`.  Ways are compared within
themselves, where all recipes have equal rows, and the best of each recipe with the best of the others.  No published
design grafts prompt lookup on what its adapter drafts: `hybrid` is retrofit's own way, and stands apart.
Not here: running anything (`runs.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.common import Bar
from benchmarks.drafts.setting import OWN, PUBLISHED

MOST_ROWS = 96
"""Rows of one request and forward that the best way may take."""
TEMPERATURES = (0.0, 0.8, 1.0)
CHAIN, HYBRID = "two_forward", "hybrid"
BARS = {"0.8": (1.4, 1.15), "1": (1.4, 1.15), "0": (None, None)}
"""At least own TPF to the best published design's, by temperature: best against best, and within CHAIN."""

Run = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]
"""By recipe, one run for each seed."""


def best(ways: Mapping[str, Mapping[str, Any]], most_rows: int = MOST_ROWS, hybrid: bool = False) -> tuple[str, float]:
    """(way, TPF) of the most tokens per forward within the rows.  Raises ValueError where none is within them.

    hybrid: whether that is among the ways.
    """
    asked = {way: found for way, found in ways.items() if hybrid or way != HYBRID}
    within = {way: found["tpf"] for way, found in asked.items() if found["most_rows"] <= most_rows}
    if not within:
        raise ValueError(f"every way takes more than {most_rows} rows: {', '.join(ways)}")
    way = max(within, key=lambda name: (within[name], name))
    return way, within[way]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, least, most)."""
    return mean(values), min(values), max(values)


def shown(values: Sequence[float], places: int = 2) -> str:
    """The mean, and the range where there are several."""
    middle, low, high = spread(values)
    text = f"{middle:.{places}f}"
    return text if len(values) == 1 else f"{text} ({low:.{places}f} to {high:.{places}f})"


def slots(runs: Sequence[Run], temperature: str, way: str = CHAIN) -> list[float]:
    """Mean acceptance of slots 1, 2, .., each given those before it; as far as every seed reached."""
    found = [run["ways"][temperature][way]["accept_cond"] for run in runs]
    return [mean(values) for values in zip(*found, strict=False)]


def of_way(runs: Sequence[Run], temperature: str, way: str, what: str = "tpf") -> list[float]:
    """A figure of a way, one for each seed; empty where the recipe has no such way."""
    found = [run["ways"][temperature] for run in runs]
    return [ways[way][what] for ways in found if way in ways]


def of_best(runs: Sequence[Run], temperature: str, hybrid: bool = False) -> list[float]:
    return [best(run["ways"][temperature], hybrid=hybrid)[1] for run in runs]


def ratios(own: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """Own figure to another's, seed by seed; of the seeds that both have."""
    return [own[seed] / other[seed] for seed in sorted(own.keys() & other.keys())]


def by_seed(runs: Sequence[Run], values: Sequence[float]) -> dict[int, float]:
    return {run["seed"]: value for run, value in zip(runs, values, strict=True)}


def compared(
    runs: Runs, temperature: str, way: str | None, hybrid: tuple[bool, bool] = (False, False), own: str = OWN
) -> tuple[str, list[float]] | None:
    """(published design with the highest mean, own TPF to its, seed by seed); way None: best against best.

    hybrid: whether that is among the ways of the own recipe, and among those of the published ones.
    None where own runs or published ones are missing.
    """

    def figures(spec: str) -> list[float]:
        if way is not None:
            return of_way(runs[spec], temperature, way)
        return of_best(runs[spec], temperature, hybrid[spec != own])

    published = {spec: values for spec in runs if spec.startswith(PUBLISHED) and (values := figures(spec))}
    if not published or not runs.get(own) or not (mine := figures(own)):
        return None
    rival = max(published, key=lambda spec: (mean(published[spec]), spec))
    found = ratios(by_seed(runs[own], mine), by_seed(runs[rival], published[rival]))
    return (rival, found) if found else None


def bars(runs: Runs, own: str = OWN) -> list[Bar]:
    """Own recipe against the best published one, at every temperature."""
    found = []
    for temperature, (whole, chain) in BARS.items():
        for way, hybrid, least, what in (
            (None, (True, False), whole, f"its best way, hybrid among them, to the other's, within {MOST_ROWS} rows"),
            (None, (True, True), None, f"the same, hybrid among both's ways, within {MOST_ROWS} rows"),
            (None, (False, False), whole, f"best way of each without hybrid, within {MOST_ROWS} rows"),
            (CHAIN, (False, False), chain, f"{CHAIN}, equal rows"),
        ):
            got = compared(runs, temperature, way, hybrid, own)
            if got is None:
                continue
            rival, values = got
            met = None if least is None else mean(values) >= least
            bar = "stated" if least is None else f">= {least} x"
            figure = f"{shown(values)} x {rival.removeprefix(PUBLISHED)}"
            found.append(
                Bar(f"TPF of own recipe to the best published one, T = {temperature}, {what}", bar, figure, met)
            )
    uncertified = [spec for spec, some in runs.items() if any(run.get("certified") is False for run in some)]
    certified = [spec for spec, some in runs.items() if any("certified" in run for run in some)]
    if certified:
        count = f"{len(certified) - len(uncertified)}/{len(certified)}"
        found.append(Bar("recipes whose certificate is ok", "all", count, not uncertified))
    return found
