"""What was measured of an artifact, as its card says it to the Hub (`model-index`) and to people.

Two kinds: acceptance on held-out text, which is in `retrofit.json`, and what `retrofit eval` left in `eval/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any, NamedTuple

from retrofit.artifact.files import sha256
from retrofit.artifact.folder import MANIFEST

REPORT, PICTURE = "eval/report.json", "eval/report.svg"
SPEEDS = {
    "tokens_per_s_user": "tokens per second of one request",
    "tokens_per_s_total": "tokens per second of all requests",
    "speedup": "times as fast as token by token",
}
"""Figures of a report that are of a batch size, of mode `auto`, by what their names begin with."""


class Reported(NamedTuple):
    """What `retrofit eval` found."""

    lines: tuple[str, ...]
    """The verdict."""
    command: str
    figures: Mapping[str, float]
    """As `report.json` has them."""
    where: str
    """On what: `bfloat16, hf backend, on AMD EPYC 7763, 8 of 8 cores`."""
    prompts: int

    @property
    def metrics(self) -> list[tuple[str, str, float]]:
        """(type, name, value) of the figures that a card shows."""
        told = {"tau": "tokens per verify cycle", "tpf": "tokens per forward"}
        found = [(key, name, self.figures[key]) for key, name in told.items() if key in self.figures]
        for key, value in self.figures.items():
            kind, _, batch = key.partition("_batch_")
            if kind in SPEEDS:
                found.append((kind, f"{SPEEDS[kind]}, batch {batch}, mode auto, in {self.where}", value))
        return found


def reported(root: Path) -> Reported | None:
    """What the report says of what the folder holds; None where it is of other files, not whole, or has no picture."""
    try:
        content = json.loads((root / REPORT).read_text(encoding="utf-8"))
        compared = content["sections"]["compared"]["data"]
        engine, machine = compared["engine"], compared["hardware"]
        found = Reported(
            tuple(map(_text, content["verdict"]["lines"])),
            _text(content["command"]),
            {_text(name): float(value) for name, value in content["figures"].items()},
            f"{_text(engine['dtype'])}, {_text(engine['backend'])} backend, on {_processor(machine)}",
            int(compared["prompts"]["count"]),
        )
        whole = content["status"] == "complete" and (root / PICTURE).is_file()
        measured = compared["artifact"]["manifest_sha256"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return found if whole and measured == sha256(root / MANIFEST) else None


def _processor(machine: Mapping[str, Any]) -> str:
    cores = f"{_text(machine['threads'])} of {_text(machine['cores'])} cores"
    return _text(machine["gpu"]) if machine["gpu"] else f"{_text(machine['cpu'])}, {cores}"


def _text(value: Any) -> str:
    """One line that is a cell of a table."""
    return " ".join(str(value).split()).replace("|", "/")


def model_index(name: str, acceptance: Mapping[str, Any], report: Reported | None) -> list[dict[str, Any]]:
    """For the header of a card; empty where nothing was measured.

    name: of the repository, without its owner; acceptance: as `retrofit.json` has it.
    """
    results = []
    if held_out := _held_out(acceptance):
        named = {"type": "held-out", "name": "held-out text of the training, teacher-forced"}
        results.append(_result(named, [("tau", f"tokens per verify cycle{where}", tau) for where, tau in held_out]))
    if report is not None and report.metrics:
        named = {"type": "retrofit-eval", "name": f"{report.prompts} prompts, by `{report.command}`"}
        results.append(_result(named, report.metrics))
    return [{"name": name, "results": results}] if results else []


def _result(dataset: dict[str, str], metrics: list[tuple[str, str, float]]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": dataset,
        "metrics": [{"type": kind, "name": name, "value": round(value, 4)} for kind, name, value in metrics],
    }


def _held_out(acceptance: Mapping[str, Any]) -> list[tuple[str, float]]:
    """(where, tau) by length of context, or of all where that was not told apart.

    tau = 1 + sum_k prod_{i<=k} a_i, a_i the chance that draft i is accepted once all before it were.
    """
    if by_context := acceptance.get("by_context"):
        return [(f", contexts up to {one['up_to']:,} tokens", one["tau"]) for one in by_context]
    conditional = acceptance.get("conditional") or {}
    chances = conditional.get("sampled")
    return [("", 1.0 + sum(accumulate(chances, mul)))] if chances else []


def summary(report: Reported | None) -> str:
    """Verdict, figures and picture of a report, as Markdown with an empty line before it; else nothing."""
    if report is None:
        return ""
    rows = [f"| {name} | {value:.4g} |" for _, name, value in report.metrics]
    table = "\n".join(["| measured by `retrofit eval` | |", "| --- | --- |", *rows])
    return "\n\n".join([
        "", "\n".join(f"- {line}" for line in report.lines), *([table] if rows else []),
        "![Tokens per second and tokens per forward, by mode](eval/report.svg)",
        f"Measured by `{report.command}`; [the whole report](eval/report.md), and as a page `eval/report.html`.",
    ])  # fmt: skip
