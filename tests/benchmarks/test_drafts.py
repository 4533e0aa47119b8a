"""Recipes compared on equal terms: what is equal, ratios and means worked out by hand, runs that are not run again."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from benchmarks.drafts import __main__ as drafts
from benchmarks.drafts import figures, presets, tables
from benchmarks.drafts.setting import OWN, RATE, Setting, folder_name, plan_of
from retrofit.recipes.schema import load_recipe, recipe_names

SETTING = Setting(steps=40, rows=60, drafts=4, prompts=2, new_tokens=8, rates=(1.0,))
PUBLISHED = [name for name in recipe_names() if name.startswith("baselines/")]


def way(tpf, rows=9, accept=(0.5,)):
    return {"tpf": tpf, "tau": 2 * tpf, "most_rows": rows, "accept_cond": list(accept)}


def made(recipe, seed, chain, fused=None, hybrid=None, **more):
    """A run whose figures are the same at every temperature."""
    ways = {"two_forward": way(chain)} | ({} if fused is None else {"fused": way(fused, rows=95)})
    ways |= {} if hybrid is None else {"hybrid": way(hybrid, rows=96)}
    about = {
        "seconds": 90.0,
        "processor_seconds": 60.0,
        "parameters": 500_000,
        "setting": SETTING.to_dict(),
        "rate": 1.0,
    }
    return {"recipe": recipe, "seed": seed, "ways": dict.fromkeys(("0", "0.8", "1"), ways), **about, **more}


RUNS = {
    OWN: [made(OWN, 0, 1.2, 2.0), made(OWN, 1, 1.5, 2.2)],
    "baselines/a": [made("baselines/a", 0, 1.25), made("baselines/a", 1, 1.0)],
    "baselines/b": [made("baselines/b", 0, 1.0, 1.6), made("baselines/b", 1, 1.2, 1.1)],
    "tiny adapter.targets=[o]": [made("tiny adapter.targets=[o]", 0, 9.0, 9.0)],
}


# What is equal


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_design_keeps_its_own_and_shares_the_rest(name):
    plan, written, own = plan_of(name, SETTING, 3), load_recipe(name), load_recipe(OWN)
    layout = {"block": plan.draft.block}
    assert plan.adapter == written.adapter and plan.objective == written.objective
    assert plan.draft == written.draft.model_copy(update=layout)
    assert plan.base == own.base and plan.data == own.data
    assert plan.draft.block - (plan.draft.shift == 0) == SETTING.drafts
    assert SETTING.rows - plan.draft.block < plan.train.anchors * plan.draft.block <= SETTING.rows
    assert (plan.train.steps, plan.train.seed, plan.train.batch_size) == (40, 3, own.train.batch_size)
    assert all(length < plan.draft.block for length in plan.train.curriculum)
    assert plan.train.lr * plan.adapter.alpha / plan.adapter.rank == pytest.approx(RATE)


def test_own_recipe_is_the_default_of_the_embedded_base():
    """At the setting of its own file."""
    own = load_recipe(OWN)
    setting = Setting(own.train.steps, own.train.anchors * own.draft.block, own.draft.block, 2, 8, (1.0,))
    assert plan_of(OWN, setting, own.train.seed) == own


def test_a_key_that_is_changed_wins():
    plan = plan_of("tiny draft.block=6 train.lr=1e-3 adapter.targets=[o]", SETTING, 0, rate=3)
    assert (plan.draft.block, plan.train.anchors, plan.train.lr, plan.adapter.targets) == (6, 10, 1e-3, ("o",))
    assert plan_of("baselines/uno", SETTING, 0).train.curriculum == (2,)
    names = {folder_name(OWN, plan_of(OWN, SETTING, seed, rate)) for seed in (0, 1) for rate in (1, 3)}
    assert len(names) == 4


# What it comes to


def test_the_best_way_is_one_within_the_rows():
    ways = {"two_forward": way(1.2), "fused": way(2.0, rows=96), "wide": way(3.0, rows=97)}
    assert figures.best(ways) == ("fused", 2.0)
    assert figures.best(ways, most_rows=97) == ("wide", 3.0)
    with pytest.raises(ValueError, match="more than 8 rows"):
        figures.best(ways, most_rows=8)


def test_ratios_are_those_of_equal_seeds():
    # best: own 2.0 and 2.2, a 1.25 and 1.0 (mean 1.125), b 1.6 and 1.2 (mean 1.4), so b: 2.0/1.6 and 2.2/1.2
    rival, found = figures.compared(RUNS, "0.8", None)
    assert (rival, found) == ("baselines/b", pytest.approx([1.25, 11 / 6]))
    # two_forward: own 1.2 and 1.5, a 1.25 and 1.0 (mean 1.125), b 1.0 and 1.2 (mean 1.1), so a: 1.2/1.25 and 1.5/1.0
    rival, found = figures.compared(RUNS, "0.8", "two_forward")
    assert (rival, found) == ("baselines/a", pytest.approx([0.96, 1.5]))
    assert figures.compared({OWN: RUNS[OWN]}, "0.8", None) is None
    assert figures.compared({name: some for name, some in RUNS.items() if name != OWN}, "0.8", None) is None
    apart = {OWN: RUNS[OWN][:1], "baselines/b": RUNS["baselines/b"][1:]}
    assert figures.compared(apart, "0.8", None) is None


def test_hybrid_counts_for_those_who_are_said_to_have_it():
    runs = {
        OWN: [made(OWN, 0, 1.0, 2.0, 3.0)],
        "baselines/a": [made("baselines/a", 0, 1.0, 1.6, 1.8)],
        "baselines/b": [made("baselines/b", 0, 1.0, 1.5, 2.4)],
    }
    for hybrid, rival, ratio in (
        ((False, False), "a", 2.0 / 1.6), ((True, False), "a", 3.0 / 1.6), ((True, True), "b", 3.0 / 2.4),
    ):  # fmt: skip
        assert figures.compared(runs, "1", None, hybrid) == (f"baselines/{rival}", pytest.approx([ratio]))
    found = {bar.what.split("T = 0.8, ")[1]: bar for bar in figures.bars(runs) if "T = 0.8" in bar.what}
    own = found["its best way, hybrid among them, to the other's, within 96 rows"]
    assert (own.bar, own.figure, own.met) == (">= 1.4 x", "1.88 x a", True)
    both = found["the same, hybrid among both's ways, within 96 rows"]
    assert (both.bar, both.figure, both.met) == ("stated", "1.25 x b", None)
    neither = found["best way of each without hybrid, within 96 rows"]
    assert (neither.bar, neither.figure, neither.met) == (">= 1.4 x", "1.25 x a", False)


def test_bars_are_held_to_the_mean_and_state_the_spread():
    found = {bar.what: bar for bar in figures.bars(RUNS)}
    best = found[
        "TPF of own recipe to the best published one, T = 0.8, best way of each without hybrid, within 96 rows"
    ]
    chain = found["TPF of own recipe to the best published one, T = 0.8, two_forward, equal rows"]
    assert (best.bar, best.figure, best.met) == (">= 1.4 x", "1.54 (1.25 to 1.83) x b", True)
    assert (chain.bar, chain.figure, chain.met) == (">= 1.15 x", "1.23 (0.96 to 1.50) x a", True)
    weak = {**RUNS, OWN: [made(OWN, 0, 1.2, 1.7), made(OWN, 1, 1.0, 1.2)]}
    assert [bar.met for bar in figures.bars(weak) if "T = 1," in bar.what] == [False, None, False, False]
    assert all(bar.met is None for bar in figures.bars(weak) if "T = 0," in bar.what)
    assert not any("certificate" in what for what in found)


def test_a_certificate_that_is_not_ok_misses_a_bar():
    runs = {OWN: [made(OWN, 0, 1.0, certified=True)], "baselines/a": [made("baselines/a", 0, 1.0, certified=False)]}
    bar = figures.bars(runs)[-1]
    assert (bar.figure, bar.met) == ("1/2", False)


def test_slots_are_means_over_seeds_as_far_as_all_reached():
    runs = [{"ways": {"0": {"two_forward": way(1, accept=accept)}}} for accept in ((0.8, 0.5, 0.1), (0.6, 0.3))]
    assert figures.slots(runs, "0") == pytest.approx([0.7, 0.4])


# Tables and files


def test_the_tables_hold_every_recipe():
    head, *rows = tables.forwards(RUNS)
    assert [row[0] for row in rows] == [f"`{name}`" for name in RUNS]
    assert all(len(row) == len(head) for row in rows)
    assert rows[1][1:] == [
        "0.50M", "60 s", *[" / ".join([text] * 3) for text in ("2.25 (2.00 to 2.50)", "1.12 (1.00 to 1.25)")],
        "- / - / -", " / ".join(["1.12 (1.00 to 1.25)"] * 3), "- / - / -",
    ]  # fmt: skip
    looked = {OWN: [made(OWN, 0, 1.0, lookup=dict.fromkeys(("0", "0.8", "1"), way(1.5)))]}
    assert tables.forwards(looked)[-1][-2] == "1.50 / 1.50 / 1.50"
    assert tables.acceptance(looked)[1] == ["`tiny`", "0.50", "0.50", "0.50"]


def called(tmp_path, *options):
    out = tmp_path / "drafts.json"
    numbers = ["--steps", "40", "--rows", "60", "--prompts", "2", "--new-tokens", "8"]
    return out, CliRunner().invoke(drafts.main, [*numbers, "--work", str(tmp_path), "--out", str(out), *options])


def test_what_is_finished_is_not_run_again(tmp_path, monkeypatch):
    ran = []

    def run(spec, setting, seed, rates, work, certified):
        ran.append((spec, seed, rates, certified))
        return made(spec, seed, 2.0 if spec == OWN else 1.0, rate=3.0, setting=setting.to_dict())

    monkeypatch.setattr(drafts, "run", run)
    two = ("--recipes", OWN, "--recipes", "baselines/uno", "--rates", "1,3")
    out, result = called(tmp_path, *two, "--seeds", "1")
    assert result.exit_code == 0, result.output
    assert ran == [(OWN, 0, (1.0,), True), ("baselines/uno", 0, (1.0, 3.0), True)]
    called(tmp_path, *two, "--seeds", "2")
    assert ran[2:] == [(OWN, 1, (1.0,), False), ("baselines/uno", 1, (3.0,), False)]
    sections = json.loads(out.read_text())["sections"]
    assert set(sections) == {"tiny, seed 0", "baselines/uno, seed 0", "tiny, seed 1", "baselines/uno, seed 1", "drafts"}
    assert "2.00 (2.00 to 2.00) x uno" in [bar["figure"] for bar in sections["drafts"]["bars"]]
    called(tmp_path, *two, "--seeds", "2")
    assert len(ran) == 4
    called(tmp_path, *two, "--seeds", "1", "--steps", "41")
    assert len(ran) == 6


def test_a_missed_bar_and_a_recipe_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(drafts, "run", lambda spec, setting, seed, *_: made(spec, seed, 1.0, setting=setting.to_dict()))
    _, result = called(tmp_path, "--recipes", OWN, "--recipes", "baselines/uno", "--seeds", "1")
    assert result.exit_code == 3 and "MISSED" in result.output
    _, result = called(tmp_path, "--recipes", "baselines/unno")
    assert result.exit_code == 2 and "baselines/unno` does not exist; did you mean `baselines/uno`?" in result.output
    assert called(tmp_path, "--rates", "1,x")[1].exit_code == 2


@pytest.mark.parametrize(
    ("hybrid", "rows", "lookup", "met"),
    [
        ((2.6, 2.2, 3.95), 96, 3.1, [True, True, True]),
        ((2.59, 2.19, 3.85), 96, 3.1, [False, False, False]),
        ((2.7, 2.3, 4.0), 97, 3.1, [False, False, False]),
    ],
)
def test_bars_of_the_preset_best(hybrid: tuple[float, float, float], rows: int, lookup: float, met: list[bool]) -> None:
    titles = ("T = 0.8", "T = 1", "T = 0")
    found = {
        title: {"hybrid": {"tpf": tpf, "most_rows": rows}, "prompt_lookup": {"tpf": lookup}}
        for title, tpf in zip(titles, hybrid, strict=True)
    }
    assert [bar.met for bar in presets.bars_of(found)] == met


def test_another_own_recipe_brings_base_data_and_schedule() -> None:
    own = "smollm2-135m train.batch_size=2"
    setting = replace(SETTING, own=own)
    mine, other = plan_of(own, setting, 0), plan_of("baselines/dspark", setting, 0)
    for plan in (mine, other):
        assert (plan.base.model, plan.data.responses, plan.train.batch_size) == ("smollm2-135m", "regenerate", 2)
    assert mine.train.lr == load_recipe("smollm2-135m").train.lr and other.train.lr == RATE / 2
    assert setting.to_dict()["own"] == own and "own" not in SETTING.to_dict()
    runs = {own: [made(own, 0, 1.5)], "baselines/a": [made("baselines/a", 0, 1.0)]}
    assert figures.compared(runs, "0.8", "two_forward", own=own) == ("baselines/a", [1.5])
    assert figures.compared(runs, "0.8", "two_forward") is None
