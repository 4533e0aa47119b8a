"""Evaluations that end in seconds, and a reader of their pages: what the tests of the report share."""

import re
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from retrofit.report.evaluate import DERIVED, SECTIONS, Report, evaluate
from retrofit.report.setting import Skipped
from retrofit.report.suites import SUITES, Suite

SMALL = Suite(
    prompts=2, tokens=8, lossless_prompts=2, lossless_tokens=8, speed_tokens=3, repeats=1, temperatures=(0.8, 0.0),
    batches=(1, 2), contexts=(24,), thresholds=(0.9,), timed_at=(0.8,),
    quality_items=1, step_rows=(1, 2),
)  # fmt: skip
PROMPTS = ["def area", "for item in range", "class Stack"]


class Ticking:
    """A clock that goes on by a second whenever it is read, and by more where a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def small_suite(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    """`quick` in a second or two."""
    patch.setitem(SUITES, "quick", replace(SMALL, **changes))


def only(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Leave out all sections but these, and those that are made of them in no time."""

    def left_out(*_: Any) -> dict[str, Any]:
        raise Skipped("left out by the test")

    for name in set(SECTIONS) - {*DERIVED, *names}:
        patch.setitem(SECTIONS, name, left_out)


def small(patch: pytest.MonkeyPatch, target: Any, **options: Any) -> Report:
    """A small evaluation on a clock of its own."""
    small_suite(patch)
    asked: dict[str, Any] = {"prompts": PROMPTS, "context": [24], "clock": Ticking(), "progress": False, **options}
    return evaluate(target, **asked)


def gate(report: Report, name: str) -> dict[str, Any]:
    (found,) = (gate for gate in report.data["verdict"]["gates"] if gate["name"] == name)
    return found


def files(folder: Path) -> Iterator[str]:
    """Names of all that lies under a folder."""
    return (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())


VOID = {"meta", "link", "br", "wbr", "rect", "path", "use"}
NUMBER = re.compile(r"(?<![\w.,-])-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[+-]\d+)?")


class Page(HTMLParser):
    """tags: (name, attributes) of every element.  figures: (value, what is shown).  said: all other text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[tuple[float, str]] = []
        self.said: list[str] = []
        self.inside: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)
        self.close()
        assert not self.inside, f"never closed: {self.inside}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.inside.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.inside.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tag, attrs = self.inside[-1] if self.inside else ("", {})
        if tag == "data":
            self.figures.append((float(attrs["value"] or "nan"), data))
        elif tag != "style" and data.strip():
            self.said.append(data)

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    def values(self, *attributes: str) -> list[str]:
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in attributes]


def untraceable(page: Page, report: Any, short: Any) -> list[str]:
    """Printed figures that the report does not hold.  short: how a number is shown that is not in `<data>`."""
    numbers, strings = set(_leaves(report, int | float)), "\n".join(_leaves(report, str))
    shown = {short(value) for value in numbers} | {str(place) for place in range(1, 17)}
    wrong = [f"{value!r} shown as {text}" for value, text in page.figures if not _is_of(value, text, numbers)]
    told = [(one, text) for text in page.said for one in NUMBER.findall(text)]
    return wrong + [f"{one} in {text!r}" for one, text in told if one not in shown and one not in strings]


def _is_of(value: float, text: str, numbers: set[float]) -> bool:
    """value: one of the report's.  text: that value in fewer digits, perhaps in percent or in millions."""
    found = NUMBER.search(text)
    if value not in numbers or found is None:
        return False
    shown = Decimal(found[0].replace(",", ""))
    last = Decimal(1).scaleb(int(shown.as_tuple().exponent))
    bytes_in_mb = value >= 10_000 and value == int(value) and shown * 1000 < value
    scale = Decimal("0.01") if text.endswith("%") else 10**6 if bytes_in_mb else 1
    return abs(shown * scale - Decimal(value)) <= Decimal("0.5000001") * last * scale


def _leaves(value: Any, kind: Any) -> Any:
    if isinstance(value, dict):
        for key, item in value.items():
            if kind is str:
                yield key
            yield from _leaves(item, kind) if key != "trace" else ()
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, kind)
    elif isinstance(value, kind) and not isinstance(value, bool):
        yield value
