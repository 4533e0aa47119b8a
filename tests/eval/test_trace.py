"""Measures of acceptance on traces worked by hand."""

import json

import pytest

from retrofit.eval.trace import Trace, bench_serve, by_slot, figures
from retrofit.runtime.results import Result, Stats


def result(tokens: int, **stats: object) -> Result:
    return Result(0, [1], list(range(tokens + 1)), None, "length", Stats(tokens=tokens, **stats))


# Four cycles of 3, 3, 3 and 1 verified drafts accept 3, 1, 0 and 1: 5 of 10 drafts, and a bonus each; the first request
# is cut by its limit one token early.
FIRST = result(
    5, accepted=[3, 1], verified=[3, 3], rows=40, widest=20, forwards={"prefill": 1, "fused": 1, "verify": 1}
)
SECOND = result(
    4, accepted=[0, 1], verified=[3, 1], rows=14, widest=8, forwards={"prefill": 1, "draft": 1, "fused": 2, "ar": 1}
)


def test_a_trace_holds_whole_numbers_that_add_up_and_survive_json():
    both = Trace.of([FIRST, SECOND])
    assert both.cycles == {(1, 1): 1, (3, 0): 1, (3, 1): 1, (3, 3): 1}
    assert both.requests == ((5, 2), (4, 3))
    assert Trace.of([FIRST]) + Trace.of([SECOND]) == both
    assert Trace.from_dict(json.loads(json.dumps(both.to_dict()))) == both


def test_figures_by_hand():
    got = figures(Trace.of([FIRST, SECOND]))
    assert (got["tokens"], got["forwards"], got["most_rows"]) == (9, 6, 20)
    assert got["tpf"] == 1.5
    assert got["tau"] == 1.8  # 9 tokens in 4 verify cycles and one forward of kind ar
    assert got["tau_macro"] == round((5 / 2 + 4 / 3) / 2, 4)
    assert got["rows_per_token"] == 6.0
    assert got["accepted_histogram"] == {0: 1, 1: 2, 3: 1}
    # slot 1: 3 of 4.  slot 2: the last cycle verified one only, so 1 of 2.  slot 3: 1 of 1.
    assert (got["tried"], got["accept_cond"], got["accept_joint"]) == (
        [4, 2, 1],
        [0.75, 0.5, 1.0],
        [0.75, 0.375, 0.375],
    )
    kinds = got["forwards_per_token"]
    assert kinds == {"fused": round(3 / 9, 4), "verify": round(1 / 9, 4), "draft": round(1 / 9, 4), "ar": 0.1111}
    assert sum(kinds.values()) == pytest.approx(1 / got["tpf"], abs=3e-4)


def test_the_formulas_of_vllm_bench_serve_by_hand():
    got = bench_serve(Trace.of([FIRST, SECOND]))
    assert got == {
        "spec_decode_acceptance_rate": 50.0,
        "spec_decode_acceptance_length": 1 + 5 / 4,  # not cut at the limit, so above tau
        "spec_decode_num_drafts": 4,
        "spec_decode_draft_tokens": 10,
        "spec_decode_accepted_tokens": 5,
        # of all four cycles, the one that verified one draft too
        "spec_decode_per_position_acceptance_rates": [0.75, 0.25, 0.25],
    }


def test_a_cycle_without_drafts_is_no_draft_of_vllm():
    assert bench_serve(Trace({(0, 0): 7, (2, 1): 1}))["spec_decode_num_drafts"] == 1
    assert bench_serve(Trace({(0, 0): 7})) == bench_serve(Trace()) == {}


def test_nothing_decoded_is_no_figure():
    got = figures(Trace())
    assert [got[name] for name in ("tpf", "tau", "tau_macro", "rows_per_token")] == [None] * 4
    assert (got["accept_cond"], got["tokens"], got["most_rows"]) == ([], 0, 0)


def test_acceptance_by_slot_leaves_out_slots_that_were_not_verified():
    # slot 1: 3 of 4.  slot 2: cycle 3 verified one only, so 2 of 2.  slot 3: 1 of 2.  slot 4: 0 of 1.
    got = by_slot([2, 0, 1, 3], [4, 4, 1, 4])
    assert got["tried"] == [4, 2, 2, 1]
    assert got["accept_cond"] == [0.75, 1.0, 0.5, 0.0]
    assert got["accept_joint"] == [0.75, 0.75, 0.375, 0.0]


def test_slots_that_none_reached_are_left_out():
    assert by_slot([0, 0], [4, 4]) == {"accept_cond": [0.0], "accept_joint": [0.0], "tried": [2]}
    assert by_slot([], []) == {"accept_cond": [], "accept_joint": [], "tried": []}
