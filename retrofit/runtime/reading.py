"""What a reader of a call gets to see: events after each step, results at the end, in a thread or out of one.

Not here: decoding (`engine.py`), text (`text.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import suppress

from transformers import PreTrainedTokenizerBase

from retrofit.runtime.request import Request
from retrofit.runtime.results import Event, Result
from retrofit.runtime.text import Detokenizer


class Reader:
    """Events of the requests of one call."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, with_text: bool | None):
        """with_text: None: only the last event of each request."""
        self.detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
        self.with_text = with_text
        self.sent: dict[int, int] = {}
        """Request -> tokens told so far."""

    def event(self, request: Request) -> Event | None:
        """What is new about a request; None: nothing to tell."""
        sent = self.sent.get(request.index, 0)
        if not request.done and (self.with_text is None or request.output_index == sent):
            return None
        self.sent[request.index] = request.output_index
        result = self.result(request) if request.done else None
        text = ""
        if self.with_text and request.text is not None:
            text = request.text.take(None if result is None else result.text)
        return Event(request.prompt_index, request.tokens[len(request.prompt) + sent :], text, result, request.sample)

    def result(self, request: Request) -> Result:
        assert request.finish_reason is not None
        return Result(
            request.prompt_index,
            request.prompt,
            request.emitted,
            None if self.detokenizer is None else request.whole_text(self.detokenizer),
            request.finish_reason,
            request.stats,
            request.stop_reason,
            request.sample,
            None if request.top is None else request.logprobs,
            None if request.prompt_top is None else request.prompt_logprobs,
        )


async def in_thread(events: Generator[Event]) -> AsyncGenerator[Event]:
    """The same events; each is waited for in a worker thread.

    A step cannot be cut, so one that runs is waited for before the rest is given up.
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            step = loop.run_in_executor(None, next, events, None)
            try:
                event = await asyncio.shield(step)
            finally:
                while not step.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([step])
                step.exception()  # asked for, or asyncio complains of one that nobody saw after a cancellation
            if event is None:
                return
            yield event
    finally:
        events.close()
