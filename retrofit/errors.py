"""Errors meant for the person at the keyboard, each with the exit code the command line ends with.

The message says what is wrong and where, on one line where it can; `hint` says what to do and is printed on
a line of its own.  Only the command line prints and exits; everything below it raises.
"""

from __future__ import annotations

import errno
import sys


class RetrofitError(Exception):
    """Anything retrofit refuses to do.  `str()` is the message."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class DataError(RetrofitError):
    """Training text that is empty, malformed or cannot be read; names the file and the line."""


class TrainingError(RetrofitError):
    """Training that must not go on: a loss that is not finite or explodes; names the step and the documents."""


class ArtifactError(RetrofitError):
    """An artifact that is damaged, unsafe, of an unknown format, or made for another base; names the file."""


class UnsupportedModelError(RetrofitError):
    """A model that does not load whole, or that retrofit cannot decode exactly; names what stands in the way."""


class UsageError(RetrofitError):
    """A wrong option, recipe key, value or path, or a prompt longer than the context."""

    exit_code = 2


class GateError(RetrofitError):
    """A check ran and was not met, such as one of the certificate's."""

    exit_code = 3


class ResourceError(RetrofitError):
    """Something outside is missing: GPU, memory, disk, an optional package, network or credentials."""

    exit_code = 4


# What torch says of memory that ran out, where it has no class for that.
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "not enough memory: you tried to allocate")
_NO_GPU_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def out_of_memory(error: BaseException, what: str | None = None) -> ResourceError | None:
    """What to say where an error means that memory ran out; None where it means something else.

    what: what needed it, such as `my-model does not fit into the memory of cuda`.
    """
    torch, text = sys.modules.get("torch"), str(error)
    on_gpu = (torch is not None and isinstance(error, torch.OutOfMemoryError)) or any(s in text for s in _NO_GPU_MEMORY)
    here = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not (on_gpu or here or any(sign in text for sign in _NO_MEMORY)):
        return None
    place, other = ("GPU memory", "a larger GPU or --device cpu") if on_gpu else ("memory", "a larger machine")
    return ResourceError(what or f"out of {place}", f"lower the batch size, use --dtype bfloat16, or {other}")


def disk_full(error: BaseException) -> ResourceError | None:
    """What to say where an error means that there is no room for output; None where it means something else."""
    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    place = f"{error.filename}: " if error.filename else ""
    return ResourceError(f"{place}no space left to write the output", "free some, or send it elsewhere")
