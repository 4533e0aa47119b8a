"""The machine, read in one place: processor, cores, memory, GPU driver, versions, commit."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from retrofit import __version__
from retrofit.errors import ResourceError


def hardware() -> dict[str, Any]:
    """What a figure was measured on and with: processor, threads, versions, commit, date."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "physical_cores": physical_cores(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "transformers", "peft")},
        "retrofit": __version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cache_folder() -> Path:
    """`RETROFIT_CACHE`, else `retrofit` in the user's cache folder.  Raises ResourceError for a user without a home."""
    given = os.environ.get("RETROFIT_CACHE")
    try:
        if given:
            return Path(given).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "retrofit"
    except RuntimeError as error:
        raise ResourceError("there is no home folder to keep responses in", "set RETROFIT_CACHE to a folder") from error


def cpu_name() -> str:
    """The processor's name and the widest instructions that torch uses on it, which decide what is exact there."""
    return f"{_model_name()}, {torch.backends.cpu.get_cpu_capability()}"


@cache
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


def physical_cores() -> int:
    """Cores that this process may use: hardware threads of one core count once, and a container's quota limits them."""
    mine = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return _physical_cores(mine)


@cache
def _physical_cores(mine: frozenset[int] | None) -> int:
    if mine is None:
        return psutil.cpu_count(logical=False) or cores()
    siblings = {_siblings(number) for number in mine}
    return max(1, min(len(siblings), int(_quota(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")))))


def _siblings(number: int) -> str:
    """The hardware threads of the core that this one is of, as Linux writes them; itself where Linux does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return str(number)


def _quota(root: Path, own: Path) -> float:
    """CPUs' worth of time that the control groups of this process allow it; as many as there are without a limit.

    root: where control groups are mounted, version 2 (`cpu.max`) or 1 (`cpu/cpu.cfs_*`); own: which ones are ours.
    """
    found = [float(os.cpu_count() or 1)]
    try:
        place = own.read_text().partition("0::/")[2].partition("\n")[0].lstrip("/")
    except OSError:
        place = ""
    for folder in (root / place, *(root / place).parents):
        if folder.is_relative_to(root):
            found += _limit(folder / "cpu.max")
    found += _limit(root / "cpu" / "cpu.cfs_quota_us", root / "cpu" / "cpu.cfs_period_us")
    return min(found)


def _limit(*files: Path) -> list[float]:
    """The CPUs that a quota and its period allow; nothing where there is no limit."""
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return [int(quota) / int(period)] if int(quota) > 0 else []
    except (OSError, ValueError):
        return []


def memory() -> int:
    """Bytes of main memory."""
    return int(psutil.virtual_memory().total)


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be taken on a device."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Hand memory that was freed back to the system, where the C library can: on its own it keeps small blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc; others have no such function
        trim(0)


def forget_peak() -> None:
    """Let `peak_resident` begin anew.  Linux only."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident() -> int:
    """The most bytes of memory that this process has held.  Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none, or where its tool does not answer in 10 seconds."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next(iter(done.stdout.split()), None) if done.returncode == 0 else None


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
