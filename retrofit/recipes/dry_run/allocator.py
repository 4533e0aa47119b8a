"""Ask the C library what a sequence of allocations makes the process hold, without using the memory.

glibc keeps freed blocks below 32 MiB for itself, and small objects in between keep it from joining them, so that a
training process holds more than its tensors; how much depends on the order of everything it allocates.  So every
tensor without memory gets a block of its size here, which nothing ever writes to: the system gives such a block no
memory, but the C library treats it as any other.
Not here: other C libraries, of which nothing is known, and CUDA, which gives back what it keeps when memory runs out.
"""

from __future__ import annotations

import ctypes
import platform

ALIGNMENT = 64
"""Of PyTorch's CPU tensors."""


class _Info(ctypes.Structure):
    """`struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


class CLibrary:
    """Blocks of the process's own heap.  `held`: bytes it has grown by since this was made."""

    def __init__(self, library: ctypes.CDLL):
        self._make, self._free, self._info = library.posix_memalign, library.free, library.mallinfo2
        self._make.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
        self._free.argtypes = [ctypes.c_void_p]
        self._info.restype = _Info
        self._refused: dict[int, int] = {}
        self._before = 0
        self._before = self.held

    @property
    def held(self) -> int:
        info = self._info()
        return int(info.arena + info.hblkhd) + sum(self._refused.values()) - self._before

    def make(self, size: int) -> int:
        """A block by its address.  One that the system refuses is counted all the same."""
        address = ctypes.c_void_p()
        if self._make(ctypes.byref(address), ALIGNMENT, size) == 0 and address.value:
            return address.value
        number = -1 - len(self._refused)
        self._refused[number] = size
        return number

    def free(self, address: int) -> None:
        if address < 0:
            self._refused[address] = 0
        else:
            self._free(address)


def c_library() -> CLibrary | None:
    """glibc 2.33 or later; None for every other system."""
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    return CLibrary(library) if hasattr(library, "mallinfo2") else None
