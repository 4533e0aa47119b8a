"""`retrofit inspect`: what an artifact holds."""

from __future__ import annotations

import click

from retrofit.cli.options import CONTEXT, artifact_argument, output_options
from retrofit.cli.output import emit_json


@click.command(context_settings=CONTEXT)
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
