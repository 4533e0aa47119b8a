"""How an artifact decodes, as HTML: what its drafts are worth, how fast it is, where that pays, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from retrofit.report.headline import first_cells, swept
from retrofit.report.html import charts
from retrofit.report.html.charts import Mark, Point
from retrofit.report.html.colours import MAIN, WAYS, colour
from retrofit.report.html.words import (
    drawing,
    figures,
    left_out,
    megabytes,
    named,
    number,
    numbers,
    pairs,
    paragraph,
    percent,
    short,
    table,
    text,
    tinted,
    where,
)

Data = Mapping[str, Any]
TOGETHER = "requests that run together"
CATEGORIES = 12
"""Those that a picture has room for; the table has them all."""


def acceptance(found: Data) -> str:
    temperatures = found["by_temperature"]
    rows = []
    for one in temperatures:
        for name, way in (("drafter", "self_spec"), ("prompt_lookup", "prompt_lookup")):
            rows.append([f"{tinted(way)}, T = {number(one['temperature'])}", *_accepted(one[name])])
    rows += [[text(one["category"]), *_accepted(one)] for one in found["by_category"]]
    rows += [[f"batch {number(one['batch_size'])}", *_accepted(one)] for one in found["by_batch"]]
    rows += [[f"{number(one['context_tokens'])} tokens before", *_accepted(one)] for one in found["by_context"]]
    header = ["", "TPF", "tau", "tau, mean of requests", "rows per token", "looping", "accepted by slot"]
    claims = [
        paragraph(
            f"The artifact claims {number(claim['claimed_drafts_per_cycle'])} accepted drafts a cycle ({text(name)});"
            f" decoding accepts {number(claim['measured_drafts_per_cycle'])}."
        )
        for name, claim in found["claimed"].items()
    ]
    return "".join([_drawn_acceptance(found), table(header, rows), *claims, left_out(found["skipped_contexts"])])


def _accepted(one: Data) -> list[str]:
    measures = [number(one[name]) for name in ("tpf", "tau", "tau_macro", "rows_per_token")]
    return [*measures, percent(one["looping_share"]), numbers(one["accept_joint"])]


def _drawn_acceptance(found: Data) -> str:
    temperatures = found["by_temperature"]
    first = temperatures[0]
    slots = [
        Mark(f"T = {short(one['temperature'])}", "self-spec", one["drafter"]["accept_joint"], one is not first)
        for one in temperatures
    ]
    places = [str(place + 1) for place in range(max(len(mark.values) for mark in slots))]
    worth = [
        Mark(f"{name}, T = {short(one['temperature'])}", tint, [one[part]["tpf"]], part == "prompt_lookup")
        for one in temperatures
        for part, name, tint in (("drafter", "self_spec", "self-spec"), ("prompt_lookup", "prompt lookup", "lookup"))
    ]
    sampled = f"At T = {short(first['temperature'])}."
    return figures(
        drawing("Tokens per forward", "Token by token it is one.", charts.bars, worth),
        drawing(
            "Drafts accepted, by their place in the block", "Share of blocks that are accepted that far.",
            charts.lines, slots, places, below="place in the block",
        ),
        _by("Tokens per forward, by category", sampled, charts.bars, _of(found["by_category"], "category")),
        _over("Tokens per forward, in a batch", sampled, found["by_batch"], "batch_size", TOGETHER),
        _over("Tokens per forward, behind a text", sampled, found["by_context"], "context_tokens", "tokens before"),
    )  # fmt: skip


def _of(measured: Iterable[Data], key: str) -> list[Mark]:
    return [Mark(one[key], "self-spec", [one["tpf"]]) for one in list(measured)[:CATEGORIES]]


def _by(title: str, said: str, draw: Callable[..., str], marks: Sequence[Mark]) -> str:
    """Nothing where there is nothing to compare."""
    return drawing(title, said, draw, marks) if len(marks) > 1 else ""


def _over(title: str, said: str, measured: Sequence[Data], key: str, below: str) -> str:
    if len(measured) < 2:
        return ""
    mark = Mark("self_spec", "self-spec", [one["tpf"] for one in measured])
    return drawing(title, said, charts.lines, [mark], [short(one[key]) for one in measured], below=below)


def speed(found: Data) -> str:
    header = [
        *("way", "batch", "tokens/s a user", "time of ar's", "of transformers'", "tokens/s in all", "first token, ms"),
        *("between p50, ms", "p99, ms", "peak memory, MB", "tokens before", "T"),
    ]
    keys = ("tokens_per_s_total", "ttft_p50_ms", "itl_p50_ms", "itl_p99_ms")
    rows = [
        [tinted(way), number(cell["batch_size"]), number(timed["tokens_per_s_user"]), number(cell["ratio_to_ar"][way]),
         number(cell["ratio_to_transformers"][way]), *(number(timed[key]) for key in keys),
         megabytes(timed["peak_memory_bytes"]), *where(cell)]
        for cell in found["cells"] for way, timed in cell["ways"].items()
    ]  # fmt: skip
    return _drawn_speed(found) + table(header, rows) + left_out(found["skipped_cells"])


def _place(cell: Data) -> str:
    return f"{short(cell['context_tokens'])} tokens before, T = {short(cell['temperature'])}."


def _drawn_speed(found: Data) -> str:
    cells = first_cells({"speed": found})
    first = min(cells, key=lambda cell: cell["batch_size"])
    said = f"Batch {short(first['batch_size'])}, {_place(first)}"
    return figures(
        drawing(
            "Tokens per second, for one user", said, charts.bars,
            [_mark(way, [timed["tokens_per_s_user"]]) for way, timed in first["ways"].items()],
        ),
        drawing(
            "Waiting for the next chunk", f"The median and the slowest in a hundred. {said}", charts.spans,
            [_mark(way, [timed["itl_p50_ms"], timed["itl_p99_ms"]], " ms") for way, timed in first["ways"].items()],
        ),
        _over_batches("Time per token, against ar", f"Below the dashed line is faster. {_place(first)}", cells),
    )  # fmt: skip


def _mark(way: str, values: Sequence[float | None], unit: str = "") -> Mark:
    return Mark(WAYS.get(way, way), colour(way), values, way not in MAIN, unit)


def _over_batches(title: str, said: str, cells: Sequence[Data]) -> str:
    """Of one batch size the table says it all."""
    if len(cells) < 2:
        return ""
    ways = dict.fromkeys(way for cell in cells for way in cell["ratio_to_ar"] if way != "ar")
    marks = [
        Mark(way.replace("_", " "), colour(way), [cell["ratio_to_ar"].get(way) for cell in cells], way != "auto")
        for way in ways
        if all(way in cell["ratio_to_ar"] for cell in cells)
    ]
    batches = [short(cell["batch_size"]) for cell in cells]
    return drawing(title, said, charts.lines, marks, batches, even="as long as ar", below=TOGETHER)


def break_even(found: Data) -> str:
    rows = [
        [tinted(way), *(number(at[key]) for key in ("pays_up_to", "stops_at", "batch_size")), *where(one)]
        for one in found["by_context"] for way, at in one["ways"].items()
    ]  # fmt: skip
    return table(["way", "pays up to batch", "no longer at", "even at about", "tokens before", "T"], rows)


def cost(found: Data) -> str:
    price = found["price_usd_per_hour"]
    rows = [
        [tinted(way), number(cell["batch_size"]), *([] if price is None else [number(one["usd_per_million_tokens"])]),
         number(one["relative_to_ar"]), *where(cell)]
        for cell in found["cells"] for way, one in cell["ways"].items()
    ]  # fmt: skip
    if price is None:
        said, drawn, dollars = "No price was given, so this is relative.", "", []
    else:
        said, drawn = f"At {number(price)} US dollars an hour.", _drawn_cost(found)
        dollars = ["USD for a million tokens"]
    return paragraph(said) + drawn + table(["way", "batch", *dollars, "of ar's", "tokens before", "T"], rows)


def _drawn_cost(found: Data) -> str:
    first = min(first_cells({"speed": found}), key=lambda cell: cell["batch_size"])
    title, said = "US dollars for a million tokens", f"Batch {short(first['batch_size'])}, {_place(first)}"
    marks = [_mark(way, [one["usd_per_million_tokens"]]) for way, one in first["ways"].items()]
    return figures(drawing(title, said, charts.bars, marks))


def diffusion(found: Data) -> str:
    points = [
        Point(point["tpf"], point["agreement_percent"], name if isinstance(name, str) else short(name), way)
        for name, way, point in swept(found) if point["tpf"] is not None
    ]  # fmt: skip
    drawn = drawing(
        "What speed costs in agreement",
        "Each point is a threshold, and what reaches it is kept; by default the base takes back what it finds too "
        "unlikely.  Further right are fewer forwards.",
        charts.curve, points, across="tokens per forward", up="agreement, %",
    )  # fmt: skip
    rows = [
        [name if isinstance(name, str) else number(name), number(point["tpf"]),
         number(point["rows_per_token"]), number(point["agreement_percent"])]
        for name, _, point in swept(found)
    ]  # fmt: skip
    area = paragraph(f"Area under the points of the thresholds: {number(found['area_under_points'])}.")
    return figures(drawn) + table(["threshold", "TPF", "rows per token", "agreement, %"], rows) + area


def training(found: Data) -> str:
    shares = {"added_share_of_base"}
    rows = [(named(key), percent(value) if key in shares else number(value)) for key, value in found.items()]
    return pairs(rows)
