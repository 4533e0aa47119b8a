"""Where two texts of one prompt part, and whether rounding can explain it: margins in units in the last place.

Not here: which texts are compared (`exactness.py`, `audit.py`, `bitwise.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from retrofit.eval.replay import Sampling, gumbel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIE_ULP, NEAR_ULP = 2, 8
CLASSES = ("match", "tie", "near", "bug")


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two texts differ, None when they are equal."""
    if list(a) == list(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def token_at(tokens: Sequence[int], at: int | None) -> int | None:
    """The token there, None beyond the end."""
    return tokens[at] if at is not None and at < len(tokens) else None


def ulp(size: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of `dtype` at magnitude `size`: eps * 2^floor(log2 size)."""
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(size, 2.0**-14))))


def classify(margin_ulp: float) -> str:
    """match: the token is the likeliest; tie, near: rounding can explain it; bug: it cannot."""
    if margin_ulp <= 0:
        return "match"
    if margin_ulp <= TIE_ULP:
        return "tie"
    return "near" if margin_ulp <= NEAR_ULP else "bug"


@torch.inference_mode()
def margins(model: PreTrainedModel, prompt: Sequence[int], text: Sequence[int], dtype: torch.dtype) -> list[float]:
    """By how many ulp of `dtype` each token of a text falls short of the likeliest, teacher-forced."""
    ids = torch.tensor([[*prompt, *text[:-1]]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0]
    rows = logits[len(prompt) - 1 :]
    chosen = rows.gather(1, torch.tensor(text, device=rows.device)[:, None])[:, 0]
    short = (rows.amax(dim=1) - chosen).tolist()
    sizes = rows.abs().amax(dim=1).tolist()
    return [s / ulp(size, dtype) for s, size in zip(short, sizes, strict=True)]


@torch.inference_mode()
def score_margin(
    model: PreTrainedModel,
    prompt: Sequence[int],
    text: Sequence[int],
    pair: Sequence[int],
    sampling: Sampling | None = None,
    seed: int = 0,
) -> float:
    """By how much the less likely of two next tokens falls short of the best after prompt and text.

    With `sampling` scores are what the choice is made by: processed, and with the noise of (seed, len(text)).
    """
    ids = torch.tensor([[*prompt, *text]], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
    scores = logits
    if sampling is not None:
        scores = sampling.processors()(ids, logits[None])[0]
        if sampling.temperature > 0:
            scores = scores + gumbel(seed, len(text), len(scores)).to(scores)
    return float(scores.max() - scores[list(pair)].min())


def class_differences(
    model: Callable[[], PreTrainedModel],
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Positions of `texts` by class, and every first difference from `expected` with its margin.

    model: gives the base in a wider type; called when a difference is there.  Before the first difference a
    position is a match by definition; after it prefixes differ and only margins can speak.
    """
    counts = dict.fromkeys(CLASSES, 0)
    firsts: list[dict[str, Any]] = []
    for number, (prompt, want, got) in enumerate(zip(prompts, expected, texts, strict=True)):
        at = first_difference(want, got)
        counts["match"] += len(got) if at is None else min(at, len(got))
        if at is None:
            continue
        if at == len(got) or at == len(want):
            counts["bug"] += 1
            firsts.append({"prompt": number, "token": at, "expected": token_at(want, at), "got": token_at(got, at)})
            continue
        short = margins(model(), prompt, got, dtype)
        # At the first difference both tokens are on trial: whichever of them is the less likely tells.
        gap = max(short[at], margins(model(), prompt, [*got[:at], want[at]], dtype)[at])
        for value in (gap, *short[at + 1 :]):
            counts[classify(value)] += 1
        firsts.append(
            {
                "prompt": number,
                "token": at,
                "expected": want[at],
                "got": got[at],
                "ulp": round(gap, 3),
                "class": classify(gap),
            }
        )
    return {**counts, "first_differences": firsts}
