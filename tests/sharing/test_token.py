"""The access token is with the Hub and nowhere else: not in what a push prints, sends or leaves, nor in `ps`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from artifact_folders import contents
from commands import run
from loopback_hub import HANG, TOKEN, Hub

NAME = "user/adapter"


def family(process: int) -> set[int]:
    """A process and all that it started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # ended by now
            continue
    found, before = {process}, set()
    while found != before:
        before = found
        found = found | {child for child, parent in parents.items() if parent in found}
    return found


def shown(process: int) -> Iterator[str]:
    """Where the process table has the token, of a process and all that it started."""
    for one in family(process):
        for what in ("cmdline", "environ"):
            try:
                if TOKEN.encode() in Path(f"/proc/{one}/{what}").read_bytes():
                    yield f"{one}/{what}"
            except OSError:
                continue


def logged_in(home: Path) -> dict[str, str]:
    """The environment of somebody who ran `hf auth login`."""
    home.mkdir()
    (home / "token").write_text(TOKEN)
    kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return {**kept, "HF_HOME": str(home), "HF_TOKEN_PATH": str(home / "token")}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no process table to read")
def test_a_push_shows_it_to_nobody(hub: Hub, folder: Path, tmp_path: Path) -> None:
    environment = {
        **logged_in(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_DEBUG": "1",
        "TMPDIR": str(tmp_path / "tmp"), "RETROFIT_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    (tmp_path / "tmp").mkdir()
    hub.fail("GET", "/resolve/", HANG, times=99)  # of the comparison at the end: all has been sent by then
    command = [sys.executable, "-m", "retrofit", "push", str(folder), NAME, "-v"]
    said = tmp_path / "said"
    with said.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        try:
            while not hub.requests("GET", "/resolve/"):
                assert process.poll() is None, said.read_text()
                assert list(shown(process.pid)) == []
                hub.closing.wait(0.01)
            assert list(shown(process.pid)) == [] and (tmp_path / "home" / "token").read_text() == TOKEN
            hub.faults.clear()
            hub.closing.set()  # ends the silence
            assert process.wait(120) == 0, said.read_text()
        finally:
            process.kill()
            process.wait()
    assert f"{hub.url}/{NAME}" in said.read_text() and TOKEN not in said.read_text()
    assert hub.token_seen_at == {"api"} and not any(TOKEN.encode() in body for body in hub.sent)
    left = {name for name, data in contents(tmp_path).items() if TOKEN.encode() in data}
    assert left == {"home/token"}


def test_the_search_finds_one_that_is_there() -> None:
    for command, more in (([TOKEN], {}), ([], {"HF_TOKEN": TOKEN})):
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()', *{command!r}])"
        environment = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
        process = subprocess.Popen([sys.executable, "-c", code], env={**environment, **more}, stdin=subprocess.PIPE)
        try:
            while len(family(process.pid)) == 1:
                assert process.poll() is None
            found = list(shown(process.pid))
        finally:
            process.communicate(b"\n")
        assert found


@pytest.mark.parametrize("status", [401, 403, 500])
@pytest.mark.parametrize("command", ["push", "pull"])
def test_errors_do_not_say_it(hub: Hub, folder: Path, command: str, status: int) -> None:
    hub.add(NAME, {}, private=True)
    hub.fail("GET", "/api/models/", status, times=99)
    result = run(*([command, folder, NAME] if command == "push" else [command, NAME]), "-v")
    assert result.exit_code == 4 and "Traceback" in result.output and TOKEN not in result.output


def test_it_cannot_be_an_argument(folder: Path) -> None:
    result = run("push", folder, NAME, "--token", TOKEN)
    assert result.exit_code == 2 and TOKEN not in result.output and "--token" not in run("push", "--help").output
