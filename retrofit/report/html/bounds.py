"""What an artifact has to be held against, as HTML: other ways to decode, the best that could be, other machines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrofit.report.html import charts
from retrofit.report.html.charts import Mark
from retrofit.report.html.colours import MAIN, WAYS, colour
from retrofit.report.html.words import (
    drawing,
    figures,
    left_out,
    megabytes,
    number,
    numbers,
    paragraph,
    percent,
    short,
    table,
    text,
    tinted,
)

Data = Mapping[str, Any]
PROJECTIONS = ("kept", "scaled")
"""What is made of the time that neither reading nor multiplying explains."""


def against(found: Data) -> str:
    keys = ("tokens_per_s", "ratio_to_transformers", "tokens_per_forward", "small_forwards_per_token")
    rows = [
        [tinted(row["way"]), *(number(row[key]) for key in keys),
         f"{number(row['equal_texts'])} of {number(found['prompts'])}"]
        for row in found["rows"]
    ]  # fmt: skip
    header = [
        *("way", "tokens/s", "time of transformers'", "tokens per forward", "forwards of a small model a token"),
        "texts equal",
    ]
    said = f"Greedy, one prompt at a time; of the base's texts {percent(found['looping_share'])} loop."
    return _drawn_against(found) + table(header, rows) + paragraph(said) + left_out(found["skipped"])


def _drawn_against(found: Data) -> str:
    marks = [
        Mark(WAYS.get(row["way"], row["way"]), colour(row["way"]), [row["tokens_per_s"]], row["way"] not in MAIN)
        for row in found["rows"]
    ]
    return figures(drawing("Tokens per second, one prompt at a time", "All took turns.", charts.bars, marks))


def speed_of_light(found: Data) -> str:
    oracle = [
        [f"T = {number(one['temperature'])}, {number(held['candidates'])} of each slot",
         number(held["tokens_per_cycle"]), number(one["realised_tau"]), numbers(held["accept_cond"])]
        for one in found["oracle"] for held in one["by_candidates"]
    ]  # fmt: skip
    keys = ("rows", "measured_ms", "least_ms", "share_of_best")
    steps = [[tinted(one["way"]), *(number(one[key]) for key in keys), text(one["bound_by"])] for one in found["steps"]]
    machine, gain = found["machine"], found["speedup"]
    reads = (
        f"This machine reads {number(machine['read_gb_per_s'])} GB/s of a buffer as large as the weights"
        f" ({megabytes(machine['weight_bytes'])} MB), and multiplies {number(machine['multiply_gflop_per_s'])} GFLOP/s."
    )
    worth = "" if gain is None else paragraph(
        f"At {number(gain['tokens_per_forward'])} tokens per forward, drafts would be worth {number(gain['predicted'])}"
        f" times <code>ar</code> with both steps at best; they are worth {number(gain['measured'])} times."
    )  # fmt: skip
    return "".join([
        _drawn_limits(found),
        table(["an oracle over", "tokens per cycle", "decoding, drafts branching", "accepted by slot"], oracle),
        table(["step", "rows", "takes, ms", "at best, ms", "share of the best", "bound by"], steps),
        paragraph(reads), worth, left_out(found["skipped"]),
    ])  # fmt: skip


def _drawn_limits(found: Data) -> str:
    first: Data = next(iter(found["oracle"]), {"by_candidates": [], "realised_tau": None, "temperature": 0})
    cycles = [Mark("decoding", "self-spec", [first["realised_tau"]])]
    cycles += [
        Mark(f"an oracle over {short(held['candidates'])}", "base", [held["tokens_per_cycle"]], faint=True)
        for held in first["by_candidates"]
    ]
    plain = [step for step in found["steps"] if step["way"] == "ar"]
    steps = [
        Mark("takes", "ar", [step["measured_ms"] for step in plain]),
        Mark("at best", "base", [step["least_ms"] for step in plain], faint=True),
    ]
    rows = [short(step["rows"]) for step in plain]
    return figures(
        drawing(
            "Tokens per cycle, and what an oracle would take",
            f"T = {short(first['temperature'])}. It knows the text, and chooses among so many drafts of each slot;"
            " when decoding, drafts may branch.",
            charts.bars, cycles if first["by_candidates"] else [],
        ),
        drawing(
            "A step of ar, in milliseconds", "And the least that reading and multiplying let it take.", charts.lines,
            steps if len(plain) > 1 else [], rows, below="rows of the step",
        ),
    )  # fmt: skip


def other_hardware(found: Data) -> str:
    check = found["check"]
    kept, scaled = (
        f"{number(check[name]['median_error_percent'])} % in the middle and"
        f" {number(check[name]['worst_error_percent'])} % at worst"
        for name in PROJECTIONS
    )
    said = (
        f"<b>Nothing here was measured there.</b> A step takes {number(found['fixed_ms'])} ms and"
        f" {number(found['row_ms'])} ms a row here, of which reading and multiplying at full speed explain"
        f" {number(found['fixed_explained_ms'])} and {number(found['row_explained_ms'])}. There, these two take what is"
        f" published, in {text(found['dtype'])}, one request at a time. The rest stays as long as here (the first"
        " figure), or shrinks with them (the second)."
    )
    held = (
        f"Held in the same ways against a setting that was measured here, {text(check['setting'])}: the first is off by"
        f" {kept}, the second by {scaled}."
    )
    keys = ("ar_tokens_per_s", "drafter_tokens_per_s", "speedup")
    rows = [
        [text(one["device"]), *(" or ".join(number(one[name][key]) for name in PROJECTIONS) for key in keys),
         number(one["read_gb_per_s"]), number(one["multiply_gflop_per_s"]), text(one["source"])]
        for one in found["devices"]
    ]  # fmt: skip
    header = ["device", "ar, tokens/s", "drafter, tokens/s", "times ar's", "GB/s", "GFLOP/s", "published in"]
    return _drawn_elsewhere(found) + paragraph(said) + paragraph(held) + table(header, rows)


def _drawn_elsewhere(found: Data) -> str:
    gains = [(one["device"], [one[name]["speedup"] for name in PROJECTIONS]) for one in found["devices"]]
    marks = [Mark(name, "self-spec", sorted(both), faint=True) for name, both in gains if None not in both]
    said = "Drafting in every step, one request at a time; the two ends are two guesses at what is not known."
    return figures(drawing("Projected, not measured: times as fast as ar", said, charts.spans, marks))
