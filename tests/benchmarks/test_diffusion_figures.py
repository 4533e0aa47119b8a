"""What the figures of mode `diffusion` say, by hand."""

import pytest

from benchmarks.diffusion import __main__ as diffusion
from benchmarks.diffusion import tables
from benchmarks.readme_numbers import __main__ as readme_numbers
from retrofit.runtime.host.infilling import Candidate, Filled


def test_how_far_a_text_is_right() -> None:
    assert diffusion.in_a_row([1, 2, 3], [1, 2, 4]) == 2
    assert diffusion.in_a_row([5], [1]) == 0
    assert diffusion.percent([True, False, False, False]) == 25.0


def test_the_best_of_an_origin_is_the_likeliest_that_it_has() -> None:
    ranked = [Candidate([1], "ar", -1.0), Candidate([2], "filled", -2.0), Candidate([3], "filled", -3.0)]
    found = Filled([1], candidates=ranked)
    assert diffusion.best_of(found, ("filled",)) == [2]
    assert diffusion.best_of(found, ("ar",)) == [1]
    assert diffusion.best_of(Filled([1], candidates=ranked[1:2]), ("ar",)) == [2], "both said so"


@pytest.mark.parametrize(("tpf", "met"), [(1.6, True), (1.4, False)])
def test_the_bar_takes_the_fastest_point_that_loses_little(tpf: float, met: bool) -> None:
    points = [
        {"tpf": 1.0, "agreement_percent": 100.0, "tolerance": None},
        {"tpf": tpf, "agreement_percent": 98.0, "tolerance": 0.1},
        {"tpf": 3.0, "agreement_percent": 97.9, "tolerance": 0.3},
    ]
    (bar,) = diffusion.bars_of(points)
    assert bar.met is met and "tolerance 0.1" in bar.figure


def test_the_tables_stand_in_the_numbers(tmp_path) -> None:
    point = {"mode": "ar", "tolerance": None, "threshold": None, "tpf": 1.0, "rows_per_token": 1.0,
             "agreement_percent": 100.0, "right_in_a_row": 2.5}  # fmt: skip
    about = {
        "command": "c",
        "hardware": {"cpu": "x", "threads": 1, "cores": 2, "versions": {}, "commit": "a", "date": "d"},
    }
    curve = {
        "diffusion, curve": {**about, "bars": [], "figures": {"prompts": 8, "max_new_tokens": 4, "points": [point]}}
    }
    assert "| ar | - | - | 1.00 | 1.00 | 100.00 | 2.50 |" in tables.markdown(curve)
    gaps = {"spans": 2, "prefix": 3, "suffix": 4, "exact_percent": {"ar": 50.0}, "by_length": {"1": {"ar": 25.0}}}
    assert "| all | 50.0 |" in tables.markdown({"diffusion, infilling": {"figures": gaps}})
    assert readme_numbers.TITLES["diffusion, curve"]
