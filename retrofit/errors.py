"""Errors meant for the person at the keyboard, each with the exit code the command line ends with.

The message says what is wrong and where, on one line where it can; `hint` says what to do and is printed on
a line of its own.  Only the command line prints and exits; everything below it raises.
"""

from __future__ import annotations


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
    """A model whose structure retrofit cannot decode exactly; names what stands in the way."""


class UsageError(RetrofitError):
    """A wrong option, recipe key, value or path, or a prompt longer than the context."""

    exit_code = 2


class GateError(RetrofitError):
    """A check ran and was not met, such as one of the certificate's."""

    exit_code = 3


class ResourceError(RetrofitError):
    """Something outside is missing: GPU, memory, disk, an optional package, network or credentials."""

    exit_code = 4
