"""How a command ends: exit codes, one line for every error, signals, a reader that leaves."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from commands import refused, run

from retrofit.cli import output
from retrofit.errors import GateError, ResourceError

MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def ending(monkeypatch, error, *options):
    """What `recipes ls` does when its work raises `error`."""

    def raises(*arguments, **more):
        raise error

    monkeypatch.setattr(output.json, "dumps", raises)
    return run("recipes", "ls", "--json", *options)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (GateError("not met", "look"), 3, "Error: not met\nhint: look\n"),
        (ResourceError("no disk"), 4, "Error: no disk\n"),
        (MEMORY, 4, "Error: out of GPU memory\nhint: "),
        (MemoryError(), 4, "Error: out of memory\nhint: "),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1 bytes"), 4, "Error: out of memory\n"),
        (RuntimeError("one\ntwo"), 1, "Error: RuntimeError: one\nhint: not foreseen"),
        (KeyError(), 1, "Error: KeyError\nhint: "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_end_with_their_code_and_one_line(monkeypatch, error, code, message):
    assert refused(ending(monkeypatch, error), code).startswith(message)


def test_interrupted(monkeypatch):
    result = ending(monkeypatch, KeyboardInterrupt())
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("error", [RuntimeError("odd"), GateError("not met")], ids=["unforeseen", "known"])
def test_verbose_shows_the_traceback(monkeypatch, error):
    result = ending(monkeypatch, error, "-v")
    assert "Traceback" in result.stderr
    assert f"{error}" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_signals_unwind_and_end_with_their_code(number, code):
    program = (
        "import os, retrofit.cli.output as output, retrofit.cli.main as cli\n"
        "def dumps(*a, **k):\n"
        "    try: os.kill(os.getpid(), NUMBER); __import__('time').sleep(30)\n"
        "    finally: print('cleaned up')\n"
        "output.json.dumps = dumps\n"
        "cli.main(['recipes', 'ls', '--json'])"
    )
    command = [sys.executable, "-c", program.replace("NUMBER", str(int(number)))]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stdout) == (code, "cleaned up\n")
    assert "Traceback" not in finished.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "retrofit.cli.main", "recipes", "show", "tiny"]
    finished = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert finished.stderr == ""
