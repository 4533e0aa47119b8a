"""Speed of light and other hardware in a report, on a clock that ticks."""

import pytest
from reporting import only, small
from saved import save_artifact
from tiny_models import build

from retrofit.eval.bounds.projection import DEVICES
from retrofit.eval.bounds.roofline import Need, Speeds
from retrofit.eval.bounds.rowcost import Cost, Drafting
from retrofit.report.markdown import markdown
from retrofit.report.sections import other_hardware as elsewhere
from retrofit.report.sections.speed_of_light import _speedup, _step
from retrofit.runtime.engine import Engine

NEED, HERE = Need(1000, 4000), Speeds(4000.0, 20_000.0)  # a second to read, a tenth of one for each row


@pytest.fixture(scope="module")
def own(tmp_path_factory, base):
    return save_artifact(tmp_path_factory.mktemp("light") / "own", base)


def test_a_step_beside_its_best():
    assert _step("ar", Cost(1, 2.0), NEED, HERE) == {
        "way": "ar", "rows": 1, "measured_ms": 2000.0, "least_ms": 1000.0, "bound_by": "reading", "share_of_best": 0.5,
    }  # fmt: skip
    many = _step("ar", Cost(40, 5.0), NEED, HERE)
    assert (many["least_ms"], many["bound_by"], many["share_of_best"]) == (4000.0, "multiplying", 0.8)


def test_speedup_predicted_and_measured():
    # 20 rows take 2 s at best for 1 s, and took 6 s for 2 s, at 3 tokens a forward.
    found = _speedup(Drafting(Cost(20, 6.0), 3.0), Cost(1, 2.0), NEED, HERE)
    assert found == {"tokens_per_forward": 3.0, "predicted": 1.5, "measured": 1.0}


def test_both_sections_of_a_report(own, monkeypatch):
    only(monkeypatch, "acceptance", "speed_of_light", "other_hardware")
    report = small(monkeypatch, own)
    found = report.section("speed_of_light")
    real = {one["temperature"]: one["drafter"]["tau"] for one in report.section("acceptance")["by_temperature"]}
    assert {one["temperature"]: one["realised_tau"] for one in found["oracle"]} == real
    assert [step["way"] for step in found["steps"]][-2:] == ["ar", "fused"]
    # Between two chunks of a request of n, the clock is read n times, a second each.
    assert [(s["rows"], s["measured_ms"]) for s in found["steps"][:-1]] == [(n, 1000.0 * n) for n in (1, 2)]
    other = report.section("other_hardware")
    assert [one["device"] for one in other["devices"]] == [device.name for device in DEVICES]
    assert other["kind"] == "projection"
    for name in ("kept", "scaled"):
        assert [step["rows"] for step in other["check"][name]["steps"]] == [1, 2]
        assert all(one[name]["drafter_tokens_per_s"] > 0 for one in other["devices"])
    page = markdown(report.data)
    assert "## On other hardware: a projection" in page and "Nothing here was measured there." in page


def test_without_a_check_nothing_is_projected(monkeypatch):
    only(monkeypatch, "speed_of_light", "other_hardware")
    monkeypatch.setattr(elsewhere, "most_threads", lambda: 1)
    with Engine.from_model(build("llama"), exact="off") as engine:
        report = small(monkeypatch, engine, prompts=[[1, 2, 3]], modes=["ar"])
    skipped = {one["section"]: one["reason"] for one in report.data["skipped"]}
    assert skipped["other_hardware"].startswith("there is no second setting to check a projection against")
    assert report.section("speed_of_light")["oracle"] == [] and report.section("speed_of_light")["speedup"] is None


@pytest.mark.parametrize(("threads", "name"), [(2, "one thread"), (1, "bfloat16")])
def test_the_second_setting(own, monkeypatch, threads, name):
    only(monkeypatch, "speed_of_light", "other_hardware")
    monkeypatch.setattr(elsewhere, "most_threads", lambda: threads)
    check = small(monkeypatch, own, modes=["ar"]).section("other_hardware")["check"]
    assert check["setting"] == name
    assert all(step["projected_ms"] > 0 for name in ("kept", "scaled") for step in check[name]["steps"])


def test_it_needs_the_steps(own, monkeypatch):
    only(monkeypatch, "other_hardware")
    skipped = {one["section"]: one["reason"] for one in small(monkeypatch, own, modes=["ar"]).data["skipped"]}
    assert skipped["other_hardware"] == "steps by rows were not measured"
