"""What a figure was measured on and with: processor, threads, versions, commit; and how much memory is free.

Not here: what is there to run on (`eval/doctor.py`).
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from retrofit import __version__


def hardware() -> dict[str, Any]:
    """What a figure was measured on and with: processor, threads, versions, commit, date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "transformers", "peft")},
        "retrofit": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cpu_name() -> str:
    """The processor's name and the widest instructions that torch uses on it, which decide what is exact there."""
    return f"{_model_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _model_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def commit() -> str | None:
    """Short commit of the checkout this package runs from, `+` when it holds changes; None outside one."""
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    top = git("rev-parse", "--show-toplevel")
    # An installed copy may lie inside somebody else's repository, whose commit says nothing about ours.
    if top is None or Path(top).resolve() != root:
        return None
    head = git("rev-parse", "--short=12", "HEAD")
    # Results are written by the run itself, so they are no change to what was measured.
    changed = git("status", "--porcelain", "--", ".", ":!results", ":!README.md")
    return f"{head}+" if head and changed else head


def installed(name: str) -> str | None:
    """A package's version; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    table = Path("/proc/meminfo")
    if not table.is_file():
        return None
    fields = dict(line.split(":", 1) for line in table.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024
