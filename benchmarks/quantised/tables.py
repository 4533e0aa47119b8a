"""The sections of results/quantised.json, and what they say of every kind on one line.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

USED, WEIGHED, CERTIFIED, DRAFTS = "quantised, used", "quantised, weighed", "quantised, certified", "quantised, drafts"
STAGES = (USED, WEIGHED, CERTIFIED, DRAFTS)
HEAD = ["held in", "weights, of plain's bytes", "self_spec = ar", "certify", "tau, the shipped adapter",
        "tau, short training on plain", "tau, the same training there"]  # fmt: skip


def rows(sections: Mapping[str, Any]) -> list[list[str]]:
    """A head, and a line for plain weights and each kind; `-` where nothing was measured."""
    used, weighed, certified, drafts = (sections.get(title, {}).get("figures", {}) for title in STAGES)
    lines = [HEAD]
    for kind in ["plain", *used]:
        share = f"{weighed[kind]['weights'] / weighed['plain']['weights']:.3f}" if kind in weighed else "-"
        same = {True: "equal", False: "**other**", None: "-"}[used[kind]["same"] if kind in used else None]
        taus = [drafts.get(f"{trained} on {kind}") for trained in ("shipped", "plain", kind)]
        lines.append([kind, share, same, _certificate(certified.get(kind)), *map(_tau, taus)])
    return lines


def _certificate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    passed = [one["status"] == "passed" for one in found.get("checks", {}).values()]
    return f"{sum(passed)} of {len(passed)} checks, {found['prompts']} texts of {found['tokens']} tokens"


def _tau(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    taus = [seed["tau"] for seed in found["seeds"]]
    return f"{mean(taus):.2f} ({min(taus):.2f} to {max(taus):.2f})"
