"""A pull that was killed: the next one takes away what it left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from loopback_hub import STALL, Hub

from retrofit import pull, push
from retrofit.artifact import folder as artifact

NAME = "user/adapter"


def killed(hub: Hub, place: str) -> None:
    """Run `retrofit pull`, and kill it while a file is on its way."""
    hub.log.clear()
    hub.fail("GET", place, STALL)
    command = [sys.executable, "-m", "retrofit", "pull", NAME]
    where = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen(command, env={**os.environ, **where}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not hub.requests("GET", place):
        assert process.poll() is None and time.monotonic() < end
        hub.closing.wait(0.01)  # `sleep` returns at once here
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_the_next_pull_leaves_nothing_else(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """Also where the repository has another commit by then."""
    push(folder, NAME)
    home = tmp_path / "cache" / "artifacts" / NAME.replace("/", "--")
    killed(hub, rf"/resolve/.*{artifact.ADAPTER}")
    assert [path.suffix for path in home.iterdir() if path.name != "refs"] == [".part"]
    there = hub.repositories[NAME]
    there.commit({**there.files, "notes.txt": b"theirs"})
    found = pull(NAME)
    artifact.read(found)
    assert found.name == hub.repositories[NAME].branches["main"]
    assert sorted(path.name for path in home.iterdir()) == sorted([found.name, "refs"])
    assert not any(path.name.startswith(".") for path in found.iterdir())
