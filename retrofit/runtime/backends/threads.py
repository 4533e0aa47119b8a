"""How many CPU threads a step runs with.

Waking a second thread costs tens of microseconds an operation, and a decode step of a small model is hundreds of
operations of a few microseconds each.  The rule is a function of sizes only: choosing by measured time could give one
request different rounding on different runs.

Threads of OpenMP wait for each other at every one of those operations.  Where they are more than there are cores, the
one that is waited for is not even running: so a step has no more threads than cores.  Engines that decode in several
Python threads run side by side, each step with all of its threads: GNU's OpenMP sees that they are more than the cores
and lets them sleep soon, and one step after another was slower (LOG.md).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from retrofit.machine import cores, physical_cores

LEAST_WORK = 6e7
"""Multiply-adds x 2 of a step from which more than one thread pays: about a millisecond of one core."""


def most_threads() -> int:
    """Threads that a step may have: as many as torch's, but no more than there are physical cores.

    Where the environment has OMP_NUM_THREADS, more than that are run if there are as many hardware threads.
    """
    return min(torch.get_num_threads(), cores() if os.environ.get("OMP_NUM_THREADS") else physical_cores())


@contextmanager
def thread_limit(device: torch.device, work: float = LEAST_WORK) -> Iterator[None]:
    """Run with one thread where `work` (floating-point operations) is too little to share, else with `most_threads`.

    The number of threads is set back at the end, also on an error.  Other threads of the process keep theirs, those
    that begin meanwhile too.  Nothing happens off the CPU.
    """
    if device.type != "cpu" or (before := torch.get_num_threads()) == 1:
        yield
        return
    count = 1 if work < LEAST_WORK else most_threads()
    if count == before:
        yield
        return
    undo = _with_threads(count, before)
    try:
        yield
    finally:
        undo()


def work_sizes(device: torch.device) -> tuple[float, ...]:
    """A size of step for each number of threads that `thread_limit` lets steps run with."""
    return (0.0, LEAST_WORK) if device.type == "cpu" and most_threads() > 1 else (LEAST_WORK,)


def _with_threads(count: int, before: int) -> Callable[[], None]:
    """Let the calling thread compute with so many threads, not `before`; returns the undo.

    `torch.set_num_threads` also sets what threads begin with, and a thread that began here would keep that for ever.
    Underneath, the count is each thread's own; where its setters are not found, only a process of one Python thread is
    limited.
    """
    openmp, mkl = _setters()
    if openmp is None:
        if threading.active_count() > 1:
            return lambda: None
        torch.set_num_threads(count)
        return lambda: torch.set_num_threads(before)
    products = mkl(count)
    openmp(count)

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
