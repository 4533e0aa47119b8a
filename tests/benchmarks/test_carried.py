"""What the figures of conversions that go on are judged by."""

from benchmarks.joint.carried import bars_of_carried, bars_of_parts, plan_of


def over(*taus: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {str(seed): {"fresh": fresh, "carried": carried} for seed, (fresh, carried) in enumerate(taus)}


def apart(*taus: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {str(seed): {"one run": one, "two runs": two} for seed, (one, two) in enumerate(taus)}


def test_every_seed_has_to_reach_the_share_in_few_steps() -> None:
    (bar,) = bars_of_carried(over((2.0, 1.9), (1.0, 1.1)), 0.2)
    assert bar.met and bar.figure == "100.0% (95.0% to 110.0%)"
    assert not bars_of_carried(over((2.0, 1.89), (1.0, 1.1)), 0.2)[0].met
    assert not bars_of_carried(over((2.0, 2.0)), 0.21)[0].met


def test_noise_is_how_far_apart_seeds_are() -> None:
    (bar,) = bars_of_parts(apart((1.5, 1.52), (1.6, 1.6)))
    assert bar.met and bar.figure == "1.560 and 1.550; seeds of one run are 0.100 apart"
    assert not bars_of_parts(apart((1.5, 1.7), (1.6, 1.8)))[0].met
    (alone,) = bars_of_parts(apart((1.5, 1.5)))
    assert alone.met is None and alone.figure == "1.500 and 1.500; one seed"


def test_a_short_run_has_a_short_warm_up() -> None:
    plan = plan_of(16, 3, train__schedule="constant")
    assert (plan.train.warmup, plan.train.seed, plan.train.schedule) == (4, 3, "constant")
    assert plan_of(80, 0).train.warmup == 10
