"""How many CPU threads a small forward is worth.

Waking a second thread costs tens of microseconds an operation, and a decode step of a small model is hundreds of
operations of a few microseconds each.  The rule is a function of sizes only: choosing by measured time could give one
request different rounding on different runs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

LEAST_WORK = 6e7
"""Multiply-adds x 2 of a step from which more than one thread pays: about a millisecond of one core."""


@contextmanager
def thread_limit(device: torch.device, work: float) -> Iterator[None]:
    """Run with one thread where `work` (floating-point operations of the forward) is too little to share.

    The number of threads is set back at the end, also on an error.  Other threads of the process keep theirs, those
    that begin meanwhile too.  Nothing happens off the CPU.
    """
    if device.type != "cpu" or work >= LEAST_WORK or (before := torch.get_num_threads()) == 1:
        yield
        return
    undo = _one_thread(before)
    try:
        yield
    finally:
        undo()


def work_sizes(device: torch.device) -> tuple[float, ...]:
    """A size of step for each number of threads that `thread_limit` lets steps run with."""
    return (0.0, LEAST_WORK) if device.type == "cpu" and torch.get_num_threads() > 1 else (LEAST_WORK,)


def _one_thread(before: int) -> Callable[[], None]:
    """Let the calling thread compute alone; returns the undo.

    `torch.set_num_threads` also sets what threads begin with, and a thread that began here would stay alone for ever.
    Underneath, the count is each thread's own; where its setters are not found, only a process of one Python thread is
    limited.
    """
    openmp, mkl = _setters()
    if openmp is None:
        if threading.active_count() > 1:
            return lambda: None
        torch.set_num_threads(1)
        return lambda: torch.set_num_threads(before)
    products = mkl(1)
    openmp(1)

    def undo() -> None:
        openmp(before)
        mkl(products)

    return undo


@cache
def _setters() -> tuple[Callable[[int], object] | None, Callable[[int], int]]:
    """(OpenMP's setter for the calling thread, or None where it is not found; MKL's, which returns what it was)."""
    names = ("libtorch_cpu.so", "libtorch_cpu.dylib")
    found = [path for name in names if (path := Path(torch.__file__).parent / "lib" / name).is_file()]
    try:
        library = ctypes.PyDLL(str(found[0]))
        openmp = library.omp_set_num_threads
        openmp.argtypes, openmp.restype = [ctypes.c_int], None
        before = torch.get_num_threads()
        openmp(1)
        works = torch.get_num_threads() == 1
        openmp(before)
    except (IndexError, OSError, AttributeError):
        works = False
    if not works:
        return None, int
    mkl = getattr(library, "MKL_Set_Num_Threads_Local", None)
    if mkl is None:  # another library multiplies, by OpenMP's count
        return openmp, int
    mkl.argtypes, mkl.restype = [ctypes.c_int], ctypes.c_int
    return openmp, mkl
