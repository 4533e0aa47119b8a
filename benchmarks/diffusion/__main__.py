"""Mode `diffusion` on the embedded base: what speed costs in agreement, and gaps filled against `ar`.

    python -m benchmarks.diffusion ARTIFACT --infilling ARTIFACT

curve      for each tolerance, and each threshold with everything kept: TPF, rows a token, agreement (the share of
           tokens that are the base's own first choice behind the text so far), and how many of the text that really
           follows are met in a row
infilling  spans of held-out text, hidden: exact matches by what `ar` writes behind the prefix, and by `infill`
revision   the same spans with another text's in their place: how often it is replaced by what stood there, and how
           often an unharmed one is left alone
Greedy, on the CPU, offline.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from benchmarks.common import ROOT, Bar, Setting, load, say, section, table, write
from benchmarks.diffusion.tables import rows_of
from retrofit.errors import RetrofitError
from retrofit.eval.differences import margins
from retrofit.eval.trace import Trace, figures
from retrofit.recipes.text.library import held_out_prompts
from retrofit.runtime.host.infilling import Filled

RESULTS = ROOT / "results" / "diffusion.json"
PROMPT, NEW, BATCH = 64, 64, 8
TOLERANCES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, math.inf)
THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9)
BEHIND = 32
"""Tokens of the suffix."""
LENGTHS = (1, 2, 3, 4, 6, 8)
"""Of hidden spans.  Unit: tokens."""
FEWEST, MOST_LOST = 1.5, 2.0
"""TPF, and points of agreement that it may cost."""


@click.command(help=__doc__)
@click.argument("artifact", type=click.Path(path_type=Path, exists=True))
@click.option("--infilling", type=click.Path(path_type=Path, exists=True), help="One that learned to fill gaps.")
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True, help="Held-out prompts of the curve.")
@click.option("--spans", type=click.IntRange(1), default=96, show_default=True, help="Held-out spans, of all lengths.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="Results file.")
def main(artifact: Path, infilling: Path | None, prompts: int, spans: int, out: Path) -> None:
    logging.set_verbosity_error()
    missed = False
    try:
        for name, folder, count in (("curve", artifact, prompts), ("infilling", infilling, spans)):
            if folder is None:
                continue
            begin = time.perf_counter()
            setting = load(folder, 1)
            found, bars = (curve if name == "curve" else infilled)(setting, count)
            found["training"] = trained(setting)
            title = f"diffusion, {name}"
            how = f"--prompts {count}" if name == "curve" else f"--infilling ARTIFACT --spans {count}"
            command = f"python -m benchmarks.diffusion ARTIFACT {how}"
            write(out, {title: section(command, time.perf_counter() - begin, bars, found)})
            missed |= any(bar.met is False for bar in bars)
            print(table(rows_of(title, found)))
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    sys.exit(3 if missed else 0)


def trained(setting: Setting) -> dict[str, Any]:
    """What the artifact says of its training."""
    config = setting.engine.config
    return {"steps": config["training"].get("steps"), "before": config.get("from", {}).get("steps", 0),
            "draft_rows": config["training"].get("draft_rows"), "block": config["draft"]["block"]}  # fmt: skip


def texts_of(setting: Setting, count: int, length: int) -> list[list[int]]:
    """Held-out texts of so many tokens."""
    return held_out_prompts(setting.engine.tokenizer, count, length)


def in_a_row(text: Sequence[int], truth: Sequence[int]) -> int:
    """How many tokens from the beginning are those of the truth."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(text, truth, strict=False))))


def curve(setting: Setting, count: int) -> tuple[dict[str, Any], list[Bar]]:
    texts = texts_of(setting, count, PROMPT + NEW)
    ways: list[tuple[str, float | None, float | None]] = [("ar", None, None)]
    ways += [("diffusion", tolerance, 0.0) for tolerance in TOLERANCES]
    ways += [("diffusion", math.inf, threshold) for threshold in THRESHOLDS]
    points = []
    for mode, tolerance, threshold in ways:
        say(f"{mode}, tolerance {tolerance}, threshold {threshold}")
        results = setting.engine.generate(
            [text[:PROMPT] for text in texts], mode, tolerance=tolerance, threshold=threshold, max_new_tokens=NEW,
            batch_size=BATCH, ignore_eos=True, original_settings=False,
        )  # fmt: skip
        found = figures(Trace.of(results))
        short = [m for r in results for m in margins(setting.reference, r.prompt, r.tokens, torch.float32)]
        right = [in_a_row(r.tokens, text[PROMPT:]) for r, text in zip(results, texts, strict=True)]
        points.append(
            {
                "mode": mode,
                "tolerance": "inf" if tolerance == math.inf else tolerance,
                "threshold": threshold,
                "tpf": found["tpf"],
                "rows_per_token": found["rows_per_token"],
                "agreement_percent": round(100 * sum(m <= 0 for m in short) / len(short), 3),
                "right_in_a_row": round(sum(right) / len(right), 3),
            }
        )
    return {"prompts": count, "max_new_tokens": NEW, "points": points}, bars_of(points)


def bars_of(points: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """The fastest point that costs little agreement; the first one is `ar`."""
    first = points[0]["agreement_percent"]
    held = [p for p in points[1:] if first - p["agreement_percent"] <= MOST_LOST]
    best = max(held, key=lambda p: p["tpf"])
    said = f"TPF {best['tpf']:.2f} at {best['agreement_percent']:.1f} % (tolerance {best['tolerance']})"
    what = f"TPF of diffusion at a loss of agreement of at most {MOST_LOST:g} points, greedy"
    return [Bar(what, f">= {FEWEST}", said, best["tpf"] >= FEWEST)]


def infilled(setting: Setting, count: int) -> tuple[dict[str, Any], list[Bar]]:
    engine, rng = setting.engine, random.Random(0)
    texts = texts_of(setting, count, PROMPT + max(LENGTHS) + BEHIND)
    lengths = [LENGTHS[n % len(LENGTHS)] for n in range(count)]
    say(f"filling {count} gaps")
    hidden = [text[PROMPT : PROMPT + n] for text, n in zip(texts, lengths, strict=True)]
    other = [rng.choice([span for span in hidden if len(span) == len(own) and span != own] or [own]) for own in hidden]
    rows = []
    for text, n, span, wrong in zip(texts, lengths, hidden, other, strict=True):
        prefix, suffix = text[:PROMPT], text[PROMPT + n : PROMPT + n + BEHIND]
        known = engine.infill(prefix, suffix, lengths=[n])
        free = engine.infill(prefix, suffix)
        rows.append(
            {
                "tokens": n,
                "ar": best_of(known, ("ar",)) == span,
                "drafter": best_of(known, ("filled",)) == span,
                "infill": known.tokens == span,
                "drafter, length unknown": best_of(free, ("filled",)) == span,
                "infill, length unknown": free.tokens == span,
                "repaired": engine.infill(prefix, suffix, given=wrong).tokens == span,
                "left alone": engine.infill(prefix, suffix, given=span).tokens == span,
                "forwards": sum(c for kind, c in known.forwards.items() if kind != "prefill"),
            }
        )
    ways = [name for name in rows[0] if name not in ("tokens", "forwards")]
    by_length = {
        str(n): {way: percent([row[way] for row in rows if row["tokens"] == n]) for way in ways} for n in LENGTHS
    }
    total = {way: percent([row[way] for row in rows]) for way in ways}
    better = [sum(row[a] and not row[b] for row in rows) for a, b in (("infill", "ar"), ("ar", "infill"))]
    said = f"{total['infill']:.1f} % against {total['ar']:.1f} %, {better[0]} spans to {better[1]}"
    bars = [Bar("exact match of a hidden span, infilling against ar behind the prefix", "more", said,
                total["infill"] > total["ar"])]  # fmt: skip
    found = {"spans": count, "prefix": PROMPT, "suffix": BEHIND, "exact_percent": total, "by_length": by_length,
             "forwards_per_span": round(sum(row["forwards"] for row in rows) / count, 2)}  # fmt: skip
    return found, bars


def best_of(found: Filled, origins: Sequence[str]) -> list[int]:
    """The likeliest candidate of these origins; one that two have is the first one's, the drafter's."""
    mine = [one for one in found.candidates if one.origin in origins]
    return mine[0].tokens if mine else found.candidates[0].tokens


def percent(right: Sequence[bool]) -> float:
    return round(100 * sum(right) / len(right), 2) if right else 0.0


if __name__ == "__main__":
    main()
