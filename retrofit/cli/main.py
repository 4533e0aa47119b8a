"""The command `retrofit`.  Each function below is one command; what they share is in `console.py`.

Everything slow is imported inside the bodies, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import click

from retrofit import __version__
from retrofit.cli.console import (
    CONTEXT,
    Cli,
    Loading,
    Totals,
    base_option,
    decodes_as,
    emit_json,
    engine_options,
    generation_options,
    is_quiet,
    not_text,
    output_options,
    quieten_libraries,
    result_json,
    say,
    seed_option,
    system_option,
)
from retrofit.cli.convert import convert
from retrofit.cli.data import data
from retrofit.errors import UsageError

if TYPE_CHECKING:
    from retrofit.runtime.engine import Event, Result

EXIT_CODES = """\b
Exit codes:
  0  done             3  a check was not met
  1  failed           4  GPU, memory, disk, network or credentials missing
  2  wrong usage      130, 143  interrupted"""


@click.group(cls=Cli, context_settings=CONTEXT, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="retrofit", message="%(prog)s %(version)s")
def main() -> None:
    """Give a language model two more ways of decoding, and leave the first as it was.

    \b
    Example, offline and on any machine:
      retrofit convert -o tiny-retrofit
      retrofit generate tiny-retrofit "def area(radius):"
      retrofit certify tiny-retrofit

    Any option can be set in the environment: RETROFIT_DEVICE=cuda is --device cuda in every command.
    Data goes to stdout, everything else to stderr.
    """


main.add_command(convert)


artifact_argument = click.argument("folder", metavar="ARTIFACT")


@main.command(context_settings=CONTEXT)
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
@engine_options
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
    asked = [_messages(text, system) for text in texts] if as_chat or system is not None else texts
    engine = loading.engine(folder, base)
    alone = len(texts) == n == 1
    events = engine.stream(asked, seed=seed, batch_size=batch_size, with_text=alone and not as_json, n=n, **options)
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


@main.command(context_settings=CONTEXT)
@artifact_argument
@generation_options
@system_option
@base_option
@seed_option
@engine_options
@output_options
def chat(
    folder: str,
    options: dict[str, Any],
    system: str | None,
    base: str | None,
    seed: int,
    loading: Loading,
    as_json: bool,
) -> None:
    """Talk with the model, line by line; /help lists the commands.

    Lines go through the model's chat template; a model without one just continues the text.  From a pipe
    every line is one turn.

    \b
    Examples:
      retrofit chat qwen-retrofit --max-new-tokens 512 --temperature 0.7
      printf '%s\\n' "Hello" "/stats" | retrofit chat qwen-retrofit
    """
    from retrofit.cli.conversation import Chat, converse

    converse(Chat(loading.engine(folder, base), options, seed, as_json, system))


@main.command(context_settings=CONTEXT)
@artifact_argument
@click.option(
    "--level",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="How many prompts and tokens to check.",
)
@base_option
@engine_options
@output_options
def certify(
    folder: str,
    level: Literal["quick", "full"],
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Prove that ARTIFACT leaves its base alone.

    Runs the checks on this machine, writes certificate.json into the artifact, and exits with 3 when one of
    them is not met. What is certified is what runs: the backend, the type and the level of exactness that
    `retrofit generate` takes with the same options; the certificate names them.

    \b
    Example:
      retrofit certify tiny-retrofit --level full
    """
    quieten_libraries()
    from retrofit import certify as run

    certificate = run(
        folder,
        level=level,
        device=loading.device,
        dtype=loading.dtype or "auto",
        backend=loading.backend,
        exact=loading.exact,
        base=base,
        offline=loading.offline,
        trust_remote_code=loading.trust_remote_code,
        progress=not is_quiet() and sys.stderr.isatty(),
    )
    path = certificate.save(folder)
    if as_json:
        click.echo(path.read_text(encoding="utf-8"), nl=False)
    else:
        width = max(len(check.name) for check in certificate.checks)
        for check in certificate.checks:
            click.echo(f"{check.status:<8}  {check.name:<{width}}  {check.detail}")
    say(f"certified was {certificate.what}")
    say(f"wrote {path}")
    certificate.require()


@main.command(context_settings=CONTEXT)
@artifact_argument
@output_options
def inspect(folder: str, as_json: bool) -> None:
    """Show what ARTIFACT holds, without loading any model.

    Base and fingerprint, layout, sizes, measured acceptance, certificate, files.  Hashes are checked.

    \b
    Example:
      retrofit inspect tiny-retrofit --json
    """
    from retrofit.artifact.inspection import describe, table

    described = describe(folder)
    if as_json:
        emit_json(described, indent=2)
    else:
        click.echo(table(described))


@main.command(context_settings=CONTEXT)
@click.argument("folder", metavar="[ARTIFACT]", required=False)
@base_option
@engine_options
@output_options
def doctor(folder: str | None, base: str | None, loading: Loading, as_json: bool) -> None:
    """Show what this machine has, and test exactness on it.

    self_spec can emit exactly what ar emits only if a row's result does not depend on the rows beside it. That
    is a property of a machine's libraries and kernels, so it is tried out: every matrix product of the model in
    its shapes, attention, and whole forwards; a row alone, among others and in other places, compared bit for
    bit. The table says what was compared; DIFFER names the first arrangement that differs.

    \b
    Levels of --exact, and what each promises:
      bucket     every decoding forward has one row count (the default on a GPU); there, a product of the
                 library that fails is replaced by our kernel
      invariant  any row count: our kernels on a GPU; a model's own modules where their products allow it
      off        nothing beyond rounding

    Where our kernels cannot run, the model's own modules are tested (backend hf), and every level is shown with
    its price: a step of ar at that level against one at off. auto takes the cheapest level that holds in half
    precision, and off in fp32.

    Without ARTIFACT the test runs the model of --base without an adapter, or the base that ships with
    retrofit. Exits with 3 when a level that was asked for does not hold, and with 4 when the GPU that was asked
    for is missing.

    \b
    Examples:
      retrofit doctor
      retrofit doctor qwen-retrofit --exact invariant
      retrofit doctor --base Qwen/Qwen3-8B --json
    """
    quieten_libraries()
    from retrofit.eval.doctor import diagnose, environment, environment_table

    # Printed first: whatever fails below, this is what a report about it needs.
    facts = environment()
    if not as_json:
        click.echo(f"{environment_table(facts)}\n")
    diagnosis = diagnose(loading, folder, base)
    if as_json:
        emit_json({"environment": facts, **diagnosis.to_dict()}, indent=2)
    else:
        click.echo(diagnosis.table())
    if diagnosis.problem is not None:
        raise diagnosis.problem


@main.group(context_settings=CONTEXT)
def recipes() -> None:
    """List the recipes that ship with retrofit, or print one in full.

    \b
    Example:
      retrofit recipes show qwen3-8b train.steps=8000 > mine.yaml
    """


@recipes.command("ls", context_settings=CONTEXT)
@output_options
def recipes_ls(as_json: bool) -> None:
    """List the recipes: name, base model.

    \b
    Example:
      retrofit recipes ls
    """
    from retrofit.recipes.schema import load_recipe, recipe_names

    # `default` is made for no model in particular
    bases = {n: None if n == "default" else load_recipe(n).base.model for n in recipe_names()}
    if as_json:
        emit_json([{"name": name, "base": base} for name, base in bases.items()])
        return
    width = max(map(len, bases))
    for name, base in bases.items():
        click.echo(f"{name:<{width}}  {base or 'any model'}")


@recipes.command("show", context_settings=CONTEXT)
@click.argument("name", metavar="NAME|FILE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@output_options
def recipes_show(name: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Print a recipe with every key, as `convert` would use it.

    \b
    Examples:
      retrofit recipes show tiny
      retrofit recipes show qwen3-8b draft.block=16 train.lr=1e-4
    """
    from retrofit.recipes.schema import dump_recipe, load_recipe

    recipe = load_recipe(name, overrides)
    if as_json:
        emit_json(recipe.model_dump(mode="json"), indent=2)
    else:
        click.echo(dump_recipe(recipe), nl=False)


main.add_command(data)


if __name__ == "__main__":
    main()
