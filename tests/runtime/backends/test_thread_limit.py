"""A small step runs on one thread, and the number of threads is as before once it is over, whatever happened."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from decoding import random_prompts, randomise
from tiny_models import build

from retrofit import machine
from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.backends import threads
from retrofit.runtime.backends.threads import LEAST_WORK, most_threads, thread_limit
from retrofit.runtime.engine import Engine

CPU, SMALL = torch.device("cpu"), LEAST_WORK / 2


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "physical_cores", lambda: 2)
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


# No more threads than cores


@pytest.mark.parametrize(("asked", "inside"), [(None, 2), ("8", 4)])
def test_a_step_has_no_more_threads_than_cores(asked: str | None, inside: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores of two hardware threads each; those count for who asked for them in the environment."""
    monkeypatch.setattr(threads, "cores", lambda: 4)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    torch.set_num_threads(8)
    assert most_threads() == inside
    with thread_limit(CPU):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 8
    torch.set_num_threads(1)
    assert most_threads() == 1


def test_hardware_threads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_siblings", lambda number: f"{number % 3},{number % 3 + 3}")
    monkeypatch.setattr(machine, "_quota", lambda *_: 100.0)
    machine._physical_cores.cache_clear()
    assert machine._physical_cores(frozenset({0, 1, 3, 4})) == 2
    monkeypatch.setattr(machine, "_quota", lambda *_: 1.5)
    machine._physical_cores.cache_clear()
    assert machine._physical_cores(frozenset({0, 1, 2})) == 1
    machine._physical_cores.cache_clear()


@pytest.mark.parametrize(
    ("files", "own", "allowed"),
    [
        ({"a/b/cpu.max": "max 100000"}, "0::/a/b\n", 64),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, "3:cpuset:/\n0::/a/b\n", 2.5),
        ({"cpu.max": "150000 50000"}, "0::/\n", 3),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/docker/x\n", 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/\n", 64),
        ({}, None, 64),
    ],
)
def test_the_quota_of_a_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], own: str | None, allowed: float
) -> None:
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 64)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    if own is not None:
        (tmp_path / "own").write_text(own)
    assert machine._quota(tmp_path / "groups", tmp_path / "own") == allowed


# Several engines


def run_all(*targets: Callable[[], object]) -> None:
    running = [threading.Thread(target=target) for target in targets]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(60)
    assert not any(thread.is_alive() for thread in running)


def test_two_engines_in_two_threads_say_what_each_says_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step with two threads, and no more though torch has three."""
    monkeypatch.setattr(threads, "LEAST_WORK", 0.0)
    torch.set_num_threads(3)
    engines = [randomise(Engine.from_model(build(name), layout=DraftLayout(block=3))) for name in ("llama", "qwen3")]
    ways = ("ar", "self_spec")

    def call(engine: Engine, mode: str) -> list[list[int]]:
        prompts = random_prompts((12, 7))
        return [r.tokens for r in engine.generate(prompts, mode, max_new_tokens=8, ignore_eos=True)]

    want = {(n, mode): call(engine, mode) for n, engine in enumerate(engines) for mode in ways}
    got = {}

    def decode(n: int, mode: str) -> None:
        got[n, mode] = call(engines[n], mode)

    run_all(*[lambda n=n, mode=mode: decode(n, mode) for n in (0, 1) for mode in ways])
    assert got == want
