"""What an artifact says about itself, without loading a model: `retrofit inspect`.

Every file is checked against its hash; of the tensors only names, types and shapes are read.  No torch.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from retrofit.artifact import folder as artifact
from retrofit.errors import ArtifactError

CERTIFICATE = "certificate.json"


def describe(folder: str | Path) -> dict[str, Any]:
    """Contents of `retrofit.json`, tensors, certificate and files, as plain data.

    Raises what `artifact.check` raises.
    """
    root = Path(folder)
    artifact.check(root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return {
        "artifact": str(root),
        **artifact.read_config(root),
        "tensors": {name: tensors(root / name) for name in (artifact.ADAPTER, artifact.HEADS)},
        "certificate": certificate(root),
        "files": {path.relative_to(root).as_posix(): path.stat().st_size for path in files},
    }


def tensors(path: Path) -> dict[str, int]:
    """Counts of tensors and of their elements, from the header of a checked safetensors file."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    return {"tensors": len(header), "elements": sum(prod(entry["shape"]) for entry in header.values())}


def certificate(root: Path) -> dict[str, Any] | None:
    """The certificate as it was written, None where there is none.  Raises ArtifactError."""
    path = root / CERTIFICATE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}", "run `retrofit certify` again") from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: no certificate", "run `retrofit certify` again")
    return content


def table(described: dict[str, Any]) -> str:
    """`describe` for people: one line per fact."""
    base, draft, adapter = described["base"], described["draft"], described["adapter"]
    parameters, training = described["parameters"], described["training"]
    added = parameters["adapter"] + parameters["heads"]
    share = f", {added / parameters['base']:.2%} of the base" if parameters["base"] else ""
    heads = [f"Markov rank {adapter['markov_rank']}"] if adapter["markov_rank"] else []
    heads += ["confidence"] if adapter["confidence"] else []
    revision = f" @ {base['revision']}" if base["revision"] else ""
    modules = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in adapter["modules"]}))
    lines = {
        "artifact": described["artifact"],
        "written by": f"retrofit {described['retrofit']}, format {described['format']}",
        "base": f"{base['model']}{revision} ({base['architecture']})",
        "parameters": f"{parameters['base']:,} in the base",
        "fingerprint": ", ".join(f"{key} {str(value)[:12]}" for key, value in base["fingerprint"].items()),
        "profile": described["profile"],
        "draft": ", ".join(f"{key} {value}" for key, value in draft.items()),
        "adapter": f"LoRA rank {adapter['rank']}, alpha {adapter['alpha']:g} on {modules}",
        "heads": ", ".join(heads) or "mask vector only",
        "added": f"{parameters['adapter']:,} + {parameters['heads']:,} parameters{share}",
        "acceptance": facts(described["acceptance"]) or "not measured",
        "training": facts(training) or "not recorded",
        "certificate": _verdict(described["certificate"]),
    }
    width = max(map(len, lines)) + 2
    rows = [f"{name:<{width}}{line}" for name, line in lines.items()]
    sizes = described["files"]
    column = max(len(f"{size:,}") for size in sizes.values())
    return "\n".join([*rows, "files", *(f"  {size:>{column},}  {name}" for name, size in sizes.items())])


def _verdict(content: dict[str, Any] | None) -> str:
    if content is None:
        return "none (`retrofit certify` makes one)"
    level = f" (level {content['level']})" if "level" in content else ""
    return f"{'ok' if content.get('ok') is True else 'NOT OK'}{level}"


def facts(values: dict[str, Any], prefix: str = "") -> str:
    """`steps 600, loss.total 1.2`: nested keys by dotted path, numbers short."""
    parts = []
    for key, value in values.items():
        if isinstance(value, dict):
            parts.append(facts(value, f"{prefix}{key}."))
        else:
            parts.append(f"{prefix}{key} {_short(value)}")
    return ", ".join(part for part in parts if part)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{' '.join(_short(item) for item in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
