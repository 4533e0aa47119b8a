"""`retrofit data`: look at training text before hours are spent on it.

`preview` shows documents as training sees them, `stats` counts them, `validate` finds every row that cannot be used.
Everything slow is imported inside the bodies, so that `--help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from retrofit.cli.options import CONTEXT, output_options, skip_bad_option
from retrofit.cli.output import emit_json, is_quiet, quieten_libraries, say
from retrofit.cli.tables import print_table
from retrofit.errors import DataError, UsageError
from retrofit.progress import tracked

if TYPE_CHECKING:
    from retrofit.recipes.schema import Recipe
    from retrofit.recipes.text.documents import Document
    from retrofit.recipes.text.faults import Skipped
    from retrofit.recipes.text.sources import Part


ADVICE = "mend them, or leave them out with --skip-bad, which `retrofit convert` has too"


@dataclass
class Text:
    """The text that a command is about, and how it is to be read."""

    recipe: Recipe
    tokenizer: Any
    vocab: int
    limit: int | None
    offline: bool

    def documents(self, part: Part, skipped: Skipped | None, progress: str | None = None) -> Iterator[Document]:
        from retrofit.recipes.text.documents import documents

        read = documents(
            self.recipe.data, self.tokenizer, part=part, seed=self.recipe.train.seed, skipped=skipped,
            vocab=self.vocab, offline=self.offline,
        )  # fmt: skip
        hidden = progress is None or is_quiet()
        yield from tracked(islice(read, self.limit), progress or "", "document", quiet=hidden, brief=True)


def _text_options(function: Any) -> Any:
    """Adds [SOURCE] [KEY=VALUE]..., --recipe and how to find the model; the command gets them as `text`."""

    @wraps(function)
    def run(
        *arguments: Any,
        items: tuple[str, ...],
        model: str | None,
        recipe: str | None,
        limit: int | None,
        offline: bool,
        trust_remote_code: bool,
        **options: Any,
    ) -> Any:
        quieten_libraries()
        from retrofit.hub import load_tokenizer
        from retrofit.recipes.schema import load_recipe

        source, overrides = _source_and_overrides(items)
        # The recipe that `convert` would take, so that lengths and blocks are those of the training to come.
        name = recipe if recipe is not None or model is None else "default"
        given: dict[str, Any] = {"data.source": source} if source is not None else {}
        if model is not None:
            given["base.model"] = model
        resolved = load_recipe(name, [*_as_overrides(given), *overrides])
        tokenizer, vocab = load_tokenizer(
            resolved.base.model, resolved.base.revision, offline=offline, trust_remote_code=trust_remote_code
        )
        return function(*arguments, text=Text(resolved, tokenizer, vocab, limit, offline), **options)

    options = (
        click.argument("items", nargs=-1, metavar="[SOURCE] [KEY=VALUE]..."),
        click.option("--model", metavar="MODEL", help="Hub id or folder whose tokenizer and chat template to use; its "
                     "weights are not read.  [default: the recipe's]"),
        click.option("--recipe", metavar="NAME|FILE", help="Read its data section.  "
                     "[default: tiny for the embedded base, else default]"),
        click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Read the first N documents only."),
        click.option("--offline", is_flag=True, help="Use no network, only what is on this machine."),
        click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with a model."),
    )  # fmt: skip
    for option in reversed(options):
        run = option(run)
    return run


def _source_and_overrides(items: Sequence[str]) -> tuple[str | None, list[str]]:
    """Raises UsageError for more than one source."""
    overrides = [item for item in items if "=" in item and not Path(item).exists()]
    sources = [item for item in items if item not in overrides]
    if len(sources) > 1:
        raise UsageError(
            f"more than one source: {', '.join(sources)}",
            "a mixture is data.source='[{source: A, weight: 2}, {source: B}]'",
        )
    return (sources[0] if sources else None), overrides


def _as_overrides(given: dict[str, str]) -> list[str]:
    return [f"{key}='{value.replace(chr(39), chr(39) * 2)}'" for key, value in given.items()]


@click.group(context_settings=CONTEXT)
def data() -> None:
    """Look at training text: preview it, count it, find bad rows.

    \b
    Example:
      retrofit data validate chats.jsonl --model Qwen/Qwen3-0.6B
    """


@data.command(context_settings=CONTEXT)
@_text_options
@click.option("-n", "--rows", type=click.IntRange(min=1), default=3, show_default=True, help="How many to show.")
@click.option("--tokens", type=click.IntRange(min=1), default=300, show_default=True, help="Of each, at most.")
@click.option("--blocks", type=click.IntRange(min=0), default=4, show_default=True, help="Draft blocks of each.")
@skip_bad_option
@output_options
def preview(text: Text, rows: int, tokens: int, blocks: int, skip_bad: bool, as_json: bool) -> None:
    """Show documents as training sees them.

    Each is decoded from its tokens, after the chat template and the cut into windows.  What the model
    learns to draft, response tokens, is green; on a pipe it stands between « and ».  Below are draft blocks that
    training hangs on it: the anchor, the positions of its rows, what they read (M is the mask vector) and the
    tokens they have to predict.

    \b
    Examples:
      retrofit data preview chats.jsonl --model Qwen/Qwen3-0.6B
      retrofit data preview texts/ data.max_length=512 draft.block=4 -n 1
    """
    from retrofit.recipes.dry_run.survey import draft_blocks
    from retrofit.recipes.text.faults import Skipped
    from retrofit.recipes.text.windows import windows

    skipped = Skipped() if skip_bad else None
    keys, seed = text.recipe.data, text.recipe.train.seed
    read = windows(text.documents("train", skipped), keys.max_length, keys.lengths, seed)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for document in islice(read, rows):
        found = draft_blocks(document, text.recipe, text.vocab)
        if as_json:
            emit_json(
                {
                    "id": document.id,
                    "source": document.source,
                    "where": document.where,
                    "text": text.tokenizer.decode(document.tokens),
                    "tokens": document.tokens,
                    "response": document.response,
                    "blocks": found,
                }
            )
            continue
        count = f"{len(document.tokens)} tokens, {sum(document.response)} of a response"
        click.echo(f"==> {document.where}, {document.id} ({count}) <==")
        shown = {block["anchor"] for block in found[:blocks]}
        click.echo(_marked(document, text.tokenizer, shown, tokens, colour), color=colour)
        for block in found[:blocks]:
            click.echo(f"  {_block_line(block, document, text.tokenizer)}")
    if skipped is not None:
        say(skipped.line())


def _marked(document: Document, tokenizer: Any, anchors: set[int], limit: int, colour: bool) -> str:
    """The text with response tokens green and anchors underlined; without colour, responses between « and »."""
    parts, inside = [], False
    for tokens, response, anchor in _pieces(document, tokenizer, anchors, limit):
        piece = tokenizer.decode(tokens)
        if colour:
            # Line ends stay outside of the style, so that it does not run on to the edge of the terminal.
            parts.append("\n".join(_styled(line, response, anchor) for line in piece.split("\n")))
        else:
            parts.append(("»" if inside and not response else "«" if response and not inside else "") + piece)
            inside = response
    left = len(document.tokens) - limit
    return "".join(parts) + ("»" if inside else "") + (f"\n  and {left:,} more tokens" if left > 0 else "")


def _styled(line: str, response: bool, anchor: bool) -> str:
    return click.style(line, fg="green" if response else None, underline=anchor) if line else ""


def _pieces(
    document: Document, tokenizer: Any, anchors: set[int], limit: int
) -> Iterator[tuple[list[int], bool, bool]]:
    """Runs of tokens that look alike: (tokens, whether of a response, whether an anchor).

    A character that several tokens make up goes to the run of the first.
    """
    run: list[int] = []
    style = (False, False)
    for number in range(min(limit, len(document.tokens))):
        new = (document.response[number], number in anchors)
        if run and new != style and not tokenizer.decode(run).endswith("\N{REPLACEMENT CHARACTER}"):
            yield (run, *style)
            run = []
        style = style if run else new
        run.append(document.tokens[number])
    if run:
        yield (run, *style)


def _block_line(block: dict[str, Any], document: Document, tokenizer: Any) -> str:
    def word(token: int | None) -> str:
        return "-" if token is None else repr(tokenizer.decode([token]))

    anchor, start, inputs = block["anchor"], block["start"], block["inputs"]
    read = " ".join("M" if token is None else word(token) for token in inputs)
    rows = f"rows {start}..{start + len(inputs) - 1}"
    wanted = " ".join(map(word, block["targets"]))
    return f"anchor {anchor} {word(document.tokens[anchor])}, {rows}: {read}, to predict: {wanted}"


@data.command(context_settings=CONTEXT)
@_text_options
@skip_bad_option
@output_options
def stats(text: Text, skip_bad: bool, as_json: bool) -> None:
    """Count documents, tokens and lengths.

    All documents are counted, those that are held out too.  Of a mixture, each source is: its share of the
    documents of training (weight) and the share of the tokens that this makes.

    \b
    Examples:
      retrofit data stats chats.jsonl --model Qwen/Qwen3-0.6B
      retrofit data stats data.source='[{source: chats.jsonl, weight: 3}, {source: stdlib}]'
      retrofit data stats --recipe qwen3-8b --limit 10000 --json
    """
    from retrofit.recipes.dry_run.survey import survey
    from retrofit.recipes.text.faults import Skipped

    skipped = Skipped() if skip_bad else None
    report = survey(text.documents("all", skipped, "counting"), text.recipe)
    if skipped is not None:
        report["skipped"] = skipped.counts()
    if as_json:
        emit_json(report, indent=2)
    else:
        _print_stats(report, text.recipe)
    if skipped is not None:
        say(skipped.line())


def _print_stats(report: dict[str, Any], recipe: Recipe) -> None:
    share = report["response_tokens"] / max(1, report["tokens"])
    lengths = ", ".join(f"{name} {value:,}" for name, value in report["lengths"].items())
    rows = {
        "documents": f"{report['documents']:,}",
        "tokens": f"{report['tokens']:,}, of responses {report['response_tokens']:,} ({share:.1%})",
        "lengths": lengths,
        "cut": f"{report['cut']:,} longer than {_window(recipe)}",
        "windows": f"{report['windows']:,} to train on, {report['dropped_windows']:,} dropped without response token",
        "anchors": f"{report['anchors']:,}; {report['unusable']:,} documents have none and are passed over",
    }
    if report["to_answer"]:
        rows["to answer"] = f"{report['to_answer']:,}, whose responses the base is yet to write"
    print_table([*rows.items()])
    if sources := report.get("sources"):
        print_table([(name, _of_source(found)) for name, found in sources.items()])


def _window(recipe: Recipe) -> str:
    lengths = recipe.data.lengths
    return f"a window of data.lengths {list(lengths)}" if lengths else f"data.max_length {recipe.data.max_length:,}"


def _of_source(found: dict[str, Any]) -> str:
    return (
        f"weight {found['weight']:.1%}, {found['token_share']:.1%} of the tokens of training; "
        f"holds {found['documents']:,} documents, {found['tokens']:,} tokens"
    )


@data.command(context_settings=CONTEXT)
@_text_options
@skip_bad_option
@output_options
def validate(text: Text, skip_bad: bool, as_json: bool) -> None:
    """Name every row that cannot be used.

    Reads all rows as training would, and prints a line for each bad one: file:line, and why.  Found are rows that
    are no JSON, lack a field, are empty, not UTF-8 or longer than 1 MB, that the chat template refuses, that hold
    no response token, and tokens that the model does not know.  Exits with 1 if there are any; with --skip-bad
    only if nothing else is left.

    \b
    Examples:
      retrofit data validate chats.jsonl --model Qwen/Qwen3-0.6B
      retrofit data validate texts/ --json -q
    """
    from retrofit.recipes.text.faults import Skipped

    skipped = Skipped()
    good = 0
    problem: DataError | None = None
    try:
        for _ in text.documents("all", skipped, "checking"):
            good += 1
    except DataError as error:
        problem = error
        if not skipped.rows:
            raise
    bad = skipped.sorted()
    if as_json:
        rows = [{"where": row.where, "kind": row.kind, "problem": row.problem} for row in bad]
        emit_json({"good": good, "bad": len(bad), "kinds": skipped.counts(), "rows": rows})
    else:
        for row in bad:
            click.echo(str(row))
    if problem is None and not bad:
        say(f"all {good:,} rows can be used")
    elif problem is None and skip_bad:
        say(skipped.line())
    else:
        raise problem or DataError(f"{len(bad):,} of {good + len(bad):,} rows cannot be used", ADVICE)
