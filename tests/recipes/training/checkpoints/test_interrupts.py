"""Signals: a checkpoint is left, handlers are given back, a second signal waits for nothing."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tiny_conversion import (
    RECIPE,
    STEPS,
    at_step,
    curve,
    failing_in_step_6,
    interrupted,
    learned,
    run,
    tokenizer,
    whole,
)
from tiny_models import build

from retrofit.artifact import files
from retrofit.cli import main as cli
from retrofit.recipes.training import checkpoint, interrupts
from retrofit.recipes.training.checkpoint import folder_of


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
