"""Artifacts to and from others: `push` and `pull` of the Hub, `export` and `import` of other programs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from retrofit.cli.options import (
    CONTEXT,
    Loading,
    artifact_argument,
    base_option,
    found_artifact,
    loading_options,
    output_options,
    say_other_precision,
)
from retrofit.cli.output import emit_json, quieten_hub, quieten_libraries, say
from retrofit.cli.tables import facts, print_table

if TYPE_CHECKING:
    from retrofit.sharing.pushing import Pushed

FORMATS = ["peft", "uno", "nemotron", "transformers"]
STYLES = ["uno", "nemotron"]


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

    ARTIFACT is a folder, smollm2-135m, or OWNER/NAME or OWNER/NAME@REVISION on the Hub, which is pulled.

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

    REPO is OWNER/NAME or OWNER/NAME@REVISION, or smollm2-135m, which ships with retrofit.  The artifact is there whole
    and checked, or not at all.  Only safetensors, JSON, YAML, Markdown, HTML and SVG are fetched.
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


@click.command(context_settings=CONTEXT)
@artifact_argument
@click.option("--format", "form", type=click.Choice(FORMATS), required=True, envvar="RETROFIT_FORMAT",
              help="What is to read it; see above.")  # fmt: skip
@click.option("-o", "--out", metavar="FOLDER", required=True, help="A new folder.")
@base_option
@click.option(
    "--mask-token",
    metavar="ID|TEXT",
    help="Of nemotron: token that becomes the mask; no text may have it.  "
    "[default: one that the tokenizer does not have]",
)
@loading_options
@output_options
def export(
    folder: str, form: str, out: str, base: str | None, mask_token: str | None, loading: Loading, as_json: bool
) -> None:
    """Write ARTIFACT as a folder for other programs.

    ARTIFACT is a folder, smollm2-135m, or OWNER/NAME or OWNER/NAME@REVISION on the Hub, which is pulled.

    \b
    peft            the adapter as a plain PEFT folder; it acts when told to
    uno             for SGLang's --uno-lora-path, with the command that starts it; recipes like `uno` only
    nemotron        with its base, as a checkpoint of Nemotron-Labs-Diffusion; recipes like `nemotron` only
    transformers    for generate(custom_generate=FOLDER, ...), where retrofit is not installed

    The folder is read back by PEFT or transformers and compared with the artifact, on its base, before it is there;
    that is done in float32 unless --dtype is given.

    \b
    Example:
      retrofit export tiny-retrofit --format transformers -o tiny-generate
    """
    place = found_artifact(folder, loading.offline)
    quieten_libraries()
    from retrofit import export as run

    exported = run(
        place,
        form,
        out,
        base=base,
        mask_token=mask_token,
        device=loading.device,
        dtype=loading.dtype or "float32",
        offline=loading.offline,
        trust_remote_code=loading.trust_remote_code,
    )
    if as_json:
        emit_json({**asdict(exported), "folder": str(exported.folder)})
    else:
        click.echo(exported.folder)
    say_other_precision(exported.other_precision)
    say(exported.compared)


@click.command("import", context_settings=CONTEXT)
@click.argument("adapter", metavar="ADAPTER")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--base", metavar="MODEL", required=True, help="Hub id, folder or GGUF file of the model it is for.")
@click.option("-o", "--out", metavar="FOLDER", required=True, help="Folder to write.")
@click.option("--style", type=click.Choice(STYLES), required=True, help="How the other program drafts; see above.")
@click.option(
    "--mask-token",
    metavar="ID|TEXT",
    help="Token that masks; its embedding becomes the mask vector.  "
    "[default: mask_token_id of the base's configuration]",
)
@click.option("--subfolder", metavar="NAME", help="Where in ADAPTER it is, such as linear_spec_lora.")
@click.option("--overwrite", is_flag=True, help="Replace an artifact that is there already.")
@loading_options
@output_options
def import_adapter(adapter: str, overrides: tuple[str, ...], loading: Loading, as_json: bool, **options: Any) -> None:
    """Write the ADAPTER of another program as an artifact.

    ADAPTER is a folder that PEFT wrote, or OWNER/NAME or OWNER/NAME@REVISION on the Hub.  Rank, alpha and targets come
    over; what no recipe can express is refused, all of it by name.  Only adapter_config.json and
    adapter_model.safetensors are read.

    \b
    uno         random tokens behind the newest, seen causally, each drafting for the next place; for SGLang's UNO
    nemotron    the newest token and masks, seeing one another, each drafting for its own place; linear_spec_lora

    The style is the recipe of that name: KEY=VALUE sets a key of draft.* otherwise, above all draft.block, which is
    what the adapter was trained for.  With data.source=TEXTS acceptance is measured on held-out text; without it
    nothing is.  Prints the artifact's folder.

    \b
    Examples:
      retrofit import ./uno-lora --base Qwen/Qwen3-8B --style uno -o qwen-uno draft.block=15
      retrofit import OWNER/NAME --subfolder linear_spec_lora --base ./model --style nemotron --mask-token 100 -o out
    """
    quieten_libraries()
    from retrofit import import_adapter as run

    made = run(
        adapter,
        out=options.pop("out"),
        overrides=overrides,
        device=loading.device,
        dtype=loading.dtype or "auto",
        offline=loading.offline,
        trust_remote_code=loading.trust_remote_code,
        **options,
    )
    parts = {key: made.config[key] for key in ("base", "imported", "adapter", "draft", "parameters", "acceptance")}
    if as_json:
        emit_json({"artifact": str(made.folder), **parts})
        return
    conditional = parts["acceptance"].get("conditional")
    measured = f"measured on held-out text: {facts({'conditional': conditional})}" if conditional else ""
    say(measured or "nothing was measured: add data.source=TEXTS for acceptance on held-out text")
    say(f"next: retrofit certify {made.folder}")
    click.echo(made.folder)
