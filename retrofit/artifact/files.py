"""Files that are whole or not there: flushed to the disk before they are renamed into place.

What artifacts and checkpoints share.  Not here: what the files hold.
"""

from __future__ import annotations

import errno
import hashlib
import json
import mmap
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from retrofit.errors import ResourceError

try:
    import fcntl
except ImportError:  # Windows, which has no O_DIRECT either
    fcntl = None  # type: ignore[assignment]

CHUNK = 1 << 20
AT_ONCE = 1 << 24
"""Bytes that are hashed while the same bytes are being written."""
DIRECT = getattr(os, "O_DIRECT", 0)
ELSEWHERE = "choose another place with -o"
MAKE_ROOM = "make room or choose another place, then run it again"


def write_file(path: Path, content: bytes | Iterable[memoryview]) -> dict[str, Any]:
    """Write a new file and wait until the disk has it; returns its size and sha256.

    Gigabytes take as long as the disk takes: they are hashed beside the writing, and go past the cache of the system.
    Raises OSError, also for a file that exists.
    """
    digest, size = hashlib.sha256(), 0
    small = isinstance(content, bytes) and len(content) < AT_ONCE
    pieces = [memoryview(content)] if isinstance(content, bytes) else content
    handle = _open_new(path, direct=not small)
    try:
        with ThreadPoolExecutor(1) as beside:
            for part in pieces if small else _packed(pieces):
                hashed = beside.submit(digest.update, part)
                _write(handle, part)
                hashed.result()
                size += len(part)
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"sha256": digest.hexdigest(), "size": size}


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, and the folders it is to be in: who reads it meets the old one or the new one, whole.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        write_file(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def _open_new(path: Path, direct: bool) -> int:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    if direct and DIRECT:
        with suppress(OSError):  # a file system that has only cached writes
            fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) | DIRECT)
    return handle


def _packed(pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same bytes in parts of AT_ONCE, the last one shorter.  A part is good until the next is asked for."""
    buffer = memoryview(mmap.mmap(-1, AT_ONCE))  # begins on a page, as uncached writes want it
    filled = 0
    for piece in pieces:
        first = 0
        while first < len(piece):
            taken = piece[first : first + AT_ONCE - filled]
            buffer[filled : filled + len(taken)] = taken
            first, filled = first + len(taken), filled + len(taken)
            if filled == AT_ONCE:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def _write(handle: int, part: memoryview) -> None:
    """Write all of it, through the cache where its length or the file system does not allow otherwise (EINVAL)."""
    while part:
        try:
            part = part[os.write(handle, part) :]
        except OSError as error:
            if error.errno != errno.EINVAL or not _through_cache(handle):
                raise


def _through_cache(handle: int) -> bool:
    """Whether that was not so before."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL) if DIRECT else 0
    if not flags & DIRECT:
        return False
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~DIRECT)
    return True


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some mounts do not know how, and need not
            raise
    finally:
        os.close(handle)


@contextmanager
def disk(path: Path, size: int) -> Iterator[None]:
    """Turns an OSError of the block into a ResourceError: the path, the bytes to be written, the bytes free."""
    try:
        yield
    except OSError as error:
        problem = f"cannot write {size:,} bytes{room(path)}: {error.strerror or error}"
        raise ResourceError(f"{path}: {problem}", MAKE_ROOM) from error


def check_room(path: Path, size: int) -> None:
    """Raises ResourceError, before anything is written, where `size` bytes do not fit."""
    free = _free(path)
    if free is not None and free < size:
        raise ResourceError(f"{path}: the disk is full: {size:,} bytes are needed, {free:,} are free", MAKE_ROOM)


def check_parent(out: Path) -> None:
    """Make the folder that an artifact is to stand in.  Raises ResourceError where that cannot be."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(f"{out.parent}: cannot be made ({error.strerror})", ELSEWHERE) from error
    check_file(out)


def check_file(path: Path) -> None:
    """Raises ResourceError where nothing can be written, for whoever has minutes of work to do before it is."""
    try:
        folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
        why = "is no folder" if not folder.is_dir() else "" if os.access(folder, os.W_OK) else "is not writable"
    except OSError as error:
        folder, why = path, str(error.strerror)
    if why:
        raise ResourceError(f"{path}: cannot be written: {folder} {why}", ELSEWHERE)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """JSON that is the same for equal content; NaN is refused."""
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def json_line(content: Any) -> str:
    """A line of a JSONL file."""
    return json.dumps(content) + "\n"


def room(path: Path) -> str:
    """` (1,234 free)`; nothing where nobody can tell."""
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
