"""The check `bitwise`: in the type that runs, `self_spec` emits exactly `ar`'s tokens, at any strategy and batch.

A level of exactness above `off` promises that a row's bits do not depend on the rows beside it, so every text must be
`ar`'s, and `ar`'s own must not depend on the batch.  At `off` nothing is promised.  In fp32 that shows only where two
tokens are as good as equal (an fp64 margin excuses); in half precision texts part, and what is left to say is how many.
The base's own generation settings hold, as they do for users.  Beside it stands what transformers itself keeps of its
own text when it decodes in another batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from retrofit.errors import ResourceError
from retrofit.eval.exactness import (
    LISTED,
    PLAIN,
    SEED,
    Prompts,
    Verdict,
    differing,
    mark_excused,
    reference,
    references,
)
from retrofit.eval.replay import Sampling
from retrofit.eval.subject import Subject
from retrofit.runtime.backends.levels import HALF
from retrofit.runtime.engine import Engine
from retrofit.weight_files import dtype_name

BATCHES = (8, 3, 1)
SAMPLINGS = (Sampling(), Sampling(0.8))


def runs(engine: Engine, prompts: int, limit: int) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """(mode, options, how many of the prompts, tokens of each): `ar` and every strategy, at every batch size."""
    strategies: list[dict[str, Any]] = [{"strategy": s} for s in ("two_forward", "prompt_lookup", "auto")]
    if engine.layout.anchored:
        strategies += [{"strategy": "fused"}, {"strategy": "fused", "tree": 0, "prepare": "last"}]
        strategies += [{"strategy": "hybrid"}, {"strategy": "hybrid", "prepare": "none"}]
    ways = [("ar", {}), *(("self_spec", strategy) for strategy in strategies)]
    batches = max(1, prompts // BATCHES[0])
    for batch in BATCHES:
        # As many batches of each size: one request at a time takes as many forwards as many do together.
        count = min(prompts, max(batch, 2) * batches)
        tokens = limit if batch == BATCHES[0] else max(1, limit // 2)
        for mode, options in ways[batch == BATCHES[0] :]:
            yield mode, {**options, "batch_size": batch}, count, tokens


def bitwise(subject: Subject, prompts: Prompts, limit: int) -> Verdict:
    """Every text against `ar`'s at the largest batch, greedy and sampled, by token."""
    engine, level = subject.run, subject.run.backend.exact
    differences: list[dict[str, Any]] = []
    compared = bad = 0
    exact = level != "off"
    half = subject.dtype in HALF
    for sampling in SAMPLINGS:
        common: dict[str, Any] = {"ignore_eos": True, "seed": SEED, **sampling.options()}
        first = engine.generate(prompts, "ar", max_new_tokens=limit, batch_size=BATCHES[0], **common)
        want = [r.tokens for r in first]
        found: list[dict[str, Any]] = []
        for mode, options, count, tokens in runs(engine, len(prompts), limit):
            results = engine.generate(prompts[:count], mode, max_new_tokens=tokens, **options, **common)
            compared += count
            named = {"mode": mode, **options, "temperature": sampling.temperature}
            found += differing(named, [text[:tokens] for text in want[:count]], [r.tokens for r in results])
        bad += len(found) if exact or half else mark_excused(subject, prompts, want, found, sampling)
        differences += found
    equal = compared - len(differences)
    name = dtype_name(subject.dtype)
    details: dict[str, Any] = {
        "exact": level,
        "dtype": name,
        "texts": compared,
        "equal": equal,
        "differences": differences[:LISTED],
    }
    said = f"{equal} of {compared} texts equal ar's"
    if half:
        details["control"], text = _control(subject, prompts, limit)
        said += text
    if exact:
        return Verdict(compared > 0 and not differences, f"level {level}, {name}: {said}", details)
    if half:
        return Verdict(None, f"level off promises no bitwise equality in {name}: {said}", details)
    excused = len(differences) - bad
    if excused:
        said += f", {excused} leave them at an fp64 margin that fp32 cannot tell"
    return Verdict(compared > 0 and not bad, f"level off, {name}: {said}", details)


def _control(subject: Subject, prompts: Prompts, limit: int) -> tuple[dict[str, Any], str]:
    """What transformers keeps of its own greedy texts in another batch, and of `ar`'s: figures, not a verdict."""
    try:
        model = subject.base(subject.dtype)
    except ResourceError as error:
        return {"skipped": str(error)}, ""
    plain = subject.run.generate(prompts, "ar", max_new_tokens=limit, batch_size=BATCHES[0], **PLAIN)
    ar = [r.tokens for r in plain]
    alone = [reference(model, prompt, limit) for prompt in prompts]
    shortest = min(map(len, prompts))
    even = [list(prompt[-shortest:]) for prompt in prompts]  # a batch of equal lengths needs no padding
    batched = references(model, even, limit)
    one_by_one = alone if all(len(p) == shortest for p in prompts) else [reference(model, p, limit) for p in even]
    kept = sum(a == b for a, b in zip(one_by_one, batched, strict=True))
    own = sum(a == b for a, b in zip(ar, alone, strict=True))
    figures = {"texts": len(prompts), "transformers_in_another_batch": kept, "ar_equals_transformers": own}
    text = f" (transformers keeps {kept} of {len(prompts)} of its own from batch 1 to {len(prompts)}; ar equals {own})"
    return figures, text
