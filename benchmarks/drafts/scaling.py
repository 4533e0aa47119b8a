"""Fit what drafts come to against the draft rows trained on, for --budget.  `python -m benchmarks.drafts.scaling`

Takes the own recipe's runs of results/ablations.json (`python -m benchmarks.drafts.ablations --steps N tiny`), whose
lengths differ.  A curve fitted to all but the longest is held against that one; the curve that ships is fitted to all.
Trains nothing.  Exits 3 if the bar is missed.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import click

from benchmarks.common import ROOT, Bar, section, write
from benchmarks.drafts.ablations import RESULTS as RUNS
from benchmarks.drafts.setting import OWN
from retrofit.named_bases import EMBEDDED
from retrofit.recipes.budget.curve import FEWEST, FILE, Curve, fitted

RESULTS = ROOT / "results" / "scaling.json"
NEAR = 0.1
"""How far a prediction may be from what was measured, as a part of that."""

Points = list[tuple[int, float]]


def points_of(sections: dict[str, Any]) -> Points:
    """(draft rows, tau) of the own recipe's runs with its own keys, by their length; of several seeds the mean."""
    found: dict[tuple[int, int], Points] = {}
    for figures in (one["figures"] for one in sections.values()):
        if figures["recipe"] == OWN:
            found.setdefault((figures["steps"], figures["rows"]), []).append(
                (figures["draft_rows"], figures["held_out_tau"])
            )
    return sorted((round(mean(n for n, _ in runs)), mean(tau for _, tau in runs)) for runs in found.values())


def checked(points: Points) -> tuple[Curve, float]:
    """(curve of all but the longest run, what it says of that one, to what was measured)."""
    *seen, (rows, tau) = points
    curve = fitted(seen)
    return curve, curve.tau(rows) / tau


@click.command(help=__doc__)
@click.option("--runs", type=click.Path(path_type=Path), default=RUNS, help="[default: results/ablations.json]")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="[default: results/scaling.json]")
def main(runs: Path, out: Path) -> None:
    begin = time.perf_counter()
    points = points_of(json.loads(runs.read_text())["sections"])
    if len(points) <= FEWEST:
        raise click.ClickException(f"{len(points)} runs of {OWN} are too few, of at least {FEWEST + 1} lengths")
    before, ratio = checked(points)
    curve = fitted(points)
    bar = Bar(
        f"tau foretold of a run that is {points[-1][0] / points[-2][0]:.1f} times as long as any the curve has seen",
        f"within {NEAR:.0%}", f"{ratio - 1:+.1%}", abs(ratio - 1) <= NEAR,
    )  # fmt: skip
    figures = {"points": points, "curve_without_the_longest": asdict(before), "curve": asdict(curve)}
    write(out, {EMBEDDED: section("python -m benchmarks.drafts.scaling", time.perf_counter() - begin, [bar], figures)})
    FILE.write_text(json.dumps({EMBEDDED: asdict(curve)}, indent=2) + "\n")
    print(f"  {bar.what}  {bar.bar}  {bar.figure}  {curve}")
    sys.exit(0 if bar.met else 3)


if __name__ == "__main__":
    main()
