"""The sections of results/joint.json as one table: a line for each way to train, means over seeds.

section    [base: ]arm, seed N; of the embedded base without the name
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from benchmarks.drafts.figures import ratios, shown

HEAD = [
    "",
    "seeds",
    "chain, greedy",
    "chain, T = 0.8",
    "best plan, greedy",
    "best plan, T = 0.8",
    "of frozen's, T = 0.8",
    "tau, held out",
    "`diffusion`: TPF at agreement",
    "KL per token",
    "same next token",
    "training, s",
]
FROZEN = "frozen"
WAYS = ("chain", "best plan")
TEMPERATURES = ("0", "0.8")
THRESHOLD = "0.5"
AIM_TPF, AIM_KL = 1.05, 0.05
"""Of anchored joint training: TPF as a multiple of the frozen base's, and the drift that it may cost."""

Figures = Mapping[str, Any]


def rows(sections: Mapping[str, Any]) -> list[list[str]]:
    """A head, and a line for each base and arm, in the order they were measured in."""
    runs = _runs(sections)
    return [HEAD, *(_line(arm, of, runs) for arm, of in runs.items())]


def verdict(sections: Mapping[str, Any]) -> str:
    """Which arms reach the aim."""
    runs, reached = _runs(sections), []
    for arm, of in runs.items():
        to_frozen, drifts = _to_frozen(arm, of, runs), [f["drift"]["kl"] for f in of.values() if f["drift"]]
        if to_frozen and drifts and mean(to_frozen) >= AIM_TPF and mean(drifts) <= AIM_KL:
            reached.append(arm)
    aim = f"{AIM_TPF} times frozen's tokens per forward, best plan, T = 0.8, at {AIM_KL} nats of KL per token at most"
    return f"The aim, {aim}: {'met by ' + ', '.join(reached) if reached else 'missed by all'}."


def _runs(sections: Mapping[str, Any]) -> dict[str, dict[int, Figures]]:
    """Arm, with its base -> seed -> what was found."""
    runs: dict[str, dict[int, Figures]] = {}
    for title, one in sections.items():
        arm, _, seed = title.rpartition(", seed ")
        runs.setdefault(arm, {})[int(seed)] = one["figures"]
    return runs


def _to_frozen(arm: str, of: Mapping[int, Figures], runs: Mapping[str, Mapping[int, Figures]]) -> list[float]:
    """Of each seed, to the frozen arm of the same base and seed."""
    base, separator, _ = arm.rpartition(": ")
    frozen = runs.get(f"{base}{separator}{FROZEN}", {})
    return ratios(_best_plans(of), _best_plans(frozen))


def _line(arm: str, of: Mapping[int, Figures], runs: Mapping[str, Mapping[int, Figures]]) -> list[str]:
    taken = [[f["tpf"][t][way] for f in of.values()] for way in WAYS for t in TEMPERATURES]
    to_frozen = _to_frozen(arm, of, runs)
    drifts = [f["drift"] for f in of.values() if f["drift"]] or [{"kl": 0.0, "agreement": 1.0}]
    passes = [f["diffusion"][THRESHOLD] for f in of.values()]
    return [
        arm,
        str(len(of)),
        *map(_cell, taken),
        _cell(to_frozen, 3) if to_frozen else "-",
        _cell([f["held_out_tau"] for f in of.values()]),
        f"{mean(p['tpf'] for p in passes):.2f} at {mean(p['agreement'] for p in passes):.1%}",
        _cell([drift["kl"] for drift in drifts], 4),
        f"{mean(drift['agreement'] for drift in drifts):.1%}",
        f"{mean(f['seconds'] for f in of.values()):.0f}",
    ]


def _best_plans(of: Mapping[int, Figures]) -> dict[int, float]:
    """Seed -> tokens per forward of the best plan at T = 0.8."""
    return {seed: f["tpf"]["0.8"]["best plan"] for seed, f in of.items()}


def _cell(values: Sequence[float], places: int = 2) -> str:
    """The mean, and the range where there is one."""
    return shown(values if min(values) < max(values) else values[:1], places)
