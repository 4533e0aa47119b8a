"""`auto`: what it learns from a step, what it chooses for each request, when it times its plans."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import random_prompts, randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto import policy as module
from retrofit.runtime.auto.cost import CostModel, Template
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import Choice, Limits
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import Shape

BLOCK = DraftLayout(block=2)
MEASURED = {
    "conditional": {"greedy": [0.5, 0.25], "sampled": [0.25, 0.125]},
    "ranks": {"greedy": [[0.5, 0.2]] * 2, "sampled": [[0.25, 0.2]] * 2},
}
TREE = Shape((-1, 0, 0), (0, 0, 1), (1.0, 0.5, 0.2))


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
    monkeypatch: pytest.MonkeyPatch, template: Template, requests: list[Request], accepted: int, rows: int | None = None
) -> tuple[CostModel, list[Choice]]:
    """The costs after one step of seven seconds that accepts so many drafts of each request, and what it chose."""
    chosen: list[Choice] = []

    def step(run: Any, running: Sequence[Request], choices: Sequence[Choice]) -> None:
        chosen.extend(choices)
        for r, c in zip(running, choices, strict=True):
            r.stats.count(c.kind, 1 + c.verify + 2 * len(c.prepare))
            if c.verify:
                r.stats.accepted.append(accepted)
                r.stats.verified.append(c.verify)

    clock = iter((10.0, 17.0))
    monkeypatch.setattr(module, "speculative_step", step)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(CostModel, "best", lambda *_: template)
    policy = AutoPolicy(BLOCK, Limits(100), MEASURED)
    policy.learn(False, len(requests), lambda verified, prepared: 1.0, 90, None)
    run = SimpleNamespace(params=Processing(), rows_each=lambda count: rows, shape=None)
    policy.step(run, requests)  # type: ignore[arg-type]
    assert run.shape is template.shape
    return policy.costs[False], chosen


def test_a_step_teaches_its_rows_its_seconds_and_what_it_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """One request verifies two drafts, of which none is accepted; the other has none and only drafts."""
    costs, chosen = stepped(monkeypatch, Template("fused", 2, 3), [request([5, 6]), request()], 0)
    assert chosen == [Choice(2, (0, 1, 2)), Choice(0, (0,))]
    assert costs.real == {(True, 9 + 3): (1, 7.0)}
    assert costs.conditional() == pytest.approx([16 / 33, 8 / 32])
    assert costs.branched == [32, 32]


def test_a_step_that_only_verifies_is_timed_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    costs, chosen = stepped(monkeypatch, Template("two_forward", 2), [request([5, 6])], 1)
    assert chosen == [Choice(2)]
    assert costs.real == {(False, 3): (1, 7.0)}
    assert costs.conditional() == pytest.approx([17 / 33, 8 / 33])


def test_a_tree_teaches_how_much_of_it_came_true(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request([5, 6], shape=TREE), request()]
    costs, chosen = stepped(monkeypatch, Template("fused", 2, 3, TREE), requests, 1)
    assert chosen == [Choice(2, (0, 1, 2)), Choice(0, (0,))]
    assert costs.branched == pytest.approx([33, 32.7])
    assert costs.conditional() == [0.5, 0.25], "of chains nothing was learned"


@pytest.mark.parametrize(
    ("template", "state", "choice"),
    [
        (Template("ar"), {"drafts": [5, 6]}, Choice(0)),
        (Template("two_forward", 1), {"drafts": [5, 6]}, Choice(1)),
        (Template("two_forward", 2), {}, Choice(0, (0,))),
        # accept lengths 0, 1, 2 of the confidence: .9, .01, .09; of what was measured: .5, .375, .125
        (Template("fused", 2, 1), {"drafts": [5, 6], "confidence": [0.1, 0.9]}, Choice(2, (0,))),
        (Template("fused", 2, 2), {"drafts": [5, 6], "confidence": [0.1, 0.9]}, Choice(2, (0, 2))),
        (Template("fused", 2, 2), {"drafts": [5, 6]}, Choice(2, (0, 1))),
        (Template("fused", 1, 1), {"drafts": [5, 6], "confidence": [0.9, 0.1]}, Choice(1, (1,))),
        # drafts of a tree, though the plan has no tree any more: they are verified, and nothing hangs on them
        (Template("two_forward", 2), {"drafts": [5, 6], "shape": TREE}, Choice(2)),
        # two tokens are left: one draft can be used, and no block
        (Template("fused", 2, 3), {"drafts": [5, 6], "max_new_tokens": 4}, Choice(1)),
    ],
    ids=str,
)
def test_what_a_plan_is_for_one_request(
    template: Template, state: dict[str, Any], choice: Choice, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stepped(monkeypatch, template, [request(**state)], 0)[1] == [choice]


def test_a_choice_is_cut_to_the_rows_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stepped(monkeypatch, Template("fused", 2, 3), [request([5, 6])], 0, rows=6)[1] == [Choice(2, (0,))]


# Timing


def test_greedy_and_sampled_are_learned_apart() -> None:
    policy = AutoPolicy(BLOCK, Limits(100), MEASURED)
    for sampled in (False, True):
        policy.learn(sampled, 1, lambda verified, prepared: 1.0, 90, None)
    greedy, sampled = policy.costs[False], policy.costs[True]
    assert (greedy.acceptance, sampled.acceptance) == ([0.5, 0.25], [0.25, 0.125])
    # 96 rows hold 31 nodes with their blocks; the table has six
    assert [s.nodes for s in greedy.shapes] == [s.nodes for s in sampled.shapes] == [6, 6, 6]
    assert greedy.shapes[0].survival[1] == 0.5 and sampled.shapes[0].survival[1] == 0.25
    wide = {"ranks": {"greedy": [[0.4] * 8] * 8}}
    assert [s.nodes for s in AutoPolicy(DraftLayout(8), Limits(100), wide)._cost_model("greedy").shapes] == [2, 4, 9]
    assert AutoPolicy(DraftLayout(8, seed_row="draft"), Limits(100), wide)._cost_model("greedy").shapes == []
    assert AutoPolicy(BLOCK, Limits(100), {})._cost_model("greedy").acceptance == [0.0, 0.0]


def test_plans_are_timed_once_for_each_batch_size_and_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = randomise(Engine.from_model(build("llama"), layout=BLOCK))
    timed: list[tuple[float, int]] = []
    ran: list[tuple[int, int, float]] = []

    def calibrate(model: CostModel, batch: int, step: Callable[[int, int], float], room: int, rows: int | None) -> None:
        timed.append((model.acceptance[0], batch))
        ran.append((batch, room, step(2, 3)))

    monkeypatch.setattr(module, "calibrate", calibrate)
    engine.policy.acceptance = MEASURED
    prompts = random_prompts((5, 7, 6))
    for temperature in (0.0, 0.8, 0.0):
        for batch in (1, 3):
            engine.generate(prompts, strategy="auto", temperature=temperature, batch_size=batch, max_new_tokens=3)
    assert timed == [(0.5, 1), (0.5, 3), (0.25, 1), (0.25, 3)]
    assert all(seconds > 0 for *_, seconds in ran)
    assert {room for _, room, _ in ran} == {128 - 16}, "of the context, less the prompt of 16 that stands in for one"
