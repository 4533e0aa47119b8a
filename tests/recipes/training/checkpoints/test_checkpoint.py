"""Checkpoints: what is damaged, changed or held by another is refused, and never makes it worse."""

import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_conversion import (
    STEPS,
    curve,
    interrupted,
    learned,
    run,
    steps,
    whole,
    write_texts,
)

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import ResourceError, UsageError
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.checkpoint import Checkpoints, checkpoints, folder_of
from retrofit.recipes.training.order import SHUFFLE_BUFFER, Order, Place


@pytest.fixture
def stopped(tmp_path: Path, texts: Path) -> Path:
    """An artifact to be: checkpoints of steps 4 and 5."""
    out = tmp_path / "out"
    interrupted(out, texts, 5)
    assert steps(out) == [4, 5]
    return out


# Kept and removed


def test_the_newest_two_are_kept_and_removed_at_the_end(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    right = Checkpoints.save

    def save(self: Checkpoints, step: int, contents: Any) -> Path:
        folder = right(self, step, contents)
        seen.append(steps(tmp_path / "out"))
        return folder

    monkeypatch.setattr(Checkpoints, "save", save)
    run(tmp_path / "out", texts)
    assert seen == [[2], [2, 4], [4, 6], [6, 8], [8, 9]]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoints_can_be_kept_and_hold_no_pickle(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    run(out, texts, keep_checkpoints=True)
    assert whole(out) == [8, STEPS]
    suffixes = {path.suffix for path in folder_of(out).rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl"}
    assert curve(folder_of(out) / f"step-{STEPS:06d}" / "metrics.jsonl") == curve(out / "metrics.jsonl")


def test_without_save_every_a_run_writes_none(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoints, "save", None)
    run(tmp_path / "out", texts, train__save_every=0)


def test_files_of_others_stay(tmp_path: Path, texts: Path) -> None:
    note = folder_of(tmp_path / "out") / "notes.md"
    note.parent.mkdir()
    note.write_text("mine")
    run(tmp_path / "out", texts)
    assert [path.name for path in folder_of(tmp_path / "out").iterdir()] == ["notes.md"]


# Damage


def flip(folder: Path) -> None:
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "optimizer.safetensors is damaged": flip,
    "weights.safetensors: No such file": lambda folder: (folder / "weights.safetensors").unlink(),
    "manifest.json: No such file": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json is damaged": lambda folder: (folder / "manifest.json").write_text('{"format": 1, "fi'),
    "state.json is damaged": lambda folder: (folder / "state.json").write_text("{}"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_and_named(
    stopped: Path, texts: Path, straight: Path, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[problem](folder_of(stopped) / "step-000005")
    run(stopped, texts, quiet=False)
    said = capsys.readouterr().err
    assert f"skipped {folder_of(stopped) / 'step-000005'}: {problem}" in said
    assert f"going on from step 4 of {STEPS}" in said
    assert learned(stopped) == learned(straight)


def test_with_none_left_it_starts_anew(stopped: Path, texts: Path, straight: Path) -> None:
    for step in (4, 5):
        flip(folder_of(stopped) / f"step-{step:06d}")
    stop = interrupted(stopped, texts, 1)
    assert "saved step 1" in stop.__notes__[0]
    assert whole(stopped) == [1], "what is damaged goes when there is something better"
    run(stopped, texts)
    assert learned(stopped) == learned(straight)
    assert curve(stopped / "metrics.jsonl") == curve(straight / "metrics.jsonl")


def test_a_checkpoint_of_a_newer_format_is_not_thrown_away(stopped: Path, texts: Path) -> None:
    path = folder_of(stopped) / "step-000005" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(UsageError, match="format 2"):
        run(stopped, texts)
    assert steps(stopped) == [4, 5]


# Changes


def test_another_recipe_is_refused_with_what_is_different(stopped: Path, texts: Path, straight: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run(stopped, texts, train__lr=1e-3, data__temperature=0.5)
    lines = str(caught.value).splitlines()
    assert "step-000005 was made with another recipe (old -> new)" in lines[0]
    assert lines[1:] == ["  data.temperature: 0.8 -> 0.5", "  train.lr: 0.01 -> 0.001"]
    assert "--force-resume" in str(caught.value.hint)
    assert "--restart" in str(caught.value.hint)
    assert whole(stopped) == [4, 5]
    run(stopped, texts, train__save_every=3)
    assert learned(stopped) == learned(straight), "how often to save changes nothing"


def test_leaving_out_bad_rows_is_part_of_the_recipe(stopped: Path, texts: Path, straight: Path) -> None:
    with pytest.raises(UsageError, match="another recipe") as caught:
        run(stopped, texts, skip_bad=True)
    assert str(caught.value).splitlines()[1:] == ["  skip_bad: false -> true"]
    run(stopped, texts, skip_bad=True, resume="force")
    assert learned(stopped) == learned(straight), "there were none"


def test_bad_rows_of_an_interrupted_run_are_counted_as_those_of_a_straight_one(tmp_path: Path) -> None:
    """A run that goes on reads but a part of the epoch it stands in, and never the ones before."""
    bad = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}  # no template
    rows = [bad if number % 3 == 1 else {"text": f"row {'abcdefghij'[number % 10]} " * 20} for number in range(36)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows)))
    made = run(tmp_path / "straight", source, skip_bad=True)
    assert made.config["training"]["skipped"] == {"template": 12}
    interrupted(tmp_path / "out", source, STEPS - 1, skip_bad=True)
    again = run(tmp_path / "out", source, skip_bad=True)
    assert again.config["training"]["skipped"] == {"template": 12}
    assert learned(tmp_path / "out") == learned(tmp_path / "straight")


def test_another_recipe_can_be_forced(stopped: Path, texts: Path, straight: Path) -> None:
    run(stopped, texts, train__lr=1e-3, resume="force")
    ours, theirs = curve(stopped / "metrics.jsonl"), curve(straight / "metrics.jsonl")
    assert ours[:5] == theirs[:5]
    assert ours[5]["lr"] == pytest.approx(theirs[5]["lr"] / 10)
    assert learned(stopped) != learned(straight)


def test_restart_is_a_run_of_its_own(stopped: Path, texts: Path, tmp_path: Path) -> None:
    run(stopped, texts, train__seed=1, resume="never")
    run(tmp_path / "other", texts, train__seed=1)
    assert learned(stopped) == learned(tmp_path / "other")


def test_an_adapter_of_another_shape_cannot_be_forced(stopped: Path, texts: Path) -> None:
    with pytest.raises(UsageError, match="does not fit this adapter: tensor") as caught:
        run(stopped, texts, adapter__rank=3, resume="force")
    assert caught.value.hint == "start anew with --restart"
    assert whole(stopped) == [4, 5]


@pytest.mark.parametrize("responses", ["keep", "regenerate"])
def test_another_text_is_noticed(tmp_path: Path, responses: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "responses"))
    own = write_texts(tmp_path / "texts")
    out = tmp_path / "out"
    interrupted(out, own, 3, data__responses=responses)
    for path in own.iterdir():
        path.write_text(path.read_text()[::-1])
    with pytest.raises(UsageError, match="the training text is not the one"):
        run(out, own, data__responses=responses)
    run(out, own, data__responses=responses, resume="force")


def test_another_base_is_noticed(stopped: Path, texts: Path) -> None:
    path = folder_of(stopped) / "step-000005" / "state.json"
    state = json.loads(path.read_text())
    assert {"base.fingerprint.config", "base.fingerprint.norms", "base.model"} <= set(state["settings"])


def test_a_place_survives_json_and_tensors() -> None:
    def epochs(number: int) -> Iterator[Document]:
        for i in range(40):
            length = 2 + (7 * i + number) % 5
            yield Document(
                f"{i}", tuple(range(i, i + length)), (False,) + (i % 3 > 0,) * (length - 1), "texts", f"a:{i}"
            )

    order = Order(epochs, 3, seed=1, layout=DraftLayout())
    for _ in range(50):
        order.batch()
    plain, tensors = order.place().pack()
    again = Order(epochs, 3, seed=1, layout=DraftLayout())
    again.go_to(Place.unpack(json.loads(json.dumps(plain)), tensors))
    assert len(plain["buffer"]) == SHUFFLE_BUFFER - 3
    assert [again.batch() for _ in range(200)] == [order.batch() for _ in range(200)]
    assert again.place() == order.place()


# One process at a time


def test_a_second_run_is_refused_and_told_who_is_first(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    with checkpoints(out):
        with pytest.raises(UsageError, match=f"process {os.getpid()} on ") as caught:
            run(out, texts)
        assert str(out) in str(caught.value)
        run(tmp_path / "other", texts, train__steps=2)
    assert not folder_of(out).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_the_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ready, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        with checkpoints(out):
            os.write(write, b"x")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(UsageError, match=f"process {holder} "), checkpoints(out):
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (folder_of(out) / "lock").exists()
    with checkpoints(out):
        assert f"process {os.getpid()} " in (folder_of(out) / "lock").read_text()
    assert not folder_of(out).exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    out = tmp_path / "out"
    with checkpoints(out):
        assert f"process {os.getpid()} " in (folder_of(out) / "lock").read_text()
    assert not folder_of(out).exists()


def test_a_lock_that_cannot_be_made_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(ResourceError, match="cannot be locked"), checkpoints(tmp_path / "out"):
        pass
