"""Folders beside their place: what is left by a kill is found and removed, what is being made is left alone."""

import signal
import subprocess
import sys
import time

import pytest
from artifact_folders import FULL, contents, failing, write

from retrofit.artifact import beside as module
from retrofit.artifact import folder as artifact
from retrofit.artifact.beside import beside
from retrofit.errors import ResourceError

CODE = """
import sys, time
from pathlib import Path
from retrofit.artifact.beside import beside
with beside(Path(sys.argv[1]), 0) as new:
    (new / "begun").write_text("half")
    time.sleep(600)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def making(place):
    """A process that has begun to make the folder."""
    process = subprocess.Popen([sys.executable, "-c", CODE, str(place)])
    end = time.monotonic() + 60
    while not list(place.parent.glob(".*/begun")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    return process


def killed(place):
    """What a killed process leaves."""
    process = making(place)
    process.send_signal(signal.SIGKILL)
    process.wait()
    [left] = place.parent.glob(".*.part")
    return left


def test_what_was_killed_is_removed_by_the_next(tmp_path):
    left = killed(tmp_path / "out")
    other = left.with_name(left.name.replace(".out.", ".other."))
    other.mkdir()
    write(tmp_path / "out")
    assert names(tmp_path) == [other.name, "out"]


def test_in_a_cache_others_are_removed_too(tmp_path):
    left = killed(tmp_path / "out")
    left.with_name(left.name.replace(".out.", ".other.")).mkdir()
    with beside(tmp_path / "out", 0, cached=True) as new, beside(tmp_path / "out", 0, cached=True) as second:
        assert names(tmp_path) == sorted([new.name, second.name]) and contents(new) == {}
    assert names(tmp_path) == []


def test_what_another_process_makes_stays(tmp_path):
    process = making(tmp_path / "out")
    [theirs] = names(tmp_path)
    try:
        write(tmp_path / "out")
        with beside(tmp_path / "more", 0, cached=True) as new:
            assert names(tmp_path) == sorted([theirs, new.name, "out"])
        assert names(tmp_path) == [theirs, "out"]
    finally:
        process.kill()
        process.wait()


def test_folders_made_above_it_go_with_it(tmp_path, monkeypatch):
    out = tmp_path / "a" / "b" / "out"
    monkeypatch.setattr(artifact, "write_file", failing(artifact.write_file, 2, FULL))
    with pytest.raises(ResourceError):
        write(out)
    assert names(tmp_path) == []
    (tmp_path / "a").mkdir()
    with beside(out, 0):
        (out.parent.parent / "of somebody else").touch()
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == ["of somebody else"]
    monkeypatch.undo()
    write(out)
    assert names(out.parent) == ["out"]


def test_a_folder_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """Another process came between its making and its lock."""
    real, taken = module._locked, []

    def late(path, wait):
        handle = real(path, wait)
        if not taken:
            taken.append(path)
            path.rmdir()
        return handle

    monkeypatch.setattr(module, "_locked", late)
    with beside(tmp_path / "out", 0) as new:
        assert new.is_dir() and new != taken[0]


def test_where_nothing_can_be_locked_nothing_is_removed(tmp_path, monkeypatch):
    left = tmp_path / ".out.0123abcd.part"
    left.mkdir()
    monkeypatch.setattr(module, "fcntl", None)
    write(tmp_path / "out")
    assert names(tmp_path) == [left.name, "out"]


def test_no_writing_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match="cannot write 5 bytes"), beside(tmp_path / "file" / "out", 5):
        pass
