"""Files that are whole or not there: flushed to the disk before they are renamed into place.

What artifacts and checkpoints share.  Not here: what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retrofit.errors import ResourceError

CHUNK = 1 << 20
MAKE_ROOM = "make room or choose another place, then run it again"


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it.  Raises OSError, also for a file that exists."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def disk(path: Path, size: int) -> Iterator[None]:
    """Turns an OSError of the block into a ResourceError: the path, the bytes to be written, the bytes free."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write {size:,} bytes{_room(path)}: {error.strerror or error}"
        raise ResourceError(f"{path}: {problem}", MAKE_ROOM) from error


def check_room(path: Path, size: int) -> None:
    """Raises ResourceError, before anything is written, where `size` bytes do not fit."""
    free = _free(path)
    if free is not None and free < size:
        raise ResourceError(f"{path}: the disk is full: {size:,} bytes are needed, {free:,} are free", MAKE_ROOM)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON that is the same for equal content; NaN is refused."""
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def _room(path: Path) -> str:
    free = _free(path)
    return "" if free is None else f" ({free:,} free)"


def _free(path: Path) -> int | None:
    """Bytes free where `path` is or would be; None where nobody can tell."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None
