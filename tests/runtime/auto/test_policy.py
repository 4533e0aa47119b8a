"""`auto`: what it learns from a step, what it chooses for each request, and what that may cost."""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto.cost import CostModel, Looked
from retrofit.runtime.auto.policy import AGAIN, BEGIN, FREE, RETHINK, TRY, AutoPolicy, Verified
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import steps as host_steps
from retrofit.runtime.plan import AR, Cycle, Limits, StepPlan, fused, lookup, two_forward
from retrofit.runtime.request import Request
from retrofit.runtime.rules.tree import DraftTree

BLOCK = DraftLayout(block=2)
MEASURED = {
    "conditional": {"greedy": [0.5, 0.25], "sampled": [0.25, 0.125]},
    "ranks": {"greedy": [[0.5, 0.2]] * 2, "sampled": [[0.25, 0.2]] * 2},
}
TREE = DraftTree((-1, 0, 0), (0, 0, 1), (1.0, 0.5, 0.2))


def request(drafts: Sequence[int] = (), **state: Any) -> Request:
    """In the middle of its decoding: 100 rows run, and of two drafts verified last time both accepted."""
    one = Request(0, [1] * 4, 0, 50, frozenset(), slot=0)
    one.emit([1, 1])
    one.drafts = list(drafts)
    one.stats.rows, one.stats.accepted, one.stats.verified = 100, [2], [2]
    for name, value in state.items():
        setattr(one, name, value)
    return one


def stepped(
    monkeypatch: pytest.MonkeyPatch, cycle: Cycle, requests: list[Request], accepted: int, rows: int | None = None
) -> tuple[CostModel, list[tuple[int, Any]]]:
    """The costs after one step of seven seconds that accepts so many drafts of each request; what each one verified
    and hung blocks on."""
    chosen: list[tuple[int, Any]] = []

    def step(run: Any, running: Sequence[Request], plans: Sequence[StepPlan]) -> None:
        chosen.extend((p.verify, p.hang) for p in plans)
        assert all(p.tree is cycle[-1].tree for p in plans)
        for r, p in zip(running, plans, strict=True):
            r.stats.count(p.kind, 1 + p.verify + 2 * len(p.hang))
            if p.verify:
                r.stats.accepted.append(accepted)
                r.stats.verified.append(p.verify)

    clock = iter((10.0, 17.0))
    monkeypatch.setattr(host_steps, "speculative_step", step)
    monkeypatch.setattr(host_steps, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(AutoPolicy, "choose", lambda *_: cycle)
    policy = AutoPolicy(BLOCK, MEASURED)
    backend = SimpleNamespace(device=torch.device("cpu"), work_per_row=1.0, most_rows=None, priced_by=lambda: None)
    run: Any = SimpleNamespace(
        pieces=None,
        strategy="auto", cycle=None, backend=backend, sampled=False, layout=BLOCK, limits=Limits(100),
        rows_each=lambda count: rows,
    )  # fmt: skip
    host_steps.HostSteps(run, policy).step(requests)
    return policy.costs[False], chosen


def learned(costs: CostModel) -> dict[tuple[bool, int], float]:
    """(drafts?, rows) -> seconds."""
    return {(drafts, rows): seconds for rows, drafts, seconds, _ in costs.times.figures()}


def test_a_step_teaches_its_rows_its_seconds_and_what_it_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request verifies two drafts, of which none is accepted; the other has none and only drafts."""
    costs, chosen = stepped(monkeypatch, fused(2), [request([5, 6]), request()], 0)
    assert chosen == [(2, (0, 1, 2)), (0, (0,))]
    assert learned(costs) == {(True, 9 + 3): 7.0}
    assert costs.conditional() == pytest.approx([8 / 17, 4 / 16])
    assert costs.branched == [16, 16]


def test_a_step_that_only_verifies_is_timed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, chosen = stepped(monkeypatch, two_forward(2), [request([5, 6])], 1)
    assert chosen == [(2, ())]
    assert learned(costs) == {(False, 3): 7.0}
    assert costs.conditional() == pytest.approx([9 / 17, 4 / 17])


def test_a_tree_teaches_how_much_of_it_came_true(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request([5, 6], tree=TREE), request()]
    costs, chosen = stepped(monkeypatch, fused(2, "all", TREE), requests, 1)
    assert chosen == [(2, (0, 1, 2)), (0, (0,))]
    assert costs.branched == pytest.approx([17, 16.7])
    assert costs.conditional() == [0.5, 0.25], "of chains nothing was learned"


@pytest.mark.parametrize(
    ("cycle", "state", "plan"),
    [
        (AR, {"drafts": [5, 6]}, (0, ())),
        (two_forward(1), {"drafts": [5, 6]}, (1, ())),
        (two_forward(2), {}, (0, (0,))),
        # accept lengths 0, 1, 2 of the confidence: .9, .01, .09; of what was measured: .5, .375, .125
        (fused(2, 1), {"drafts": [5, 6], "confidence": [0.1, 0.9]}, (2, (0,))),
        (fused(2, 2), {"drafts": [5, 6], "confidence": [0.1, 0.9]}, (2, (0, 2))),
        (fused(2, 2), {"drafts": [5, 6]}, (2, (0, 1))),
        (fused(1, 1), {"drafts": [5, 6], "confidence": [0.9, 0.1]}, (1, (1,))),
        # drafts of a tree, though the plan has no tree any more: they are verified, and nothing hangs on them
        (two_forward(2), {"drafts": [5, 6], "tree": TREE}, (2, ())),
        # two tokens are left: one draft can be used, and no block
        (fused(2), {"drafts": [5, 6], "max_new_tokens": 4}, (1, ())),
    ],
    ids=str,
)
def test_what_a_plan_is_for_one_request(
    cycle: Cycle, state: dict[str, Any], plan: tuple[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stepped(monkeypatch, cycle, [request(**state)], 0)[1] == [plan]


def test_a_plan_is_cut_to_the_rows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stepped(monkeypatch, fused(2), [request([5, 6])], 0, rows=6)[1] == [(2, (0,))]


def test_drafts_that_the_text_proposes_say_nothing_about_the_drafter(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 1 1 stood one place before, and another 1 followed."""
    costs, chosen = stepped(monkeypatch, lookup(BLOCK), [request([5, 6])], 1)
    assert chosen == [(1, ())]
    assert learned(costs) == {(False, 2): 7.0} and costs.conditional() == [0.5, 0.25]


# What is chosen, and for how long.  A machine whose steps take what is said here; a second is a step of `ar`.

COSTS = {AR: 1.0, fused(2): 2.0, two_forward(2): 1.5, lookup(BLOCK): 1.2}


def decode(
    policy: AutoPolicy,
    steps: int,
    truth: float,
    costs: dict[Cycle, float] = COSTS,
    looked: Looked | None = None,
    place: tuple[int, int] = (1, 100),
) -> tuple[list[Cycle], float]:
    """Run steps of a drafter whose drafts are accepted with a chance of `truth` each: cycles, and seconds too many."""
    batch, context = place
    drawn, chosen, seconds, tokens = random.Random(0), [], 0.0, 0
    for _ in range(steps):
        cycle = policy.choose(False, batch, None, context, looked)
        chosen.append(cycle)
        plan = cycle[-1]
        accepted = 0
        while accepted < plan.verify and drawn.random() < truth:
            accepted += 1
        took = costs.get(cycle, 2.0)
        rows = batch * (1 + plan.verify + plan.blocks * BLOCK.block)
        verified = [Verified(accepted, plan.verify)] * batch if plan.verify and plan.blocks else []
        emitted = batch * (1 + accepted)
        policy.learn(False, rows, plan.blocks > 0, took, verified, batch=batch, context=context, emitted=emitted)
        seconds, tokens = seconds + took, tokens + 1 + accepted
    return chosen, seconds - tokens * costs[AR]


def test_it_begins_with_ar() -> None:
    policy = AutoPolicy(BLOCK, {"conditional": {"greedy": [0.95, 0.95]}})
    chosen, lost = decode(policy, 500, 0.95)
    assert chosen[:BEGIN] == [AR] * BEGIN and 2 <= chosen[BEGIN : BEGIN + AGAIN].count(AR) <= 5
    assert lost < -200, "2.85 tokens in two seconds"
    assert AR in chosen[BEGIN + AGAIN :], "and times `ar` again, sooner at first"


@pytest.mark.parametrize("said", [0.0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("steps", [128, 1024, 5000])
def test_a_drafter_worth_nothing_costs_a_hundredth(said: float, steps: int) -> None:
    policy = AutoPolicy(BLOCK, {"conditional": {"greedy": [said, said]}})
    _, lost = decode(policy, steps, 0.05)
    assert lost <= 0.01 * steps + FREE + TRY


def test_where_drafting_costs_three_steps_too() -> None:
    policy = AutoPolicy(BLOCK, {"conditional": {"greedy": [0.99, 0.99]}})
    dear = {AR: 1.0, fused(2): 3.0, two_forward(2): 3.0, fused(1): 3.0, fused(2, 1): 3.0, fused(2, 2): 3.0}
    _, lost = decode(policy, 1024, 0.05, dear)
    assert lost <= 10 + FREE + TRY


def test_one_step_that_the_machine_stumbles_over_blocks_nothing() -> None:
    policy = AutoPolicy(BLOCK, {"conditional": {"greedy": [0.95, 0.95]}})
    decode(policy, 100, 0.95)
    policy.learn(False, 9, True, 500.0, batch=1, context=100, emitted=1)
    chosen, lost = decode(policy, 100, 0.95)
    assert chosen.count(AR) <= 2 and lost < 0


def test_a_price_that_has_changed_is_learnt() -> None:
    """Drafting gets cheap after it was too dear: tried again, it is taken."""
    policy = AutoPolicy(BLOCK, {"conditional": {"greedy": [0.9, 0.9]}})
    dear = dict.fromkeys(COSTS, 9.0) | {AR: 1.0}
    decode(policy, 200, 0.9, {cycle: dear.get(cycle, 9.0) for cycle in [AR, *policy.model(False).cycles()]})
    chosen, _ = decode(policy, 4000, 0.9)
    assert chosen[-50:].count(AR) < 5


def test_another_context_is_timed_by_ar_first() -> None:
    policy = AutoPolicy(BLOCK, {"conditional": {"greedy": [0.95, 0.95]}})
    decode(policy, 50, 0.95)
    chosen, _ = decode(policy, 20, 0.95, place=(1, 3000))
    assert chosen[0] == AR and AR not in chosen[1:]


def test_text_that_repeats_itself_is_looked_up_and_other_text_is_not() -> None:
    policy = AutoPolicy(BLOCK, {})
    chosen, _ = decode(policy, 100, 0.9, looked=Looked(2.5, 3))
    assert chosen[BEGIN:].count(lookup(BLOCK)) >= 90
    chosen, _ = decode(policy, 100, 0.0, looked=Looked(1.1, 3))
    assert lookup(BLOCK) not in chosen[RETHINK:]


def test_the_plan_is_thought_over_every_32_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, thought = AutoPolicy(BLOCK, {}), []
    monkeypatch.setattr(CostModel, "best", lambda *_: thought.append(1) or AR)
    decode(policy, BEGIN + 3 * RETHINK, 0.5)
    assert len(thought) == 3 and RETHINK == 32


def test_greedy_and_sampled_are_learned_apart() -> None:
    policy = AutoPolicy(BLOCK, MEASURED)
    greedy, sampled = policy.model(False), policy.model(True)
    policy.learn(True, 3, True, 2.0)
    assert (learned(greedy), learned(sampled)) == ({}, {(True, 3): 2.0})
    assert (greedy.acceptance, sampled.acceptance) == ([0.5, 0.25], [0.25, 0.125])
    # 96 rows hold 31 nodes with their blocks; the table has six
    assert [t.nodes for t in greedy.trees] == [t.nodes for t in sampled.trees] == [6, 6, 6]
    assert greedy.trees[0].survival[1] == 0.5 and sampled.trees[0].survival[1] == 0.25
    wide = {"ranks": {"greedy": [[0.4] * 8] * 8}}
    assert [t.nodes for t in AutoPolicy(DraftLayout(8), wide).model(False).trees] == [2, 4, 9]
    assert AutoPolicy(DraftLayout(8, seed_row="draft"), wide).model(False).trees == []
    assert AutoPolicy(BLOCK, {}).model(False).acceptance == [0.0, 0.0]


def test_nothing_runs_before_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = randomise(Engine.from_model(build("llama"), layout=BLOCK))
    engine.policy.acceptance = MEASURED
    forwards: list[int] = []
    forward = type(engine.backend).forward
    monkeypatch.setattr(
        type(engine.backend), "forward", lambda backend, *rest: forwards.append(1) or forward(backend, *rest)
    )
    stream = engine.stream(random_prompts((5, 7)), strategy="auto", max_new_tokens=8, batch_size=2)
    next(stream)
    assert len(forwards) <= 2, "the prompts"


def test_what_a_device_has_timed_is_not_timed_again() -> None:
    policy = AutoPolicy(BLOCK, {})
    assert StepPlan() in policy.trials(False, 1, 90, None)
    policy.timed.add((False, 1))
    assert policy.trials(False, 1, 90, None) == []
    assert policy.trials(True, 1, 90, None) and policy.trials(False, 2, 90, None)
