"""How an error ends the program: a message and a hint on stderr, and the exit code.

`Cli.invoke` is the one place that turns an exception into those.  This file imports nothing heavy.
"""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from retrofit.cli.output import VERBOSE
from retrofit.errors import DataError, RetrofitError, disk_full, out_of_memory
from retrofit.launch import speaks


class Cli(click.Group):
    """A group whose commands may raise anything."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().main(*arguments, **options)
        except OSError as error:  # from --help and --version, which print before any command is there
            if disk_full(error) is None:
                raise
            raise SystemExit(_report(error, verbose=False)) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminated():
                return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException, BrokenPipeError) as error:
            if isinstance(error, click.UsageError) and ctx.invoked_subcommand == "convert" and not speaks():
                raise click.exceptions.Exit(error.exit_code) from None  # another of several processes says it
            raise  # click's own business: exit codes, usage errors, a reader that left
        except SystemExit as error:  # SIGTERM
            _notes(error)
            raise
        except KeyboardInterrupt as error:
            click.echo("interrupted", err=True)
            _notes(error)
            raise click.exceptions.Exit(128 + signal.SIGINT) from None
        except Exception as error:
            code = _report(error, bool(ctx.meta.get(VERBOSE)))
            _notes(error)
            raise click.exceptions.Exit(code) from None


def show(error: RetrofitError) -> None:
    """What is wrong and what to do, on stderr."""
    click.echo(f"Error: {error}", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)


def _notes(error: BaseException) -> None:
    """What was saved before the program ended, on stderr."""
    for note in getattr(error, "__notes__", []):
        click.echo(note, err=True)


def _report(error: Exception, verbose: bool) -> int:
    """Print what went wrong; returns the exit code."""
    if verbose:
        traceback.print_exception(error)
    known = error if isinstance(error, RetrofitError) else out_of_memory(error) or disk_full(error)
    if known is not None:
        show(known)
        return known.exit_code
    first = next(iter(str(error).strip().splitlines()), "")
    click.echo(f"Error: {type(error).__name__}{': ' if first else ''}{first}", err=True)
    if not verbose:
        click.echo("hint: not foreseen, so maybe a bug; run with -v for the traceback", err=True)
    return 1


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that what must be saved or removed is; the exit code is 143."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set signal handlers
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def not_text(error: UnicodeDecodeError) -> DataError:
    """What is wrong with stdin that cannot be read as text."""
    return DataError(f"stdin: not UTF-8 text ({error.reason})", "convert it to UTF-8")
