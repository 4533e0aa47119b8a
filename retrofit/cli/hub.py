"""`retrofit push` and `retrofit pull`: artifacts to the Hub, and from there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from retrofit.cli.options import CONTEXT, artifact_argument, output_options
from retrofit.cli.output import VERBOSE, emit_json, say
from retrofit.cli.tables import print_table

if TYPE_CHECKING:
    from retrofit.sharing.pushing import Pushed


@click.command(context_settings=CONTEXT)
@artifact_argument
@click.argument("repository", metavar="REPO")
@click.option("--public", is_flag=True, help="Let everybody see a repository that is made; else only its owner does.")
@click.option("--create-pr", is_flag=True, help="Propose the change as a pull request.")
@click.option("--revision", metavar="BRANCH", help="The branch to push to, made if need be; else the default one.")
@click.option("--dry-run", is_flag=True, help="Only show files, sizes, differences and the card.")
@click.option("--uncertified", is_flag=True, help="Push without a certificate that passed; the card says so.")
@output_options
def push(folder: str, repository: str, as_json: bool, **options: Any) -> None:
    """Put ARTIFACT into REPO, OWNER/NAME on the Hub.

    One commit, and none where nothing changed; what was sent is fetched again and compared.  Sent are the files of an
    artifact and its reports, never local.json.  The access token is that of HF_TOKEN or `hf auth login`.

    \b
    Examples:
      retrofit push qwen-retrofit me/qwen-retrofit --dry-run
      retrofit push qwen-retrofit me/qwen-retrofit --public
    """
    _quieten()
    from retrofit import push as run

    pushed = run(folder, repository, **options)
    if as_json:
        emit_json({**asdict(pushed), "dry_run": options["dry_run"]}, indent=2)
        return
    column = max(len(f"{change.size:,}") for change in pushed.changes)
    print_table([(change.what, f"{change.size:>{column},}", change.name) for change in pushed.changes])
    if pushed.left_out:
        say(f"not sent: {', '.join(pushed.left_out)}")
    if options["dry_run"]:
        click.echo(f"\n{pushed.card}")
    say(_outcome(pushed, options["dry_run"]))
    if not options["dry_run"]:
        click.echo(pushed.pull_request or pushed.url)


def _outcome(pushed: Pushed, dry_run: bool) -> str:
    who = "private" if pushed.private else "public"
    if dry_run:
        return f"nothing was sent; it would be {pushed.bytes:,} bytes to {pushed.repository} ({who})"
    if pushed.commit is None:
        return f"nothing to send: {pushed.repository} holds every file as it is here"
    return f"sent {pushed.bytes:,} bytes to {pushed.repository} ({who}); {pushed.verified} sha256 compared, all equal"


def _quieten() -> None:
    """The Hub's library warns of each try and draws its own bars; what matters of that is said here.  Unless -v."""
    from huggingface_hub.utils import disable_progress_bars, logging

    if not click.get_current_context().meta.get(VERBOSE):
        logging.set_verbosity_error()
    disable_progress_bars()
