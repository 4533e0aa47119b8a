"""The cost model behind `auto` against numbers worked out by hand."""

from itertools import count

import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto import cost
from retrofit.runtime.auto.cost import CostModel
from retrofit.runtime.auto.policy import RETHINK, AutoPolicy
from retrofit.runtime.plan import AR, Cycle, StepPlan, fused, num_rows, two_forward
from retrofit.runtime.rules.tree import DraftTree

BLOCK = DraftLayout(block=2)  # a block is two rows and drafts two tokens
PLAIN = {1: 10.0, 2: 12.0, 3: 16.0, 5: 20.0}
"""Rows -> seconds of a step that does not draft."""
DRAFTING = {3: 20.0, 5: 30.0, 9: 60.0}
TREE = DraftTree((-1, 0, 0), (0, 0, 1), (1.0, 0.5, 0.2))


def known(layout: DraftLayout = BLOCK, trees: list[DraftTree] | None = None) -> CostModel:
    """Draft 1 is accepted half of the time, draft 2 in a quarter of those."""
    times = {False: dict(PLAIN), True: dict(DRAFTING)}
    return CostModel(layout, [0.5, 0.25], trees or [], times)


# Seconds


def test_times_between_measured_row_counts_are_interpolated() -> None:
    model = known()
    assert [model.time(n, False) for n in (1, 2, 3, 4, 5)] == [10, 12, 16, 18, 20]
    assert [model.time(n, True) for n in (3, 4, 5, 6, 7, 9)] == [20, 25, 30, 37.5, 45, 60]


def test_times_beyond_the_measured_row_counts() -> None:
    model = known()
    assert (model.time(1, True), model.time(2, True)) == (20, 20), "fewer rows take no less than the fewest measured"
    assert (model.time(10, True), model.time(13, True)) == (67.5, 90), "on at 7.5 s a row, as from 5 to 9"
    assert model.time(7, False) == 24
    model.times[True][9] = 25.0
    assert model.time(13, True) == 25, "more rows never take less"
    model.times[True] = {3: 20.0}
    assert model.time(30, True) == 20


def test_a_trial_keeps_the_fastest_and_gives_way_to_three_real_steps() -> None:
    model = CostModel(BLOCK, [0.5, 0.5])
    for seconds in (3.0, 2.0, 4.0):
        model.observe_time(5, True, seconds, trial=True)
    assert model.times == {False: {}, True: {5: 2.0}}
    seen = []
    for seconds in (9.0, 7.0, 8.0, 6.0, 9.0):
        model.observe_time(5, True, seconds)
        seen.append(model.times[True][5])
    assert seen == [2.0, 2.0, 7.0, 6.0, 6.0]
    model.observe_time(6, False, 5.0)  # rows that no trial had
    model.observe_time(6, False, 4.0)
    assert model.times[False] == {6: 5.0}
    model.observe_time(6, False, 5.5)
    assert model.times[False] == {6: 4.0}


# Tokens


def test_acceptance_is_a_mean_that_begins_with_32_observations_of_the_prior() -> None:
    model = known()
    assert model.conditional() == [0.5, 0.25]
    model.observe(2, 2, None)  # both accepted
    model.observe(0, 2, None)  # the first was not, so nothing is known of the second
    model.observe(1, 2, None)
    model.observe(1, 1, None)  # the second was not verified
    assert model.conditional() == pytest.approx([(16 + 3) / (32 + 4), (8 + 1) / (32 + 2)])
    assert model.branched == [32, 32]
    model.observe(0, 5, 0.75)
    model.observe(3, 5, 1.25)
    assert model.branched == [35, 34]
    assert model.conditional() == pytest.approx([(16 + 3) / (32 + 4), (8 + 1) / (32 + 2)])


# Tokens per second.  The survivals are .5 and .125, so two drafts are worth .625 tokens.


@pytest.mark.parametrize(
    ("cycle", "batch", "rate"),
    [
        (AR, 1, 1 / 10),
        (AR, 4, 1 / 18),
        # a root and a bonus; drafting {seed} + block: 3 rows; verifying {root, d..}: 2 or 3
        (two_forward(1), 1, 2.5 / (20 + 12)),
        (two_forward(2), 1, 2.625 / (20 + 16)),
        (two_forward(1), 2, 2.5 / (37.5 + 18)),
        # a block on each accept length: 1 + k + (k + 1) * 2 rows
        (fused(1), 1, 1.5 / 37.5),
        (fused(2), 1, 1.625 / 60),
        (fused(1), 2, 1.5 / (60 + 3 * 7.5)),
        # accept lengths of one draft: 0 and 1, each .5; if it was not prepared a token comes from a drafting step
        (fused(1, 1), 1, (1.5 + 0.5) / (25 + 0.5 * 20)),
        # of two drafts: 0 with .5, 1 with .375, 2 with .125
        (fused(2, 1), 1, (1.625 + 0.5) / (30 + 0.5 * 20)),
        (fused(2, 2), 1, (1.625 + 0.125) / (45 + 0.125 * 20)),
        # two nodes and the seed, each with a block: 9 rows
        (fused(2, "all", TREE), 1, 1.7 / 60),
    ],
    ids=lambda x: "-".join(str(plan.blocks) for plan in x) + f"-{x[-1].verify}" if isinstance(x, tuple) else None,
)
def test_rates_by_hand(cycle: Cycle, batch: int, rate: float) -> None:
    assert known().rate(cycle, batch) == pytest.approx(rate)


def test_the_likeliest_lengths_are_prepared_first() -> None:
    model = known()
    model.hits = [32 * 0.9, 32 * 0.9]  # lengths 0, 1, 2 come with .1, .09, .81
    assert model.rate(fused(2, 1), 1) == pytest.approx((1 + 0.9 + 0.81 + 0.19) / (30 + 0.19 * 20))
    assert model.rate(fused(2, 2), 1) == pytest.approx((1 + 0.9 + 0.81 + 0.09) / (45 + 0.09 * 20))


def test_a_tree_is_worth_what_came_true_of_those_before() -> None:
    model = known()
    model.observe_tree(8, 32.0)  # (32 + 8) / (32 + 32) of .7
    assert model.rate(fused(2, "all", TREE), 1) == pytest.approx((1 + 0.625 * 0.7) / 60)


@pytest.mark.parametrize("layout", [DraftLayout(2, seed_row="draft"), DraftLayout(3, shift=0, seed_row="draft")])
def test_a_block_that_holds_the_seed_emits_no_root_and_has_no_anchor(layout: DraftLayout) -> None:
    """Drafting takes `block` rows, 2 or 3, both 20 s; with the anchor of the other layout it would be 3 or 4."""
    model = known(layout)
    model.times[True] = {2: 20.0, 3: 20.0, 4: 30.0}
    assert model.rate(two_forward(2), 1) == pytest.approx(1.625 / (20 + 16))


# What is chosen


def test_a_plan_must_promise_two_percent_more_than_ar() -> None:
    """One draft, accepted half of the time: 2.5 tokens in x + 10 seconds against one in 10."""
    for seconds, chosen in ((15.1, AR), (14.9, AR), (14.6, AR), (14.4, two_forward(1)), (5.0, two_forward(1))):
        model = CostModel(DraftLayout(block=1), [0.5], [], {False: {1: 10.0, 2: 10.0}, True: {2: seconds, 3: 1000.0}})
        assert model.best(1) == chosen, (seconds, 2.5 / (seconds + 10) / 0.1)


def test_the_plan_of_the_highest_rate_is_taken() -> None:
    model = known(trees=[TREE])
    model.times[True] = {3: 9.0, 9: 9.0}
    # fused, all lengths of 1: 1.5 / 9, of 2: 1.625 / 9; two of 2: 1.75 / 10.125; two_forward: 2.625 / 25; tree: 1.7 / 9
    assert model.best(1) == fused(2, "all", TREE)
    assert model.best(1, rows=8) == fused(2, 2), "9 rows do not fit"
    model.trees = []
    assert model.best(1) == fused(2)
    model.times[True] = {}
    assert model.best(1) == AR, "nothing was timed"


def test_all_plans_that_fit_are_compared() -> None:
    model = known(trees=[TREE])
    chains = [fused(k, h) for k, h in ((1, 1), (1, "all"), (2, 1), (2, 2), (2, "all"))]
    turns = [two_forward(1), two_forward(2)]
    assert model.cycles() == [*turns, *chains, fused(2, "all", TREE)]
    assert model.cycles(9) == model.cycles()
    assert model.cycles(8) == [*turns, *chains[:4]]  # rows 4, 6, 5, 7 and 9; the tree 9
    assert model.cycles(4) == [*turns, chains[0]]
    assert model.cycles(3) == turns
    assert model.cycles(2) == [], "a drafting step has three rows"
    assert known(DraftLayout(2, seed_row="draft")).cycles() == turns
    assert known(DraftLayout(2, seed_row="draft")).cycles(2) == turns[:1]
    wide = CostModel(DraftLayout(block=16), [0.5] * 16).cycles()
    assert max(num_rows(p, DraftLayout(block=16)) for cycle in wide for p in cycle) == 1 + 15 + 15 * 16 == 256, (
        "256 rows and no more"
    )


# Trials


def test_what_is_timed_of_a_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs(model: CostModel, *room: int) -> list[tuple[int, int]]:
        return [(plan.verify, plan.blocks) for plan in model.trials(*room)]

    monkeypatch.setattr(cost, "REPEATS", 1)
    layout = DraftLayout(block=4)
    model, all_of_them = CostModel(layout, [0.5] * 4, [TREE]), [(0, 0), (2, 0), (4, 0), (0, 1), (1, 2), (2, 2), (4, 5)]
    all_of_them.append((2, 3))  # the tree
    assert pairs(model, 99) == all_of_them
    assert [plan.tree for plan in model.trials(99)] == [None] * 7 + [TREE]
    assert pairs(CostModel(DraftLayout(4, seed_row="draft"), [0.5] * 4), 99) == all_of_them[:4]
    assert pairs(CostModel(DraftLayout(1), [0.5]), 99) == [(0, 0), (1, 0), (0, 1), (1, 2), (1, 1)]
    # positions: a block of 4 after 4 drafts needs 8
    assert pairs(model, 8) == [pair for pair in all_of_them if pair != (4, 5)]
    assert pairs(model, 9) == all_of_them
    # rows of a request: 1 + 2 + 3 * 4 = 15
    assert pairs(model, 99, 15) == [pair for pair in all_of_them if pair != (4, 5)]
    assert pairs(model, 99, 14) == all_of_them[:6]
    monkeypatch.setattr(cost, "REPEATS", 2)
    assert pairs(model, 8, 15) == [pair for pair in all_of_them if pair != (4, 5)] * 2


def test_rows_and_seconds_of_trials_are_kept() -> None:
    """Three requests of 1, 3, 5 base rows; of 5, 10, 11, 15 rows that draft; the first round was the fastest."""
    layout = DraftLayout(block=4)
    policy = AutoPolicy(layout, {})
    clock = count(1)
    for plan in CostModel(layout, [0.5] * 4, [TREE]).trials(8, 15):
        policy.learn(False, 3 * num_rows(plan, layout), plan.blocks > 0, float(next(clock)), trial=True)
    assert policy.costs[False].times == {False: {3: 1, 9: 2, 15: 3}, True: {15: 4, 30: 5, 33: 6, 45: 7}}
    seeded = DraftLayout(4, seed_row="draft")
    rows = [(plan.blocks, 2 * num_rows(plan, seeded)) for plan in CostModel(seeded, [0.5] * 4).trials(99)]
    assert sorted(set(rows)) == [(0, 2), (0, 6), (0, 10), (1, 8)]


def test_the_plan_is_thought_over_every_128_steps() -> None:
    policy = AutoPolicy(BLOCK, {"conditional": {"greedy": [0.5, 0.25], "sampled": [0.0]}})
    costs = policy.model(False)
    assert (costs.acceptance, policy.model(True).acceptance) == ([0.5, 0.25], [0.0, 0.0])
    costs.times = {False: {1: 10.0, 5: 10.0}, True: {1: 1.0, 9: 1.0}}
    chosen = []
    for _ in range(RETHINK):
        chosen.append(policy.choose(False, 1, None))
        costs.times[True] = {1: 1e3, 9: 1e3}
    assert len(chosen) == 128 and set(chosen) == {chosen[0]} != {AR}
    assert policy.choose(False, 1, None) == AR
    assert set(policy.chosen) == {(False, 1)}, "of other batch sizes nothing is decided"


def test_what_was_timed_is_not_timed_again() -> None:
    policy = AutoPolicy(BLOCK, {})
    assert StepPlan() in policy.trials(False, 1, 90, None)
    policy.timed.add((False, 1))
    assert policy.trials(False, 1, 90, None) == []
    assert policy.trials(True, 1, 90, None) and policy.trials(False, 2, 90, None)
