"""Checks that run the engine: the gate, greedy and sampled equality in fp32, the audit in the run type.

Each returns a `Verdict`; one that cannot be had for lack of memory raises ResourceError.  Not here: weights
(`weights.py`), the auditor's own loop (`audit.py`), `ar`'s distribution (`distribution.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.eval.audit import (
    CLASSES,
    Sampling,
    audit_run,
    class_differences,
    first_difference,
)
from retrofit.eval.subject import Subject
from retrofit.runtime.cache import KVCache
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import noise_token

Prompts = Sequence[Sequence[int]]
BATCH = 8
EXCUSED_MARGIN = 1e-5
"""fp64 logits closer than this: fp32 cannot tell the two tokens apart."""
SAMPLINGS = (Sampling(0.8), Sampling(0.8, top_k=50, top_p=0.95, repetition_penalty=1.2))
AUDITED = (Sampling(), Sampling(0.8, top_k=50, repetition_penalty=0.6))
"""A penalty below 1 favours what the path holds, so a row that forgot its own drafts shows soon."""
LISTED = 16


class Verdict(NamedTuple):
    """ok, one line for people, everything for machines."""

    ok: bool
    detail: str
    details: dict[str, Any]


def strategies(engine: Engine, prepare: str | int) -> list[dict[str, Any]]:
    """Every strategy once, in different batch sizes; `prepare` is for `fused`."""
    two = [{"strategy": "two_forward", "batch_size": BATCH}, {"strategy": "auto", "batch_size": 4}]
    if not engine.layout.anchored:
        return two
    return [{"strategy": "fused", "prepare": prepare, "batch_size": 5}, *two]


@contextmanager
def nan_adapter(engine: Engine) -> Iterator[None]:
    """Adapter and heads as NaN, and back again, bit for bit."""
    parameters = engine.attached.parameters() + list(engine.attached.heads.buffers())
    saved = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(float("nan"))
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)


@torch.inference_mode()
def gate(subject: Subject, prompts: Prompts) -> Verdict:
    """Base rows of mixed forwards with the trained adapter and with NaN in its place: bitwise the same."""
    engine = subject.run
    rows = changed = forwards = 0
    for start in range(0, len(prompts), 4):
        group = prompts[start : start + 4]
        trained = _mixed(engine, group)
        with nan_adapter(engine):
            broken = _mixed(engine, group)
        for (logits, hidden), (other_logits, other_hidden) in zip(trained, broken, strict=True):
            same = _same_bits(logits, other_logits) & _same_bits(hidden, other_hidden)
            rows, changed, forwards = rows + len(same), changed + int((~same).sum()), forwards + 1
    details = {"forwards": forwards, "base_rows": rows, "changed": changed}
    return Verdict(rows > 0 and not changed, f"{rows - changed} of {rows} base rows unchanged", details)


def _mixed(engine: Engine, prompts: Prompts) -> list[tuple[Tensor, Tensor]]:
    """(logits, hidden) of base rows in forwards that hold blocks too: prompt tails verified, a block on each.

    The last forward runs on the K/V that the first left, so a draft row that reached the cache shows as well.
    """
    layout, vocab = engine.layout, engine.backend.head.vocab
    cache = KVCache(len(prompts), max(map(len, prompts)) + layout.block)
    out = []
    for step, tail in enumerate((min(5, min(map(len, prompts))), 1)):
        plan = []
        for slot, prompt in enumerate(prompts):
            known = len(prompt) - tail
            if step == 0 and known:
                head = SequenceRows(slot, 0, list(prompt[:known]), last_logits_only=True)
                engine.backend.forward(engine.backend.plan([head]), cache)
            starts = range(known + 1, min(len(prompt), engine.limits.context - layout.block) + 1)
            blocks = [Block(at, _inputs(engine, at, vocab)) for at in starts]
            plan.append(SequenceRows(slot, known, list(prompt[known:]), blocks))
        got = engine.backend.forward(engine.backend.plan(plan), cache)
        out.append((got.base_logits, got.base_hidden))
    return out


def _same_bits(a_RN: Tensor, b_RN: Tensor) -> Tensor:
    """[R] rows that are bitwise equal and hold no NaN."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a_RN.element_size()]
    return (a_RN.view(bits) == b_RN.view(bits)).all(-1) & ~a_RN.isnan().any(-1)


def _inputs(engine: Engine, start: int, vocab: int) -> list[int]:
    rows = range(engine.layout.block)
    return [noise_token(0, start + i, vocab) if engine.layout.input == "noise" else MASK for i in rows]


def greedy(subject: Subject, prompts: Prompts, limit: int) -> Verdict:
    """`self_spec` in fp32 against transformers `generate` of a separate, clean copy of the base."""
    engine = subject.fp32()
    want = [_reference(subject.base(torch.float32), prompt, limit) for prompt in prompts]
    differences: list[dict[str, Any]] = []
    compared = 0
    for options in strategies(engine, "all"):
        results = engine.generate(
            prompts, "self_spec", max_new_tokens=limit, ignore_eos=True, temperature=0.0, **options
        )
        for number, (text, result) in enumerate(zip(want, results, strict=True)):
            at = first_difference(text, result.tokens)
            compared += 1
            if at is not None:
                differences.append(
                    {
                        **options,
                        "prompt": number,
                        "token": at,
                        "expected": text[at:],
                        "got": result.tokens[at:],
                    }
                )
    excused = 0
    for difference in differences:
        number, at = difference["prompt"], difference["token"]
        pair = [*difference.pop("expected")[:1], *difference.pop("got")[:1]]
        difference["tokens"] = pair
        prefix = [*prompts[number], *want[number][:at]]
        margin = _margin(subject.base(torch.float64), prefix, pair) if len(pair) == 2 else float("inf")
        difference["fp64_margin"] = margin
        difference["excused"] = margin < EXCUSED_MARGIN
        excused += difference["excused"]
    bad = len(differences) - excused
    detail = f"{compared - len(differences)} of {compared} texts identical to transformers"
    if excused:
        detail += f", {excused} leave it at an fp64 margin below {EXCUSED_MARGIN:g}"
    if bad:
        detail += f", {bad} differ"
    details = {
        "texts": compared,
        "tokens": compared * limit,
        "excused": excused,
        "differences": differences[:LISTED],
    }
    return Verdict(compared > 0 and not bad, detail, details)


@torch.inference_mode()
def _reference(model: PreTrainedModel, prompt: Sequence[int], limit: int) -> list[int]:
    ids = torch.tensor([list(prompt)], device=model.device)
    # The padding id must be given, but pads nothing: one prompt at a time, and the mask is explicit.
    neutral = GenerationConfig(max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=neutral)
    return [int(token) for token in out[0, ids.shape[1] :]]


@torch.inference_mode()
def _margin(model: PreTrainedModel, prefix: Sequence[int], pair: Sequence[int]) -> float:
    """By how much the less likely of two tokens falls short of the likeliest after `prefix`."""
    ids = torch.tensor([list(prefix)], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, -1]
    return float(logits.max() - logits[list(pair)].min())


def sampled(subject: Subject, prompts: Prompts, limit: int) -> Verdict:
    """`self_spec` against `ar` in fp32 at equal seeds, without and with top-k, top-p and penalty."""
    engine = subject.fp32()
    differences: list[dict[str, Any]] = []
    compared = accepted = 0
    for sampling in SAMPLINGS:
        common = {"max_new_tokens": limit, "ignore_eos": True, "seed": 17, **sampling.options()}
        want = [r.tokens for r in engine.generate(prompts, "ar", batch_size=BATCH, **common)]
        for options in strategies(engine, "last"):
            results = engine.generate(prompts, "self_spec", **options, **common)
            for number, (text, result) in enumerate(zip(want, results, strict=True)):
                compared += 1
                accepted += sum(result.stats.accepted)
                at = first_difference(text, result.tokens)
                if at is not None:
                    differences.append({**options, "sampling": sampling.options(), "prompt": number, "token": at})
    details = {
        "texts": compared,
        "tokens": compared * limit,
        "accepted_drafts": accepted,
        "differences": differences[:LISTED],
    }
    detail = f"{compared - len(differences)} of {compared} texts identical to ar at equal seed"
    return Verdict(compared > 0 and not differences, detail, details)


def audit(subject: Subject, prompts: Prompts, limit: int) -> Verdict:
    """Targets recomputed from stored logits, then the texts against `ar`, in the type the engine runs in."""
    engine = subject.run
    problems: list[str] = []
    checked = 0
    texts: list[list[list[int]]] = []
    runs: list[dict[str, Any]] = [{"strategy": "two_forward", "batch_size": BATCH}]
    if engine.layout.anchored:
        runs.append({"strategy": "fused", "prepare": 2, "batch_size": 5})
    for sampling in AUDITED:
        for options in runs if sampling.temperature == 0 else runs[-1:]:
            auditor, emitted = audit_run(engine, prompts, limit, sampling, **options)
            problems += [f"{options['strategy']}: {problem}" for problem in auditor.problems]
            checked += auditor.checked
            if sampling.temperature == 0:
                texts.append(emitted)
    common: dict[str, Any] = {"max_new_tokens": limit, "ignore_eos": True}
    want = [r.tokens for r in engine.generate(prompts, "ar", batch_size=BATCH, **common)]
    again = [r.tokens for r in engine.generate(prompts, "ar", batch_size=2, **common)]
    wider = torch.float64 if subject.dtype == torch.float32 else torch.float32

    def model() -> PreTrainedModel:
        return subject.base(wider)

    control = class_differences(model, prompts, want, again, subject.dtype)
    free = [class_differences(model, prompts, want, text, subject.dtype) for text in texts]
    counts = {name: sum(run[name] for run in free) for name in CLASSES}
    firsts = [first for run in free for first in run["first_differences"]]
    details = {
        "targets_recomputed": checked,
        "problems": len(problems),
        "first_problems": problems[:LISTED],
        "free_run": {**counts, "first_differences": firsts[:LISTED]},
        "ar_against_ar": {**control, "first_differences": control["first_differences"][:LISTED]},
    }
    detail = f"{checked} targets recomputed, {len(problems)} problems; against ar " + ", ".join(
        f"{name} {counts[name]}" for name in CLASSES
    )
    return Verdict(checked > 0 and not problems and not counts["bug"], detail, details)
