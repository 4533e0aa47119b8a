"""The model of its own that an artifact of the profile `joint` has: `model/`, a plain transformers folder.

Every file in it is in the manifest, and none besides: transformers takes to what it finds there.  No torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrofit.artifact.files import sha256, sync_folder
from retrofit.artifact.safety import AGAIN
from retrofit.errors import ArtifactError

MODEL = "model"
FILE = re.compile(rf"{MODEL}/\w[\w.-]*\.(json|jinja|model|safetensors|txt)", re.ASCII)
"""What may be there: configuration, weights, and a tokenizer's files."""
ADAPTERS = (f"{MODEL}/adapter_config.json", f"{MODEL}/adapter_model.safetensors")
"""What may not: transformers would put them on the model without a word."""


def written_model(
    new: Path, write: Callable[[Path], Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], Mapping[str, Any]]:
    """Let model/ be written into a new artifact: (entries of the manifest, what `write` returned).

    Raises OSError, and ArtifactError for a file that may not be there.
    """
    folder = new / MODEL
    folder.mkdir()
    told = write(folder)
    entries = {}
    for path in sorted(folder.iterdir()):
        name = f"{MODEL}/{path.name}"
        if FILE.fullmatch(name) is None or name in ADAPTERS:
            raise ArtifactError(f"{name}: no file of a plain transformers folder, which is all that is written there")
        with path.open("rb+") as file:  # wait until the disk has it
            os.fsync(file.fileno())
        entries[name] = {"sha256": sha256(path), "size": path.stat().st_size}
    sync_folder(folder)
    return entries, told


def own_names(root: Path, there: Sequence[str], recorded: Sequence[str], profile: str) -> None:
    """Raises ArtifactError unless model/ holds a model where the profile has one, what the manifest says of it is all
    that is there, and none of it is more than a model."""
    own = [name for name in recorded if name.startswith(f"{MODEL}/")]
    kinds = {Path(name).suffix for name in own}
    whole = f"{MODEL}/config.json" in own and ".safetensors" in kinds
    if whole != (profile == "joint") or (own and not whole):
        raise ArtifactError(f"{root}: the manifest and the profile, {profile}, do not agree on a model", AGAIN)
    wrong = [name for name in own if FILE.fullmatch(name) is None or name in ADAPTERS]
    wrong += [name for name in there if profile == "joint" and name.startswith(f"{MODEL}/") and name not in own]
    if wrong:
        raise ArtifactError(f"{root / wrong[0]}: does not belong there", "delete it; do not load what is in there")


def told(drift: Mapping[str, Any]) -> str:
    """`KL 0.0300 nats per token, next token as the original's 91.2 %, perplexity 8.10 (the original's 8.02)`.

    drift: as `retrofit.json` has it.
    """
    return (
        f"KL {drift['kl']:.4f} nats per token, next token as the original's {100 * drift['agreement']:.1f} %, "
        f"perplexity {drift['perplexity']:.2f} (the original's {drift['original_perplexity']:.2f})"
    )
