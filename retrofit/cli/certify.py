"""`retrofit certify`: prove that an artifact leaves its base alone."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from retrofit.artifact.own import told
from retrofit.cli.options import (
    CONTEXT,
    Loading,
    artifact_argument,
    base_option,
    engine_options,
    found_artifact,
    output_options,
)
from retrofit.cli.output import is_quiet, quieten_libraries, say
from retrofit.cli.tables import print_table
from retrofit.errors import UsageError


@click.command(context_settings=CONTEXT)
@artifact_argument
@click.option(
    "--level",
    type=click.Choice(["quick", "full"]),
    default="quick",
    show_default=True,
    help="How many prompts and tokens to check.",
)
@click.option(
    "-o",
    "--out",
    metavar="FILE",
    help="Where the certificate is written, a file or a folder that is there.  [default: ARTIFACT]",
)
@base_option
@engine_options
@output_options
def certify(
    folder: str,
    level: Literal["quick", "full"],
    out: str | None,
    base: str | None,
    loading: Loading,
    as_json: bool,
) -> None:
    """Prove that ARTIFACT leaves its base alone.

    Runs the checks on this machine, writes certificate.json into the artifact (of one that ships with
    retrofit: into the cache), and exits with 3 when one of them is not met. What is certified is what runs:
    the backend, the type and the level of exactness that `retrofit generate` takes with the same options;
    the certificate names them. Of an artifact of the profile joint it is of kind own: lossless against the
    output of its own model, in ARTIFACT/model, not of the original, from which it says how far that is.

    \b
    Example:
      retrofit certify tiny-retrofit --level full
    """
    place = found_artifact(folder, loading.offline)
    quieten_libraries()
    from retrofit import certify as run
    from retrofit.artifact.files import check_file
    from retrofit.eval.certify import CERTIFICATE

    target = _place(out, folder, place)
    check_file(target / CERTIFICATE if target.is_dir() else target)
    certificate = run(place, level=level, base=base, progress=not is_quiet(), **loading.keywords)
    path = certificate.save(target)
    if as_json:
        click.echo(path.read_text(encoding="utf-8"), nl=False)
    else:
        print_table([(f"{check.status:<8}", check.name, check.detail) for check in certificate.checks])
    say(f"certified was {certificate.what}")
    if certificate.kind == "own":
        original, drift = certificate.subject["original"]["model"], certificate.subject["drift"]
        say(f"kind own: against its own `ar`, not that of {original}; drift from it: {told(drift)}")
    say(f"wrote {path}")
    certificate.require()


def _place(out: str | None, name: str, folder: Path) -> Path:
    """What `Certificate.save` is to be told.  Raises UsageError for another artifact, of which it says nothing."""
    from retrofit.artifact.folder import CONFIG
    from retrofit.eval.certify import CERTIFICATE
    from retrofit.sharing.pulling import findings_folder

    if out is None:
        kept = findings_folder(name, folder)
        return folder if kept == folder else kept / CERTIFICATE
    if (Path(out) / CONFIG).is_file() and Path(out).resolve() != folder.resolve():
        raise UsageError(f"{out} is another artifact: the certificate of {name} does not go there", "name a file")
    return Path(out)
