"""The cost model behind `auto` against numbers worked out by hand."""

import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto import cost, times
from retrofit.runtime.auto.cost import CostModel, Looked
from retrofit.runtime.auto.times import StepTimes
from retrofit.runtime.plan import AR, Cycle, fused, lookup, num_rows, two_forward
from retrofit.runtime.rules.tree import DraftTree

BLOCK = DraftLayout(block=2)  # a block is two rows and drafts two tokens
PLAIN = {1: 10.0, 2: 12.0, 3: 16.0, 5: 20.0}
"""Rows -> seconds of a step that does not draft."""
DRAFTING = {3: 20.0, 5: 30.0, 9: 60.0}
TREE = DraftTree((-1, 0, 0), (0, 0, 1), (1.0, 0.5, 0.2))


@pytest.fixture(autouse=True)
def flat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in between cost what lies in between, rows beyond what the last did."""
    monkeypatch.setattr(times, "PER_ROW", 0.0)
    monkeypatch.setattr(times, "DRAFTING", 0.0)


def known(layout: DraftLayout = BLOCK, trees: list[DraftTree] | None = None) -> CostModel:
    """Draft 1 is accepted half of the time, draft 2 in a quarter of those."""
    return CostModel(layout, [0.5, 0.25], trees or [], took(PLAIN, DRAFTING))


def took(plain: dict[int, float], drafting: dict[int, float]) -> StepTimes:
    times = StepTimes()
    for drafts, some in ((False, plain), (True, drafting)):
        for rows, seconds in some.items():
            times.observe(rows, drafts, seconds)
    return times


# Tokens


def test_acceptance_is_a_mean_that_begins_with_16_observations_of_the_prior() -> None:
    model = known()
    assert model.conditional() == [0.5, 0.25]
    model.observe(2, 2, None)  # both accepted
    model.observe(0, 2, None)  # the first was not, so nothing is known of the second
    model.observe(1, 2, None)
    model.observe(1, 1, None)  # the second was not verified
    assert model.conditional() == pytest.approx([(8 + 3) / (16 + 4), (4 + 1) / (16 + 2)])
    assert model.branched == [16, 16]
    model.observe(0, 5, 0.75)
    model.observe(3, 5, 1.25)
    assert model.branched == [19, 18]
    assert model.conditional() == pytest.approx([(8 + 3) / (16 + 4), (4 + 1) / (16 + 2)])


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
        (fused(1), 2, 1.5 / 60),
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
    model.hits = [16 * 0.9, 16 * 0.9]  # lengths 0, 1, 2 come with .1, .09, .81
    assert model.rate(fused(2, 1), 1) == pytest.approx((1 + 0.9 + 0.81 + 0.19) / (30 + 0.19 * 20))
    assert model.rate(fused(2, 2), 1) == pytest.approx((1 + 0.9 + 0.81 + 0.09) / (45 + 0.09 * 20))


def test_a_tree_is_worth_what_came_true_of_those_before() -> None:
    model = known()
    model.observe_tree(4, 16.0)  # (16 + 4) / (16 + 16) of .7
    assert model.rate(fused(2, "all", TREE), 1) == pytest.approx((1 + 0.625 * 0.7) / 60)


@pytest.mark.parametrize("layout", [DraftLayout(2, seed_row="draft"), DraftLayout(3, shift=0, seed_row="draft")])
def test_a_block_that_holds_the_seed_emits_no_root_and_has_no_anchor(layout: DraftLayout) -> None:
    """Drafting takes `block` rows, 2 or 3, both 20 s; with the anchor of the other layout it would be 3 or 4."""
    model = known(layout)
    model.times = took(PLAIN, {2: 20.0, 3: 20.0, 4: 30.0})
    assert model.rate(two_forward(2), 1) == pytest.approx(1.625 / (20 + 16))


# What is chosen


def test_a_plan_must_promise_two_percent_more_than_ar() -> None:
    """One draft, accepted half of the time: 2.5 tokens in x + 10 seconds against one in 10."""
    for seconds, chosen in ((15.1, AR), (14.9, AR), (14.6, AR), (14.4, two_forward(1)), (5.0, two_forward(1))):
        model = CostModel(DraftLayout(block=1), [0.5], [], took({1: 10.0, 2: 10.0}, {2: seconds, 3: 1000.0}))
        assert model.best(1) == chosen, (seconds, 2.5 / (seconds + 10) / 0.1)


def test_the_plan_of_the_highest_rate_is_taken() -> None:
    model = known(trees=[TREE])
    model.times = took(PLAIN, {3: 9.0, 9: 9.0})
    # fused, all lengths of 1: 1.5 / 9, of 2: 1.625 / 9; two of 2: 1.75 / 10.125; two_forward: 2.625 / 25; tree: 1.7 / 9
    assert model.best(1) == fused(2, "all", TREE)
    assert model.best(1, rows=8) == fused(2, 2), "9 rows do not fit"
    model.trees = []
    assert model.best(1) == fused(2)


def test_prompt_lookup_is_worth_what_it_would_have_done_in_these_texts() -> None:
    """Two tokens a step of three rows: 2 / 16 a second, against 1 / 10 of `ar`; drafts of ours promise less."""
    model = known()
    assert model.rate(lookup(BLOCK), 1, 0, Looked(2.0, 3)) == pytest.approx(2 / 16)
    assert model.best(1, looked=Looked(2.0, 3)) == lookup(BLOCK)
    assert model.best(1, looked=Looked(1.2, 3)) == AR
    assert model.best(1) == AR


def test_hybrid_is_worth_both_its_sources_until_it_has_run() -> None:
    """Nine rows that draft take 60 s; the tree promises .7 of its own, the text 1 or 3."""
    model = known(trees=[TREE])
    (cycle,) = model.hybrids()
    assert num_rows(cycle[-1], BLOCK) == num_rows(fused(2, "all", TREE)[-1], BLOCK)
    assert model.rate(cycle, 1, 0, Looked(2.0, 3)) == pytest.approx(2.7 / 60)
    assert model.rate(cycle, 1, 0, Looked(1.2, 3)) == pytest.approx(1.9 / 60)
    for _ in range(48):
        model.observe_hybrid(cycle, 4.0)
    assert model.rate(cycle, 1, 0, Looked(2.0, 3)) == pytest.approx((16 * 2.7 + 48 * 4.0) / 64 / 60)
    for _ in range(500):
        model.observe_hybrid(cycle, 1.0)
    assert model.rate(cycle, 1, 0, Looked(2.0, 3)) == pytest.approx((16 * 2.7 + 64 * 1.0) / 80 / 60, rel=1e-2)


def test_hybrid_in_turn_is_worth_the_mean_of_its_two_steps() -> None:
    """The tree's two nodes and the seed take 10 s; seed, block and three of the text's, six rows that draft, 30 s.

    The tree promises .7 of its own once in two steps, a text that emits 3 tokens a step 2 in each.
    """
    model = known()
    model.in_turn, model.times = [TREE], took({1: 8.0, 3: 10.0}, {6: 30.0})
    (cycle,) = model.hybrids()
    assert [num_rows(plan, BLOCK) for plan in cycle] == [6, 3]
    assert model.rate(cycle, 1, 0, Looked(1.2, 3)) == pytest.approx((1 + 0.7 / 2 + 0.2) / 20)
    assert model.rate(cycle, 1, 0, Looked(3.0, 3)) == pytest.approx((1 + 0.7 / 2 + 2) / 20)
    for _ in range(48):
        model.observe_hybrid(cycle, 4.0)
    assert model.rate(cycle, 1, 0, Looked(3.0, 3)) == pytest.approx((16 * 3.35 + 48 * 4.0) / 64 / 20)
    assert model.best(1, rows=6, looked=Looked(1.2, 3)) == cycle
    assert model.best(1, rows=5, looked=Looked(1.2, 3)) == AR


def test_hybrid_is_chosen_where_it_pays_and_only_where_the_text_is_known() -> None:
    model = known(trees=[TREE])
    model.times = took(PLAIN, {3: 30.0, 9: 12.0})
    model.branched = [16.0, 64.0]  # the adapter alone promises little
    assert model.best(1, looked=Looked(2.4, 40)) == model.hybrids()[0]
    assert model.best(1, rows=8, looked=Looked(2.4, 40)) not in model.hybrids()
    assert model.best(1) not in model.hybrids()
    model.times = took(PLAIN, {3: 30.0, 9: 40.0})
    assert model.best(1, looked=Looked(2.4, 40)) not in model.hybrids()


def test_what_is_remembered_of_acceptance_is_bounded() -> None:
    """After 10,000 drafts that were accepted a thousand that were not are four fifths of what counts."""
    model = known()
    for _ in range(10_000):
        model.observe(1, 1, None)
        model.observe(1, 1, 1.0)
    assert model.conditional()[0] > 0.99
    for _ in range(1000):
        model.observe(0, 1, None)
        model.observe(0, 1, 1.0)
    assert model.conditional()[0] < 0.2 and model.branched[0] / model.branched[1] < 0.2


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
