"""Weights on huge pages: a product of few rows reads every weight once, and finding its pages costs as much as reading.

A processor looks up every page of 4 KiB that it reads; where memory is virtual twice over, as in most rented machines,
packed products of a small model took 1.4 times as long for it.  Linux can put memory that is there onto pages of 2 MiB
(`madvise`, from 6.1 on at once).  Where it does not, nothing is lost.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path

PAGE = 2 << 20
HUGEPAGE, COLLAPSE = 14, 25
"""Advice to Linux, from its `mman.h`: use huge pages here; make them of what lies here."""
TRIES = 3
"""The kernel may be busy with a page."""


def on_huge_pages(spans: Iterable[tuple[int, int]]) -> int:
    """Put memory from one address to another each, as far as it fills whole pages; returns how many it is on."""
    wanted = {page for first, stop in spans for page in range(first // PAGE, -(-stop // PAGE))}
    if not sys.platform.startswith("linux") or not wanted:
        return 0
    try:
        madvise = ctypes.CDLL(None).madvise
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, AttributeError):
        return 0
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    made = 0
    for first, stop in filter(None, map(_private, lines)):
        for page in range(-(-first // PAGE), stop // PAGE):
            if page in wanted and madvise(page * PAGE, PAGE, HUGEPAGE) == 0:
                made += any(madvise(page * PAGE, PAGE, COLLAPSE) == 0 for _ in range(TRIES))
    return made


def _private(line: str) -> tuple[int, int] | None:
    """The addresses of a line of /proc/self/maps, if it is memory of this process and no file's."""
    addresses, rights, _, _, inode, *_ = line.split()
    if inode != "0" or not rights.startswith("rw") or not rights.endswith("p"):
        return None
    first, stop = addresses.split("-")
    return int(first, 16), int(stop, 16)
