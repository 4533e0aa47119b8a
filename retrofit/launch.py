"""How this process was started: alone, or as one of several by `torchrun` or `accelerate launch`.

Reads the environment only.  Not here: what the processes do together (`recipes/processes.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from retrofit.errors import UsageError


@dataclass(frozen=True)
class Launch:
    """One of several processes that run the same program."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """How many of them run on this machine."""
    sharded: bool
    """Whether FSDP was asked for: each process holds a part of the base's layers."""


def is_launched() -> bool:
    """Whether a launcher started this process."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= set(os.environ)


def launched() -> Launch | None:
    """How this process was started; None for a process of its own.  Raises UsageError for FSDP version 1."""
    if not is_launched():
        return None
    rank, size, local = (_number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else local + 1
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")
    if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
        raise UsageError("FSDP version 1 was asked for", "start with `accelerate launch --use_fsdp --fsdp_version 2`")
    if size < 2:
        if sharded:
            raise UsageError("FSDP was asked for with one process", "start two or more, or leave FSDP out")
        return None
    return Launch(rank, size, local, local_size, sharded)


def _number(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        hint = "leave RANK, WORLD_SIZE and LOCAL_RANK to the launcher, or unset them"
        raise UsageError(f"{name}={os.environ[name]} in the environment is no number", hint) from None


def speaks() -> bool:
    """Whether this process is the one of its machine that says what all of them would say."""
    return not is_launched() or os.environ["LOCAL_RANK"] == "0"
