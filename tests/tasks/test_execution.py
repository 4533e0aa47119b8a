"""Programs that models write, run under limits: right ones pass, and no other does, whatever it tries."""

import sys

import pytest

from retrofit.errors import ResourceError
from retrofit.tasks import execution
from retrofit.tasks.execution import run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no limits for processes")


def test_a_right_program_passes_and_a_wrong_one_says_why():
    assert run("def f():\n    return 1\n", "assert f() == 1").passed
    outcome = run("def f():\n    return 2\n", "assert f() == 1, 'two'")
    assert not outcome.passed and outcome.error == "AssertionError: two"


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("import os\nos._exit(0)", "ended early, with code 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import socket\nsocket.socket()", "not allowed here: socket"),
        ("import subprocess\nsubprocess.run(['true'])", "not allowed here: subprocess"),
        ("import os\nos.system('true')", "not allowed here: os.system"),
        ("import os\nos.fork()", "not allowed here: os.fork"),
        ("open('x', 'w')", "not allowed here: open for writing"),
        ("import os\nos.remove('program.py')", "not allowed here: os.remove"),
        ("x = 'a' * (1 << 31)", "MemoryError"),
        ("import os\nprint(os.environ['SECRET'])", "KeyError: 'SECRET'"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_what_a_program_may_not_do(program, error, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    outcome = run(program, "")
    assert not outcome.passed
    assert error in outcome.error


def test_a_program_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(execution, "PATIENCE", 60)  # a second of a busy processor may take many
    outcome = run("while True:\n    pass", "", seconds=1)
    assert not outcome.passed and "more than 1 s of processor time" in outcome.error


def test_a_program_that_waits_is_ended(monkeypatch):
    monkeypatch.setattr(execution, "PATIENCE", 1)
    outcome = run("import time\ntime.sleep(60)", "", seconds=1)
    assert not outcome.passed and outcome.error == "ran longer than 1 s"


def test_what_it_prints_goes_nowhere(capfd):
    assert run("for _ in range(10000):\n    print('x' * 1000)", "").passed
    assert capfd.readouterr() == ("", "")


def test_without_limits_nothing_is_run(monkeypatch):
    monkeypatch.setattr(execution, "find_spec", lambda name: None)
    with pytest.raises(ResourceError, match="under limits"):
        run("x = 1", "")
