"""A real model from beginning to end: converted, decoded from, talked to, certified.  `make real` runs this alone.

Marked `real`: it takes minutes, needs the package that brings the model, and is left out unless asked for.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from retrofit.named_bases import PACKAGED

NAME = "smollm2-135m"
SHORT = [
    *("train.steps=20", "train.warmup=2", "train.batch_size=1", "train.anchors=4"),
    *("data.source=stdlib", "data.responses=keep", "data.max_length=64", "data.held_out=2"),
]


def told(*arguments: str, stdin: str | None = None) -> str:
    """stdout of a command that succeeds, in a process of its own; with `pytest -s` it is seen as it runs."""
    print("$ retrofit", *arguments, flush=True)
    command = [sys.executable, "-m", "retrofit", *arguments]
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, flush=True)
    assert done.returncode == 0
    return done.stdout


@pytest.mark.real
def test_a_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = PACKAGED[NAME]
    if known.place is None:
        pytest.skip(f"the package {known.distribution} is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RETROFIT_DEVICE", "cpu")
    out = str(tmp_path / "real-retrofit")
    told("convert", "--recipe", NAME, "-o", out, "--offline", *SHORT)
    prompt = "def read_lines(path):"
    speculated = told("generate", out, prompt, "--max-new-tokens", "24", "--strategy", "fused")
    assert speculated == told("generate", out, prompt, "--max-new-tokens", "24", "--mode", "ar")
    answer = told("chat", out, "--max-new-tokens", "24", stdin="What is the capital of France?\n")
    assert "Paris" in answer
    assert known.file in told("inspect", out)
    checks = told("certify", out)
    assert "base-weights" in checks and "failed" not in checks
