"""Measures of speed on timelines worked by hand."""

import pytest

from retrofit.eval.latency import Timeline, bench_serve, percentile, speed_figures

# Sent at 10 s.  Tokens 1, 3 and 1 after 0.5, 0.7 and 1.0 s: 5 tokens, gaps 0.2 and 0.3, TPOT 0.5 / 4.
FIRST = Timeline(10.0, 7, [(10.5, 1), (10.7, 3), (11.0, 1)])
# Sent at 10 s, one token after 0.3 s: no TPOT, no gap.
SECOND = Timeline(10.0, 3, [(10.3, 1)])
# Sent at 10 s.  Tokens 1, 2 after 0.4 and 2.0 s: TPOT 1.6 / 2.
THIRD = Timeline(10.0, 2, [(10.4, 1), (12.0, 2)])


def test_speed_figures_by_hand():
    got = speed_figures([FIRST, SECOND, THIRD])
    assert (got["requests"], got["tokens"]) == (3, 9)
    assert got["ttft_p50_ms"] == 400.0
    assert got["ttft_p99_ms"] == 498.0  # 0.98 of the way from 0.4 to 0.5
    assert got["itl_p50_ms"] == 300.0
    assert got["itl_p99_ms"] == round(1000 * (0.3 + 0.98 * 1.3), 4)
    assert got["itl_max_ms"] == 1600.0
    assert got["tpot_p50_ms"] == round(1000 * (0.125 + 0.8) / 2, 4)
    assert got["tokens_per_s_user"] == round(2 / 0.925, 4)
    assert got["tokens_per_s_total"] == 4.5  # 9 tokens from 10 s to 12 s


def test_nothing_came_of_nothing():
    got = speed_figures([Timeline(0.0)])
    assert (got["requests"], got["tokens"]) == (0, 0)
    assert {value for name, value in got.items() if name not in ("requests", "tokens")} == {None}
    assert speed_figures([SECOND])["tokens_per_s_user"] is None


def test_the_formulas_of_vllm_bench_serve_by_hand():
    got = bench_serve([FIRST, SECOND, THIRD, Timeline(10.0, 100)], duration=2.0, percentiles=(50, 99))
    assert (got["completed"], got["failed"], got["total_input_tokens"], got["total_output_tokens"]) == (3, 1, 12, 9)
    assert (got["request_throughput"], got["output_throughput"], got["total_token_throughput"]) == (1.5, 4.5, 10.5)
    assert got["mean_ttft_ms"] == pytest.approx(400)
    assert got["std_ttft_ms"] == pytest.approx(1000 * (0.02 / 3) ** 0.5)  # of the population, as numpy has it
    assert got["mean_tpot_ms"] == pytest.approx(462.5)  # the request of one token has none
    assert got["mean_itl_ms"] == pytest.approx(700)
    assert got["median_e2el_ms"] == got["p50_e2el_ms"] == pytest.approx(1000)
    assert got["p99_e2el_ms"] == pytest.approx(1980)


def test_a_percentile_is_linear_between_neighbours():
    assert percentile([3.0, 1.0], 50) == 2.0
    assert percentile([], 50) is None
