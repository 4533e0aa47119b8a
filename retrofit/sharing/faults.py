"""What went wrong on the way to the Hub, as one clear error with the cure in it.

The library's own messages are passed on where they say more, without anything that looks like an access token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from retrofit.errors import ResourceError, RetrofitError, UsageError, disk_full

TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may go well."""
LOG_IN = "`hf auth login`, or set HF_TOKEN, with a token that may do this"
LATER = "run it again later"


class UnreachableError(ResourceError):
    """The Hub did not answer, or had no time; what is kept of it here may do instead."""


def redacted(text: str) -> str:
    """The text without access tokens."""
    return TOKEN.sub("hf_...", text)


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the nearest first."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error; None where there was no answer."""
    for one in causes(error):
        response = getattr(one, "response", None)
        if response is not None:
            return int(response.status_code)
    return None


def is_passing(error: BaseException) -> bool:
    """Whether the same may go well when tried again: no answer, an answer cut short, a server in trouble."""
    status = status_of(error)
    return status in PASSING if status is not None else _is_connection(error)


def refused(error: BaseException, name: str, doing: str) -> RetrofitError:
    """What to say of an error.  name: the repository; doing: what was asked of the Hub, such as `write`."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    for one in causes(error):
        if isinstance(one, RetrofitError):
            return one
        if isinstance(one, OSError) and (full := disk_full(one)) is not None:
            return full
    if isinstance(error, GatedRepoError):
        return ResourceError(f"{name} is gated on the Hub", "accept its conditions on its page, then `hf auth login`")
    if isinstance(error, RevisionNotFoundError):
        return UsageError(f"{name}: no such revision on the Hub", "check the branch, tag or commit after the @")
    if isinstance(error, RepositoryNotFoundError):
        hint = "check the spelling; of a private one `hf auth login` first"
        return UsageError(f"{name}: not a folder here, and no repository on the Hub that you can see", hint)
    status = status_of(error)
    if status is not None:
        return _answered(status, error, name, doing)
    if _is_connection(error):
        return UnreachableError(f"{name}: the Hub cannot be reached: {_first_line(error)}", LATER)
    return ResourceError(f"{name}: the Hub's library failed: {_first_line(error)}", LATER)


def _answered(status: int, error: BaseException, name: str, doing: str) -> RetrofitError:
    if status == 401:
        return ResourceError(f"{name}: the Hub does not accept the access token, or there is none", LOG_IN)
    if status == 403:
        return ResourceError(f"{name}: the Hub does not let this account {doing}", LOG_IN)
    if status == 404:
        return UsageError(f"{name}: not found on the Hub", "check the spelling; of a private one `hf auth login` first")
    if status in (409, 412):
        return ResourceError(f"{name}: somebody else changed it at the same time", "look at it, then run it again")
    if status == 429:
        return UnreachableError(f"{name}: the Hub has had too many requests from here", LATER)
    if status >= 500:
        return UnreachableError(f"{name}: the Hub is in trouble (status {status})", LATER)
    return ResourceError(f"{name}: the Hub refused this (status {status}): {_first_line(error)}", None)


def _is_connection(error: BaseException) -> bool:
    """By the module, since which HTTP library the Hub's library uses changes with its version."""
    return any(
        isinstance(one, ConnectionError | TimeoutError) or type(one).__module__.partition(".")[0] in ("httpx", "httpx2")
        for one in causes(error)
    )


def _first_line(error: BaseException) -> str:
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])
