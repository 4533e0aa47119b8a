"""Disks that fill up, errors and losses that explode: the last good step is kept, and what was wrong is said."""

import errno
import json
import math
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_conversion import (
    STEPS,
    at_step,
    curve,
    failing_in_step_6,
    half_written,
    learned,
    run,
    whole,
)

from retrofit.artifact import files
from retrofit.artifact import folder as artifact
from retrofit.errors import DataError, ResourceError, TrainingError
from retrofit.recipes.text import reading
from retrofit.recipes.training import checkpoint, session
from retrofit.recipes.training.checkpoint import checkpoints, folder_of
from retrofit.recipes.training.session import fault
from retrofit.recipes.training.step import StepResult, Trainer


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


def failing_in_epoch_6(patch: pytest.MonkeyPatch) -> None:
    """The shuffle buffer is filled with five epochs before the first step."""
    right = reading.documents

    def documents(*arguments: Any, part: Any, seed: int = 0, **options: Any) -> Any:
        yield from right(*arguments, part=part, seed=seed, **options)
        if (part, seed) == ("train", 6):
            raise DataError("rows.jsonl:7: not valid JSON")

    patch.setattr(reading, "documents", documents)


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


def test_a_folder_that_cannot_be_made_is_refused_and_not_tried_for_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nowhere(folder: Path, *_: Any, **__: Any) -> None:
        tried.append(folder)
        if len(tried) > 3:
            pytest.fail("it tries for ever")
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(folder))

    tried: list[Path] = []
    monkeypatch.setattr(Path, "mkdir", nowhere)
    with pytest.raises(ResourceError, match=r"out\.checkpoints: cannot write there"), checkpoints(tmp_path / "out"):
        pass
    assert tried == [folder_of(tmp_path / "out")]
