"""Whether what a server samples is of the target's distribution: Pearson's test over pairs of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch

from benchmarks.vllm.server import Server
from benchmarks.vllm.subjects import Subject

TEMPERATURE = 0.8
WORDS = 16
SAMPLES = 2000
COPIES = 50
SIGNIFICANT = 1e-4
LEAST = 10
"""Expected in each cell; rarer pairs are put together."""
Pairs = Mapping[tuple[int, int], float]


def target(subject: Subject) -> Pairs:
    """(second, third) token after the first prompt -> probability, the first summed over, among its likeliest WORDS."""
    from transformers import AutoModelForCausalLM

    net, prompt = AutoModelForCausalLM.from_pretrained(subject.base, dtype=torch.float32), subject.prompts[0]
    with torch.inference_mode():
        ids = net(torch.tensor([prompt])).logits[0, -1].topk(WORDS).indices.tolist()

        def after(rows: list[list[int]]) -> torch.Tensor:
            logits = net(torch.tensor(rows)).logits[:, -1, ids]
            return torch.softmax(logits / TEMPERATURE, -1).double()

        first = after([prompt])[0]
        second = after([[*prompt, a] for a in ids])
        third = after([[*prompt, a, b] for a in ids for b in ids]).view(WORDS, WORDS, WORDS)
        joint = torch.einsum("a,ab,abc->bc", first, second, third)
        joint = joint / joint.sum()
    return {(a, b): float(joint[i, j]) for i, a in enumerate(ids) for j, b in enumerate(ids)}


def sampled(server: Server, subject: Subject, wanted: Pairs) -> Counter[tuple[int, int]]:
    """How often each pair was sampled.  The first token of a sample comes of the prompt alone, without drafts."""
    body = {"allowed_token_ids": sorted({a for a, _ in wanted}), "ignore_eos": True}
    found: Counter[tuple[int, int]] = Counter()
    for _ in range(SAMPLES // COPIES):
        rows = server.one(subject.prompts[0], 3, temperature=TEMPERATURE, n=COPIES, extra_body=body)
        found.update((second, third) for _, second, third in rows)
    return found


def chance(counts: Mapping[tuple[int, int], int], wanted: Pairs) -> float:
    """The p-value: how likely samples of that distribution are to be as far from it."""
    from scipy.stats import chisquare

    total = sum(counts.values())
    expected = sorted((p * total, counts.get(pair, 0)) for pair, p in wanted.items())
    if total != sum(n for _, n in expected):
        raise ValueError("a token was sampled that was not to be")
    cells = [[0.0, 0.0]]
    for want, found in expected:
        cells[-1][0] += want
        cells[-1][1] += found
        if cells[-1][0] >= LEAST:
            cells.append([0.0, 0.0])
    want, found = cells.pop()
    cells[-1][0] += want
    cells[-1][1] += found
    return float(chisquare([found for _, found in cells], [want for want, _ in cells]).pvalue)
