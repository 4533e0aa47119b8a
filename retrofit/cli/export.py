"""`retrofit export`: an artifact for other programs."""

from __future__ import annotations

from dataclasses import asdict

import click

from retrofit.cli.options import CONTEXT, Loading, artifact_argument, base_option, loading_options, output_options
from retrofit.cli.output import emit_json, quieten_libraries, say

FORMATS = ["peft", "uno", "transformers"]


@click.command(context_settings=CONTEXT)
@artifact_argument
@click.option("--format", "form", type=click.Choice(FORMATS), required=True, help="What is to read it; see above.")
@click.option("-o", "--out", metavar="FOLDER", required=True, help="A new folder.")
@base_option
@loading_options
@output_options
def export(folder: str, form: str, out: str, base: str | None, loading: Loading, as_json: bool) -> None:
    """Write ARTIFACT as a folder for other programs.

    ARTIFACT is a folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hub, which is pulled.

    \b
    peft            the adapter as a plain PEFT folder; it acts when told to
    uno             for SGLang's --uno-lora-path, with the command that starts it; recipes like `uno` only
    transformers    for generate(custom_generate=FOLDER, ...), where retrofit is not installed

    The folder is read back by PEFT or transformers and compared with the artifact, on its base, before it is there;
    that is done in float32 unless --dtype is given.

    \b
    Example:
      retrofit export tiny-retrofit --format transformers -o tiny-generate
    """
    quieten_libraries()
    from retrofit import export as run

    exported = run(
        folder,
        form,
        out,
        base=base,
        device=loading.device,
        dtype=loading.dtype or "float32",
        offline=loading.offline,
        trust_remote_code=loading.trust_remote_code,
    )
    if as_json:
        emit_json({**asdict(exported), "folder": str(exported.folder)})
    else:
        click.echo(exported.folder)
    say(exported.compared)
