"""Memory that runs out ends a command with exit code 4, one line and what to do, and leaves nothing half-written."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from several_processes import run_folder
from tiny_conversion import RECIPE
from transformers import AutoModelForCausalLM

from retrofit.cli import main as cli
from retrofit.errors import ResourceError, out_of_memory
from retrofit.hub import load_base, load_tokenizer
from retrofit.runtime.backends.hf.backend import HFBackend

ABSURD = 1 << 52
"""Bytes, more than any machine can address."""


def exhausted(*arguments: Any, **options: Any) -> Any:
    return torch.empty(ABSURD, dtype=torch.uint8)


def python_exhausted(*arguments: Any, **options: Any) -> Any:
    return bytearray(ABSURD)


def command(*arguments: Any) -> Any:
    return CliRunner(env={"RETROFIT_DEVICE": "cpu"}).invoke(cli.main, [str(one) for one in arguments])


@pytest.fixture(scope="module")
def made(model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that `convert` wrote."""
    out = tmp_path_factory.mktemp("made") / "artifact"
    run_folder(out, model, texts, train__steps=1, train__warmup=0)
    return out


PLACES = [(AutoModelForCausalLM, "from_pretrained"), (HFBackend, "run_trunk")]


@pytest.mark.parametrize("allocate", [exhausted, python_exhausted], ids=["torch", "python"])
@pytest.mark.parametrize(("place", "method"), PLACES, ids=["load", "forward"])
@pytest.mark.parametrize("name", ["convert", "generate", "certify"])
def test_commands(
    name: str,
    place: Any,
    method: str,
    allocate: Any,
    made: Path,
    model: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = [f"{key}={','.join(v) if isinstance(v, list) else v}" for key, v in RECIPE.items() if "targets" not in key]
    lines = {
        "convert": [model, "--recipe", "tiny", *recipe, f"data.source={texts}", "-o", tmp_path / "out"],
        "generate": [made, "abc"],
        "certify": [made],
    }
    monkeypatch.setattr(place, method, allocate)
    done = command(name, *lines[name], "--offline", "-q")
    assert done.exit_code == 4, done.output
    first, hint = done.stderr.strip().splitlines()
    assert "memory" in first and first.startswith("Error: ")
    assert hint == "hint: lower the batch size, use --dtype bfloat16, or a larger machine"
    assert done.stdout == "" and list(tmp_path.iterdir()) == []
    assert not (made / "certificate.json").exists()


def test_loading(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", exhausted)
    for call in (lambda: load_base(str(model), need_tokenizer=False), lambda: load_tokenizer(str(model))):
        with pytest.raises(ResourceError, match="out of memory"):
            call()
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(ResourceError, match=f"{model} does not fit into the memory of cpu") as caught:
        load_base(str(model))
    assert "larger GPU" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("error", "place"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "GPU memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "GPU memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "GPU memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), "memory"),
        (MemoryError(), "memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
    ],
    ids=str,
)
def test_what_means_that_memory_ran_out(error: Exception, place: str | None) -> None:
    found = out_of_memory(error)
    assert (None if found is None else str(found)) == (None if place is None else f"out of {place}")
