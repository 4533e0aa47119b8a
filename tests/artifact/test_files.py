"""Files of gigabytes: the bytes, size and hash are right however they are written, and there is no second copy."""

import errno
import hashlib
import os
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from retrofit.artifact import files
from retrofit.artifact.files import check_file, check_parent, write_file
from retrofit.artifact.tensors import TYPES, pieces
from retrofit.errors import ResourceError
from retrofit.recipes.training.checkpoint import Checkpoints


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"of {name}": torch.randint(0, 2, (3, 5), generator=generator).to(kind) for kind, name in TYPES.items()}
    made |= {"a step": torch.tensor(3.0), "empty": torch.zeros(0, 4), "mine": torch.arange(12.0).view(3, 4).T}
    return made | {"a parameter": torch.nn.Parameter(torch.randn(7, generator=generator))}


@pytest.mark.parametrize("at_once", [4096, 1 << 24])
def test_tensors_are_read_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(files, "AT_ONCE", at_once)
    large = {"large": torch.arange(3000, dtype=torch.int64), **tensors()}
    entry = write_file(tmp_path / "a", pieces(large))
    data = (tmp_path / "a").read_bytes()
    assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    found = load_file(tmp_path / "a")
    assert found.keys() == large.keys()
    for name, tensor in large.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    whole = {name: tensor.detach().contiguous() for name, tensor in large.items()}
    assert len(data) == len(save(whole, {"format": "pt"}))


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 8192, 10_000])
@pytest.mark.parametrize("refused", ["nowhere", "when opened", "when written"])
def test_file_systems_without_uncached_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, refused: str
) -> None:
    monkeypatch.setattr(files, "AT_ONCE", 4096)
    right_fcntl, right_write, through_cache = files.fcntl.fcntl, os.write, []

    def control(handle: int, command: int, flags: int = 0) -> int:
        if refused == "when opened" and flags & files.DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return right_fcntl(handle, command, flags)

    def written(handle: int, part: memoryview) -> int:
        direct = right_fcntl(handle, files.fcntl.F_GETFL) & files.DIRECT
        if refused == "when written" and direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        through_cache.append(not direct)
        return right_write(handle, part[: 4096 if direct else 1000])  # less than asked for, as may happen

    monkeypatch.setattr(files.fcntl, "fcntl", control)
    monkeypatch.setattr(files.os, "write", written)
    data = os.urandom(length)
    for name, content in (("bytes", data), ("pieces", [memoryview(data[:100]), memoryview(data[100:])])):
        entry = write_file(tmp_path / name, content)
        assert (tmp_path / name).read_bytes() == data
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "size": length}
        with pytest.raises(FileExistsError):
            write_file(tmp_path / name, content)
    assert refused == "nowhere" or all(through_cache)


def test_a_checkpoint_is_written_without_a_second_copy(tmp_path: Path) -> None:
    state = {f"{number}": torch.zeros(1 << 20) for number in range(24)}
    size = sum(tensor.numel() * 4 for tensor in state.values())
    tracemalloc.start()
    try:
        Checkpoints(tmp_path).save(1, {"weights.safetensors": state, "state.json": b"{}"})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size / 4


@pytest.mark.parametrize("place", ["dangling/new", "dangling/a/b/new", "loop/new", "notes.txt/new"])
def test_a_place_where_nothing_can_be_made_is_refused_at_once(place: str, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "notes.txt").write_text("mine")
    for check in (check_parent, check_file):
        with pytest.raises(ResourceError, match=r"cannot be (made|written)") as refused:
            check(tmp_path / place)
        assert refused.value.hint == "choose another place with -o"
    assert {path.name for path in tmp_path.iterdir()} == {"dangling", "loop", "notes.txt"}


def test_folders_on_the_way_to_an_artifact_are_made_and_those_of_a_file_are_not(tmp_path: Path) -> None:
    check_file(tmp_path / "a" / "b" / "c.json")
    assert not (tmp_path / "a").exists()
    check_parent(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b").is_dir() and not (tmp_path / "a" / "b" / "c").exists()
