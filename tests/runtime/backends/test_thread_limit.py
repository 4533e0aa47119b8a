"""A small step runs on one thread, and the number of threads is as before once it is over, whatever happened."""

from collections.abc import Iterator

import pytest
import torch

from retrofit.runtime.backends import threads
from retrofit.runtime.backends.threads import LEAST_WORK, thread_limit

CPU, SMALL = torch.device("cpu"), LEAST_WORK / 2


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_one_thread_for_a_small_step_and_two_again_after_it() -> None:
    with thread_limit(CPU, SMALL):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


def test_two_threads_again_after_an_error() -> None:
    with pytest.raises(KeyboardInterrupt), thread_limit(CPU, SMALL):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 2


def test_one_inside_another_ends_with_what_the_outer_one_found() -> None:
    with thread_limit(CPU, SMALL):
        with thread_limit(CPU, SMALL):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(("device", "work"), [("cpu", LEAST_WORK), ("meta", SMALL)])
def test_large_steps_and_other_devices_keep_their_threads(device: str, work: float) -> None:
    with thread_limit(torch.device(device), work):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 2


def test_matrix_products_have_their_threads_again_too() -> None:
    """MKL counts apart, for each thread; 0 there is no count of its own."""
    _, mkl = threads._setters()
    if mkl is int:
        pytest.skip("no MKL in this torch")

    def own() -> int:
        count = mkl(0)
        mkl(count)
        return count

    before = own()
    with thread_limit(CPU, SMALL):
        assert own() == 1
    assert own() == before
    with pytest.raises(KeyboardInterrupt), thread_limit(CPU, SMALL):
        raise KeyboardInterrupt
    assert own() == before


@pytest.mark.parametrize(("alive", "inside"), [(1, 1), (2, 2)])
def test_without_a_count_for_each_thread_only_a_process_of_one_is_limited(
    alive: int, inside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_setters", lambda: (None, int))
    monkeypatch.setattr(threads.threading, "active_count", lambda: alive)
    with thread_limit(CPU, SMALL):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 2
