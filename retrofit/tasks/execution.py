"""Runs a program that a model wrote, with its tests, in a process under limits, and says whether it passed.

Only where the user allowed it; the limits (`guard.py`) protect from accidents, not from an attack.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from retrofit.errors import ResourceError

GUARD = Path(__file__).with_name("guard.py")
SECONDS = 5
"""Of processor time; the clock may run twice as long, on a machine that is busy four times."""
PATIENCE = 4
MEMORY = 1 << 30
"""Bytes of address space."""


class Outcome(NamedTuple):
    """passed: all tests ran and none failed.  error: in one line, what ended it; None where it passed."""

    passed: bool
    error: str | None


def run(program: str, tests: str, seconds: int = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run a program and then its tests.  Raises ResourceError on a system without limits for processes."""
    if find_spec("resource") is None:
        raise ResourceError("code cannot be run under limits on this system", "leave code execution off, or use Linux")
    with tempfile.TemporaryDirectory(prefix="retrofit-code-") as name:
        return _run(Path(name), f"{program}\n\n{tests}\n", seconds, memory)


def _run(folder: Path, source: str, seconds: int, memory: int) -> Outcome:
    program, verdict, word = folder / "program.py", folder / "verdict.json", secrets.token_hex(16)
    program.write_text(source, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(GUARD), str(program), str(verdict), str(seconds), str(memory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={"PATH": os.defpath, "HOME": str(folder), "PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
        start_new_session=True,
    )
    try:
        process.communicate(f"{word}\n".encode(), timeout=seconds * PATIENCE)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return Outcome(False, f"ran longer than {seconds * PATIENCE} s")
    told = _told(verdict)
    if told.get("word") == word:
        return Outcome(True, None)
    return Outcome(False, told.get("error") or _ended(process.returncode, seconds))


def _told(verdict: Path) -> dict[str, Any]:
    """The last line that the guard wrote; nothing where it did not come to that."""
    lines = verdict.read_text(encoding="utf-8").splitlines() if verdict.exists() else []
    return dict(json.loads(lines[-1])) if lines else {}


def _ended(code: int | None, seconds: int) -> str:
    if code == -signal.SIGXCPU or code == -signal.SIGKILL:
        return f"used more than {seconds} s of processor time"
    return f"ended early, with code {code}"
