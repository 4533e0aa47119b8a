"""What steps take, by rows and context: by hand, with a shape of 1 + 0.03 a row + 0.4 for drafting."""

from __future__ import annotations

import pytest

from retrofit.runtime.auto.times import LAST, STALE, StepTimes, doublings, shape


def known(*steps: tuple[int, bool, float, int]) -> StepTimes:
    times = StepTimes()
    for step in steps:
        times.observe(*step)
    return times


def test_where_nothing_is_known_it_is_the_shape() -> None:
    times = StepTimes()
    assert times.seconds(1, False) == 1
    assert times.seconds(11, False) == pytest.approx(1.3)
    assert times.seconds(11, True) == pytest.approx(1.7)


def test_one_step_says_something_about_all() -> None:
    times = known((1, False, 10.0, 0))
    assert times.seconds(1, False) == 10
    assert times.seconds(11, False) == pytest.approx(13)
    assert times.seconds(17, True) == pytest.approx(10 * 1.88), "of drafting nothing is known: as without"
    times.observe(17, True, 37.6)
    assert times.seconds(17, True) == pytest.approx(37.6)
    assert times.seconds(48, True) == pytest.approx(20 * shape(48, True)), "twice what it was"
    assert times.seconds(11, False) == pytest.approx(13)


def test_between_rows_the_ratio_is_interpolated() -> None:
    times = known((1, False, 10.0, 0), (11, False, 26.0, 0))  # ratios 10 and 20
    assert times.seconds(6, False) == pytest.approx(15 * 1.15)
    assert times.seconds(21, False) == pytest.approx(20 * 1.6)


def test_a_figure_is_the_median_of_the_last() -> None:
    times = known(*((1, False, float(n), 0) for n in (3, 100, 1, 2, 4)))
    assert times.seconds(1, False) == 3
    for _ in range(LAST):
        times.observe(1, False, 50.0)
    assert times.seconds(1, False) == 50, "what was cheap once is forgotten"
    assert times.typical(1, False, 0) == 50 and times.typical(2, False, 0) is None
    assert (times.steps(1, False), times.steps(1, True)) == (LAST, 0)


def test_contexts_are_told_apart_by_doublings() -> None:
    assert [doublings(n) for n in (0, 255, 256, 511, 512, 1023, 1024)] == [0, 0, 1, 1, 2, 2, 3]
    times = known((1, False, 10.0, 100), (9, False, 12.0, 100), (9, True, 20.0, 100))
    assert times.seconds(1, False, 2000) == 10, "nothing is known there"
    times.observe(1, False, 15.0, 2000)
    assert times.seconds(1, False, 100) == 10 and times.seconds(1, False, 2000) == 15
    assert times.seconds(9, False, 2000) == pytest.approx(18), "half more, as `ar`"
    assert times.seconds(9, True, 2000) == pytest.approx(30)
    assert times.seconds(9, True, 100) == pytest.approx(20)
    assert times.typical(9, True, 2000) is None and times.rows(True) == [9]


def test_what_was_run_a_few_times_long_ago_is_forgotten_but_for_plain_decoding() -> None:
    times = StepTimes()
    for rows, drafts, count in ((1, False, 3), (8, True, LAST - 1), (5, True, LAST)):
        for _ in range(count):
            times.observe(rows, drafts, 10.0)
    for _ in range(STALE):
        times.observe(3, False, 1.0)
    assert times.steps(8, True) == LAST - 1, "not yet"
    for _ in range(STALE):
        times.observe(3, False, 1.0)
    assert times.steps(8, True) == 0
    assert (times.steps(1, False), times.steps(5, True)) == (3, LAST)
