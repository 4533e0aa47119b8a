"""`retrofit export` and `retrofit import`: an artifact for other programs, and their adapters as artifacts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from retrofit.cli.options import CONTEXT, Loading, artifact_argument, base_option, loading_options, output_options
from retrofit.cli.output import emit_json, quieten_libraries, say
from retrofit.cli.tables import facts

FORMATS = ["peft", "uno", "transformers"]
STYLES = ["uno", "nemotron"]


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
    """Write ADAPTER, which another program drafts with, as an artifact.

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
