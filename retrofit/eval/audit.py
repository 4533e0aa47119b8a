"""The check `audit`: every way of decoding that a user can choose, replayed by the auditor, in the type that runs.

    two_forward, fused (a tree where the artifact knows its candidates' chances, and a chain), auto, prompt lookup,
    hybrid; greedy, sampled, under a repetition penalty; and a ragged batch: prompts of different lengths and limits,
    more than run at once, so that slots are used again, ending at an EOS or at their limit

`auto` chooses by measured times, so what it would choose differs from run to run; here it takes every plan it knows.
Then texts against `ar`'s: where they part, rounding must explain it.  Not here: the rules (`replay.py`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from retrofit.eval.differences import CLASSES, class_differences, first_difference, token_at
from retrofit.eval.exactness import BATCH, LISTED, PLAIN, Prompts, Verdict
from retrofit.eval.recording import recording
from retrofit.eval.replay import Asked, Auditor, Sampling
from retrofit.eval.subject import Subject
from retrofit.runtime.auto.cost import Looked
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.engine import Engine, Result
from retrofit.runtime.plan import AR, Cycle, StepPlan, lookup

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GREEDY, SAMPLED = Sampling(), Sampling(0.8)
PENALTY = Sampling(0.8, top_k=50, repetition_penalty=3.0)
"""So strong that a row which forgot the drafts on its own path repeats one of them."""
RAGGED_BATCH = 3
CYCLE_STEPS = 3
"""Steps that a cycle of `auto` holds for: drafts of one plan are verified by the next of the same cycle."""


@dataclass(frozen=True)
class Way:
    """One audited generation."""

    name: str
    options: dict[str, Any]
    sampling: Sampling = GREEDY
    ragged: bool = False
    short: bool = False
    """Behind the last tokens of each prompt only: what a path adds to the tokens seen then matters."""
    compared: bool = False
    """Whether its texts are held against `ar`'s."""


def ways(engine: Engine) -> list[Way]:
    """What is audited of this engine; layouts without an anchor have no `fused`."""
    two = {"strategy": "two_forward", "batch_size": BATCH}
    auto = {"strategy": "auto", "batch_size": 4}
    fused = {"strategy": "fused", "batch_size": 5}
    hybrid = {"strategy": "hybrid", "batch_size": BATCH}
    made = [
        Way("two_forward", two, compared=True),
        Way("two_forward, penalty", two, PENALTY, short=True),
        Way("auto", auto, SAMPLED),
        Way("auto, penalty", auto, PENALTY, short=True),
        Way("prompt_lookup", {"strategy": "prompt_lookup", "batch_size": BATCH}, compared=True),
        Way("ragged", {**two, "batch_size": RAGGED_BATCH}, SAMPLED, ragged=True),
    ]
    if engine.layout.anchored:
        made += [
            Way("fused", fused, compared=True),
            Way("fused, chain", {**fused, "tree": 0}, SAMPLED),
            Way("fused, last", {**fused, "prepare": "last"}),
            Way("fused, prepare 2, penalty", {**fused, "prepare": 2}, PENALTY, short=True),
            Way("fused, ragged", {**fused, "batch_size": RAGGED_BATCH}, SAMPLED, ragged=True),
            Way("hybrid", hybrid, compared=True),
            Way("hybrid, in turn", {**hybrid, "prepare": "none"}, SAMPLED),
            Way("hybrid, ragged", {**hybrid, "batch_size": RAGGED_BATCH}, SAMPLED, ragged=True),
        ]
    return made


@dataclass
class Audited:
    """What one way's audit found.  texts: the emitted tokens of each prompt."""

    auditor: Auditor
    texts: list[list[int]]
    problems: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, int]:
        found = self.auditor
        return {
            "targets": found.checked,
            "verified": found.verified,
            "accepted": found.accepted,
            "branched": found.branched,
            "telling": found.telling,
            "problems": len(self.problems),
        }


def audit_run(
    engine: Engine,
    prompts: Prompts,
    limits: Sequence[int],
    sampling: Sampling,
    eos: frozenset[int] = frozenset(),
    **options: Any,
) -> Audited:
    """Generate, replay, compare.  eos: tokens that end a text; empty: none does."""
    seeds = [1000 + i for i in range(len(prompts))]
    layout, limited = engine.layout, engine.limits
    asked = Asked(
        prompts, seeds, limits, sampling, options["strategy"], eos, limited.context, limited.boundary,
        layout.block, layout.first_drafting_row, engine.backend.most_rows,
    )  # fmt: skip
    auditor = Auditor(asked, engine.backend.device)
    with recording(engine, auditor.replay):
        results = engine.generate(
            prompts,
            "self_spec",
            max_new_tokens=limits,
            seed=seeds,
            ignore_eos=not eos,
            original_settings=False,
            **sampling.options(),
            **options,
        )
    wanted = auditor.texts()
    # Wrong tokens first: they make the rows after them look wrong too.
    problems = _wrong_texts(results, wanted, eos) + auditor.problems
    return Audited(auditor, [result.tokens for result in results], problems)


def _wrong_texts(results: Sequence[Result], wanted: Sequence[Sequence[int]], eos: frozenset[int]) -> list[str]:
    """Emitted texts against the targets, and the reasons they ended for."""
    problems = []
    for number, (result, want) in enumerate(zip(results, wanted, strict=True)):
        at = first_difference(want, result.tokens)
        if at is not None:
            got, target = token_at(result.tokens, at), token_at(want, at)
            problems.append(f"prompt {number}, token {at}: emitted {got}, the target is {target} (token)")
        elif (result.finish_reason == "stop") != (result.tokens[-1] in eos):
            problems.append(f"prompt {number}: ended by {result.finish_reason}, at token {result.tokens[-1]} (end)")
    return problems


@contextmanager
def every_plan(engine: Engine) -> Iterator[None]:
    """Let `auto` change its cycle every few steps, through all that it could choose, and time nothing."""
    policies = [engine.policy, engine.device_policy]
    kept = [(policy.costs, policy.timed) for policy in policies]
    for policy in policies:
        policy.costs, policy.timed = {}, set()
        _vary_plans(policy)
    try:
        yield
    finally:
        for policy, (costs, timed) in zip(policies, kept, strict=True):
            del policy.choose, policy.trials
            policy.costs, policy.timed = costs, timed


def _vary_plans(policy: AutoPolicy) -> None:
    drawn, steps = random.Random(0), itertools.count()
    held = AR

    def choose(sampled: bool, batch: int, rows: int | None, context: int = 0, looked: Looked | None = None) -> Cycle:
        nonlocal held
        if next(steps) % CYCLE_STEPS == 0:
            model = policy.model(sampled)
            text = [] if looked is None else [lookup(policy.layout), *model.hybrids(rows)]
            held = drawn.choice([AR, *text, *model.cycles(rows)])
        return held

    def trials(sampled: bool, batch: int, room: int, rows: int | None) -> list[StepPlan]:
        return []

    policy.choose, policy.trials = choose, trials  # type: ignore[method-assign]


@contextmanager
def ended_by(engine: Engine, eos: frozenset[int]) -> Iterator[None]:
    """Let other tokens end a text."""
    own = engine.backend.eos
    engine.backend.eos = eos
    try:
        yield
    finally:
        engine.backend.eos = own


def ragged(prompts: Prompts, limit: int) -> tuple[list[list[int]], list[int]]:
    """(prompts of different lengths, from one token up; new tokens of each)."""
    cut = [list(prompt[-max(1, len(prompt) * (1 + 5 * i % 8) // 8) :]) for i, prompt in enumerate(prompts)]
    return cut, [max(1, limit - 3 * i % max(1, limit // 2)) for i in range(len(prompts))]


def common_token(engine: Engine, prompts: Prompts, limits: Sequence[int], sampling: Sampling) -> frozenset[int]:
    """A token that ends some of the texts early: the one that stands inside the most of them."""
    seeds = [1000 + i for i in range(len(prompts))]
    results = engine.generate(
        prompts, "ar", max_new_tokens=limits, seed=seeds, batch_size=BATCH, **PLAIN, **sampling.options()
    )
    inside: dict[int, int] = {}
    for result in results:
        for token in set(result.tokens[1:-1]) - set(result.tokens[:1]):
            inside[token] = inside.get(token, 0) + 1
    return frozenset([max(inside, key=lambda token: (inside[token], -token))]) if inside else frozenset()


def _audit_way(engine: Engine, way: Way, prompts: Prompts, limit: int) -> Audited:
    if way.ragged:
        cut, limits = ragged(prompts, limit)
        eos = common_token(engine, cut, limits, way.sampling)
        with ended_by(engine, eos):
            return audit_run(engine, cut, limits, way.sampling, eos, **way.options)
    if way.short:
        prompts = [prompt[-size:] for size in (1, 2) for prompt in prompts]
    limits = [limit] * len(prompts)
    if way.options["strategy"] != "auto":
        return audit_run(engine, prompts, limits, way.sampling, **way.options)
    with every_plan(engine):
        return audit_run(engine, prompts, limits, way.sampling, **way.options)


def audit(subject: Subject, prompts: Prompts, limit: int) -> Verdict:
    """Targets recomputed from stored logits, then the texts against `ar`, in the type the engine runs in."""
    engine = subject.run
    problems: list[str] = []
    texts: list[list[list[int]]] = []
    runs: dict[str, dict[str, int]] = {}
    for way in ways(engine):
        # What is compared with `ar` runs in full; the others show their rules in half of each text, and of the prompts
        # where these are not short.
        some = prompts if way.compared or way.short else prompts[::2]
        found = _audit_way(engine, way, some, limit if way.compared else max(1, limit // 2))
        problems += [f"{way.name}: {problem}" for problem in found.problems]
        runs[way.name] = found.figures()
        if way.compared:
            texts.append(found.texts)
    free, control = _differences_from_ar(subject, prompts, limit, texts)
    counts = {name: sum(run[name] for run in free) for name in CLASSES}
    checked = sum(run["targets"] for run in runs.values())
    firsts = [first for run in free for first in run["first_differences"]]
    details = {
        "targets_recomputed": checked,
        "runs": runs,
        "problems": len(problems),
        "first_problems": problems[:LISTED],
        "free_run": {**counts, "first_differences": firsts[:LISTED]},
        "ar_against_ar": {**control, "first_differences": control["first_differences"][:LISTED]},
    }
    detail = f"{checked} targets recomputed in {len(runs)} ways of decoding, {len(problems)} problems; against ar "
    detail += ", ".join(f"{name} {counts[name]}" for name in CLASSES)
    return Verdict(all(run["targets"] for run in runs.values()) and not problems and not counts["bug"], detail, details)


def _differences_from_ar(
    subject: Subject, prompts: Prompts, limit: int, texts: Sequence[Sequence[Sequence[int]]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Differences of texts from `ar`'s by class, and of `ar`'s from its own in another batch: the noise floor."""
    common: dict[str, Any] = {"max_new_tokens": limit, **PLAIN}
    want = [r.tokens for r in subject.run.generate(prompts, "ar", batch_size=BATCH, **common)]
    again = [r.tokens for r in subject.run.generate(prompts, "ar", batch_size=2, **common)]
    wider = torch.float64 if subject.dtype == torch.float32 else torch.float32

    def model() -> PreTrainedModel:
        return subject.base(wider)

    control = class_differences(model, prompts, want, again, subject.dtype)
    return [class_differences(model, prompts, want, text, subject.dtype) for text in texts], control
