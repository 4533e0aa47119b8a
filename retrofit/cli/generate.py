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
    answering_options,
    artifact_argument,
    base_option,
    generation_options,
    output_options,
    say_differences,
    seed_option,
    system_option,
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
@click.option("-n", "n", type=click.IntRange(min=1), default=1, show_default=True,
              help="Outputs of each prompt, which is read once; they differ with a --temperature.")  # fmt: skip
@click.option("--chat", "as_chat", is_flag=True, help="Each PROMPT is a user's message, for the chat template.")
@system_option
@base_option
@seed_option
@answering_options
@output_options
def generate(
    folder: str,
    prompts: tuple[str, ...],
    options: dict[str, Any],
    batch_size: int,
    n: int,
    as_chat: bool,
    system: str | None,
    base: str | None,
    seed: int,
    loading: Loading,
    as_json: bool,
) -> None:
    """Continue each PROMPT, or the text on stdin.

    ARTIFACT is a folder, smollm2-135m, which ships with retrofit, or OWNER/NAME or OWNER/NAME@REVISION on the Hub.
    stdin is read where there is no PROMPT or it is `-`.  Prompts are raw text, nothing added; with --chat or
    --system they are messages for the model's chat template.  One output is streamed; several are printed in
    their order, each under a header.  With --json every result is one line.

    \b
    Examples:
      retrofit generate tiny-retrofit "def area(radius):"
      cat prompt.txt | retrofit generate tiny-retrofit --mode ar --temperature 0.8 --seed 7
      retrofit generate tiny-retrofit --json "import os" "class Stack:" > results.jsonl
      retrofit generate qwen-retrofit --chat --system "Answer in one word." -n 3 --temperature 1 "A colour?"
    """
    texts = [_stdin() if prompt == "-" else prompt for prompt in prompts or ("-",)]
    as_chat = as_chat or system is not None
    if options["template"] is not None and not as_chat:
        raise UsageError("--template is for the chat template, which raw text does not go through", "add --chat")
    asked = [_messages(text, system) for text in texts] if as_chat else texts
    engine = loading.engine(folder, base)
    alone = len(texts) == n == 1
    events = engine.stream(asked, seed=seed, batch_size=batch_size, with_text=alone and not as_json, n=n, **options)
    if as_chat:
        say_differences(engine, options["template"])
    totals = Totals()
    for result in _finished(events, totals, n):
        if as_json:
            emit_json(result_json(result))
        elif alone:
            click.echo()
        else:
            output = f", output {result.sample + 1}" if n > 1 else ""
            click.echo(f"==> prompt {result.index + 1}{output} <==\n{result.text}")
    say(f"{totals.line()}; {decodes_as(engine)}")


def _messages(text: str, system: str | None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    return [*first, {"role": "user", "content": text}]


def _finished(events: Iterator[Event], totals: Totals, n: int) -> Iterator[Result]:
    """Results in the order of the prompts and outputs, each as soon as those before are out; prints streamed text."""
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
        waiting[event.index * n + event.sample] = event.result
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
