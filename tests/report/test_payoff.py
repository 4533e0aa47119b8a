"""Break-even and cost, worked by hand."""

import math

import pytest

from retrofit.report.sections.diffusion import area_under
from retrofit.report.sections.payoff import break_even_batch, usd_per_million
from retrofit.report.verdict import verdict


def test_break_even_lies_between_the_last_that_pays_and_the_first_that_does_not():
    found = break_even_batch([(16, 1.5), (1, 0.5), (4, 0.75)])
    assert (found["pays_up_to"], found["stops_at"]) == (4, 16)
    assert found["batch_size"] == round(math.exp(math.log(4) + math.log(4) / 3), 2)  # 0.25 of 0.75 on the way


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ([(1, 0.5), (4, 1.0)], (4, None, None)),  # as fast is no slower
        ([(1, 1.01), (4, 0.5)], (None, 1, None)),
        ([], (None, None, None)),
    ],
)
def test_a_curve_that_does_not_cross(curve, expected):
    assert tuple(break_even_batch(curve).values()) == expected


def test_dollars_for_a_million_tokens():
    assert usd_per_million(3.6, 100.0) == 10.0  # 0.001 a second, 100 tokens
    assert usd_per_million(None, 100.0) is usd_per_million(3.6, None) is None


def test_the_area_under_points_by_hand():
    # One point: tokens per forward times percent.
    assert area_under([(1.0, 80.0)]) == 80.0
    # The second weighs exp(-3 / 20) of itself; the third is more than 5 points below the first and is left out.
    second = 76.0 * math.exp(-3 * (1 - 76 / 80))
    assert area_under([(2.0, 76.0), (1.0, 80.0), (3.0, 74.9)]) == round(80 + 0.5 * (80 + second), 4)
    assert area_under([]) is None
    assert area_under([(1.0, 0.0)]) == 0.0


def test_nothing_is_said_of_batches_smaller_than_those_that_were_measured():
    def said(curve):
        by_context = [{"context_tokens": 1, "temperature": 0.8, "ways": {"fused": break_even_batch(curve)}}]
        return verdict({"break_even": {"by_context": by_context}}, {})["lines"][2]

    assert said([(16, 1.5), (64, 2.0)]) == "Speculation does not pay at batch 16, the smallest that was measured."
    assert said([(1, 1.5)]).startswith("Speculation does not pay on this machine")


def test_where_only_prompt_lookup_pays_the_verdict_says_so():
    ways = {"fused": break_even_batch([(1, 2.8)]), "prompt_lookup": break_even_batch([(1, 0.8), (4, 0.9), (16, 1.2)])}
    by_context = [{"context_tokens": 1, "temperature": 0.8, "ways": ways}]
    line = verdict({"break_even": {"by_context": by_context}}, {})["lines"][2]
    assert line == "The adapter's drafts do not pay here; prompt lookup does, up to batch 4, and auto takes it."
