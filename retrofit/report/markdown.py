"""A report as Markdown, for people: every figure comes from `report.json`, nothing is measured or worked out here.

What models and prompts say is escaped: it is text, never markup.  The model an artifact is held beside is "the base",
which is the original, or in the profile `joint` a model of its own; the verdict says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from retrofit.report.headline import swept

Data = Mapping[str, Any]
TITLES = {
    "compared": "What was compared",
    "losslessness": "Does it answer the same",
    "quality": "Is it as good",
    "acceptance": "What the drafts are worth",
    "speed": "Speed",
    "break_even": "Where it stops paying",
    "cost": "Cost",
    "against": "Beside other ways to decode the base",
    "diffusion": "Diffusion: speed against agreement",
    "speed_of_light": "How far from the best that could be",
    "other_hardware": "On other hardware: a projection",
    "training": "What the conversion cost",
}
SPECIAL = {
    "&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;", "*": "&#42;", "_": "&#95;", "[": "&#91;",
    "]": "&#93;", "\\": "&#92;", "\n": "⏎", "\r": "⏎",
}  # fmt: skip


def markdown(data: Data) -> str:
    """The whole page."""
    parts = [f"# Report: {text(_name(data))}", "", *_verdict(data)]
    for name, section in data["sections"].items():
        if section["status"] == "done" and name in RENDERED:
            parts += ["", f"## {TITLES[name]}", "", *RENDERED[name](section["data"])]
            parts += ["", f"`{data['command']}` makes these figures again."]
    parts += ["", "## Not measured", "", *(f"- {text(s['section'])}: {text(s['reason'])}" for s in data["skipped"])]
    return "\n".join([*parts, ""])


def text(value: Any) -> str:
    """What a model or a person wrote, in one line, as nothing but text."""
    return "".join(SPECIAL.get(c, c) for c in str(value) if c.isprintable() or c in "\n\r")


def number(value: Any) -> str:
    """Short: four digits of a number that is not whole, a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else text(value)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_row(header), _row(["---"] * len(header)), *map(_row, rows)]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(data: Data) -> str:
    compared = data["sections"]["compared"]
    artifact = compared["data"]["artifact"] if compared["status"] == "done" else None
    return artifact["name"] if artifact else "a live engine"


def _verdict(data: Data) -> Iterator[str]:
    verdict = data["verdict"]
    for line in verdict["lines"]:
        yield f"- {line}"
    if data["status"] == "partial":
        yield "- **This report is partial**: the same command goes on."
    if verdict["gates"]:
        yield ""
        rows = [["passed" if g["ok"] else "**FAILED**", g["name"], text(g["says"])] for g in verdict["gates"]]
        yield from table(["gate", "", ""], rows)


def _compared(found: Data) -> Iterator[str]:
    base, engine, machine, prompts = found["base"] or {}, found["engine"], found["hardware"], found["prompts"]
    artifact = found["artifact"] or {}
    template = found["template"]
    rows = {
        "base": f"{base.get('model', 'a live model')} {base.get('revision') or ''}".strip(),
        "fingerprint": ", ".join(f"{k} {str(v)[:12]}" for k, v in (base.get("fingerprint") or {}).items()) or "-",
        "artifact": f"manifest sha256 {artifact['manifest_sha256'][:12]}" if artifact else "none",
        "engine": f"{engine['backend']} in {engine['dtype']} on {engine['device']}, exact={engine['exact']}",
        "machine": f"{machine['gpu'] or machine['cpu']}, {machine['threads']} of {machine['cores']} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        "commit, date": f"{machine['commit'] or '-'}, {machine['date']}",
        "prompts": f"{prompts['count']}{_given(prompts)}, sha256 {prompts['sha256'][:12]}",
        "chat template": "; ".join(template["differences"]) or ("as in training" if template["trained"] else "none"),
        "seed": str(found["seed"]),
    }
    yield from table(["", ""], [[name, text(value)] for name, value in rows.items()])


def _given(prompts: Data) -> str:
    more = prompts.get("left_out")
    return (" of the user" if prompts["given"] else "") + (f" ({more} more left out)" if more else "")


def _losslessness(found: Data) -> Iterator[str]:
    rows = []
    for kind in ("greedy", "sampled"):
        part = found[kind]
        ways = {**part["by_way"], "the base against itself": part["noise_floor"]}
        for way, counts in ways.items():
            classes = [number(counts[c]) for c in ("match", "tie", "near", "bug")]
            rows.append([kind, text(way), f"{counts['equal_texts']} of {counts['texts']}", *classes])
    yield from table(["", "way", "texts equal", "match", "tie", "near", "bug"], rows)
    worst = [(kind, first) for kind in ("greedy", "sampled") for first in found[kind]["worst"]]
    if worst:
        yield ""
        cells = [
            [kind, text(f["way"]), text(f["prompt"]), number(f["token"]), number(f["ulp"]), f["class"],
             text(f["before"]), text(f["expected"]), text(f["got"])]
            for kind, f in worst
        ]  # fmt: skip
        header = ["worst", "way", "prompt", "token", "ulp", "class", "after", "the base", "this"]
        yield from table(header, cells)


def _quality(found: Data) -> Iterator[str]:
    rows = [
        [text(one["task"]), text(one["metric"]), mode, number(stat["n"]), number(stat["value"]),
         number(stat["original"]), number(stat["delta"]), _interval(stat["ci95"]), _split(stat)]
        for one in found["tasks"] for mode, stat in one["modes"].items()
    ]  # fmt: skip
    header = ["task", "metric", "mode", "items", "this", "the base", "delta", "95 % interval", "right alone, p"]
    yield from table(header, rows)
    for mode, same in found["answers"].items():
        yield ""
        yield (
            f"Of {same['items']} answers of {mode} {same['equal']} are the base's, {same['by_rounding']} differ by"
            f" rounding, {same['other']} otherwise."
        )
    if found["differing"]:
        yield ""
        cells = [
            [one["mode"], text(one["task"]), text(one["item"]), text(one["original"]), text(one["answer"])]
            for one in found["differing"]
        ]
        yield from table(["mode", "task", "item", "the base", "this"], cells)
    yield from _reasons(found["skipped"])


def _reasons(skipped: Sequence[Data]) -> Iterator[str]:
    for one in skipped:
        yield ""
        yield f"Left out: {text(one['what'])}: {text(one['why'])}."


def _interval(bounds: Sequence[float] | None) -> str:
    return "-" if bounds is None else f"{number(bounds[0])} to {number(bounds[1])}"


def _split(stat: Data) -> str:
    """Items that only the one, and only the base, has right, and McNemar's p."""
    if stat["mcnemar_p"] is None:
        return "-"
    return f"{stat['only_here']} : {stat['only_original']}, {number(stat['mcnemar_p'])}"


def _acceptance(found: Data) -> Iterator[str]:
    header = ["", "TPF", "tau", "tau, mean of requests", "rows per token", "looping", "acceptance by slot"]
    rows = []
    for one in found["by_temperature"]:
        rows += [[f"T = {number(one['temperature'])}", *_accepted(one["drafter"])]]
        rows += [[f"T = {number(one['temperature'])}, prompt lookup", *_accepted(one["prompt_lookup"])]]
    rows += [[text(one["category"]), *_accepted(one)] for one in found["by_category"]]
    rows += [[f"batch {one['batch_size']}", *_accepted(one)] for one in found["by_batch"]]
    rows += [[f"{number(one['context_tokens'])} tokens before", *_accepted(one)] for one in found["by_context"]]
    yield from table(header, rows)
    for name, claim in found["claimed"].items():
        yield ""
        yield (
            f"The artifact claims {number(claim['claimed_drafts_per_cycle'])} accepted drafts per cycle ({name});"
            f" decoding accepts {number(claim['measured_drafts_per_cycle'])}."
        )
    yield from _left_out(found["skipped_contexts"])


def _accepted(one: Data) -> list[str]:
    names = ("tpf", "tau", "tau_macro", "rows_per_token", "looping_share")
    return [*(number(one[name]) for name in names), " ".join(map(number, one["accept_joint"])) or "-"]


def _speed(found: Data) -> Iterator[str]:
    header = [
        *("batch", "tokens before", "T", "way", "time of ar's", "of transformers'", "first token, ms"),
        *("between p50, ms", "p99, ms", "tokens/s a user", "tokens/s in all", "peak memory, MB"),
    ]
    rows = []
    for cell in found["cells"]:
        for way, timed in cell["ways"].items():
            keys = ("ttft_p50_ms", "itl_p50_ms", "itl_p99_ms", "tokens_per_s_user", "tokens_per_s_total")
            memory = timed["peak_memory_bytes"]
            rows.append([
                *_where(cell), text(way), number(cell["ratio_to_ar"][way]),
                number(cell["ratio_to_transformers"][way]), *(number(timed[key]) for key in keys),
                "-" if memory is None else f"{memory / 1e6:,.0f}",
            ])  # fmt: skip
    yield from table(header, rows)
    yield from _left_out(found["skipped_cells"])


def _where(cell: Data) -> list[str]:
    return [number(cell[key]) for key in ("batch_size", "context_tokens", "temperature")]


def _left_out(skipped: Sequence[Data]) -> Iterator[str]:
    for one in skipped:
        where = ", ".join(f"{name.replace('_', ' ')} {number(v)}" for name, v in one.items() if name != "reason")
        yield ""
        yield f"Left out: {where}: {text(one['reason'])}."


def _break_even(found: Data) -> Iterator[str]:
    rows = [
        [number(one["context_tokens"]), number(one["temperature"]), text(way),
         *(number(at[key]) for key in ("pays_up_to", "stops_at", "batch_size"))]
        for one in found["by_context"] for way, at in one["ways"].items()
    ]  # fmt: skip
    yield from table(["tokens before", "T", "way", "pays up to batch", "no longer at", "even at about"], rows)


def _cost(found: Data) -> Iterator[str]:
    price = found["price_usd_per_hour"]
    yield "No price was given." if price is None else f"At {number(price)} US dollars an hour."
    yield ""
    rows = [
        [*_where(cell), text(way), number(cost["usd_per_million_tokens"]), number(cost["relative_to_ar"])]
        for cell in found["cells"] for way, cost in cell["ways"].items()
    ]  # fmt: skip
    yield from table(["batch", "tokens before", "T", "way", "USD for a million tokens", "of ar's"], rows)


def _against(found: Data) -> Iterator[str]:
    header = [
        "way",
        "tokens/s",
        "time of transformers'",
        "tokens per forward",
        "small forwards per token",
        "texts equal",
    ]
    keys = ("tokens_per_s", "ratio_to_transformers", "tokens_per_forward", "small_forwards_per_token")
    rows = [
        [text(row["way"]), *(number(row[key]) for key in keys), f"{row['equal_texts']} of {found['prompts']}"]
        for row in found["rows"]
    ]
    yield from table(header, rows)
    yield ""
    yield f"Greedy, one prompt at a time; of the base's texts {number(found['looping_share'])} loop."
    yield from _reasons(found["skipped"])


def _diffusion(found: Data) -> Iterator[str]:
    rows = [
        [number(name), number(point["tpf"]), number(point["rows_per_token"]), number(point["agreement_percent"])]
        for name, _, point in swept(found)
    ]
    yield from table(["threshold", "TPF", "rows per token", "agreement, %"], rows)
    yield ""
    yield f"Area under the points of the thresholds: {number(found['area_under_points'])}."


def _speed_of_light(found: Data) -> Iterator[str]:
    if found["oracle"]:
        header = ["an oracle over", "tokens per cycle", "acceptance by slot", "tau of decoding, whose drafts branch"]
        rows = [
            [f"T = {number(one['temperature'])}, {held['candidates']} of each slot", number(held["tokens_per_cycle"]),
             " ".join(map(number, held["accept_cond"])), number(one["realised_tau"])]
            for one in found["oracle"] for held in one["by_candidates"]
        ]  # fmt: skip
        yield from table(header, rows)
        yield ""
    machine = found["machine"]
    yield (
        f"This machine reads {number(machine['read_gb_per_s'])} GB/s of a buffer as large as the weights"
        f" ({machine['weight_bytes'] / 1e6:,.1f} MB), and multiplies {number(machine['multiply_gflop_per_s'])} GFLOP/s."
    )
    yield ""
    keys = ("rows", "measured_ms", "least_ms", "share_of_best")
    steps = [[text(one["way"]), *(number(one[key]) for key in keys), one["bound_by"]] for one in found["steps"]]
    yield from table(["step", "rows", "takes, ms", "at best, ms", "share of the best", "bound by"], steps)
    if found["speedup"] is not None:
        gain = found["speedup"]
        yield ""
        yield (
            f"At {number(gain['tokens_per_forward'])} tokens per forward, drafts would be worth"
            f" {number(gain['predicted'])} times `ar` with both steps at best; they are worth"
            f" {number(gain['measured'])} times."
        )
    yield from _reasons(found["skipped"])


def _other_hardware(found: Data) -> Iterator[str]:
    check = found["check"]
    off = {
        name: f"{number(check[name]['median_error_percent'])} % in the middle,"
        f" {number(check[name]['worst_error_percent'])} % at worst"
        for name in ("kept", "scaled")
    }
    yield (
        f"**Nothing here was measured there.** A step takes {number(found['fixed_ms'])} ms and"
        f" {number(found['row_ms'])} ms a row here, of which reading and multiplying at full speed explain"
        f" {number(found['fixed_explained_ms'])} and {number(found['row_explained_ms'])}. There, these two take what is"
        f" published, in {found['dtype']}, one request at a time. The rest stays as long as here (first figures) or"
        " shrinks with them (second figures)."
    )
    yield ""
    yield (
        f"Held in the same ways against a setting that was measured here, {text(check['setting'])}: the first is off by"
        f" {off['kept']}, the second by {off['scaled']}."
    )
    yield ""
    keys = ("ar_tokens_per_s", "drafter_tokens_per_s", "speedup")
    rows = [
        [text(one["device"]), number(one["read_gb_per_s"]), number(one["multiply_gflop_per_s"]),
         *(f"{number(one['kept'][key])} or {number(one['scaled'][key])}" for key in keys), text(one["source"])]
        for one in found["devices"]
    ]  # fmt: skip
    header = ["device", "GB/s", "GFLOP/s", "ar, tokens/s", "drafter, tokens/s", "times ar's", "published in"]
    yield from table(header, rows)


def _training(found: Data) -> Iterator[str]:
    yield from table(["", ""], [[name.replace("_", " "), number(value)] for name, value in found.items()])


RENDERED: dict[str, Callable[[Data], Iterator[str]]] = {
    "compared": _compared,
    "losslessness": _losslessness,
    "quality": _quality,
    "acceptance": _acceptance,
    "speed": _speed,
    "break_even": _break_even,
    "cost": _cost,
    "against": _against,
    "diffusion": _diffusion,
    "speed_of_light": _speed_of_light,
    "other_hardware": _other_hardware,
    "training": _training,
}
