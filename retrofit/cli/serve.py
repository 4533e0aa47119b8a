"""`retrofit serve`: an artifact in a serving engine that exists."""

from __future__ import annotations

import os
import shlex

import click

from retrofit.cli.options import (
    CONTEXT,
    artifact_argument,
    base_option,
    found_artifact,
    output_options,
    say_other_precision,
)
from retrofit.cli.output import emit_json, quieten_libraries, say

ENGINES = ["vllm", "sglang"]


@click.command(context_settings={**CONTEXT, "ignore_unknown_options": True, "allow_interspersed_args": True})
@artifact_argument
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[OPTIONS OF THE ENGINE]...")
@click.option("--engine", type=click.Choice(ENGINES), required=True, help="The serving engine; see above.")
@base_option
@click.option("--offline", is_flag=True, help="Use no network, only what is on this machine.")
@click.option("--print", "only_print", is_flag=True, envvar="RETROFIT_PRINT",
              help="Print the command, start nothing; with --json as a list.")  # fmt: skip
@output_options
def serve(
    folder: str, options: tuple[str, ...], engine: str, base: str | None, offline: bool, only_print: bool, as_json: bool
) -> None:
    """Serve ARTIFACT in vLLM, over HTTP and with drafts.

    ARTIFACT is a folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hub, which is pulled.  Options that are not below
    go to the engine as they are.

    vllm starts `vllm serve` of vLLM 0.32 or 0.33: its server, scheduler and sampler, with drafts of the artifact.
    sglang prints the command for an artifact whose drafts SGLang's UNO can make, and starts nothing; --uno-lora-path is
    the folder that was exported for it.

    \b
    Examples:
      retrofit serve qwen-retrofit --engine vllm --port 8000 --dtype bfloat16
      retrofit serve qwen-uno --engine sglang --uno-lora-path qwen-sglang
    """
    place = found_artifact(folder, offline)
    quieten_libraries()
    from retrofit.serving.starting import words

    found, other_precision = words(place, folder, engine, options, base=base, offline=offline)
    say_other_precision(other_precision)
    if only_print or engine == "sglang":
        if as_json:
            emit_json(found)
        else:
            click.echo(shlex.join(found))
        return
    say(shlex.join(found))
    os.execv(found[0], found)
