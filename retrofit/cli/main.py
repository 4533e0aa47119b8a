"""The command `retrofit`: its commands, one file each; what they share is in `options.py`, `output.py` and `errors.py`.

Everything slow is imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

import os

import click

from retrofit import __version__
from retrofit.cli.certify import certify
from retrofit.cli.chat import chat
from retrofit.cli.convert import average, convert
from retrofit.cli.data import data
from retrofit.cli.doctor import doctor
from retrofit.cli.errors import Cli
from retrofit.cli.evaluate import evaluate, report
from retrofit.cli.exchange import export, import_adapter, pull, push
from retrofit.cli.generate import generate
from retrofit.cli.inspect import inspect
from retrofit.cli.options import CONTEXT
from retrofit.cli.recipes import recipes
from retrofit.cli.serve import serve

EXIT_CODES = """\b
Exit codes:
  0  done             3  a check was not met
  1  failed           4  GPU, memory, disk, network or credentials missing
  2  wrong usage      130, 143  interrupted"""

SPINS = "10000"
"""How often a thread of GNU's OpenMP looks for work before it sleeps: half a millisecond, which bridges the gaps within
a step.  Its own default comes to 16, during which it takes a core from whoever else runs on a busy machine."""


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
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported, so by no process that has it already
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


for command in (
    convert, average, generate, chat, certify, evaluate, report, inspect, pull, push, export, import_adapter,
    serve, doctor, recipes, data,
):  # fmt: skip
    main.add_command(command)


if __name__ == "__main__":
    main()
