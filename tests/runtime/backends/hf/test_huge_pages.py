"""Memory on huge pages: what is in it stays, and where there are none nothing happens."""

import ctypes
import sys
from typing import Any

import pytest
import torch

from retrofit.runtime.backends.hf.linear import huge_pages
from retrofit.runtime.backends.hf.linear.huge_pages import PAGE, on_huge_pages


def span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps")
def test_what_lies_there_stays() -> None:
    tensor = torch.randn(3 * PAGE // 4)
    before = tensor.clone()
    on_huge_pages([span(tensor)])
    assert torch.equal(tensor, before)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps")
def test_only_whole_pages_that_a_span_touches_are_asked_for(monkeypatch: Any) -> None:
    tensor, asked = torch.zeros(16 * PAGE // 4), []
    monkeypatch.setattr(ctypes, "CDLL", lambda _: type("L", (), {"madvise": staticmethod(recorder(asked))})())
    first = -(-tensor.data_ptr() // PAGE) * PAGE + 4 * PAGE  # far from the ends of the memory
    made = on_huge_pages([(first + 5, first + 6), (first + 2 * PAGE, first + 3 * PAGE + 1)])
    addresses = sorted({address for address, _, _ in asked})
    assert addresses == [first, first + 2 * PAGE, first + 3 * PAGE] and made == 3
    assert all(length == PAGE for _, length, _ in asked)


def recorder(asked: list[Any]) -> Any:
    def madvise(address: int, length: int, advice: int) -> int:
        asked.append((address, length, advice))
        return 0

    return madvise


def test_other_systems_are_left_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    assert on_huge_pages([(0, 10 * PAGE)]) == 0
    monkeypatch.undo()
    assert on_huge_pages([]) == 0


def test_files_and_stacks_of_others_are_not_memory_of_ours() -> None:
    read = huge_pages._private
    assert read("7f00a0000000-7f00a0200000 rw-p 00000000 00:00 0 ") == (0x7F00A0000000, 0x7F00A0200000)
    assert read("7f00a0000000-7f00a0200000 rw-p 00000000 00:00 0    [heap]") is not None
    assert read("7f00a0000000-7f00a0200000 r--p 00000000 08:01 4711   /lib/libc.so.6") is None
    assert read("7f00a0000000-7f00a0200000 rw-s 00000000 00:05 0   /dev/shm/x") is None
