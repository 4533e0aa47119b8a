"""`retrofit push` and `retrofit pull`: artifacts to the Hub, and from there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from retrofit.cli.options import CONTEXT, artifact_argument, output_options
from retrofit.cli.output import emit_json, quieten_hub, say
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
    quieten_hub()
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


@click.command(context_settings=CONTEXT)
@click.argument("repository", metavar="REPO")
@click.option("-o", "--out", metavar="FOLDER", help="Put it there; else it stays in the cache.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there.")
@click.option("--offline", is_flag=True, help="Use no network, only what is on this machine.")
@output_options
def pull(repository: str, out: str | None, overwrite: bool, offline: bool, as_json: bool) -> None:
    """Fetch the artifact in REPO on the Hub and print its folder.

    REPO is OWNER/NAME or OWNER/NAME@REVISION.  The artifact is there whole and checked, or not at all.  Only
    safetensors, JSON, YAML, Markdown, HTML and SVG are fetched.
    `retrofit generate`, `chat` and `inspect` take REPO too, and pull it by themselves.

    \b
    Example:
      retrofit pull me/qwen-retrofit -o qwen-retrofit
    """
    quieten_hub()
    from retrofit import pull as run

    folder = run(repository, out, overwrite=overwrite, offline=offline)
    if as_json:
        emit_json({"repository": repository, "folder": str(folder)})
    else:
        click.echo(folder)


def _outcome(pushed: Pushed, dry_run: bool) -> str:
    who = "private" if pushed.private else "public"
    if dry_run:
        return f"nothing was sent; it would be {pushed.bytes:,} bytes to {pushed.repository} ({who})"
    if pushed.commit is None:
        return f"nothing to send: {pushed.repository} holds every file as it is here"
    return f"sent {pushed.bytes:,} bytes to {pushed.repository} ({who}); {pushed.verified} sha256 compared, all equal"
