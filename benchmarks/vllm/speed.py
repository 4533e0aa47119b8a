"""Tokens by second of two servers, one after the other in every round, so that what else a machine does hits both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.vllm.server import Server
from benchmarks.vllm.subjects import Subject

ROUNDS = 3
BATCHES = (1, 8)


def timed(servers: Mapping[str, Server], subject: Subject) -> dict[str, Any]:
    """Batch -> with drafts against without, tokens by second of processor time and of the clock, medians of ROUNDS.

    servers: by the names "drafts" and "plain".  Prompts are in the prefix cache.
    """
    return {str(batch): _of(servers, subject, batch) for batch in BATCHES}


def _of(servers: Mapping[str, Server], subject: Subject, batch: int) -> dict[str, Any]:
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
    prompts = subject.prompts[:batch] if batch > 1 else subject.prompts[:2]
    for server in servers.values():
        server.together(subject.prompts, tokens=1)
    for _ in range(ROUNDS):
        for name, server in servers.items():
            busy, begin = server.processor_seconds(), time.perf_counter()
            if batch > 1:
                answers = server.together(prompts, tokens=subject.tokens, extra_body={"ignore_eos": True})
            else:
                answers = [server.one(one, subject.tokens, extra_body={"ignore_eos": True}) for one in prompts]
            took = time.perf_counter() - begin
            tokens = sum(len(ids) for [ids] in answers)
            rates[name].append((tokens / (server.processor_seconds() - busy), tokens / took))
    ratios = [
        [drafts[i] / plain[i] for drafts, plain in zip(rates["drafts"], rates["plain"], strict=True)] for i in (0, 1)
    ]
    return {
        "processor": round(median(ratios[0]), 3),
        "clock": round(median(ratios[1]), 3),
        "ratios": {"processor": [round(x, 3) for x in ratios[0]], "clock": [round(x, 3) for x in ratios[1]]},
    }
