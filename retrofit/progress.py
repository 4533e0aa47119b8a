"""How far a piece of work is, on stderr: a bar at a terminal, elsewhere a plain line now and then.

A log gets a line every EVERY seconds and one at the end, never a carriage return.  Work that is often short (`brief`)
leaves nothing behind at a terminal, and a log hears of it only where it takes longer than EVERY.
Not here: any other talk.  Importing this imports nothing heavy.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

EVERY = 10.0
"""Seconds between two lines in a log."""
_SILENT: ContextVar[bool] = ContextVar("_SILENT", default=False)
Item = TypeVar("Item")


class Progress:
    """A piece of work: how much of it is done, and a word about it.  `total` may be set later, or stay unknown."""

    def __init__(self, what: str, unit: str, total: int | None, done: int, changed: Callable[[], None]) -> None:
        self.what, self.unit, self.total, self.done, self.text = what, unit, total, done, ""
        self._first, self._began, self._changed = done, time.monotonic(), changed

    def advance(self, by: int = 1, text: str | None = None) -> None:
        """Some more is done.  text: a word about it, in place of the one before."""
        self.done += by
        self.about(self.text if text is None else text)

    def about(self, text: str) -> None:
        """Change the word about it."""
        self.text = text
        self._changed()

    def amount(self) -> str:
        """`120 of 600 steps`, `1.20 of 15.26 GB`."""
        if self.unit == "B":
            parts, unit = [f"{size / 1e9:.2f}" for size in (self.done, self.total) if size is not None], "GB"
        else:
            parts, unit = [f"{count:,.0f}" for count in (self.done, self.total) if count is not None], f"{self.unit}s"
        return f"{' of '.join(parts)} {unit}"

    def line(self) -> str:
        """`training: 120 of 600 steps, 0:02:10, 0:08:40 left; loss 1.2`."""
        seconds, more = time.monotonic() - self._began, self.done - self._first
        parts = [self.amount(), _clock(seconds)]
        if self.total and more > 0 and self.total > self.done:
            parts.append(f"{_clock(seconds * (self.total - self.done) / more)} left")
        return f"{self.what}: {', '.join(parts)}{'; ' if self.text else ''}{self.text}"


@contextmanager
def silent() -> Iterator[None]:
    """No progress at all within the block."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


@contextmanager
def progress(
    what: str, unit: str, total: int | None = None, *, done: int = 0, quiet: bool = False, brief: bool = False
) -> Iterator[Progress]:
    """Show a piece of work while the block lasts.  unit: one of what is counted, `step`; `B` for bytes.

    done: how much was done before.  quiet: show nothing.  brief: see above.
    """
    if quiet or _SILENT.get() or sys.stderr is None:
        yield Progress(what, unit, total, done, lambda: None)
    elif sys.stderr.isatty():
        yield from _bar(what, unit, total, done, brief)
    else:
        yield from _lines(what, unit, total, done, brief)


def tracked(
    items: Iterable[Item],
    what: str,
    unit: str,
    total: int | None = None,
    *,
    quiet: bool = False,
    brief: bool = False,
) -> Iterator[Item]:
    """The items, shown as `progress` shows a piece of work."""
    with progress(what, unit, total, quiet=quiet, brief=brief) as shown:
        for item in items:
            yield item
            shown.advance()


def _lines(what: str, unit: str, total: int | None, done: int, brief: bool) -> Iterator[Progress]:
    """One line at a time, for a log."""
    last, written, pending = time.monotonic(), not brief, not brief

    def changed() -> None:
        nonlocal last, written, pending
        pending = True
        if time.monotonic() - last >= EVERY:
            print(work.line(), file=sys.stderr, flush=True)
            last, written, pending = time.monotonic(), True, False

    work = Progress(what, unit, total, done, changed)
    try:
        yield work
    finally:
        if written and pending:
            print(work.line(), file=sys.stderr, flush=True)


def _bar(what: str, unit: str, total: int | None, done: int, brief: bool) -> Iterator[Progress]:
    """A bar, and a line below it for the word about the work."""
    from rich import progress as bars
    from rich.console import Console, RenderableType
    from rich.text import Text

    class Bars(bars.Progress):
        def get_renderables(self) -> Iterable[RenderableType]:
            yield from super().get_renderables()
            if work.text:
                yield Text(work.text)

    columns = (
        bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TextColumn("{task.fields[amount]}"),
        bars.TimeElapsedColumn(), bars.TimeRemainingColumn(),
    )  # fmt: skip

    def changed() -> None:
        shown.update(task, completed=work.done, total=work.total, amount=work.amount())

    work = Progress(what, unit, total, done, changed)
    shown = Bars(
        *columns, console=Console(stderr=True), transient=brief, redirect_stdout=False, refresh_per_second=4
    )  # stdout is for data
    task = shown.add_task(what, total=total, completed=done, amount=work.amount())
    with shown:
        yield work


@contextmanager
def downloading(what: str) -> Iterator[type[Any]]:
    """Shows the bytes of a download from the Hub; gives what `snapshot_download` is to take as `tqdm_class`."""
    from huggingface_hub.utils import tqdm as hub_bar

    with ExitStack() as shown:

        class Bytes(hub_bar):
            """Shows nothing itself; the bar of the bytes on disk tells `progress` of them."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                self.work: Progress | None = None
                if options.get("name") == "huggingface_hub.snapshot_download":
                    self.work = shown.enter_context(progress(what, "B", brief=True))
                super().__init__(*arguments, **(options | {"disable": True}))

            def update(self, n: float | None = 1) -> bool | None:
                if self.work is not None:
                    self.work.total = int(self.total) if self.total else None
                    self.work.advance(int(n or 0))
                return super().update(n)

        yield Bytes


def _clock(seconds: float) -> str:
    """`0:02:10`."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


@contextmanager
def without_bar() -> Iterator[None]:
    """transformers draws no bar of its own while it loads or saves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
