"""What every section measures: an engine and its original, prompts, sizes.

Not here: the sections, the order they run in (`evaluate.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from retrofit.errors import DataError
from retrofit.eval.subject import Subject
from retrofit.recipes.text.library import held_out_prompts
from retrofit.report.prompts import Prompt
from retrofit.report.rivals import Rival
from retrofit.report.suites import MODES, Suite
from retrofit.runtime.engine import Engine
from retrofit.tasks.items import CATEGORIES

Data = dict[str, Any]
Earlier = Mapping[str, Data]
"""What the finished sections before one found, by name."""


class Skipped(Exception):
    """A section that cannot be measured here; its text is the reason, for people."""


@dataclass(frozen=True)
class Setting:
    """prompts: tokenized, at least one.  given: whether they are the user's own.

    left_out: how many of the user's own are not measured, being more than the suite or the limit has.
    """

    subject: Subject
    prompts: Sequence[Prompt]
    suite: Suite
    given: bool = False
    modes: tuple[str, ...] = MODES
    price: float | None = None
    """US dollars an hour of this machine costs; None: nobody said."""
    seed: int = 0
    clock: Callable[[], float] = time.perf_counter
    command: str = "retrofit eval ARTIFACT"
    tasks: tuple[str, ...] = CATEGORIES
    """Names of tasks of quality."""
    allow_code: bool = False
    """Whether code that a model wrote may be run."""
    against: tuple[Rival, ...] = ()
    left_out: int = 0
    _texts: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def engine(self) -> Engine:
        return self.subject.run

    @property
    def drafter(self) -> dict[str, Any]:
        """Options of the strategy whose drafts are measured: one forward drafts and verifies where the layout can."""
        return {"strategy": "fused" if self.engine.layout.anchored else "two_forward"}

    def asked(self, section: str) -> Data:
        """What a section was asked for that no other goes by."""
        if section == "quality":
            return {"tasks": list(self.tasks), "allow_code": self.allow_code}
        return {"against": [rival.identity for rival in self.against]} if section == "against" else {}

    def need(self, mode: str) -> None:
        """Raises Skipped where the mode was not asked for."""
        if mode not in self.modes:
            raise Skipped(f"mode {mode} was not asked for")

    def ids(self, count: int, room: int) -> list[list[int]]:
        """Tokens of up to so many prompts, each cut at its beginning where it leaves no room for so many new tokens."""
        most = self.engine.limits.context - room
        if most < 1:
            raise Skipped(f"a context of {self.engine.limits.context} tokens has no room for {room} new ones")
        return [list(prompt.tokens[-most:]) for prompt in self.prompts[:count]]

    def texts(self, length: int, count: int, room: int) -> list[list[int]]:
        """So many prompts of exactly `length` tokens: held-out source code.  Raises Skipped where there are none."""
        if length + room > self.engine.limits.context:
            raise Skipped(f"the context of {self.engine.limits.context} tokens has no room for {length} and {room} new")
        if self.engine.tokenizer is None:
            raise Skipped("without a tokenizer there is no text of a given length")
        if len(self._texts.get(length, ())) < count:
            try:
                self._texts[length] = held_out_prompts(self.engine.tokenizer, count, length)
            except DataError as error:
                raise Skipped(str(error)) from None
        return self._texts[length][:count]
