"""`retrofit certify`: prove that an artifact leaves its base alone."""

from __future__ import annotations

from typing import Literal

import click

from retrofit.cli.options import CONTEXT, Loading, artifact_argument, base_option, engine_options, output_options
from retrofit.cli.output import is_quiet, quieten_libraries, say
from retrofit.cli.tables import print_table


@click.command(context_settings=CONTEXT)
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
    from retrofit.sharing.pulling import local_folder

    folder = str(local_folder(folder, loading.offline))
    certificate = run(folder, level=level, base=base, progress=not is_quiet(), **loading.keywords)
    path = certificate.save(folder)
    if as_json:
        click.echo(path.read_text(encoding="utf-8"), nl=False)
    else:
        print_table([(f"{check.status:<8}", check.name, check.detail) for check in certificate.checks])
    say(f"certified was {certificate.what}")
    say(f"wrote {path}")
    certificate.require()
