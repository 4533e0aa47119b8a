"""Whatever ends one of several processes ends all of them, is told once, and leaves a checkpoint."""

import json
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  (imported before the processes are forked)
import pytest
import torch
from several_processes import (
    FSDP,
    converts,
    converts_live,
    quiet_end,
    rank,
    run_folder,
    together,
)
from tiny_conversion import STEPS, at_step, curve, run, steps, write_texts

from retrofit.errors import DataError
from retrofit.recipes import processes
from retrofit.recipes.processes import Processes
from retrofit.recipes.training import shards
from retrofit.recipes.training import shares as parallel
from retrofit.recipes.training.checkpoint import folder_of
from retrofit.recipes.training.step import Trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")


# Interrupted and killed


def test_the_main_process_is_stopped_while_it_waits(tmp_path: Path, texts: Path) -> None:
    ended = together(stopped_waiting, tmp_path / "out", texts)
    assert ended[0] is not None
    assert ended[0].kind == "KeyboardInterrupt"
    assert quiet_end(ended[1], 1)
    assert (tmp_path / "seen").read_text() == "saved while the other was computing"
    assert steps(tmp_path / "out") == [2, 3]


def stopped_waiting(out: Path, texts: Path) -> None:
    """The main process is interrupted in step 4, in which the other takes as long as it needs to see the result."""
    patch = pytest.MonkeyPatch()
    saved = folder_of(out) / "step-000003" / "manifest.json"

    def look() -> None:
        for _ in range(200):
            if saved.exists():
                (out.parent / "seen").write_text("saved while the other was computing")
                return
            time.sleep(0.1)

    if rank() == 0:
        right = Processes.exchange

        def interrupting(self: Processes, what: str, value: Any = None) -> Any:
            if what == "step" and len(curve(folder_of(out) / "metrics.jsonl")) == 3:
                signal.setitimer(signal.ITIMER_REAL, 0.3)
            return right(self, what, value)

        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        patch.setattr(Processes, "exchange", interrupting)
    else:
        at_step(4, look, patch, "gradients")
    run(out, texts)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("variables", [{}, FSDP], ids=["whole", "fsdp"])
def test_one_that_is_killed_ends_the_others(
    tmp_path: Path, texts: Path, model: Path, victim: int, variables: dict[str, str]
) -> None:
    ended = together(killed, tmp_path / "out", model, texts, victim, **variables)
    assert ended[victim] is None
    if victim == 0:
        assert quiet_end(ended[1], 1)
        assert steps(tmp_path / "out") == [2, 4]
    else:
        assert ended[0] is not None
        assert (ended[0].kind, ended[0].code) == ("ResourceError", 4)
        assert "connection to another process was lost" in ended[0].message
        assert f"saved step 5 of {STEPS}" in ended[0].hint
        assert steps(tmp_path / "out") == [4, 5]


def killed(out: Path, model: Path, texts: Path, victim: int) -> None:
    if rank() == victim:
        at_step(6, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch(), "gradients")
    run_folder(out, model, texts)


# Errors


def fails_alone(out: Path, texts: Path) -> None:
    if rank() == 1:

        def broken() -> None:
            raise DataError("row 7 is broken", "mend it")

        at_step(3, broken, pytest.MonkeyPatch(), "gradients")
    run(out, texts)


def test_an_error_of_one_process_is_the_main_ones(tmp_path: Path, texts: Path) -> None:
    main, other = together(fails_alone, tmp_path / "out", texts)
    assert main is not None
    assert (main.kind, main.message) == ("DataError", "row 7 is broken (in process 1)")
    assert main.hint.startswith("mend it; saved step 2 of")
    assert quiet_end(other, 1)


def test_a_main_process_that_lives_on_after_its_error_keeps_no_one_waiting(tmp_path: Path, texts: Path) -> None:
    main, other = together(fails_and_lives_on, tmp_path / "out", texts)
    assert main is not None
    assert main.value == "the other has ended"
    assert quiet_end(other, 1)


def fails_and_lives_on(out: Path, texts: Path) -> str:
    ended = out.parent / "ended"
    if rank() == 0:
        at_step(3, lambda: 1 / 0, pytest.MonkeyPatch(), "gradients")
        with pytest.raises(ZeroDivisionError):
            run(out, texts)
        for _ in range(200):
            if ended.exists():
                return "the other has ended"
            time.sleep(0.1)
        return "the other waits"
    try:
        run(out, texts)
    finally:
        ended.touch()
    return "no end"


def test_a_step_that_must_not_be_taken_is_written_down_whole(tmp_path: Path, texts: Path) -> None:
    main, other = together(poisoned, tmp_path / "out", texts)
    assert main is not None
    assert (main.kind, main.code) == ("TrainingError", 1)
    assert "the loss is not finite at step 3" in main.message
    assert quiet_end(other, 1)
    stopped = json.loads((folder_of(tmp_path / "out") / "stopped-000003.json").read_text())
    assert len(stopped["documents"]) == 3
    assert all(set(one["anchors"]) >= {"uniform", "masked"} for one in stopped["documents"])
    for one in stopped["documents"]:
        assert all(anchor < len(one["tokens"]) for anchor in one["anchors"]["uniform"])


def poisoned(out: Path, texts: Path) -> None:
    right = Trainer.update

    def update(self: Trainer) -> None:
        right(self)
        if self.steps_done == 2:
            with torch.no_grad():
                self.trained[0].fill_(float("nan"))

    pytest.MonkeyPatch().setattr(Trainer, "update", update)
    run(out, texts, train__batch_size=3)


def test_a_mistake_that_all_make_is_told_once(tmp_path: Path) -> None:
    main, other = together(converts_live, tmp_path / "out", tmp_path / "nothing", {})
    assert main is not None
    assert (main.kind, main.code) == ("UsageError", 2)
    assert "no such file or folder" in main.message
    assert quiet_end(other, 2)


@pytest.mark.parametrize("responses", ["keep", "regenerate"])
def test_processes_that_read_different_text_stop(tmp_path: Path, responses: str) -> None:
    """The recipe names the same folder; on one machine it holds something else."""
    main, other = together(other_text, tmp_path, responses)
    assert main is not None
    assert (main.kind, main.code) == ("TrainingError", 1)
    assert "read different text" in main.message
    assert "same files" in main.hint
    assert quiet_end(other, 1)
    assert steps(tmp_path / "out") == []


def other_text(folder: Path, responses: str) -> None:
    os.environ["RETROFIT_CACHE"] = str(folder / f"cache{rank()}")
    (folder / str(rank())).mkdir()
    texts = write_texts(folder / str(rank()) / "texts")
    if rank() == 1:
        for path in texts.iterdir():
            path.write_text(path.read_text().replace("a", "b"))
    os.chdir(folder / str(rank()))
    run(folder / "out", Path("texts"), data__responses=responses)


def test_weights_that_drift_apart_are_found_out(tmp_path: Path, texts: Path) -> None:
    main, other = together(drifts, tmp_path / "out", texts)
    assert main is not None
    assert (main.kind, main.message) == ("TrainingError", "processes 0 and 1 hold different weights")
    assert quiet_end(other, 1)


def drifts(out: Path, texts: Path) -> None:
    right = Trainer.update

    def nudged(self: Trainer) -> None:
        right(self)
        if rank() == 1 and self.steps_done == 3:
            with torch.no_grad():
                self.trained[0].view(-1)[0] += 1e-6

    pytest.MonkeyPatch().setattr(Trainer, "update", nudged)
    run(out, texts)


REFUSED: list[tuple[dict[str, Any], dict[str, str], str, str]] = [
    ({"train__batch_size": 1}, {}, "train.batch_size is 1, but there are 2 processes", "train.batch_size=2"),
    ({"device": "cuda:1"}, {}, "--device cuda:1 with 2 processes", "say cuda"),
    ({"device": "cuda"}, {}, "2 processes, but 0 GPU", "one process for each GPU"),
    ({}, {**FSDP, "FSDP_VERSION": "1"}, "FSDP version 1", "--fsdp_version 2"),
    ({"data__responses": "regenerate"}, FSDP, "does not go with FSDP", "without FSDP"),
]


@pytest.mark.parametrize(("options", "variables", "message", "fix"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_several_processes_cannot_do_is_refused(
    tmp_path: Path, texts: Path, model: Path, options: dict[str, Any], variables: dict[str, str], message: str, fix: str
) -> None:
    if torch.cuda.is_available() and "0 GPU" in message:
        pytest.skip("there are GPUs here")
    main, other = together(converts, tmp_path / "out", model, texts, options, **variables)
    assert main is not None
    assert message in main.message
    assert fix in main.hint
    assert main.kind in ("UsageError", "ResourceError")
    assert quiet_end(other, main.code)
    assert not (tmp_path / "out").exists()
    assert not folder_of(tmp_path / "out").exists()


def test_a_live_model_is_not_split(tmp_path: Path, texts: Path) -> None:
    main, _ = together(converts_live, tmp_path / "out", texts, {}, **FSDP)
    assert main is not None
    assert "FSDP cannot split a live model" in main.message


def test_layers_that_are_not_split_are_found_out(tmp_path: Path, model: Path, texts: Path) -> None:
    main, other = together(does_not_split, tmp_path / "out", model, texts, **FSDP)
    assert main is not None
    assert main.kind == "UnsupportedModelError"
    assert "FSDP did not split the layers" in main.message
    assert quiet_end(other, 1)


def does_not_split(out: Path, model: Path, texts: Path) -> None:
    pytest.MonkeyPatch().setattr(shards, "fully_shard", lambda *_, **__: None)
    run_folder(out, model, texts)


def test_one_forward_too_many_is_an_error(tmp_path: Path, model: Path, texts: Path) -> None:
    main, _ = together(one_forward_more, tmp_path / "out", model, texts, **FSDP)
    assert main is not None
    assert main.kind == "TrainingError"
    assert "not at the same place" in main.message


def one_forward_more(out: Path, model: Path, texts: Path) -> None:
    from retrofit.recipes.training import step as train

    right = train.clean_forward

    def twice(*arguments: Any) -> Any:
        if rank() == 1:
            right(*arguments)
        return right(*arguments)

    pytest.MonkeyPatch().setattr(train, "clean_forward", twice)
    run_folder(out, model, texts)


# What is not added up, or added up twice, shows


def forgets_a_buffer(out: Path, model: Path, texts: Path) -> None:
    right: Callable[..., Any] = parallel.Shares.add_up

    def half(self: Any, sums: Any, drafts: int, rows: Any, buffers: Any) -> Any:
        return right(self, sums, drafts, rows, buffers[: len(buffers) // 2])

    pytest.MonkeyPatch().setattr(parallel.Shares, "add_up", half)
    run_folder(out, model, texts)


def test_a_gradient_that_is_not_added_up_makes_the_weights_differ(tmp_path: Path, model: Path, texts: Path) -> None:
    main, _ = together(forgets_a_buffer, tmp_path / "out", model, texts)
    assert main is not None
    assert "hold different weights" in main.message


def test_processes_that_nobody_started_are_waited_for_only_so_long(tmp_path: Path, texts: Path) -> None:
    ended = together(converts_live_impatiently, tmp_path / "out", texts, size=1, WORLD_SIZE="2")
    assert ended[0] is not None
    assert (ended[0].kind, ended[0].code) == ("ResourceError", 4)
    assert "the processes did not meet" in ended[0].message
    assert "unset RANK" in ended[0].hint


def converts_live_impatiently(out: Path, texts: Path) -> None:
    pytest.MonkeyPatch().setattr(processes, "CONNECT_TIMEOUT", timedelta(seconds=1))
    converts_live(out, texts, {})
