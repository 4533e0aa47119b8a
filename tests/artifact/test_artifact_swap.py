"""Writing over an artifact: whole or not at all, whatever fails or is killed on the way."""

import errno
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from artifact_folders import FULL, contents, failing, same, tensors, write

from retrofit.artifact import folder as artifact
from retrofit.errors import ResourceError, UsageError
from retrofit.recipes.training.checkpoint import checkpoints


def test_an_artifact_is_only_overwritten_on_demand_and_then_whole(folder):
    artifact.add(folder, "certificate.json", "{}")
    before = contents(folder)
    with pytest.raises(UsageError, match="holds an artifact already"):
        write(folder, seed=1)
    assert contents(folder) == before
    write(folder, seed=1, overwrite=True)
    assert same(artifact.read(folder).adapter_state, tensors(1)[0])
    assert not (folder / "certificate.json").exists()  # it was another adapter's
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "a").mkdir()
    artifact.check(write(tmp_path / "a"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_peoples_files_are_never_overwritten(tmp_path, overwrite):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("thesis", "file", "link"):
        with pytest.raises(UsageError, match=name):
            artifact.check_writable(tmp_path / name, overwrite)  # before the work
        with pytest.raises(UsageError, match=name):
            write(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("function", ["write_file", "sync_folder", "put"])
@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()], ids=["full", "interrupt"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_at_any_point_leaves_nothing_half_written(tmp_path, monkeypatch, function, after, error, exists):
    folder = tmp_path / "artifact"
    if exists:
        write(folder)
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(artifact, function, failing(getattr(artifact, function), after, error))
        with suppress(KeyboardInterrupt, ResourceError):
            write(folder, seed=1, overwrite=True)
    if (folder / "retrofit.json").exists() and contents(tmp_path) != before:
        # the failure came after the renaming: the new artifact is there, whole
        assert same(artifact.read(folder).adapter_state, tensors(1)[0])
    else:
        assert contents(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir() if p.name != "artifact"] == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("reader", [artifact.read, artifact.check, artifact.read_config])
def test_killed_between_the_two_renames(tmp_path, monkeypatch, reader):
    """What was to be replaced stands beside its place; whoever comes next puts it back."""
    folder = tmp_path / "artifact"
    write(folder)
    before = contents(folder)
    child = os.fork()
    if child == 0:
        rename, calls = Path.rename, []

        def dying(self, target):
            calls.append(target)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", dying)
        write(folder, seed=1, overwrite=True)
    os.waitpid(child, 0)
    assert not folder.exists()
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".old", ".part"]
    reader(folder)
    assert contents(folder) == before
    write(folder, seed=1, overwrite=True)
    assert same(artifact.read(folder).adapter_state, tensors(1)[0])


def test_a_conversion_that_may_not_overwrite_finds_what_was_moved_aside(tmp_path):
    write(tmp_path / "artifact")
    (tmp_path / "artifact").rename(tmp_path / ".artifact.0123abcd.old")
    with pytest.raises(UsageError, match="holds an artifact already"):
        artifact.check_writable(tmp_path / "artifact", overwrite=False)
    (tmp_path / "artifact").rename(tmp_path / ".artifact.0123abcd.old")
    with checkpoints(tmp_path / "artifact"):
        artifact.read(tmp_path / "artifact")
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


@pytest.mark.parametrize("call", [1, 2])
def test_a_reader_between_the_two_renames(tmp_path, monkeypatch, call):
    folder, rename, calls = tmp_path / "artifact", Path.rename, []
    write(folder)

    def watched(self, target):
        calls.append(target)
        if len(calls) == call:
            artifact.read(folder)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    write(folder, seed=1, overwrite=True)
    assert same(artifact.read(folder).adapter_state, tensors(1)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]


def test_a_full_disk_is_named_with_place_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "write_file", failing(artifact.write_file, 2, FULL))
    with pytest.raises(ResourceError, match=r"cannot write [\d,]+ bytes \([\d,]+ free\): No space left") as caught:
        write(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize("call", [0, 1])
def test_a_failed_swap_puts_the_old_artifact_back(folder, monkeypatch, call):
    before = contents(folder)
    path = type(folder)
    monkeypatch.setattr(path, "rename", fail_once(path.rename, call, OSError(errno.EIO, "Input/output error")))
    with pytest.raises(ResourceError, match="Input/output error"):
        write(folder, seed=1, overwrite=True)
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def fail_once(real, number, error):
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) == number + 1:
            raise error
        return real(*arguments)

    return call
