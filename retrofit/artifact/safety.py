"""What keeps an artifact from being trusted: pickles, links that lead out, JSON and safetensors files that are none.

Not here: what the files have to say (`schema.py`), their hashes (`folder.py`).  No torch.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retrofit.errors import ArtifactError

AGAIN = "copy or download the artifact again, or run `retrofit convert` again"
PICKLE_SUFFIXES = (
    *(".bin", ".ckpt", ".dill", ".joblib", ".npy", ".npz", ".pickle", ".pkl"),
    *(".pt", ".pt2", ".pth", ".ptl", ".th", ".torch"),
)

LARGEST_JSON = 1 << 22
"""Bytes; of a JSON file that is longer nothing is read.  As objects it may take twenty times as much."""
DEEPEST = 32
"""Objects and lists within one another; whoever walks through them may do so by recursion."""
WIDEST = 63
"""Bits of a whole number."""
LARGEST_HEADER = 1 << 24
"""Bytes; a hundred thousand tensors.  The library's own limit lets a header take gigabytes of memory."""


def names_in(root: Path) -> list[str]:
    """Files of the folder, sorted, as POSIX paths.  Nothing is opened.

    Raises ArtifactError for what may be a pickle, by its name, and for a link that leads out of the folder.
    """
    names = []
    for at, folders, files in os.walk(root):
        for entry in (*folders, *files):
            path = Path(at, entry)
            if path.suffix.lower() in PICKLE_SUFFIXES:
                hint = "delete it; an artifact needs safetensors, JSON, YAML, Markdown, HTML and SVG only"
                raise ArtifactError(f"{path}: may be a pickle, which can run code when read", hint)
            stays_inside(path, root)
        names += [Path(at, file).relative_to(root).as_posix() for file in files]
    return sorted(names)


def stays_inside(path: Path, root: Path) -> None:
    """Raises ArtifactError for a path that leads out of the folder."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise ArtifactError(f"{path}: a link that leads out of the artifact", "copy the file itself, `cp -L`")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into an ArtifactError that names the file."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}", AGAIN) from None


def load_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.  Raises ArtifactError."""
    with reading(path):
        size = path.stat().st_size
        if size > LARGEST_JSON:
            raise ArtifactError(f"{path}: {size:,} bytes, more than any JSON file of an artifact has", AGAIN)
        data = path.read_bytes()
    try:
        content = json.loads(data.decode(), parse_constant=_no_number, parse_int=_whole, parse_float=_finite)
        _refuse_deep(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}", AGAIN) from None
    if not isinstance(content, dict):
        raise ArtifactError(f"{path}: must be a JSON object, not {type(content).__name__}", AGAIN)
    return content


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number in JSON")


def _whole(digits: str) -> int:
    if len(digits) > WIDEST or abs(int(digits)).bit_length() > WIDEST:
        raise ValueError(f"a whole number of more than {WIDEST} bits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:20]} is out of range")
    return value


def _refuse_deep(content: Any) -> None:
    """Raises ValueError for what is nested deeper than DEEPEST."""
    level = [content]
    for _ in range(DEEPEST):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise ValueError(f"nested deeper than {DEEPEST}")


def check_safetensors(path: Path) -> None:
    """Refuse a file whose header is damaged, or does not describe what follows it, by the library's own checks.

    Those look at size, JSON, types, shapes and offsets before anything is allocated by the header's word.
    Raises ArtifactError.
    """
    from safetensors import SafetensorError, safe_open

    with reading(path), path.open("rb") as file:
        header = int.from_bytes(file.read(8), "little")
    if header > LARGEST_HEADER:
        raise ArtifactError(f"{path}: no intact safetensors file: its header would have {header:,} bytes", AGAIN)
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        problem = str(error).removeprefix("Error while deserializing header: ")
        raise ArtifactError(f"{path}: no intact safetensors file: {problem}", AGAIN) from None
