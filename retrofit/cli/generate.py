"""`retrofit generate`: continue prompts."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from retrofit.cli.errors import not_text
from retrofit.cli.options import (
    CONTEXT,
    GENERATION,
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
    from retrofit.runtime.engine import Engine, Event, Result


@click.command(context_settings=CONTEXT)
@artifact_argument
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@generation_options
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Prompts decoded together."
)
@click.option("-n", "n", type=click.IntRange(min=1), default=1, show_default=True,
              help="Outputs of each prompt, which is read once; they differ with a --temperature.")  # fmt: skip
@click.option("--image", "images", multiple=True, metavar="FILE", envvar="RETROFIT_IMAGE",
              type=click.Path(path_type=Path),
              help="An image for the PROMPT, where the base takes images; repeatable.  The PROMPT is a user's message "
                   "then, as with --chat.")  # fmt: skip
@click.option("--chat", "as_chat", is_flag=True, envvar="RETROFIT_CHAT",
              help="Each PROMPT is a user's message, for the chat template.")  # fmt: skip
@click.option("--prefix", metavar="TEXT", help="What stands before a gap to fill; with --suffix.")
@click.option("--suffix", metavar="TEXT", help="What stands behind it; the gap gets up to --max-new-tokens.")
@click.option("--revise", metavar="TEXT", help="A text whose [[marked span]] is kept or replaced by what is likelier.")
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
    images: tuple[Path, ...],
    as_chat: bool,
    prefix: str | None,
    suffix: str | None,
    revise: str | None,
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

    With --prefix and --suffix what is printed fits between them, with --revise it is the whole text; both need an
    artifact that was converted with objective.infill_share above 0, and are greedy.

    \b
    Examples:
      retrofit generate tiny-retrofit "def area(radius):"
      cat prompt.txt | retrofit generate tiny-retrofit --mode ar --temperature 0.8 --seed 7
      retrofit generate tiny-retrofit --json "import os" "class Stack:" > results.jsonl
      retrofit generate qwen-retrofit --chat --system "Answer in one word." -n 3 --temperature 1 "A colour?"
      retrofit generate tiny-retrofit --prefix "def area(radius):" --suffix "radius ** 2" --max-new-tokens 8
      retrofit generate tiny-retrofit --revise "for i [[inn]] range(10):"
      retrofit generate qwen-vl-retrofit --image cat.jpg "What does it look at?"
    """
    if gap := _gap(prefix, suffix, revise, prompts):
        _fill(gap, loading.engine(folder, base), options["max_new_tokens"], as_json)
        return
    texts = [_stdin() if prompt == "-" else prompt for prompt in prompts or ("-",)]
    if images and len(texts) > 1:
        raise UsageError(f"--image belongs to one PROMPT, and {len(texts)} are given", "run one at a time")
    as_chat = as_chat or system is not None or bool(images)
    if options["template"] is not None and not as_chat:
        raise UsageError("--template is for the chat template, which raw text does not go through", "add --chat")
    engine = loading.engine(folder, base)
    asked: Any = [_messages(text, system) for text in texts] if as_chat else texts
    if images:
        from retrofit.processors import image_prompt

        asked = image_prompt(engine.base, texts[0], images, system, options["template"], loading.trust_remote_code)
    alone = len(texts) == n == 1
    events = engine.stream(asked, seed=seed, batch_size=batch_size, with_text=alone and not as_json, n=n, **options)
    if as_chat:
        say_differences(engine, options["template"])
    say(f"{_printed(events, n, alone, as_json).line()}; {decodes_as(engine)}")


def _printed(events: Iterator[Event], n: int, alone: bool, as_json: bool) -> Totals:
    """Print what comes, and return how much it was."""
    totals = Totals()
    for result in _finished(events, totals, n):
        if as_json:
            emit_json(result_json(result))
        elif alone:
            click.echo()
        else:
            output = f", output {result.sample + 1}" if n > 1 else ""
            click.echo(f"==> prompt {result.index + 1}{output} <==\n{result.text}")
    return totals


@dataclass(frozen=True)
class _Gap:
    """What stands before and behind a gap, and what is in it now."""

    prefix: str
    suffix: str
    now: str | None = None


def _gap(prefix: str | None, suffix: str | None, revise: str | None, prompts: tuple[str, ...]) -> _Gap | None:
    """The gap to fill; None: nobody asked.  Raises UsageError for what does not make one, or means nothing for it."""
    given = {"--prefix": prefix, "--suffix": suffix, "--revise": revise}
    named = [name for name, value in given.items() if value is not None]
    if not named:
        return None
    if named not in (["--prefix", "--suffix"], ["--revise"]):
        raise UsageError(
            f"a gap cannot be made of {' and '.join(named)}", "give --prefix and --suffix, or --revise alone"
        )
    if prompts:
        raise UsageError(f"a PROMPT means nothing beside {named[0]}", "leave it out")
    context = click.get_current_context()
    taken = {"mode", "max_new_tokens"}
    for name in (*GENERATION, "batch_size", "n", "images", "as_chat", "system", "seed"):
        if name not in taken and context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            flag = next(p.opts[-1] for p in context.command.params if p.name == name)
            raise UsageError(f"{flag} means nothing beside {named[0]}: a gap is filled greedily, by one rule")
    if context.get_parameter_source("mode") is not ParameterSource.DEFAULT and context.params["mode"] != "diffusion":
        raise UsageError(f"a gap is filled by mode diffusion, not {context.params['mode']}", "leave --mode out")
    if revise is None:
        if not prefix or not suffix:
            raise UsageError(f"{'--suffix' if prefix else '--prefix'} is empty", "a gap has a text on both sides")
        return _Gap(prefix, suffix)
    parts = re.split(r"\[\[(.*?)\]\]", revise, flags=re.DOTALL)
    if len(parts) != 3 or not parts[1]:
        raise UsageError("--revise must mark one span, with text in it", 'such as "for i [[inn]] range(10):"')
    if not parts[0] or not parts[2]:
        raise UsageError("--revise marks a span with text on one side alone", "leave some text before and behind it")
    return _Gap(parts[0], parts[2], parts[1])


def _fill(gap: _Gap, engine: Engine, longest: int | None, as_json: bool) -> None:
    """Fill the gap and print it, or the whole text where one was to be revised."""
    begin = time.perf_counter()
    found = engine.infill(gap.prefix, gap.suffix, longest=longest, given=gap.now)
    seconds = time.perf_counter() - begin
    origins = {"filled": "filled by the drafter", "ar": "as ar goes on", "given": "what stood there"}
    if as_json:
        candidates = [
            {"tokens": one.tokens, "origin": one.origin, "log_probability": round(one.log_probability, 4)}
            for one in found.candidates
        ]
        said = {"text": found.text, "tokens": found.tokens, "candidates": candidates, "forwards": found.forwards}
        emit_json({"prefix": gap.prefix, "suffix": gap.suffix, **said, "seconds": round(seconds, 3)})
    else:
        click.echo(found.text if gap.now is None else f"{gap.prefix}{found.text}{gap.suffix}")
    best = found.candidates[0]
    say(f"{origins[best.origin]}, the likeliest of {len(found.candidates)} candidates, in {seconds:.2f} s")


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
