"""What an artifact is and what it answers, as HTML: what was compared, token by token, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrofit.report.html import charts
from retrofit.report.html.charts import Mark
from retrofit.report.html.colours import colour
from retrofit.report.html.words import (
    NONE,
    drawing,
    exactly,
    figures,
    left_out,
    number,
    pairs,
    paragraph,
    short,
    table,
    text,
    tinted,
)

Data = Mapping[str, Any]


def compared(found: Data) -> str:
    base, engine, machine, prompts = found["base"] or {}, found["engine"], found["hardware"], found["prompts"]
    artifact, template = found["artifact"] or {}, found["template"]
    prints = ", ".join(f"{key} {value[:12]}" for key, value in (base.get("fingerprint") or {}).items())
    categories = ", ".join(list(prompts.get("categories", {}))[:20])
    rows = {
        "base": text(f"{base.get('model', 'a live model')} {base.get('revision') or ''}".strip()),
        "its fingerprint": text(prints or NONE),
        "artifact": text(f"manifest sha256 {artifact['manifest_sha256'][:12]}" if artifact else "none"),
        "engine": text(f"{engine['backend']} in {engine['dtype']} on {engine['device']}, exact={engine['exact']}"),
        "machine": text(machine["gpu"] or machine["cpu"]),
        "threads": f"{number(machine['threads'])} on {number(machine['cores'])} cores",
        "versions": text(", ".join(f"{name} {version}" for name, version in machine["versions"].items())),
        "commit, date": text(f"{machine['commit'] or NONE}, {machine['date']}"),
        "prompts": f"{number(prompts['count'])}{', of the user' if prompts['given'] else ''}"
        f"{', ' + number(prompts['left_out']) + ' more left out' if prompts.get('left_out') else ''}"
        f", sha256 {text(prompts['sha256'][:12])}",
        "categories": text(categories or NONE),
        "chat template": text(
            "; ".join(template["differences"]) or ("as in training" if template["trained"] else "none")
        ),
        "seed": number(found["seed"]),
    }
    return pairs(rows.items())


def losslessness(found: Data) -> str:
    rows, worst = [], []
    for kind in ("greedy", "sampled"):
        part = found[kind]
        for way, counts in {**part["by_way"], "the base against itself": part["noise_floor"]}.items():
            texts = f"{number(counts['equal_texts'])} of {number(counts['texts'])}"
            bug = exactly(counts["bug"], short(counts["bug"]), "bad" if counts["bug"] else "")
            rows.append([tinted(way), kind, texts, bug, *(number(counts[name]) for name in ("near", "tie", "match"))])
        worst += [(kind, first) for first in part["worst"]]
    shown = table(["way", "", "texts equal", "bug", "near", "tie", "match"], rows)
    if not worst:
        return shown
    cells = [
        [tinted(first["way"]), kind, text(first["prompt"]), number(first["token"]), number(first["ulp"]),
         text(first["class"]), *(f"<code>{text(first[name])}</code>" for name in ("before", "expected", "got"))]
        for kind, first in worst
    ]  # fmt: skip
    header = ["way", "", "prompt", "token", "ulp", "class", "after", "the base", "this"]
    return f"{shown}<h3>Where they differ most</h3>{table(header, cells)}"


def quality(found: Data) -> str:
    rows = [
        [text(one["task"]), tinted(mode), number(stat["value"]), number(stat["original"]), number(stat["delta"]),
         _interval(stat["ci95"]), number(stat["mcnemar_p"]), number(stat["only_here"]), number(stat["only_original"]),
         number(stat["n"]), text(one["metric"])]
        for one in found["tasks"] for mode, stat in one["modes"].items()
    ]  # fmt: skip
    header = [
        *("task", "mode", "this", "the base", "difference", "its interval", "McNemar's p"),
        *("only this is right", "only the base", "items", "measure"),
    ]
    same = [
        paragraph(
            f"Of {number(one['items'])} answers of {tinted(mode)} {number(one['equal'])} are the base's,"
            f" {number(one['by_rounding'])} differ by rounding, {number(one['other'])} otherwise."
        )
        for mode, one in found["answers"].items()
    ]
    differing = [
        [tinted(one["mode"]), text(one["task"]), text(one["item"]), _said(one["original"]), _said(one["answer"])]
        for one in found["differing"]
    ]
    shown = table(["mode", "task", "item", "the base", "this"], differing)
    answers = f"<h3>Answers that are not the base's</h3>{shown}" if shown else ""
    return _drawn_quality(found) + table(header, rows) + "".join(same) + answers + left_out(found["skipped"])


def _said(answer: Any) -> str:
    return f"<code>{text(answer)}</code>"


def _interval(bounds: Any) -> str:
    return NONE if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def _drawn_quality(found: Data) -> str:
    """Of all tasks together.  Differences, for not every mode was asked every task: only within one is it fair."""
    modes: Data = next((one["modes"] for one in found["tasks"] if one["task"] == "all"), {})
    between = [
        Mark(mode, colour(mode), [stat["ci95"][0], stat["delta"], stat["ci95"][1]], mode == "ar")
        for mode, stat in modes.items() if stat["ci95"] is not None
    ]  # fmt: skip
    said = "Share of tasks solved less that of the base, and how far chance may move it. Left of the line is worse."
    return figures(drawing("Tasks solved, against the base", said, charts.intervals, between))
