"""Evaluations that end in seconds: what the tests of the report share."""

from collections.abc import Iterator
from dataclasses import replace
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
