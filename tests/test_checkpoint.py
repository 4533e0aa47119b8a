"""Checkpoints: what is damaged, changed, held by another or does not fit is refused, and never makes it worse."""

import errno
import json
import math
import os
import signal
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from resuming import (
    RECIPE,
    STEPS,
    at_step,
    curve,
    half_written,
    interrupted,
    learned,
    run,
    steps,
    tokenizer,
    write_texts,
)
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.artifact import files
from retrofit.artifact import folder as artifact
from retrofit.cli import main as cli
from retrofit.errors import DataError, ResourceError, TrainingError, UsageError
from retrofit.recipes import convert
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training import checkpoint, interrupts, session
from retrofit.recipes.training.checkpoint import Checkpoints, checkpoints, folder_of
from retrofit.recipes.training.order import SHUFFLE_BUFFER, Order, Place
from retrofit.recipes.training.session import fault
from retrofit.recipes.training.step import StepResult, Trainer


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    out = tmp_path_factory.mktemp("straight") / "out"
    run(out, texts)
    return out


@pytest.fixture
def stopped(tmp_path: Path, texts: Path) -> Path:
    """An artifact to be: checkpoints of steps 4 and 5."""
    out = tmp_path / "out"
    interrupted(out, texts, 5)
    assert steps(out) == [4, 5]
    return out


def whole(out: Path) -> list[int]:
    """Steps of checkpoints that verify, and nothing else lies there."""
    said: list[str] = []
    folder = folder_of(out)
    found = [path for path in folder.iterdir() if path.name not in ("metrics.jsonl", "lock")]
    assert all(path.name.startswith(("step-", "stopped-")) for path in found), found
    assert Checkpoints(folder).newest(said.append) is not None
    assert said == []
    return steps(out)


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


# Disks


def failing_after(calls: int, number: int) -> Callable[..., Any]:
    """`write_file`, until the disk is full: then half the bytes are there."""
    right, made = files.write_file, []

    def write(path: Path, content: Any) -> Any:
        made.append(path)
        if len(made) > calls:
            half_written(path, content)
            raise OSError(number, os.strerror(number))
        return right(path, content)

    return write


@pytest.mark.parametrize(("calls", "number"), [(6, errno.ENOSPC), (8, errno.EROFS), (11, errno.ENOSPC)])
def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, calls: int, number: int
) -> None:
    """The first checkpoint is written, the second, of step 4, fails at its first, third or last file."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_file", failing_after(calls, number))
        with pytest.raises(ResourceError, match=r"cannot write [\d,]+ bytes \([\d,]+ free\): ") as caught:
            run(out, texts)
    assert str(folder_of(out) / "step-000004") in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert whole(out) == [2]


def test_a_disk_filled_by_others_goes_on_when_there_is_room(
    tmp_path: Path, texts: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    Usage = namedtuple("Usage", "total used free")
    with monkeypatch.context() as patch:
        at_step(3, lambda: patch.setattr(files.shutil, "disk_usage", lambda path: Usage(10, 9, 1234)), patch)
        with pytest.raises(ResourceError, match=r"[\d,]+ bytes are needed, 1,234 are free") as caught:
            run(out, texts)
    assert str(folder_of(out) / "step-000004") in str(caught.value)
    needed = int(str(caught.value).partition(" bytes are needed")[0].split()[-1].replace(",", ""))
    assert whole(out) == [2]
    run(out, texts, keep_checkpoints=True)
    assert learned(out) == learned(straight)
    written = sum(path.stat().st_size for path in (folder_of(out) / "step-000008").iterdir())
    assert needed == pytest.approx(written, rel=0.2)


def test_metrics_that_cannot_be_written(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    at_step(3, lambda: ((folder_of(out) / "metrics.jsonl").unlink(), (folder_of(out) / "metrics.jsonl").mkdir()),
            monkeypatch)  # fmt: skip
    with pytest.raises(ResourceError, match=r"metrics\.jsonl: cannot write"):
        run(out, texts)


def test_a_place_that_cannot_be_written_is_found_out_at_once(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mkdir(self: Path, *arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoint.Path, "mkdir", mkdir)
    with (
        pytest.raises(ResourceError, match=r"out\.checkpoints: cannot write there: Read-only"),
        checkpoints(tmp_path / "out"),
    ):
        pass


# Other errors


LARGER = {"train__batch_size": 16, "train__save_every": 0}


@pytest.fixture(scope="module")
def straight_larger(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    out = tmp_path_factory.mktemp("larger") / "out"
    run(out, texts, **LARGER)
    return out


def failing_in_step_6(error: Exception, patch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise error

    at_step(6, fail, patch, "gradients")


def failing_in_epoch_6(patch: pytest.MonkeyPatch) -> None:
    """The shuffle buffer is filled with five epochs before the first step."""
    right = convert.documents

    def documents(*arguments: Any, part: Any, seed: int = 0, **options: Any) -> Any:
        yield from right(*arguments, part=part, seed=seed, **options)
        if (part, seed) == ("train", 6):
            raise DataError("rows.jsonl:7: not valid JSON")

    patch.setattr(convert, "documents", documents)


FAILURES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "not valid JSON": failing_in_epoch_6,
    "out of memory": lambda patch: failing_in_step_6(torch.OutOfMemoryError("CUDA out of memory"), patch),
    "reset by peer": lambda patch: failing_in_step_6(ConnectionError("reset by peer"), patch),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_an_error_leaves_a_checkpoint_of_the_last_step(
    tmp_path: Path, texts: Path, straight_larger: Path, failure: str
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        FAILURES[failure](patch)
        with pytest.raises(Exception, match=failure) as caught:
            run(out, texts, **LARGER)
    (last,) = whole(out)
    assert 2 <= last <= 5
    assert f"saved step {last} of {STEPS} in {folder_of(out)}" in caught.value.__notes__[0]
    run(out, texts, **LARGER)
    assert learned(out) == learned(straight_larger)
    assert curve(out / "metrics.jsonl") == curve(straight_larger / "metrics.jsonl")


def test_an_error_is_not_hidden_by_a_checkpoint_that_fails(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        failing_in_step_6(ConnectionError("reset by peer"), patch)
        patch.setattr(checkpoint, "write_file", failing_after(12, errno.EIO))
        with pytest.raises(ConnectionError, match="reset by peer") as caught:
            run(out, texts)
    (note,) = caught.value.__notes__
    assert note.startswith("step 5 could not be saved: ")
    assert whole(out) == [2, 4]


def test_a_last_checkpoint_that_fails_says_that_the_artifact_is_there(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_file", failing_after(0, errno.ENOSPC))
        with pytest.raises(ResourceError, match="cannot write") as caught:
            run(out, texts, train__save_every=0, keep_checkpoints=True)
    assert caught.value.__notes__ == [f"{out} is complete"]
    artifact.check(out)


# Losses


def with_loss(step: int, loss: float, norm: float, patch: pytest.MonkeyPatch) -> list[Any]:
    """Let a step have a loss and a gradient like these; the batches of that step come into the list."""
    right, batches = Trainer.gradients, []

    def gradients(self: Trainer, given: Any) -> StepResult:
        result = right(self, given)
        if self.steps_done + 1 == step:
            batches.extend(given)
            result.loss["total"], result.gradient_norm = loss, norm
        return result

    patch.setattr(Trainer, "gradients", gradients)
    return batches


@pytest.mark.parametrize(
    ("loss", "norm", "problem"),
    [(math.nan, 1.0, "the loss is not finite"), (math.inf, 1.0, "the loss is not finite"),
     (1.0, math.nan, "the gradient is not finite")],
)  # fmt: skip
def test_training_stops_before_it_takes_up_a_bad_step(
    tmp_path: Path, texts: Path, loss: float, norm: float, problem: str
) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        batches, updates = with_loss(6, loss, norm, patch), []
        at_step(5, lambda: updates.append(5), patch)
        at_step(6, lambda: updates.append(6), patch)
        with pytest.raises(TrainingError, match=f"{problem} at step 6") as caught:
            run(out, texts, train__accumulation=2)
    assert updates == [5]
    assert (caught.value.exit_code, "lower train.lr" in str(caught.value.hint)) == (1, True)
    path = folder_of(out) / "stopped-000006.json"
    assert str(path) in str(caught.value)
    assert whole(out) == [2, 4]
    saved = json.loads(path.read_text())
    documents = [(document, epoch) for batch in batches for document, epoch in batch]
    assert [(d["document"], d["epoch"], d["tokens"]) for d in saved["documents"]] == [
        (document.id, epoch, list(document.tokens)) for document, epoch in documents
    ]
    assert [d["batch"] for d in saved["documents"]] == [0, 0, 1, 1]
    for entry in saved["documents"]:
        assert set(entry["anchors"]) == {"uniform", "missed", "masked"}
        assert all(0 <= a < len(entry["tokens"]) for group in entry["anchors"].values() for a in group)
    run(out, texts, train__accumulation=2)  # the fault was planted: what stands there is sound
    assert not folder_of(out).exists()


def loss(trained: float) -> dict[str, float]:
    return {"total": 2.5 + trained, "ar": 2.5}


def test_what_counts_as_an_explosion() -> None:
    """Ten times the median of the steps since the warm-up, and worse than no training at all."""
    untrained, recent = loss(3.0), [loss(0.4)] * 10 + [loss(0.5)] * 11
    assert fault(loss(4.9), 1.0, untrained, recent) is None
    assert "exploded: 5.1, its median was 0.5" in str(fault(loss(5.1), 1.0, untrained, recent))
    assert fault(loss(5.1), 1.0, untrained, recent[-10:]) is None, "too few steps to tell"
    assert fault(loss(2.9), 1.0, untrained, [loss(0.001)] * 20) is None
    assert fault(loss(5.1), 1.0, loss(5.1), []) is None


def test_an_exploding_loss_stops_the_run(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MEDIAN_LEAST", 3)
    with_loss(7, 1e4, 1.0, monkeypatch)
    with pytest.raises(TrainingError, match=r"the loss exploded: .*, its median was .* at step 7"):
        run(tmp_path / "out", texts)
    assert whole(tmp_path / "out") == [4, 6]


def test_what_killed_processes_left_is_swept_up(tmp_path: Path) -> None:
    litter = [".out.0123abcd.part", "out.checkpoints/.step-000004.0123abcd.part"]
    litter.append("out.checkpoints/.stopped-000004.json.0123abcd.part")
    kept = [".out.notes.part", ".out2.0123abcd.part", ".out.0123abcd.old", "out.checkpoints/.step-4.part"]
    for name in [*litter, *kept]:
        (tmp_path / name).mkdir(parents=True)
    with checkpoints(tmp_path / "out"):
        assert [name for name in litter if (tmp_path / name).exists()] == []
    assert [name for name in kept if not (tmp_path / name).exists()] == []
    (tmp_path / "out").mkdir()
    with checkpoints(tmp_path / "out"):
        pass
    assert not (tmp_path / ".out.0123abcd.old").exists(), "what it replaced is not needed any more"


# Signals


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_saves_and_the_handlers_are_given_back(
    tmp_path: Path, texts: Path, number: int, kind: type[BaseException]
) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop = interrupted(tmp_path / "out", texts, 3, number)
    assert type(stop) is kind
    assert kind is KeyboardInterrupt or stop.args == (143,)
    assert whole(tmp_path / "out") == [2, 3]
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_step_that_takes_long_is_given_up(tmp_path: Path, texts: Path, straight: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        at_step(4, lambda: os.kill(os.getpid(), signal.SIGINT), patch, "gradients")
        with pytest.raises(KeyboardInterrupt):
            run(out, texts)
    assert whole(out) == [2, 3]
    run(out, texts)
    assert learned(out) == learned(straight)
    assert curve(out / "metrics.jsonl") == curve(straight / "metrics.jsonl")


def test_a_signal_that_a_library_swallowed(tmp_path: Path, texts: Path) -> None:
    def swallowed() -> None:
        with suppress(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        at_step(4, swallowed, patch, "gradients")
        with pytest.raises(SystemExit):
            run(out, texts)
    assert whole(out) == [2, 4]


@pytest.mark.parametrize("patience", [0.0, 2.0])
def test_the_second_signal_waits_for_nothing(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """The first comes in step 3; while its checkpoint is being written comes the second, which may come too soon."""
    monkeypatch.setattr(interrupts, "INSIST_SECONDS", patience)
    out, right = tmp_path / "out", files.write_file

    def write(path: Path, content: Any) -> Any:
        if ".step-000003." in str(path) and path.name == "optimizer.safetensors":
            os.kill(os.getpid(), signal.SIGINT)
        return right(path, content)

    monkeypatch.setattr(checkpoint, "write_file", write)
    stop = interrupted(out, texts, 3)
    assert hasattr(stop, "__notes__") == (patience > 0)
    assert whole(out) == ([2, 3] if patience else [2])


@pytest.mark.parametrize("patience", [0.0, 2.0])
def test_two_signals_while_the_weights_move(
    tmp_path: Path, texts: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """torchrun sends two at once; that is no insisting."""
    monkeypatch.setattr(interrupts, "INSIST_SECONDS", patience)
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        at_step(3, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)], patch)
        with pytest.raises(KeyboardInterrupt):
            run(out, texts)
    assert whole(out) == ([2, 3] if patience else [2])
    run(out, texts)
    assert learned(out) == learned(straight)


def test_stopped_before_the_first_step_nothing_is_left(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(1, lambda: os.kill(os.getpid(), signal.SIGINT), monkeypatch, "gradients")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", texts)
    assert list(tmp_path.iterdir()) == []


# The command


@pytest.fixture
def command(tmp_path: Path, texts: Path) -> list[str]:
    base = tmp_path / "base"
    build("llama").save_pretrained(base)
    tokenizer().save_pretrained(base)
    overrides = {**RECIPE, "data.source": texts, "train.precision": "float32"}
    made = ["convert", str(base), "-o", str(tmp_path / "out"), *(f"{k}={v}" for k, v in overrides.items())]
    return [*made, "--recipe", "tiny", "--device", "cpu"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["INT", "TERM"])
def test_the_command_says_how_to_go_on(tmp_path: Path, command: list[str], number: int, code: int) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        at_step(5, lambda: os.kill(os.getpid(), number), patch)
        result = CliRunner().invoke(cli.main, [*command, "-q"])
    saved = f"saved step 5 of {STEPS} in {folder_of(out) / 'step-000005'}; the same command goes on from there\n"
    assert result.exit_code == code
    assert (result.stdout, result.stderr) == ("", f"interrupted\n{saved}" if code == 130 else saved)
    with pytest.MonkeyPatch.context() as patch:
        failing_in_step_6(ConnectionError("reset by peer"), patch)
        failed = CliRunner().invoke(cli.main, [*command, "-q"])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("Error: ConnectionError: reset by peer\n")
    assert f"\nsaved step 5 of {STEPS} in {folder_of(out)}" in failed.stderr
    refused = CliRunner().invoke(cli.main, [*command, "-q", "train.lr=0.001"])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "\n  train.lr: 0.01 -> 0.001\nhint: " in refused.stderr
    both = CliRunner().invoke(cli.main, [*command, "--force-resume", "--restart"])
    assert (both.exit_code, "do not go together" in both.stderr) == (2, True)
    done = CliRunner().invoke(cli.main, [*command, "--keep-checkpoints"])
    assert (done.exit_code, done.stdout) == (0, f"{out}\n")
    assert f"going on from step 5 of {STEPS}" in done.stderr
    assert whole(out) == [8, STEPS]
