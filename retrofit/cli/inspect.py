"""`retrofit inspect`: what an artifact holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from retrofit.cli.options import CONTEXT, artifact_argument, output_options
from retrofit.cli.output import emit_json, quieten_hub
from retrofit.cli.tables import facts, print_table


@click.command(context_settings=CONTEXT)
@artifact_argument
@click.option("--offline", is_flag=True, help="Use no network, only what is on this machine.")
@output_options
def inspect(folder: str, offline: bool, as_json: bool) -> None:
    """Show what ARTIFACT holds, without loading any model.

    ARTIFACT is a folder, smollm2-135m, or OWNER/NAME or OWNER/NAME@REVISION on the Hub, which is pulled.
    Base and fingerprint, layout, sizes, measured acceptance, certificate, files.  Hashes are checked.

    \b
    Example:
      retrofit inspect tiny-retrofit --json
    """
    from retrofit.artifact.inspection import describe
    from retrofit.sharing.pulling import local_folder, source

    if not Path(folder).is_dir():
        quieten_hub()
    place = local_folder(folder, offline)
    described = describe(place)
    if (hub := source(place)) is not None:
        described["hub"] = hub
    if as_json:
        emit_json(described, indent=2)
    else:
        print_table([*facts_of(described).items()])
        click.echo("files")
        column = max(len(f"{size:,}") for size in described["files"].values())
        print_table([(f"  {size:>{column},}", name) for name, size in described["files"].items()])


def facts_of(described: dict[str, Any]) -> dict[str, str]:
    """`describe` for people, but for the files."""
    from retrofit.artifact.card import contexts

    base, draft, adapter = described["base"], described["draft"], described["adapter"]
    parameters, training = described["parameters"], described["training"]
    acceptance = {**described["acceptance"]}
    by_context = acceptance.pop("by_context", None)
    added = parameters["adapter"] + parameters["heads"]
    share = f", {added / parameters['base']:.2%} of the base" if parameters["base"] else ""
    heads = [f"Markov rank {adapter['markov_rank']}"] if adapter["markov_rank"] else []
    heads += ["confidence"] if adapter["confidence"] else []
    revision = f" @ {base['revision']}" if base["revision"] else ""
    modules = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in adapter["modules"]}))
    told = {
        "artifact": described["artifact"],
        **({"from": "{repository} @ {commit}".format(**described["hub"])} if "hub" in described else {}),
        "written by": f"retrofit {described['retrofit']}, format {described['format']}",
        **({"imported": _origin(described["imported"])} if "imported" in described else {}),
        **({"began with": _began(described["from"])} if "from" in described else {}),
        **({"mean of": "; ".join(map(_began, described["averaged"]))} if "averaged" in described else {}),
        "base": f"{base['model']}{revision} ({base['architecture']})",
        **_own(described),
        **({"file": _file(base["gguf"])} if "gguf" in base else {}),
        "parameters": f"{parameters['base']:,} in the base",
        "fingerprint": ", ".join(f"{key} {str(value)[:12]}" for key, value in base["fingerprint"].items()),
        "profile": described["profile"],
        "draft": ", ".join(f"{key} {value}" for key, value in draft.items()),
        "adapter": f"LoRA rank {adapter['rank']}, alpha {adapter['alpha']:g} on {modules}",
        "heads": ", ".join(heads) or "mask vector only",
        "added": f"{parameters['adapter']:,} + {parameters['heads']:,} parameters{share}",
        "acceptance": facts(acceptance) or "not measured",
        **({"tau": contexts(by_context)} if by_context else {}),
        "training": facts(training) or "not recorded",
        "certificate": _verdict(described["certificate"]),
    }
    return {name: _printable(text) for name, text in told.items()}


def _own(described: dict[str, Any]) -> dict[str, str]:
    """Of a model that was trained along."""
    from retrofit.artifact.own import told

    if "drift" not in described:
        return {}
    original = described["original"]
    revision = f" @ {original['revision']}" if original["revision"] else ""
    return {"trained from": f"{original['model']}{revision}", "drift": told(described["drift"])}


def _printable(text: str) -> str:
    """What strangers wrote cannot move the cursor of a terminal, nor pass for other lines."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _file(gguf: dict[str, str]) -> str:
    return f"{gguf['file']}, mostly {gguf['kind']}, sha256 {gguf['sha256'][:12]}"


def _origin(imported: dict[str, str | None]) -> str:
    found = imported["repository"]
    place = f"{found} @ {imported['commit']}" if found else "a folder"
    return f"from {place}, as {imported['style']}"


def _began(origin: dict[str, Any]) -> str:
    """Of `from`, or of one of `averaged`."""
    base = f" on {origin['base']}" if "base" in origin else ""
    share = f", weight {origin['weight']:.3g}" if "weight" in origin else ""
    return f"{origin['kind']} {origin['sha256'][:12]} ({origin['steps']:,} steps{base}{share})"


def _verdict(content: dict[str, Any] | None) -> str:
    if content is None:
        return "none (`retrofit certify` makes one)"
    level = f" (level {content['level']})" if "level" in content else ""
    own = ", of kind own: against its own ar" if content.get("kind") == "own" else ""
    return f"{'ok' if content.get('ok') is True else 'NOT OK'}{level}{own}"
