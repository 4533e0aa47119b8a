"""`retrofit generate`: continue prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from retrofit.cli.errors import not_text
from retrofit.cli.options import (
    CONTEXT,
    Loading,
    artifact_argument,
    base_option,
    engine_options,
    generation_options,
    output_options,
    seed_option,
)
from retrofit.cli.output import Totals, decodes_as, emit_json, result_json, say
from retrofit.errors import UsageError

if TYPE_CHECKING:
    from retrofit.runtime.engine import Event, Result


@click.command(context_settings=CONTEXT)
@artifact_argument
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@generation_options
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts decoded together."
)
@base_option
@seed_option
@engine_options
@output_options
def generate(
    folder: str,
    prompts: tuple[str, ...],
    options: dict[str, Any],
    batch_size: int,
    base: str | None,
    seed: int,
    loading: Loading,
    as_json: bool,
) -> None:
    """Continue each PROMPT, or the text on stdin.

    stdin is read where there is no PROMPT or it is `-`.  Prompts are raw text: no chat template, nothing
    added.  One prompt is streamed; several are printed in their order, each under a header.  With --json
    every result is one line.

    \b
    Examples:
      retrofit generate tiny-retrofit "def area(radius):"
      cat prompt.txt | retrofit generate tiny-retrofit --mode ar --temperature 0.8 --seed 7
      retrofit generate tiny-retrofit --json "import os" "class Stack:" > results.jsonl
    """
    texts = [_stdin() if prompt == "-" else prompt for prompt in prompts or ("-",)]
    engine = loading.engine(folder, base)
    events = engine.stream(
        texts, seed=seed, batch_size=batch_size, with_text=len(texts) == 1 and not as_json, **options
    )
    totals = Totals()
    for result in _finished(events, totals):
        if as_json:
            emit_json(result_json(result))
        elif len(texts) == 1:
            click.echo()
        else:
            click.echo(f"==> prompt {result.index + 1} <==\n{result.text}")
    say(f"{totals.line()}; {decodes_as(engine)}")


def _finished(events: Iterator[Event], totals: Totals) -> Iterator[Result]:
    """Results in the order of the prompts, each as soon as those before are out; prints streamed text."""
    waiting: dict[int, Result] = {}
    due = 0
    began = float("inf")
    for event in events:
        click.echo(event.text, nl=False)
        if event.result is None:
            continue
        now = time.perf_counter()
        began = min(began, now - event.result.stats.seconds)
        totals.add(event.result)
        totals.seconds = now - began  # from the first admission: timing the plans beforehand does not count
        waiting[event.index] = event.result
        while due in waiting:
            yield waiting.pop(due)
            due += 1


def _stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():  # None: it is closed
        raise UsageError("no prompt", "give one as an argument, or pipe text in")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise not_text(error) from None
