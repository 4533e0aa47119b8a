"""`auto`: what it learns from a step, what it chooses for each request, when it times its plans."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto import cost
from retrofit.runtime.auto.cost import CostModel
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import steps as host_steps
from retrofit.runtime.plan import AR, Cycle, Limits, StepPlan, fused, two_forward
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
    monkeypatch.setattr(CostModel, "best", lambda *_: cycle)
    policy = AutoPolicy(BLOCK, MEASURED)
    backend = SimpleNamespace(device=torch.device("cpu"), work_per_row=1.0, most_rows=None)
    run: Any = SimpleNamespace(
        pieces=None,
        strategy="auto", cycle=None, backend=backend, sampled=False, layout=BLOCK, limits=Limits(100),
        rows_each=lambda count: rows,
    )  # fmt: skip
    host_steps.HostSteps(run, [], 1, policy).step(requests)
    return policy.costs[False], chosen


def test_a_step_teaches_its_rows_its_seconds_and_what_it_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request verifies two drafts, of which none is accepted; the other has none and only drafts."""
    costs, chosen = stepped(monkeypatch, fused(2), [request([5, 6]), request()], 0)
    assert chosen == [(2, (0, 1, 2)), (0, (0,))]
    assert costs.real == {(True, 9 + 3): (1, 7.0)}
    assert costs.conditional() == pytest.approx([16 / 33, 8 / 32])
    assert costs.branched == [32, 32]


def test_a_step_that_only_verifies_is_timed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, chosen = stepped(monkeypatch, two_forward(2), [request([5, 6])], 1)
    assert chosen == [(2, ())]
    assert costs.real == {(False, 3): (1, 7.0)}
    assert costs.conditional() == pytest.approx([17 / 33, 8 / 33])


def test_a_tree_teaches_how_much_of_it_came_true(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request([5, 6], tree=TREE), request()]
    costs, chosen = stepped(monkeypatch, fused(2, "all", TREE), requests, 1)
    assert chosen == [(2, (0, 1, 2)), (0, (0,))]
    assert costs.branched == pytest.approx([33, 32.7])
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


# Timing


def test_greedy_and_sampled_are_learned_apart() -> None:
    policy = AutoPolicy(BLOCK, MEASURED)
    greedy, sampled = policy.model(False), policy.model(True)
    policy.learn(True, 3, True, 2.0)
    assert (greedy.real, sampled.real) == ({}, {(True, 3): (1, 2.0)})
    assert (greedy.acceptance, sampled.acceptance) == ([0.5, 0.25], [0.25, 0.125])
    # 96 rows hold 31 nodes with their blocks; the table has six
    assert [t.nodes for t in greedy.trees] == [t.nodes for t in sampled.trees] == [6, 6, 6]
    assert greedy.trees[0].survival[1] == 0.5 and sampled.trees[0].survival[1] == 0.25
    wide = {"ranks": {"greedy": [[0.4] * 8] * 8}}
    assert [t.nodes for t in AutoPolicy(DraftLayout(8), wide).model(False).trees] == [2, 4, 9]
    assert AutoPolicy(DraftLayout(8, seed_row="draft"), wide).model(False).trees == []
    assert AutoPolicy(BLOCK, {}).model(False).acceptance == [0.0, 0.0]


def test_plans_are_timed_once_for_each_batch_size_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = randomise(Engine.from_model(build("llama"), layout=BLOCK))
    timed: list[tuple[float, int, int]] = []
    seconds: list[float] = []
    trials, learn = AutoPolicy.trials, AutoPolicy.learn

    def noted(policy: AutoPolicy, sampled: bool, batch: int, room: int, rows: int | None) -> list[StepPlan]:
        made = trials(policy, sampled, batch, room, rows)
        if made:
            timed.append((policy.model(sampled).acceptance[0], batch, room))
        return made

    def learned(
        policy: AutoPolicy, sampled: bool, rows: int, drafts: bool, took: float, *rest: Any, **how: Any
    ) -> None:
        if how.get("trial"):
            seconds.append(took)
        learn(policy, sampled, rows, drafts, took, *rest, **how)

    monkeypatch.setattr(cost, "REPEATS", 1)
    monkeypatch.setattr(AutoPolicy, "trials", noted)
    monkeypatch.setattr(AutoPolicy, "learn", learned)
    engine.policy.acceptance = MEASURED
    prompts = random_prompts((5, 7, 6))
    for temperature in (0.0, 0.8, 0.0):
        for batch in (1, 3):
            engine.generate(prompts, strategy="auto", temperature=temperature, batch_size=batch, max_new_tokens=3)
    assert [one[:2] for one in timed] == [(0.5, 1), (0.5, 3), (0.25, 1), (0.25, 3)]
    assert len(seconds) == 4 * len(engine.policy.model(False).trials(112)) and all(took > 0 for took in seconds)
    assert {room for *_, room in timed} == {128 - 16}, "of the context, less the prompt of 16 that stands in for one"
