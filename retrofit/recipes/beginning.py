"""What a conversion that begins with an artifact drafts like before its first step, and on another base a better start.

A Markov head says what is expected behind a token, and that is the base's own: on another base, such as a fine-tune,
the one that an artifact brings is of the base before.  So where the base is another one, the head that this base's
pairs make is tried too, and what drafts better on held-out text is what training begins with.
Not here: reading an artifact (`origin.py`), the pairs (`training/clean/pairs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from retrofit.adapters.attach import Attached
from retrofit.hub import Base
from retrofit.recipes.origin import Origin, is_another_base
from retrofit.recipes.schema import Recipe
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.clean.pairs import TOKENS, begin_with_pairs
from retrofit.recipes.training.measure import held_out_acceptance, in_line
from retrofit.recipes.training.order import Order
from retrofit.runtime.backends.hf.backend import HFBackend


def looked(
    origin: Origin | None,
    plan: Recipe,
    base: Base,
    attached: Attached,
    backend: HFBackend,
    held_out: Sequence[Document],
    order: Order,
    say: Callable[[str], None],
) -> dict[str, Any] | None:
    """Acceptance before the first step, which is said; None without held-out text.  order: of the text to train on."""

    def measured() -> dict[str, Any] | None:
        return held_out_acceptance(backend, attached, list(held_out), plan.train.anchors, plan.train.seed).figures()

    found = measured()
    say(f"before the first step: {'not measured, there is no held-out text' if found is None else in_line(found)}")
    another = origin is not None and origin.artifact is not None and is_another_base(origin, plan, base)
    if found is None or not another or plan.adapter.markov_init != "base" or not plan.adapter.markov_rank:
        return found
    heads = list(attached.heads.markov_parameters())
    kept = [head.detach().clone() for head in heads]
    begin_with_pairs(attached.heads, backend, order.upcoming(TOKENS))
    anew = measured()
    if anew is not None and anew["tau"] > found["tau"]:
        say(f"with a Markov head of this base's own pairs, which is kept: {in_line(anew)}")
        return anew
    with torch.no_grad():
        for head, before in zip(heads, kept, strict=True):
            head.copy_(before)
    return found
