"""`retrofit eval` and `retrofit report`: measure an artifact beside its original, and show what came of it."""

from __future__ import annotations

import math
from typing import Any

import click

from retrofit.cli.options import (
    CONTEXT,
    MODES,
    Loading,
    artifact_argument,
    base_option,
    engine_options,
    found_artifact,
    output_options,
    seed_option,
)
from retrofit.cli.output import emit_json, is_quiet, quieten_libraries, say
from retrofit.errors import UsageError


class Listed(click.ParamType):
    """`1,4,16` or `ar,self_spec`."""

    name = "LIST"

    def __init__(self, kind: type[int] | type[str]):
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        if isinstance(value, list):
            return value
        try:
            return [self.kind(part.strip()) for part in str(value).split(",") if part.strip()]
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers, such as 1,4,16", param, ctx)


@click.command("eval", context_settings=CONTEXT)
@artifact_argument
@click.option("--suite", type=click.Choice(["quick", "standard", "full"]), default="quick", show_default=True,
              help="How much to run.")  # fmt: skip
@click.option("--modes", type=Listed(str), metavar="LIST", help=f"Of {','.join(MODES)}.  [default: all]")
@click.option("--batch", type=Listed(int), metavar="LIST",
              help="Requests that run together, such as 1,4,16.  [default: the suite's]")  # fmt: skip
@click.option("--context", type=Listed(int), metavar="LIST",
              help="Tokens before the output, such as 128,4096.  [default: the suite's]")  # fmt: skip
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    metavar="N",
    help="Most prompts, and items of a task.  [default: the suite's]",
)
@click.option("--prompts", type=click.Path(dir_okay=False), metavar="FILE",
              help="Prompts of your own, JSONL with `turns`, `prompt`, `messages` or `tokens`.")  # fmt: skip
@click.option("--price", type=float, metavar="USD", help="What an hour of this machine costs.")
@click.option("--fail-under", multiple=True, metavar="NAME=V",
              help="End with 3 where a figure is below V, such as speedup_batch_1=1.2; may be repeated.")  # fmt: skip
@click.option("--tasks", type=Listed(str), metavar="LIST",
              help="Of quality: arithmetic, cloze, code, format, text, gsm8k, humaneval, or of lm-evaluation-harness."
              "  [default: the first five]")  # fmt: skip
@click.option("--allow-code", is_flag=True, help="Run code that a model wrote for a task, under limits.")
@click.option("--against", multiple=True, metavar="WHAT",
              help="Beside transformers' lookup, assisted=MODEL, or another ARTIFACT; may be repeated.")  # fmt: skip
@click.option(
    "-o",
    "--out",
    metavar="FOLDER",
    help="Where the report is written.  [default: ARTIFACT/eval; of one that ships with retrofit: the cache]",
)
@click.option("--restart", is_flag=True, help="Measure again what an earlier run has finished.")
@base_option
@seed_option
@engine_options
@output_options
def evaluate(
    folder: str, out: str | None, fail_under: tuple[str, ...], loading: Loading, as_json: bool, **options: Any
) -> None:
    """Measure ARTIFACT beside its original.

    Does it answer the same, is it faster, where does it stop paying, what does it cost. Writes
    report.json, and from it report.md, report.html and report.svg, and exits with 3 when a gate of the verdict is
    not met. Sections that are finished are written at once and not run again: after an interruption the same command
    goes on.

    \b
    Examples:
      retrofit eval tiny-retrofit
      retrofit eval tiny-retrofit --prompts mine.jsonl --batch 1,8 --price 2.5 --fail-under speedup_batch_1=1.2
    """
    least = _bounds(fail_under)
    artifact = found_artifact(folder, loading.offline)
    quieten_libraries()
    from retrofit.report.evaluate import evaluate as run
    from retrofit.sharing.pulling import findings_folder

    out = out or str(findings_folder(folder, artifact))
    report = run(
        artifact, out=out, fail_under=least, progress=not is_quiet(), **options, **loading.keywords
    )  # fmt: skip
    if as_json:
        emit_json(report.data, indent=1)
    else:
        _print(report.data)
    from retrofit.report.document import place

    say(f"wrote {place(out)}")
    report.require()


def _bounds(texts: tuple[str, ...]) -> dict[str, float]:
    """Raises UsageError for what is no NAME=V, and for a name with two bounds."""
    found: dict[str, float] = {}
    for name, bound in map(_bound, texts):
        if found.setdefault(name, bound) != bound:
            raise UsageError(f"--fail-under gives {name} two bounds, {found[name]:g} and {bound:g}", "leave one out")
    return found


def _bound(text: str) -> tuple[str, float]:
    """`NAME=V`.  Raises UsageError."""
    name, _, value = text.partition("=")
    try:
        bound = float(value)
    except ValueError:
        bound = math.nan
    if not name or not math.isfinite(bound):
        raise UsageError(f"--fail-under is {text}; it must be NAME=V, a figure and a number", "speedup_batch_1=1.2")
    return name, bound


def _print(data: dict[str, Any]) -> None:
    from retrofit.cli.tables import print_table

    for line in data["verdict"]["lines"]:
        click.echo(line)
    rows = [("passed" if gate["ok"] else "failed", gate["name"], gate["says"]) for gate in data["verdict"]["gates"]]
    if rows:
        print_table(rows)


@click.group(context_settings=CONTEXT)
def report() -> None:
    """Show a report of `retrofit eval`, or several side by side.

    \b
    Examples:
      retrofit report show tiny-retrofit
      retrofit report compare tiny-retrofit other-retrofit
    """


@report.command("show", context_settings=CONTEXT)
@click.argument("place", metavar="ARTIFACT|FILE")
@click.option("--html", "as_html", is_flag=True, envvar="RETROFIT_HTML",
              help="As a page for a browser, which holds its pictures.")  # fmt: skip
@output_options
def report_show(place: str, as_html: bool, as_json: bool) -> None:
    """Print the report of an artifact, or of a file, as Markdown.

    \b
    Examples:
      retrofit report show tiny-retrofit
      retrofit report show tiny-retrofit --html > report.html
    """
    from retrofit.report import document
    from retrofit.report.html.page import html
    from retrofit.report.markdown import markdown

    if as_html and as_json:
        raise UsageError("--html and --json are two forms of one report", "give one of them")
    data = document.read(place)
    if as_json:
        emit_json(data, indent=1)
    else:
        click.echo(html(data) if as_html else markdown(data), nl=False)


@report.command("compare", context_settings=CONTEXT)
@click.argument("places", metavar="ARTIFACT|FILE...", nargs=-1, required=True)
@click.option("--markdown", is_flag=True, help="Print Markdown.")
@output_options
def report_compare(places: tuple[str, ...], markdown: bool, as_json: bool) -> None:
    """Print reports side by side, each held against the first.

    Where two were not measured alike (another base, other prompts, other hardware), that stands in place of a
    difference.

    \b
    Example:
      retrofit report compare tiny-retrofit other-retrofit --markdown
    """
    from retrofit.cli.tables import print_table
    from retrofit.report import compare, document

    found = compare.compared([(place, document.read(place)) for place in places])
    if as_json:
        emit_json(found, indent=1)
    elif markdown:
        click.echo(compare.page(found), nl=False)
    else:
        for line in compare.legend(found):
            click.echo(line)
        header, rows = compare.rows(found)
        print_table([tuple(row) for row in rows], tuple(header))
