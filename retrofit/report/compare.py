"""Reports side by side, each held against the first.

A difference of two figures is worked out only where both were measured alike; else what was not alike stands in its
place: another base, other prompts, other hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import Any

from retrofit.errors import UsageError
from retrofit.report.markdown import number, table, text

Data = Mapping[str, Any]
SIZES = (
    *("prompts", "tokens", "lossless_prompts", "lossless_tokens", "speed_tokens", "repeats"),
    *("temperatures", "contexts", "timed_at"),
)
"""Of a suite, those that figures of all names go by."""
ASPECTS: dict[str, Callable[[Data, Data], dict[str, Any]]] = {
    "base": lambda held, quality: {"model": (held["base"] or {}).get("model"),
                                   "fingerprint": (held["base"] or {}).get("fingerprint")},
    "prompts": lambda held, quality: {name: held["prompts"][name] for name in ("count", "sha256")},
    "tasks": lambda held, quality: {**quality.get("asked", {}), "items_sha256": quality.get("items_sha256")},
    "sizes": lambda held, quality: {name: held["suite"].get(name) for name in SIZES},
    "hardware": lambda held, quality: {**{name: held["hardware"][name] for name in ("cpu", "gpu", "cores", "threads")},
                                       "device": held["engine"]["device"]},
    "versions": lambda held, quality: {**held["hardware"]["versions"], "retrofit": held["hardware"].get("retrofit")},
    "engine": lambda held, quality: {name: held["engine"][name] for name in ("backend", "exact", "dtype", "packed")},
    "template": lambda held, quality: {"differences": held["template"]["differences"]},
    "seed": lambda held, quality: {"seed": held["seed"]},
}  # fmt: skip
"""What may be unlike in two reports: of what was compared, and of the section of quality."""
NEEDED = {
    "quality": ("base", "tasks"),
    "equal_texts": ("base", "prompts", "sizes"),
    "speedup": ("base", "prompts", "sizes", "hardware"),
    "tokens_per_s": ("base", "prompts", "sizes", "hardware"),
    "": ("base", "prompts", "sizes"),
}
"""Beginning of a figure's name -> what must be alike for two of them to be held against each other.  What else is
unlike (versions, level of exactness, template) is said, for it may be what the reports are compared for."""
SHORT = 12
"""Characters of a hash that are shown."""


def compared(reports: Sequence[tuple[str, Data]]) -> dict[str, Any]:
    """`reports`: what each is; `unlike`: aspects that are not the same in all; `figures` and `gates` side by side.

    reports: (where it lies, the report).  Raises UsageError for fewer than two, and for one that does not say what it
    is of.
    """
    if not 2 <= len(reports) <= len(ascii_uppercase):
        raise UsageError(f"{len(reports)} report{'s' * (len(reports) != 1)} to compare; it takes two or more")
    held = [_held(where, data) for where, data in reports]
    aspects = [
        {name: of(one, _found(data, "quality")) for name, of in ASPECTS.items()}
        for one, (_, data) in zip(held, reports, strict=True)
    ]
    unlike = [name for name in ASPECTS if any(one[name] != aspects[0][name] for one in aspects)]
    figures = [_figures(data) for _, data in reports]
    gates = [{gate["name"]: gate["ok"] for gate in data["verdict"]["gates"]} for _, data in reports]
    return {
        "reports": [
            _named(letter, one, where, data)
            for letter, one, (where, data) in zip(ascii_uppercase, held, reports, strict=False)
        ],
        "unlike": [{"what": name, "values": _differing([one[name] for one in aspects])} for name in unlike],
        "figures": [_row(name, [some.get(name) for some in figures], aspects) for name in _names(figures)],
        "gates": [{"name": name, "ok": [some.get(name) for some in gates]} for name in _names(gates)],
    }


def _held(where: str, data: Data) -> Data:
    section = data["sections"]["compared"]
    if section["status"] != "done":
        raise UsageError(f"{where}: does not say what it is of: {section['reason']}", "run `retrofit eval` again")
    held: Data = section["data"]
    return held


def _found(data: Data, section: str) -> Data:
    """What a section found; nothing where it was skipped."""
    found: Data = data["sections"].get(section, {}).get("data", {})
    return found


def _named(letter: str, held: Data, where: str, data: Data) -> dict[str, Any]:
    return {
        "letter": letter,
        "where": where,
        "artifact": (held["artifact"] or {}).get("name"),
        "base": (held["base"] or {}).get("model"),
        "suite": data["suite"],
        "date": data["date"],
        "status": data["status"],
        "ok": data["verdict"]["ok"],
    }


def _differing(values: Sequence[Data]) -> list[dict[str, Any]]:
    """Of each report, the keys that are not the same in all."""
    keys = [key for key in values[0] if any(one.get(key) != values[0][key] for one in values)]
    return [{key: one.get(key) for key in keys} for one in values]


def _figures(data: Data) -> dict[str, float]:
    """Figures that go by a name, and what each task is worth in each mode."""
    tasks = {
        f"quality, {one['task']}, {one['metric']}, {mode}": round(stat["value"], 4)
        for one in _found(data, "quality").get("tasks", [])
        for mode, stat in one["modes"].items()
    }
    return {**data["figures"], **tasks}


def _names(some: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in some for name in one))


def _row(name: str, values: Sequence[float | None], aspects: Sequence[Data]) -> dict[str, Any]:
    """`deltas`: to the first; None where one is missing or `unlike` names what was not alike."""
    needed = next(needed for beginning, needed in NEEDED.items() if name.startswith(beginning))
    unlike = [[what for what in needed if one[what] != aspects[0][what]] for one in aspects]
    first = values[0]
    return {
        "name": name,
        "values": list(values),
        "deltas": [
            None if n == 0 or why or value is None or first is None else round(value - first, 4)
            for n, (value, why) in enumerate(zip(values, unlike, strict=True))
        ],
        "unlike": unlike,
    }


def legend(found: Data) -> Iterator[str]:
    """A line for each report, and one for whatever is not the same in all."""
    for one in found["reports"]:
        state = {True: "all gates passed", False: "a gate FAILED", None: "no gate"}[one["ok"]]
        partial = ", partial" if one["status"] == "partial" else ""
        yield (
            f"{one['letter']}: {one['artifact'] or 'a live engine'} of {one['base'] or 'a live model'},"
            f" {one['suite']}{partial}, {one['date']}, {state} ({one['where']})"
        )
    for one in found["unlike"]:
        each = zip(ascii_uppercase, one["values"], strict=False)
        yield f"Not the same {one['what']}: {'; '.join(f'{letter} {_shown(values)}' for letter, values in each)}"


def _shown(values: Data) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in values.items())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(one)[:SHORT] for one in value.values())
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)[:SHORT] if isinstance(value, str) and len(value) == 64 else str(value)


def rows(found: Data) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the figures and gates.  A figure that cannot be held against A's says why."""
    letters = [one["letter"] for one in found["reports"]]
    header = ["", *letters, *(f"{letter} - A" for letter in letters[1:])]
    lines = [
        [one["name"], *map(number, one["values"]), *(_delta(one, n) for n in range(1, len(letters)))]
        for one in found["figures"]
    ]
    said = {True: "passed", False: "failed", None: "-"}
    none = [""] * (len(letters) - 1)
    lines += [[f"gate {one['name']}", *(said[ok] for ok in one["ok"]), *none] for one in found["gates"]]
    return header, lines


def _delta(figure: Data, at: int) -> str:
    """Of a report to the first, or why there is none."""
    if None in (figure["values"][0], figure["values"][at]):
        return "-"
    if figure["unlike"][at]:
        return f"other {', '.join(figure['unlike'][at])}"
    delta = figure["deltas"][at]
    return f"{'+' if delta > 0 else ''}{number(delta)}"


def page(found: Data) -> str:
    """As Markdown."""
    header, lines = rows(found)
    shown = table(header, [[text(cell) for cell in line] for line in lines])
    return "\n".join(["# Reports side by side", "", *(f"- {text(line)}" for line in legend(found)), "", *shown, ""])
