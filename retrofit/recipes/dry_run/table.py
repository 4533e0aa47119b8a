"""The report of a dry run, as lines for people.

Not here: what is in it (`report.py`).
"""

from __future__ import annotations

from typing import Any

from retrofit.named_bases import EMBEDDED
from retrofit.recipes.dry_run.fit import short
from retrofit.recipes.schema import Recipe

SHOWN = 4
"""Parts of a phase's memory that its line names."""


def table(report: dict[str, Any], plan: Recipe) -> str:
    """`dry_run` for people."""
    parts = [
        ["text", *_columns([(name, state, "") for name, state in report["text"].items()])],
        ["parameters", *_parameter_lines(report["parameters"])],
        ["memory", *_memory_lines(report["memory"], report["device"])],
        ["disk", *_disk_lines(report["disk"], report["model"])],
        ["time", *_time_lines(report["time"], plan)],
    ]
    if "fit" in report:
        parts.append([f"fit {short(report['fit']['limit'])}", *_fit_lines(report["fit"])])
    return "\n".join(line if not n else f"  {line}" for part in parts for n, line in enumerate(part))


def _columns(rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in rows]


def _parameter_lines(counted: dict[str, Any]) -> list[str]:
    modules = ", ".join(f"{count} {name}" for name, count in counted["modules"].items())
    names = {"base": "base", "lora": "LoRA", "mask_vector": "mask vector", "markov_head": "Markov head"}
    names |= {"confidence_head": "confidence head", **({"along": "trained along"} if counted["along"] else {})}
    names |= {"trained": "trained"}
    notes = {"lora": f"on {modules}", "along": "the base's, or a LoRA on all rows"}
    notes |= {"trained": f"{counted['share']:.2%} of the base"}
    return _columns([(label, f"{counted[key]:,}", notes.get(key, "")) for key, label in names.items()])


def _memory_lines(memory: dict[str, Any], device: str) -> list[str]:
    peak = memory["peak"]
    rows = []
    for name, phase in memory["phases"].items():
        rows.append((name, short(phase["bytes"]), _holds(phase, SHOWN)))
    beyond = (
        f"Python and its imports, {short(memory['python'])} more" if device == "cpu" else "what other programs hold"
    )
    compared = "" if device == "cpu" else "; estimates for GPUs have not been compared with one"
    return [
        f"beyond {beyond}; all windows full{compared}",
        *_columns(rows),
        f"peak {short(peak['bytes'])} ({peak['bytes']:,} bytes), {peak['phase']}:",
        f"  {_holds(memory['phases'][peak['phase']], 99)}",
    ]


def _holds(phase: dict[str, Any], most: int) -> str:
    """The largest parts of what a phase holds."""
    held = sorted(phase["holds"].items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {short(size)}" for kind, size in held[:most] if size >= phase["bytes"] / 1000)


def _disk_lines(disk: dict[str, Any], model: str) -> list[str]:
    kept = disk["checkpoints_kept"]
    rows = [
        (
            "checkpoints",
            short(disk["checkpoints"]),
            f"{short(disk['checkpoint'])} each, {kept} kept, one being written",
        ),
        ("artifact", short(disk["artifact"]), ""),
    ]
    if "responses_at_most" in disk:
        rows.append(("responses", short(disk["responses_at_most"]), f"at most, in {disk['responses_folder']}"))
    if disk["download"]:
        rows.append(("download", short(disk["download"]), model))
    elif model == EMBEDDED:
        rows.append(("download", "none", "the base ships with retrofit"))
    return _columns([*rows, ("free", short(disk["free"]), "where the artifact goes")])


def _time_lines(measured: dict[str, Any], plan: Recipe) -> list[str]:
    if "not_measured" in measured:
        return [f"not measured: {measured['not_measured']}"]
    probe = measured["probe"]
    scaled = "" if probe["windows"] == probe["of"] else f" on {probe['windows']} of {probe['of']} windows, scaled"
    responses = ", without the time to write responses" if plan.data.responses == "regenerate" else ""
    return _columns(
        [
            ("step", f"{measured['step']:.3g} s", f"measured in {probe['steps']} steps{scaled}"),
            ("draft rows", f"{measured['draft_rows_per_second']:,.0f}/s", ""),
            ("training", duration(measured["training"]), f"{plan.train.steps:,} steps"),
            ("measuring at the end", duration(measured["measuring"]), ""),
            ("total", duration(measured["total"]), f"without reading text and writing checkpoints{responses}"),
        ]
    )


def _fit_lines(fit: dict[str, Any]) -> list[str]:
    if fit["fits"]:
        return [f"it fits: {short(fit['needs'])} are needed"]
    lines = [f"it does not fit: {short(fit['needs'])} are needed"]
    for one in fit["suggestions"]:
        lines.append(f"{' '.join(one['overrides'])}  needs {short(one['needs'])}")
    return lines


def duration(seconds: float) -> str:
    """`1 h 12 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
