"""What an artifact says about itself, without loading a model.

Every file is checked against its hash; of the tensors only names, types and shapes are read.  No torch.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from retrofit.artifact import folder as artifact
from retrofit.artifact.safety import load_json

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
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return {"tensors": len(shapes), "elements": sum(map(prod, shapes))}


def certificate(root: Path) -> dict[str, Any] | None:
    """The certificate as it was written, None where there is none.  Raises ArtifactError."""
    path = root / CERTIFICATE
    if not path.is_file():
        return None
    return load_json(path)
