"""Paired statistics, worked by hand."""

import numpy as np
import pytest
from scipy.stats import binomtest

from retrofit.tasks.pairing import compared, interval, mcnemar, only_one


def test_mcnemar_by_hand():
    """Six items on which one is right, one to five: 2 * (1 + 6) / 64."""
    assert mcnemar(1, 5) == mcnemar(5, 1) == 14 / 64
    assert mcnemar(0, 3) == 2 / 8
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0


@pytest.mark.parametrize(("here", "there"), [(0, 9), (3, 11), (20, 33), (150, 190)])
def test_mcnemar_is_the_binomial_test(here, there):
    assert mcnemar(here, there) == pytest.approx(binomtest(here, here + there).pvalue, rel=1e-9)


def test_a_comparison_by_hand():
    found = compared([1, 1, 0, 1], [1, 0, 1, 0])
    assert found["n"] == 4
    assert found["value"] == 0.75 and found["original"] == 0.5 and found["delta"] == 0.25
    assert (found["only_here"], found["only_original"], found["mcnemar_p"]) == (2, 1, 1.0)
    low, high = found["ci95"]
    assert -0.75 <= low < 0.25 < high <= 1.0


def test_the_same_scores_differ_by_nothing():
    found = compared([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert found["delta"] == 0.0 and found["ci95"] == [0.0, 0.0] and found["mcnemar_p"] == 1.0


def test_losses_are_weighted_by_their_tokens_and_are_not_right_or_wrong():
    found = compared([2.0, 4.0], [2.0, 3.0], weights=[30, 10])
    assert found["value"] == 2.5 and found["original"] == 2.25
    assert found["only_here"] is None and found["mcnemar_p"] is None
    assert found["ci95"] == [0.0, 1.0]


def test_pairs_are_drawn_whole():
    """Scores that rise and fall together differ by a constant, however the items are drawn."""
    original = np.linspace(0, 5, 20)
    assert compared(list(original + 0.5), list(original))["ci95"] == pytest.approx([0.5, 0.5])


def test_the_interval_is_the_same_in_every_run_and_about_that_of_a_normal_mean():
    differences = np.random.default_rng(3).normal(0.1, 1.0, 400)
    low, high = interval(differences, np.ones(400))
    assert interval(differences, np.ones(400)) == [low, high]
    spread = 1.96 * differences.std() / 20
    assert low == pytest.approx(differences.mean() - spread, abs=0.02)  # of 4,000 resamples
    assert high == pytest.approx(differences.mean() + spread, abs=0.02)


def test_one_item_has_no_interval_and_none_is_an_error():
    assert compared([1.0], [0.0])["ci95"] is None
    with pytest.raises(ValueError, match="at least one"):
        compared([], [])
    with pytest.raises(ValueError, match="same items"):
        compared([1.0], [0.0, 1.0])


def test_items_that_only_one_has_right():
    assert only_one([1, 1, 0, 0], [1, 0, 1, 1]) == (1, 2)
