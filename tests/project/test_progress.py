"""How far work is: plain lines in a log, a bar at a terminal, nothing where it is to be quiet."""

import io
import re
import sys

import pytest

from retrofit import progress as module
from retrofit.progress import downloading, progress, silent, tracked


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time stands still until it is moved."""
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_so_often_and_one_at_the_end(clock, capsys):
    with progress("training", "step", 600, done=100) as shown:
        for step in range(25):
            clock[0] += 1
            shown.advance(text=f"loss {step}")
    lines = capsys.readouterr().err
    assert lines.splitlines() == [
        "training: 110 of 600 steps, 0:00:10, 0:08:10 left; loss 9",
        "training: 120 of 600 steps, 0:00:20, 0:08:00 left; loss 19",
        "training: 125 of 600 steps, 0:00:25, 0:07:55 left; loss 24",
    ]
    assert "\r" not in lines and "\x1b" not in lines


@pytest.mark.parametrize(("seconds", "lines"), [(9, 0), (11, 2)])
def test_a_log_hears_of_brief_work_only_where_it_is_not(clock, capsys, seconds, lines):
    with progress("checking", "check", 3, brief=True) as shown:
        clock[0] += seconds
        shown.advance()
        shown.advance()
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_the_end_is_said_also_where_the_work_fails(clock, capsys):
    def steps():
        yield 1
        raise RuntimeError

    with pytest.raises(RuntimeError):
        list(tracked(steps(), "training", "step", 9))
    assert capsys.readouterr().err == "training: 1 of 9 steps, 0:00:00, 0:00:00 left\n"


@pytest.mark.parametrize("brief", [False, True])
def test_a_terminal_shows_a_bar(monkeypatch, brief):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("training", "step", 20, brief=brief) as shown:
        for _ in range(20):
            shown.advance(text="loss 1.25")
        with progress("downloading", "B", 2_000_000_000) as inner:  # one within the other
            inner.advance(1_500_000_000)
    seen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", sys.stderr.getvalue())
    assert "20 of 20 steps" in seen and "loss 1.25" in seen
    assert "1.50 of 2.00 GB" in seen


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_is_quiet(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    assert list(tracked(range(3), "counting", "number", quiet=True)) == [0, 1, 2]
    with silent():
        assert list(tracked(range(3), "counting", "number")) == [0, 1, 2]
    assert sys.stderr.getvalue() == ""
    assert list(tracked(range(3), "counting", "number")) == [0, 1, 2]
    assert "3 numbers" in sys.stderr.getvalue(), "the stream shows what is not quiet"


def test_stdin_closed_and_stderr_gone_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(tracked(range(3), "counting", "number")) == [0, 1, 2]


def test_a_download_tells_its_bytes(clock, capsys):
    """The bars as `snapshot_download` makes and moves them: of bytes received, of bytes on disk, of files."""
    from huggingface_hub.utils.tqdm import _create_progress_bar

    with downloading("downloading a/b") as bar:
        received, written = (
            _create_progress_bar(cls=bar, log_level=0, name=f"huggingface_hub.{name}", desc="", total=0, unit="B")
            for name in ("snapshot_download.transfer", "snapshot_download")
        )
        with bar(total=2, desc="Fetching 2 files") as files:
            written.total = (written.total or 0) + 4_000_000_000
            for _ in range(4):
                clock[0] += 6
                received.update(1_000_000_000)
                written.update(1_000_000_000)
                written.set_postfix_str("1 GB/s", refresh=False)
            files.update(1)
        written.set_description("complete")
    assert capsys.readouterr().err.splitlines() == [
        "downloading a/b: 2.00 of 4.00 GB, 0:00:12, 0:00:12 left",
        "downloading a/b: 4.00 of 4.00 GB, 0:00:24",
    ]
