"""A folder that is being made, beside the place that it is for: `.NAME.1a2b3c4d.part`.

Its process holds a lock on it, which the system takes away with the process.  So whoever comes to the same place next
knows what a killed process has left there, and removes it; what another is making stays.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from retrofit.artifact.files import disk

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked, so that nothing is known to be left
    fcntl = None  # type: ignore[assignment]

ENDING = ".part"


@contextmanager
def beside(folder: Path, size: int, cached: bool = False) -> Iterator[Path]:
    """A folder beside a place, for what `folder.put` is to bring there whole.

    Afterwards it is gone, and so is every folder above the place that was made for it and holds nothing.
    size: bytes that are to be written, for the message.  cached: what lies beside the place is all of a cache, so that
    leftovers of other places are removed too.  Raises ResourceError where there is no writing.
    """
    missing = [path for path in folder.parents if not path.exists()]
    new, handle = None, None
    try:
        with disk(folder, size):
            folder.parent.mkdir(parents=True, exist_ok=True)
            _sweep(folder, cached)
            new, handle = _new(folder)
        yield new
    finally:
        if new is not None:
            shutil.rmtree(new, ignore_errors=True)  # gone already when it was put into its place
        if handle is not None:
            os.close(handle)
        for path in missing:
            with suppress(OSError):  # it holds something by now
                path.rmdir()


def _new(folder: Path) -> tuple[Path, int | None]:
    """A folder, and the handle by which it is locked.  Raises OSError."""
    while True:
        path = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{ENDING}")
        path.mkdir()
        handle = _locked(path, wait=True)
        if path.is_dir():  # or someone took it for a leftover before it was locked
            return path, handle
        _close(handle)


def _sweep(folder: Path, cached: bool) -> None:
    """Remove what killed processes have left."""
    own = re.compile(rf"\.{'.+' if cached else re.escape(folder.name)}\.[0-9a-f]{{8}}{re.escape(ENDING)}")
    with suppress(OSError):  # a folder that may be written to and not looked into
        for path in folder.parent.iterdir() if fcntl else ():
            if own.fullmatch(path.name) and path.is_dir() and (handle := _locked(path, wait=False)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(handle)


def _locked(path: Path, wait: bool) -> int | None:
    """A handle that holds a folder's lock; None where another holds it, or the system has no such locks."""
    if fcntl is None:
        return None
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        _close(handle)
        return None
    return handle


def _close(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
