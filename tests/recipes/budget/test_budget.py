"""A preset, and a time that a conversion is to take: more time never means less training, and what was chosen stays."""

import json
import shutil

import pytest
from commands import SHORT, done, refused, run

from benchmarks.drafts import scaling
from retrofit.errors import ResourceError, UsageError
from retrofit.recipes.budget import planning
from retrofit.recipes.budget.choice import LEAST_STEPS, choose, draft_rows, seconds_of, worth_drafting
from retrofit.recipes.budget.curve import Curve, curves, fitted
from retrofit.recipes.budget.presets import SCALES, changes_of
from retrofit.recipes.dry_run.fit import changed
from retrofit.recipes.dry_run.timing import Took
from retrofit.recipes.schema import load_recipe
from retrofit.recipes.training.step import expected_tau

PLAN = load_recipe("tiny")
ROW = 1e-3
"""Seconds that a draft row takes in these tests."""


def took(plan):
    """As a machine would that is paid by the row."""
    rows = draft_rows(plan) / plan.train.steps
    return Took(opening=1.0, step=ROW * rows, measuring=2.0, draft_rows_per_second=1 / ROW, windows=8)


def test_a_preset_scales_the_training_and_leaves_the_rest():
    plans = {name: changed(PLAN, changes_of(name, PLAN)) for name in SCALES}
    assert plans["balanced"] == PLAN
    assert draft_rows(plans["fast"]) < draft_rows(PLAN) < draft_rows(plans["best"])
    for plan in plans.values():
        train = {"steps": PLAN.train.steps, "warmup": PLAN.train.warmup, "anchors": PLAN.train.anchors}
        assert changed(plan, {f"train.{key}": value for key, value in train.items()}) == PLAN
        assert plan.train.warmup <= plan.train.steps / 10


def test_what_is_given_wins_over_a_preset():
    assert changes_of("fast", PLAN, {"train.steps", "train.anchors"}) == {}
    assert "train.anchors" in changes_of("fast", PLAN, {"train.steps"})


def test_a_decay_is_scaled_along():
    plan = load_recipe("tiny", ["train.schedule=wsd", "train.decay=44"])
    half = changed(plan, changes_of("best", plan))
    assert half.train.decay == 44 and changes_of("fast", plan)["train.decay"] == round(44 * SCALES["fast"].steps)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("1h30m", 5400), ("2 d", 172800), ("1h 5s", 3605)]
)
def test_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "30x", "1h30", "-3m", "0s", "1h nonsense"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(UsageError, match="--budget"):
        seconds_of(text)


def test_more_time_is_more_training_and_never_more_than_there_is():
    rows, presets = [], []
    for budget in (60, 120, 300, 600, 1200, 3600):
        found = choose(PLAN, budget, took)
        plan = changed(PLAN, found.changes)
        assert found.seconds <= budget and found.rows == draft_rows(plan)
        assert found.seconds == pytest.approx(3.0 + ROW * draft_rows(plan))
        rows.append(found.rows)
        presets.append(found.preset)
    assert rows == sorted(rows) and len(set(rows)) == len(rows)
    assert presets == sorted(presets, key=list(SCALES).index) and set(presets) == set(SCALES)


def test_time_that_is_gone_counts():
    assert choose(PLAN, 600, took, spent=lambda: 300.0).rows < choose(PLAN, 600, took).rows


def test_too_little_time_is_refused_and_the_time_named_suffices():
    with pytest.raises(ResourceError) as refusal:
        choose(PLAN, 5, took)
    named = seconds_of(refusal.value.hint.split()[2])
    assert changed(PLAN, choose(PLAN, named, took).changes).train.steps >= LEAST_STEPS
    with pytest.raises(ResourceError):
        choose(PLAN, named - 1.5, took)


def test_steps_that_are_given_are_not_chosen():
    with pytest.raises(UsageError, match=r"train\.steps"):
        choose(PLAN, 600, took, kept={"train.steps"})


@pytest.mark.parametrize("accepted", [0.2, 0.4, 0.6, 0.75])
def test_a_block_ends_where_drafting_hardly_reaches(accepted):
    tau = expected_tau([accepted] * 4)
    slots = worth_drafting(tau, 4)
    assert slots in (2, 8) or accepted**slots < 0.05 <= accepted ** (slots - 1)


def test_a_longer_block_has_as_many_rows():
    sure = Curve(ceiling=3.5, gap=0.1, power=0.5, least=1, most=10**9)
    found = choose(PLAN, 600, took, curve=sure)
    plan = changed(PLAN, found.changes)
    assert plan.draft.block > PLAN.draft.block and found.tau == pytest.approx(sure.tau(found.rows))
    alone = choose(PLAN, 600, took)
    assert alone.tau is None and abs(found.rows - alone.rows) < 0.1 * alone.rows
    assert "draft.block" not in choose(PLAN, 600, took, curve=sure, kept={"draft.block"}).changes


def test_a_curve_is_found_again():
    true = Curve(ceiling=1.9, gap=0.3, power=0.4, least=2_000, most=512_000)
    rows = (2_000, 8_000, 32_000, 128_000, 512_000)
    found = fitted([(one, true.tau(one)) for one in rows])
    assert (found.ceiling, found.gap, found.power) == pytest.approx((1.9, 0.3, 0.4), abs=1e-3)
    assert true.tau(1) == 1.0


def test_the_curve_that_ships_is_that_of_the_measured_runs():
    points = scaling.points_of(json.loads(scaling.RUNS.read_text())["sections"])
    assert curves() == {"tiny": fitted(points)}
    assert abs(scaling.checked(points)[1] - 1) < scaling.NEAR


def test_every_curve_rises():
    for curve in curves().values():
        assert 1 < curve.tau(curve.least) < curve.tau(curve.most) < curve.ceiling


# The command


@pytest.fixture
def machine(monkeypatch):
    """One whose steps take as long as is said here."""
    seconds = {"step": 0.01}
    monkeypatch.setattr(planning, "timed", lambda *_, **__: Took(0.1, seconds["step"], 0.1, 100.0, 1))
    return seconds


GIVEN = [*(key for key in SHORT if not key.startswith("train.steps")), "--device", "cpu"]


def test_a_run_goes_on_with_what_was_chosen(machine, tmp_path):
    out = tmp_path / "out"
    told = json.loads(done("convert", *GIVEN, "-o", out, "--budget", "1s", "--keep-checkpoints", "--json"))
    steps = told["budget"]["changes"]["train.steps"]
    assert told["training"]["steps"] == steps and f"steps: {steps}" in (out / "recipe.yaml").read_text()
    once = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out)
    machine["step"] = 0.02  # half as many, if it were measured again
    again = run("convert", *GIVEN, "-o", out, "--budget", "1s", "--json")
    assert again.exit_code == 0 and "going on with what was chosen" in again.stderr
    assert json.loads(again.stdout)["training"]["steps"] == steps
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == once


def test_a_dry_run_says_what_would_be_chosen(machine, tmp_path):
    told = json.loads(done("convert", *GIVEN, "-o", tmp_path / "out", "--budget", "1s", "--dry-run", "--json"))
    assert told["budget"]["changes"]["train.steps"] >= LEAST_STEPS and not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["profile=joint", "adapter.rank=1", "objective.draft_loss=ce", "draft.block=2"])
def test_nothing_is_foretold_of_a_recipe_that_was_not_measured(key):
    assert planning.measured_curve(load_recipe("tiny", ["train.anchors=9", "train.seed=3"])) == curves()["tiny"]
    plan = load_recipe("tiny", [key])
    assert planning.measured_curve(plan) is None
    why = planning.unknown(plan, fresh=True)
    assert "another recipe" in why and key.partition("=")[0] in why


def test_why_nothing_is_foretold():
    other = load_recipe("tiny", ["base.model=other"])
    assert planning.unknown(other, fresh=True) == "no conversions of such a base were measured"
    assert "begins with trained weights" in planning.unknown(load_recipe("tiny"), fresh=False)


@pytest.mark.parametrize("option", [("--budget", "1s"), ("--preset", "fast")])
def test_a_checkpoint_is_refused_before_anything_is_measured(machine, tmp_path, option):
    done("convert", *GIVEN, "-o", tmp_path / "out", "train.steps=2", "train.save_every=1", "--keep-checkpoints")
    machine["step"] = None  # a step that is measured would fail
    (*_, last) = sorted((tmp_path / "out.checkpoints").iterdir())
    told = refused(run("convert", "--from", last, "-o", tmp_path / "on", *option), 2)
    assert f"{option[0]} chooses how a training goes" in told and "measuring" not in told


def test_a_time_that_is_none_ends_the_command(tmp_path):
    assert "30m" in refused(run("convert", *GIVEN, "-o", tmp_path / "out", "--budget", "soon"), 2)
