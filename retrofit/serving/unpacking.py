"""A base that is a GGUF file, as the safetensors folder that an engine reads: unpacked once, then kept.

    RETROFIT_CACHE/unpacked/FINGERPRINT/     the model in fp32, its tokenizer and its settings

In fp32 it is the dequantised model that the artifact was made for, whatever type it then runs in.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from retrofit.artifact import folder as artifacts
from retrofit.artifact.beside import beside
from retrofit.artifact.files import check_room, disk
from retrofit.hub import Base, empty_model, load_base
from retrofit.machine import cache_folder
from retrofit.progress import without_bar

BYTES = 4
"""Of a parameter in fp32."""


def unpacked(base: Base, offline: bool) -> Path:
    """The folder, which is written if need be.  base: opened without its model.

    Raises ResourceError where there is no room, and what `load_base` raises.
    """
    key = hashlib.sha256(json.dumps(base.fingerprint, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "unpacked" / key[:32]
    if folder.is_dir():
        return folder
    size = BYTES * sum(p.numel() for p in empty_model(base.name, base.revision, offline=offline).parameters())
    with beside(folder, size, cached=True) as new:
        check_room(folder, size)
        whole = load_base(base.name, base.revision, dtype="float32", offline=offline, need_tokenizer=False)
        with disk(folder, size), without_bar():
            whole.model.save_pretrained(new)
            if whole.tokenizer is not None:
                whole.tokenizer.save_pretrained(new)
            if not folder.is_dir():  # another process may have been faster
                artifacts.put(new, folder)
    return folder
