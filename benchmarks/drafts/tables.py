"""The tables that the documentation has of the comparison, as rows of cells; drawn from results/drafts.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.drafts.figures import CHAIN, HYBRID, MOST_ROWS, Runs, of_best, of_way, shown, slots

LOOKUP = "prompt lookup alone"
SUMMARY = "drafts"
"""The section with the bars, beside one for each run."""


def runs_of(sections: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of a results file, by recipe, in the order they were asked for."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, section in sections.items():
        if name != SUMMARY:
            found.setdefault(section["figures"]["recipe"], []).append(section["figures"])
    return found


def forwards(runs: Runs) -> list[list[str]]:
    """TPF within each way and of the best one, greedy / T = 0.8 / T = 1."""
    best = f"TPF, best of these and a tree within {MOST_ROWS} rows"
    ways = [f"tau, {CHAIN}", f"TPF, {CHAIN}", "TPF, fused, a chain", best, "TPF, hybrid"]
    rows = [["recipe", "added", "training, processor", *ways]]
    for spec, some in runs.items():

        def cell(find: Any, some: Any = some) -> str:
            values = [find(some, at) for at in ("0", "0.8", "1")]
            return " / ".join(shown(value) if value else "-" for value in values)

        rows.append([
            f"`{spec}`",
            f"{some[0]['parameters'] / 1e6:.2f}M",
            taken(some),
            cell(lambda runs, at: of_way(runs, at, CHAIN, "tau")),
            cell(lambda runs, at: of_way(runs, at, CHAIN)),
            cell(lambda runs, at: of_way(runs, at, "fused chain")),
            cell(of_best),
            cell(lambda runs, at: of_way(runs, at, HYBRID)),
        ])  # fmt: skip
    lookups = next((some for some in runs.values() if "lookup" in some[0]), None)
    if lookups:
        found = lookups[0]["lookup"]
        tau, tpf = (" / ".join(f"{found[at][what]:.2f}" for at in ("0", "0.8", "1")) for what in ("tau", "tpf"))
        rows.append([LOOKUP, "none", "none", tau, "-", "-", tpf, "-"])
    return rows


def taken(runs: Sequence[Mapping[str, Any]]) -> str:
    """Processor seconds of the training, where they are known."""
    known = [run["processor_seconds"] for run in runs if run.get("processor_seconds") is not None]
    return f"{mean(known):.0f} s" if known else "-"


def acceptance(runs: Runs) -> list[list[str]]:
    """Acceptance of each slot, given those before it, greedy and at T = 0.8 and 1."""
    head = ["acceptance of slots 1, 2, ..", "greedy", "T = 0.8", "T = 1"]
    rows = [[" ".join(f"{value:.2f}" for value in slots(some, at)) for at in ("0", "0.8", "1")]
            for some in runs.values()]  # fmt: skip
    return [head, *([f"`{spec}`", *cells] for spec, cells in zip(runs, rows, strict=True))]
