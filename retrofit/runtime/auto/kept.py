"""What steps took, kept from one process to the next: the first step of `auto` then knows the prices already.

One file for each processor, engine setting and shape of model and adapter, in RETROFIT_CACHE/steps.  What cannot be
read or written is done without: it is measured anew.  What is accepted goes by texts, and is not kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from retrofit.errors import ResourceError
from retrofit.machine import cache_folder
from retrofit.runtime.auto.policy import BEGIN, AutoPolicy

VERSION = 1
MOST_BYTES = 1 << 20
"""No file of ours is larger."""
EVERY = 5.0
"""Seconds between two writings."""


class Kept:
    """The file of the steps that a policy plans, as its engine is set now."""

    def __init__(self, policy: AutoPolicy, about: Mapping[str, Any]):
        """about: what the price of a step goes by, beside this machine.  Reads the file, once for each policy."""
        self.policy = policy
        self.about = {"version": VERSION, "torch": torch.__version__, "threads": torch.get_num_threads(), **about}
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.file: Path | None = None
        with suppress(ResourceError):  # this user has no home
            self.file = cache_folder() / "steps" / f"{name}.json"
        with policy.lock:
            if self.file is not None and self.file not in policy.written:
                policy.written[self.file] = float("-inf")
                self._read(self.file)

    def _read(self, file: Path) -> None:
        """Steps of which the policy knows nothing take what they took."""
        with suppress(OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            if file.stat().st_size > MOST_BYTES:
                return
            known = json.loads(file.read_text(encoding="utf-8"))
            if known["about"] != self.about:
                return
            for sampled, rows, drafts, seconds, context in known["steps"]:
                times = self.policy.model(bool(sampled)).times
                if 0 < seconds < float("inf") and times.typical(int(rows), bool(drafts), int(context)) is None:
                    for _ in range(BEGIN):
                        times.observe(int(rows), bool(drafts), float(seconds), int(context))

    def write(self) -> None:
        """All that the policy knows; at most every few seconds."""
        policy = self.policy
        with policy.lock:
            if self.file is None or time.monotonic() < policy.written[self.file] + EVERY:
                return
            policy.written[self.file] = time.monotonic()
            steps = [[sampled, *of] for sampled, model in policy.costs.items() for of in model.times.figures()]
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.file.with_suffix(f".{os.getpid()}.part")
            try:
                part.write_text(json.dumps({"about": self.about, "steps": steps}), encoding="utf-8")
                part.replace(self.file)
            finally:
                part.unlink(missing_ok=True)
