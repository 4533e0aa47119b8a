"""`retrofit convert` under a launcher: one artifact, one voice, one exit."""

import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import accelerate  # noqa: F401  (imported before the processes are forked)
import pytest
from several_processes import (
    FSDP,
    rank,
    together,
)
from tiny_conversion import RECIPE, STEPS, curve, steps

from retrofit.cli import main as cli
from retrofit.launch import launched
from retrofit.recipes.training.checkpoint import folder_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX")


# Launched


def command(path: Path, texts: Path, model: Path, *arguments: str) -> list[str]:
    recipe = [f"{key}={json.dumps(value)}" for key, value in RECIPE.items()]
    given = ["convert", str(model), "-o", str(path), "--device", "cpu", "--offline", f"data.source={texts}"]
    return [*given, *recipe, *arguments]


def test_the_command_under_torchrun(tmp_path: Path, texts: Path, model: Path) -> None:
    """One artifact, printed once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "retrofit.cli.main"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, *command(tmp_path / "out", texts, model)],
        capture_output=True,
        text=True,
        env=variables,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'out'}\n"
    lines = done.stderr.splitlines()
    for line in ("base ", "wrote ", "measured on held-out text", "next: "):
        assert len([found for found in lines if found.startswith(line)]) == 1, done.stderr
    assert done.stderr.count(f"{STEPS} of {STEPS} steps") == 1
    assert len(curve(tmp_path / "out" / "metrics.jsonl")) == STEPS
    assert not folder_of(tmp_path / "out").exists()


def steps_of(out: Path) -> list[int]:
    return steps(out) if folder_of(out).exists() else []


def speaks_into(folder: Path, arguments: list[str]) -> None:
    """The command, its output in files."""
    out, err = ((folder / f"{rank()}-{name}").open("w") for name in ("out", "err"))
    with out, err, redirect_stdout(out), redirect_stderr(err):
        cli.main(arguments)


WRONG = [
    (["data.source=/nothing"], 2, "Error: data.source /nothing: no such file or folder"),
    (["train.stepz=3"], 2, "train.stepz: unknown key"),
    (["--no-such-option"], 2, "Error: No such option"),
    (["train.batch_size=1"], 2, "Error: train.batch_size is 1"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), WRONG, ids=lambda v: str(v)[:30])
def test_a_mistake_ends_all_processes_with_one_message(
    tmp_path: Path, texts: Path, model: Path, arguments: list[str], code: int, message: str
) -> None:
    ended = together(speaks_into, tmp_path, command(tmp_path / "out", texts, model, *arguments))
    assert [one.code for one in ended if one is not None] == [code, code]
    assert message in (tmp_path / "0-err").read_text()
    assert [(tmp_path / name).read_text() for name in ("0-out", "1-out", "1-err")] == ["", "", ""]


def test_no_launcher_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *FSDP):
        monkeypatch.delenv(name, raising=False)
    assert launched() is None
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert launched() is None
