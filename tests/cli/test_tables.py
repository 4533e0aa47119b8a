"""Tables: plain lines on a pipe, fitted to the width and coloured at a terminal."""

import io
import re
import sys

import pytest

from retrofit.cli.tables import aligned, print_table

ROWS = [("passed", "gate", "bitwise equal"), ("failed", "greedy-fp32", "[red]1 of 8 differ " + "in many ways " * 8)]


def test_on_a_pipe_columns_are_two_spaces_apart_and_nothing_is_cut(capsys):
    print_table(ROWS[:1], ("status", "check", "detail"))
    print_table(ROWS)
    assert capsys.readouterr().out.splitlines() == [
        "status  check  detail",
        "passed  gate   bitwise equal",
        "passed  gate         bitwise equal",
        f"failed  greedy-fp32  {ROWS[1][2].rstrip()}",
    ]
    assert aligned([("a", "b"), ("long", "")]) == "a     b\nlong"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("colour", [True, False])
def test_at_a_terminal_it_is_fitted_and_coloured(monkeypatch, colour):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    print_table(ROWS, ("status", "check", "detail"))
    shown = sys.stdout.getvalue()
    assert ("\x1b[32mpassed" in shown and "\x1b[31mfailed" in shown) == colour
    assert "[red]1 of 8" in shown, "text is no markup"
    lines = re.sub(r"\x1b\[[0-9;]*m", "", shown).splitlines()
    assert len(lines) > 4
    assert max(map(len, lines)) <= 60
