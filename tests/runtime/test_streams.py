"""Streams: events at every step, and asynchronous ones that are given up in the middle."""

import asyncio
import gc
import threading
from typing import Any

import pytest
from decoding import random_prompts
from optioned import engine
from tiny_models import CONTEXT

from retrofit import UsageError
from retrofit.runtime.results import Result

PROMPTS = random_prompts((3, 6, 4), seed=8)
HOT = {"temperature": 1.2, "top_k": 30, "max_new_tokens": 8}


def tokens(results: list[Result]) -> list[list[int]]:
    return [r.tokens for r in results]


def test_a_stream_without_text_tells_every_step() -> None:
    events = list(engine().stream(PROMPTS[:1], mode="ar", max_new_tokens=5, ignore_eos=True, with_text=False))
    assert [len(e.tokens) for e in events] == [1] * 5
    assert [e.text for e in events] == [""] * 5
    assert [e.result is not None for e in events] == [False] * 4 + [True]


def test_async_streams_beside_each_other() -> None:
    want = engine().generate(PROMPTS, **HOT)

    async def read(n: int) -> tuple[list[int], str]:
        found: list[int] = []
        text = ""
        async for event in engine().astream([PROMPTS[n]], **HOT, seed=n):
            found += event.tokens
            text += event.text
        return found, text

    async def both() -> list[tuple[list[int], str]]:
        return await asyncio.gather(*map(read, range(3)))

    assert asyncio.run(both()) == [(r.tokens, r.text) for r in want]


@pytest.mark.parametrize("how", ["closed", "cancelled"])
def test_an_async_stream_that_is_given_up_gives_its_cache_back(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.runtime.backends.hf.cache import KVCache

    released: list[KVCache] = []
    monkeypatch.setattr(KVCache, "release", lambda self: released.append(self))

    async def read(began: asyncio.Event) -> None:
        events = engine().astream(PROMPTS[:1], max_new_tokens=CONTEXT, ignore_eos=True, mode="ar")
        async for _ in events:
            began.set()
            if how == "closed":
                break
        await events.aclose()

    async def main() -> None:
        began = asyncio.Event()
        task = asyncio.create_task(read(began))
        await began.wait()
        if how == "cancelled":
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert len(released) == 1


def test_a_step_that_fails_while_it_is_cancelled_leaves_no_complaint(monkeypatch: pytest.MonkeyPatch) -> None:
    complaints: list[Any] = []
    running, go = threading.Event(), threading.Event()

    def fail(*_: Any) -> Any:
        running.set()
        go.wait(10)
        raise RuntimeError("broken")

    monkeypatch.setattr(engine(), "_turn", fail)

    async def read() -> None:
        async for _ in engine().astream(PROMPTS[:1], max_new_tokens=3):
            pass

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, what: complaints.append(what))
        task = asyncio.create_task(read())
        await asyncio.to_thread(running.wait, 10)
        task.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(main())
    gc.collect()
    assert complaints == []


def test_wrong_options_of_an_async_stream_are_told_at_once() -> None:
    with pytest.raises(UsageError, match="top_k"):
        engine().astream(PROMPTS, top_k=0)


# What stands behind the names
