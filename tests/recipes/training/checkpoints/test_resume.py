"""A conversion that was stopped anywhere and run again ends with the bytes of one that never was."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_conversion import STEPS, at_step, child, curve, interrupted, learned, run, steps

from retrofit.errors import UsageError
from retrofit.recipes.training.checkpoint import folder_of
from retrofit.recipes.training.session import Session
from retrofit.runtime.engine import Engine

PROCESSES = multiprocessing.get_context("fork")  # everything slow is imported already


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> Path:
    """A conversion that nothing interrupted."""
    out = tmp_path_factory.mktemp("straight") / "out"
    run(out, texts, train__save_every=0)
    return out


def same(out: Path, straight: Path) -> bool:
    assert curve(out / "metrics.jsonl") == curve(straight / "metrics.jsonl")
    assert not folder_of(out).exists()
    assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []
    return learned(out) == learned(straight)


# Stopped and gone on


@pytest.mark.parametrize("step", [1, 5, STEPS - 1])
def test_a_resumed_run_has_the_losses_and_weights_of_a_straight_one(
    tmp_path: Path, texts: Path, straight: Path, step: int
) -> None:
    out = tmp_path / "out"
    stop = interrupted(out, texts, step, train__save_every=0)
    assert f"saved step {step} of {STEPS}" in stop.__notes__[0]
    assert steps(out) == [step]
    assert curve(folder_of(out) / "metrics.jsonl") == curve(straight / "metrics.jsonl")[:step]
    run(out, texts)
    assert same(out, straight)


def test_stopped_at_every_step(tmp_path: Path, texts: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "straight"
    options = {"train__steps": 4, "train__accumulation": 2, "train__save_every": 3}
    run(whole, texts, **options)
    for step in range(1, 5):
        interrupted(out, texts, step, **options)
        assert steps(out)[-1] == step
    run(out, texts, **options)
    assert same(out, whole)


def test_metrics_are_cut_back_to_the_step_that_is_gone_on_from(tmp_path: Path, texts: Path, straight: Path) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        at_step(6, lambda: (patch.setattr(Session, "save", lambda self: None), 1 / 0), patch, "gradients")
        with pytest.raises(ZeroDivisionError):
            run(out, texts)
    assert (steps(out), len(curve(folder_of(out) / "metrics.jsonl"))) == ([2, 4], 5)
    interrupted(out, texts, 7)
    assert curve(folder_of(out) / "metrics.jsonl") == curve(straight / "metrics.jsonl")[:7]


def test_responses_written_by_the_base_are_not_written_again(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are on disk; where they no longer are, they come out the same."""
    generated = [0]
    right = Engine.stream

    def counted(self: Engine, prompts: Any, *arguments: Any, **options: Any) -> Any:
        generated[-1] += len(prompts)
        return right(self, prompts, *arguments, **options)

    monkeypatch.setattr(Engine, "stream", counted)
    options = {"data__responses": "regenerate", "train__steps": 4}
    for out, lost in [("straight", False), ("out", False), ("lost", True)]:
        monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / f"{out}-responses"))
        if out != "straight":
            generated.append(0)
            interrupted(tmp_path / out, texts, 3, **options)
            generated.append(0)
        if lost:
            monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "another"))
        run(tmp_path / out, texts, **options)
        assert same(tmp_path / out, tmp_path / "straight")
    whole, before, after, before_lost, after_lost = generated
    assert (before, after) == (whole, 0)
    assert (before_lost, after_lost) == (whole, whole)


def test_a_mixture_is_taken_up_where_it_was(tmp_path: Path, texts: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {letter} = " * 9}) + "\n" for letter in "abcdefghijk"))
    mixture = [{"source": str(texts), "weight": 2}, {"source": str(rows)}]
    run(tmp_path / "straight", texts, data__source=mixture)
    interrupted(tmp_path / "out", texts, 5, data__source=mixture)
    mixture[0]["weight"] = 3
    with pytest.raises(UsageError, match=r"data\.source: .*2\.0.* -> .*3\.0"):
        run(tmp_path / "out", texts, data__source=mixture)
    mixture[0]["weight"] = 2
    run(tmp_path / "out", texts, data__source=mixture)
    assert same(tmp_path / "out", tmp_path / "straight")


def test_a_curriculum_is_taken_up_where_it_was(tmp_path: Path, texts: Path) -> None:
    """In the stage of its step, not in the first one."""
    grown = {"train__curriculum": [1, 2]}
    run(tmp_path / "straight", texts, **grown)
    interrupted(tmp_path / "out", texts, 4, **grown)
    run(tmp_path / "out", texts, **grown)
    lengths = [len(record["accept"]["sampled"]) for record in curve(tmp_path / "out" / "metrics.jsonl")]
    assert lengths == [1, 1, 1, 2, 2, 2, 4, 4, 4]
    assert same(tmp_path / "out", tmp_path / "straight")


def test_mixed_lengths_are_taken_up_where_they_were(tmp_path: Path, texts: Path) -> None:
    mix = {"data__lengths": [8, 24, 16]}
    run(tmp_path / "straight", texts, **mix)
    interrupted(tmp_path / "out", texts, 5, **mix)
    with pytest.raises(UsageError, match=r"data\.lengths: .*8, 24, 16.* -> .*8, 24"):
        run(tmp_path / "out", texts, data__lengths=[8, 24])
    run(tmp_path / "out", texts, **mix)
    assert same(tmp_path / "out", tmp_path / "straight")
    plain = tmp_path / "plain"
    run(plain, texts)
    assert learned(plain) != learned(tmp_path / "straight")


def test_nothing_draws_from_a_global_generator(tmp_path: Path, texts: Path) -> None:
    """A checkpoint keeps the state of none."""

    def states() -> tuple[Any, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    run(tmp_path / "out", texts, train__steps=2)
    assert states() == before


# Killed


def killed(
    out: Path, texts: Path, function: str | None = None, call: int = 0, after: float | None = None, **options: Any
) -> int | None:
    """Exit code of a process that converts; it is killed by itself, or after some seconds, or ends."""
    process = PROCESSES.Process(target=child, args=(out, texts, function, call), kwargs=options)
    process.start()
    process.join(after if after is not None else 60)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode


# Six files in a checkpoint, the manifest last; the first save of the run is at step 2, the second at step 4.
DEATHS = [("write_file", 1), ("write_file", 8), ("write_file", 12), ("write_file", 18)]
DEATHS += [("sync_folder", 1), ("sync_folder", 4)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
@pytest.mark.parametrize(("function", "call"), DEATHS, ids=str)
def test_killed_while_a_checkpoint_is_written(
    tmp_path: Path, texts: Path, straight: Path, function: str, call: int
) -> None:
    out = tmp_path / "out"
    assert killed(out, texts, function, call) == -signal.SIGKILL
    assert killed(out, texts) == 0
    assert same(out, straight)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_a_hybrid_is_killed_and_gone_on_with(tmp_path: Path, texts: Path) -> None:
    hybrid = {"base": "qwen3_5", "adapter__targets": ["q", "o"], "train__steps": 4}
    run(tmp_path / "straight", texts, **hybrid)
    assert killed(tmp_path / "out", texts, "write_file", 8, **hybrid) == -signal.SIGKILL
    assert steps(tmp_path / "out") == [2]
    assert killed(tmp_path / "out", texts, **hybrid) == 0
    assert same(tmp_path / "out", tmp_path / "straight")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")
def test_killed_at_random_moments(tmp_path: Path, texts: Path, straight: Path) -> None:
    """`python -m benchmarks.interrupted` kills the command ten times."""
    out, clock = tmp_path / "out", random.Random(0)
    begin = time.perf_counter()
    assert killed(tmp_path / "whole", texts) == 0
    whole = time.perf_counter() - begin
    for _ in range(3):
        killed(out, texts, after=clock.uniform(0.3, 0.9) * whole)
    assert killed(out, texts) == 0
    assert same(out, straight)
