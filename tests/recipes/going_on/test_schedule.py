"""More steps, or another end, for a conversion that has begun: as if it had been meant so from the beginning."""

from pathlib import Path

import pytest
from tiny_conversion import STEPS, curve, interrupted, learned, run, steps

from retrofit.errors import UsageError
from retrofit.recipes.schema import by_key, load_recipe
from retrofit.recipes.training.schedule import same_rates

CONSTANT = {"train__schedule": "constant"}
WSD = {"train__schedule": "wsd", "train__decay": 3}
CHANGES = {
    "raised": (CONSTANT, {**CONSTANT, "train__steps": 7}),
    "raised before the decay": ({**WSD, "train__steps": 9}, {**WSD, "train__steps": 11}),
    "decay run now": (CONSTANT, {**WSD, "train__steps": 8}),
    "a longer decay": ({**WSD, "train__steps": 9}, {"train__schedule": "wsd", "train__decay": 4, "train__steps": 9}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_weights_are_those_of_a_run_that_was_meant_so(tmp_path: Path, texts: Path, change: str) -> None:
    before, after = CHANGES[change]
    run(tmp_path / "straight", texts, **after)
    interrupted(tmp_path / "out", texts, 5, **{"train__steps": 6, **before})
    run(tmp_path / "out", texts, **after)
    assert learned(tmp_path / "out") == learned(tmp_path / "straight")
    assert curve(tmp_path / "out" / "metrics.jsonl") == curve(tmp_path / "straight" / "metrics.jsonl")


def test_a_complete_conversion_whose_checkpoints_were_kept_goes_on(tmp_path: Path, texts: Path) -> None:
    run(tmp_path / "straight", texts, **CONSTANT, train__steps=7)
    run(tmp_path / "out", texts, **CONSTANT, train__steps=5, keep_checkpoints=True)
    assert steps(tmp_path / "out")[-1] == 5
    run(tmp_path / "out", texts, **CONSTANT, train__steps=7, overwrite=True)
    assert learned(tmp_path / "out") == learned(tmp_path / "straight")


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({"train__steps": STEPS + 1}, rf"train\.steps: {STEPS} -> {STEPS + 1}"),
        ({"train__schedule": "constant"}, r"train\.schedule: cosine -> constant"),
        ({"train__lr": 2e-3}, r"train\.lr: 0\.01 -> 0\.002"),
    ],
)
def test_other_learning_rates_for_steps_done_are_another_recipe(
    tmp_path: Path, texts: Path, after: dict[str, object], message: str
) -> None:
    interrupted(tmp_path / "out", texts, 5)
    with pytest.raises(UsageError, match=message) as caught:
        run(tmp_path / "out", texts, **after)
    assert "may be raised where train.schedule is constant or wsd" in str(caught.value.hint)


def test_fewer_steps_than_are_done(tmp_path: Path, texts: Path) -> None:
    interrupted(tmp_path / "out", texts, 5, **CONSTANT)
    with pytest.raises(UsageError, match=r"train\.steps is 4, and .*step-000005 has done 5") as caught:
        run(tmp_path / "out", texts, **CONSTANT, train__steps=4)
    assert str(caught.value.hint).startswith("set train.steps=5 or more")


def test_which_steps_have_the_same_rates() -> None:
    """A decay of 20 in 100 steps begins after 80."""
    keys = {"train.schedule": "wsd", "train.decay": 20, "train.warmup": 10, "train.lr": 1e-2}
    plan = load_recipe("tiny", {**keys, "train.steps": 100})
    then = {**keys, "train.steps": 200}
    assert [same_rates(then, plan, steps) for steps in (0, 80, 81, 82)] == [True, True, True, False]
    assert not same_rates({**then, "train.warmup": 11}, plan, 1)
    assert same_rates({**then, "train.schedule": "cosine"}, plan, 10)
    assert not same_rates({**then, "train.schedule": "of a later version"}, plan, 1)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train.decay": 5}, r"train\.decay: with train\.schedule cosine there is none"),
        (
            {"train.schedule": "wsd", "train.decay": 96, "train.steps": 100, "train.warmup": 5},
            "96 steps and train.warmup 5 are more than train.steps 100",
        ),
    ],
)
def test_a_decay_that_cannot_be(keys: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_recipe("tiny", keys)


def test_more_steps_must_not_change_the_blocks_of_those_done() -> None:
    """Blocks of 2, 4, 8 in 90 steps: 30 each; in 120 steps 40 each, so step 31 would have had another length."""
    keys = ["draft.block=8", "train.curriculum=[2,4]", "train.schedule=constant", "train.warmup=0"]
    then = by_key(load_recipe("tiny", [*keys, "train.steps=90"]))
    plan = load_recipe("tiny", [*keys, "train.steps=120"])
    assert [same_rates(then, plan, steps) for steps in (0, 30, 31)] == [True, True, False]
