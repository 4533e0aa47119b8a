"""The examples do what they say, on an artifact of the embedded base that the first of them makes in seconds."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from certifying import small

from benchmarks.common import ROOT

FOLDER = ROOT / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))
QUICK = ["train.steps=2", "train.warmup=1", "train.batch_size=2", "train.anchors=8", "data.max_length=64"]
LINES = {
    "stream": ["0: ", "1: "],
    "live_model": [],
    "compare_modes": ["ar ", "two_forward ", "fused ", "prompt_lookup ", "hybrid ", "auto ", "diffusion "],
    "batch_of_seeds": ["3: ", "14: ", "15: ", "92: "],
    "certify": ["passed   artifact", "passed   gate"],
}
"""What each prints at the beginnings of lines."""


def run(name: str, *arguments: str) -> None:
    """An example as `python examples/NAME.py ARGUMENTS` runs it, in this process."""
    before, threads = sys.argv, torch.get_num_threads()
    sys.argv = [f"{name}.py", *arguments]
    try:
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    finally:
        sys.argv = before
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "artifact"
    run("convert_and_generate", str(folder), *QUICK, "data.held_out=4")
    return folder


def test_each_example_is_run():
    assert sorted(["convert_and_generate", *LINES]) == EXAMPLES


def test_the_first_writes_an_artifact(artifact):
    assert (artifact / "retrofit.json").is_file()


@pytest.mark.parametrize("name", LINES)
def test_example(artifact, name, capsys, monkeypatch, tmp_path):
    small(monkeypatch, only=("artifact", "base-weights", "gate"))
    monkeypatch.chdir(tmp_path)  # where they look for the artifact if none is named
    (tmp_path / "tiny-retrofit").symlink_to(artifact)
    run(name)
    lines = capsys.readouterr().out.splitlines()
    assert any(lines)
    assert [begin for begin in LINES[name] if not any(line.startswith(begin) for line in lines)] == []
    if name == "compare_modes":
        assert all(line.endswith("equal to ar") for line in lines[:6])
