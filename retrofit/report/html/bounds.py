"""What an artifact has to be held against, as HTML: other ways to decode the same original."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrofit.report.html import charts
from retrofit.report.html.charts import Mark
from retrofit.report.html.colours import WAYS, colour
from retrofit.report.html.words import drawing, figures, left_out, number, paragraph, percent, table, tinted

Data = Mapping[str, Any]
MAIN = ("auto", "transformers")
"""Ways that the picture is about; the others stand beside them."""


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
    said = f"Greedy, one prompt at a time; of the original's texts {percent(found['looping_share'])} loop."
    return _drawn_against(found) + table(header, rows) + paragraph(said) + left_out(found["skipped"])


def _drawn_against(found: Data) -> str:
    marks = [
        Mark(WAYS.get(row["way"], row["way"]), colour(row["way"]), [row["tokens_per_s"]], row["way"] not in MAIN)
        for row in found["rows"]
    ]
    return figures(drawing("Tokens per second, one prompt at a time", "All took turns.", charts.bars, marks))
