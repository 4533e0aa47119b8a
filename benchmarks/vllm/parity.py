"""The same requests to a server with drafts and to one without: the same token ids, and drafts accepted as here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.vllm.server import Server
from benchmarks.vllm.subjects import Subject

Answers = dict[str, list[Any]]
"""Set of requests -> what is answered, in the order of the requests."""
Counts = list[int]
"""[cycles, drafts accepted in slot 0 (the root), 1, ..]; of ours, which count no root, from slot 1 on."""
Own = list[tuple[list[int], Counts]]
"""Token ids and counts of each request here."""
BLOCK = 32
"""Tokens of a block of vLLM's cache here."""
CLOSE = 0.05
"""By how much counts of accepted drafts may differ from ours."""


def alone(server: Server, subject: Subject) -> tuple[Answers, list[Counts]]:
    """Requests one after the other, and of each how many drafts were accepted."""
    answers, counts, before = [], [], server.accepted()
    for prompt in subject.prompts:
        answers.append(server.one(prompt, subject.counted))
        after = server.accepted()
        counts.append([new - old for new, old in zip(after, before or [0] * len(after), strict=True)])
        before = after
    return {"alone": answers}, counts


def others(server: Server, subject: Subject) -> Answers:
    """All other sets of requests."""
    prompts, ids, tokens = subject.prompts, subject.text, subject.tokens
    long = [ids[200 * i : 200 * i + 270 + 3 * i] for i in range(8)]
    blocks = [ids[500 : 500 + BLOCK * n] for n in (1, 2, 4)]
    return {
        "8 at once": server.together(prompts, tokens=tokens),
        "24 at once, over a warm prefix cache, some put off": server.together(prompts * 3, tokens=tokens),
        "exact repeats": [server.one(prompt, tokens) for prompt in prompts for _ in range(2)],
        "over several chunks": server.together(long, tokens=tokens),
        "one token of a cached prompt": [server.one(prompt, tokens) for prompt in blocks for _ in range(3)],
        "one token": server.together(prompts, tokens=1),
        "to the end of the context": [server.one(ids[:480])],
        "stopped": server.together(prompts, tokens=tokens, stop=["\n", "e"]),
    }


def equal(drafted: Answers, without: Answers) -> dict[str, list[int]]:
    """Set -> [how many requests are answered the same, how many there are]."""
    pairs = {what: list(zip(drafted[what], own, strict=True)) for what, own in without.items()}
    return {what: [sum(a == b for a, b in some), len(some)] for what, some in pairs.items()}


def ours(subject: Subject, dtype: str) -> Own:
    """(token ids, [cycles, drafts accepted after the root in slot 1, 2, ..]) of each prompt by `two_forward`."""
    from retrofit import Engine

    with Engine.load(subject.artifact, dtype=dtype, offline=True) as engine:
        options: dict[str, Any] = {"max_new_tokens": subject.counted, "original_settings": False}
        results = engine.generate(subject.prompts, "self_spec", strategy="two_forward", **options)
    slots = engine.config["draft"]["block"]
    return [
        (list(one.tokens), [len(n := one.stats.accepted), *(sum(k > slot for k in n) for slot in range(slots))])
        for one in results
    ]


def summed(counts: Sequence[Counts]) -> Counts:
    return [sum(column) for column in zip(*counts, strict=True)]


def as_close(counts: Counts, own: Counts, requests: int) -> bool:
    """Whether vLLM's counts, [cycles, root, slot 1, ..], are within CLOSE of ours, [cycles, slot 1, ..].

    vLLM counts what it accepts after a request's end too, and our last step of a request may be a plain one: that is
    one cycle of a request, and half as many drafts.
    """
    cycles, root, *slots = counts
    pairs = [(cycles, own[0], requests), *((n, want, requests / 2) for n, want in zip(slots, own[1:], strict=True))]
    return root >= 0.99 * cycles and all(abs(n - want) <= max(CLOSE * want, ends) for n, want, ends in pairs)


def partings(
    drafted: Sequence[Any], without: Sequence[Any], prompts: Sequence[list[int]]
) -> list[tuple[list[int], int, int]]:
    """Where two answers to a prompt part: (all tokens before, the one without drafts, the one with)."""
    found = []
    for [one], [own], prompt in zip(drafted, without, prompts, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(one, own, strict=False)) if a != b), None)
        if at is not None:
            found.append(([*prompt, *own[:at]], own[at], one[at]))
    return found


def gap(server: Server, before: list[int], own: int, other: int) -> float | None:
    """By how much a token's logit is above another's after some tokens, as a server says; None: not among its best."""
    [choice] = server.choices(before, 1, logprobs=5, extra_body={"return_tokens_as_token_ids": True})
    said: Mapping[str, float] = choice.logprobs.top_logprobs[0]
    chances = [said.get(f"token_id:{token}") for token in (own, other)]
    return None if None in chances else chances[0] - chances[1]  # type: ignore[operator]
