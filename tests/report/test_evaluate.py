"""`retrofit.evaluate` on tiny models: what it finds, what it asks for again, and the faults it must see."""

import json

import pytest
from reporting import PROMPTS, SMALL, gate, only, small, small_suite
from saved import save_artifact
from tiny_models import build

import retrofit
from retrofit.artifact import folder as artifacts
from retrofit.errors import DataError, GateError, ResourceError, UsageError
from retrofit.eval.trace import Trace, bench_serve, figures
from retrofit.report import document
from retrofit.report.evaluate import SECTIONS
from retrofit.runtime.host import modes

HONEST = {"conditional": {"sampled": [0.1, 0.05]}}
"""Less than a random adapter keeps."""
LYING = {"conditional": {"greedy": [0.9] * 4}}


@pytest.fixture
def own(tmp_path, base):
    return save_artifact(tmp_path / "own", base, acceptance=HONEST)


def test_a_lossless_engine_passes_and_every_figure_comes_from_its_trace(own, monkeypatch):
    report = small(monkeypatch, own, price=2.0)
    lossless = report.section("losslessness")
    assert [lossless[kind]["bug"] for kind in ("greedy", "sampled")] == [0, 0]
    assert lossless["greedy"]["texts"] == lossless["greedy"]["equal_texts"] == 10  # two prompts, five strategies
    assert lossless["greedy"]["noise_floor"]["texts"] == 2
    assert gate(report, "lossless_bugs")["ok"] and gate(report, "claimed_sampled")["ok"]
    for one in report.section("acceptance")["by_temperature"]:
        drafter = one["drafter"]
        trace = Trace.from_dict(drafter["trace"])
        again = json.loads(json.dumps(figures(trace)))
        assert {name: drafter[name] for name in ("tpf", "tau", "tau_macro", "accept_cond", "rows_per_token")} == {
            name: again[name] for name in ("tpf", "tau", "tau_macro", "accept_cond", "rows_per_token")
        }
        assert drafter["bench_serve"] == bench_serve(trace)
    assert report.data["figures"]["equal_texts_share"] == 1.0
    assert report.data["figures"]["tau"] == report.section("acceptance")["by_temperature"][0]["drafter"]["tau"]


def test_few_requests_are_the_same_at_every_batch_size(own, monkeypatch):
    only(monkeypatch, "acceptance")
    report = small(monkeypatch, own)
    one, two = report.section("acceptance")["by_batch"]
    assert (one["batch_size"], two["batch_size"]) == (1, 2)
    assert one["trace"]["cycles"] == two["trace"]["cycles"]  # fp32, and no tie: drafts do not depend on company


def test_an_engine_that_accepts_one_too_many_fails(own, monkeypatch):
    only(monkeypatch, "losslessness")
    right = modes.accepted_length
    monkeypatch.setattr(
        modes, "accepted_length", lambda draft, target, lengths: (right(draft, target, lengths) + 1).minimum(lengths)
    )
    report = small(monkeypatch, own)
    found = gate(report, "lossless_bugs")
    assert not found["ok"] and found["value"] > 0
    assert f"{found['value']:.0f} of " in found["says"] and found["says"].endswith("none may")
    worst = report.section("losslessness")["greedy"]["worst"]
    assert 0 < len(worst) <= 5 and {first["class"] for first in worst} <= {"bug", "near", "tie", "match"}
    assert all(first["expected"] != first["got"] for first in worst)
    assert report.data["verdict"]["lines"][0].startswith("It does NOT answer as the original does")
    assert report.ok is False
    with pytest.raises(GateError, match="lossless_bugs: "):
        report.require()


def test_an_artifact_that_claims_ten_times_its_acceptance_fails(tmp_path, base, monkeypatch):
    only(monkeypatch, "acceptance")
    report = small(monkeypatch, save_artifact(tmp_path / "lying", base, acceptance=LYING))
    claim = report.section("acceptance")["claimed"]["greedy"]
    assert claim["claimed_drafts_per_cycle"] > 10 * claim["measured_drafts_per_cycle"]
    found = gate(report, "claimed_greedy")
    assert not found["ok"] and found["value"] < 0.1
    assert "that the artifact claims; 50% must hold" in found["says"]


def test_a_finished_section_is_not_run_again(own, monkeypatch):
    only(monkeypatch, "losslessness", "diffusion")
    first = small(monkeypatch, own, out=own)
    assert document.read(own) == first.data
    artifacts.check(own)
    ran = []

    def counted(name, function):
        return lambda *arguments: (ran.append(name), function(*arguments))[1]

    for name, function in list(SECTIONS.items()):
        monkeypatch.setitem(SECTIONS, name, counted(name, function))
    again = small(monkeypatch, own, out=own, price=3.0)  # a new price measures nothing again
    assert set(SECTIONS) - set(ran) == {"losslessness", "diffusion"}
    assert again.section("diffusion") == first.section("diffusion")
    assert "--price 3" in again.data["command"]
    ran.clear()
    small(monkeypatch, own, out=own, restart=True)
    assert set(ran) == set(SECTIONS)
    ran.clear()
    small(monkeypatch, own, out=own, seed=1)  # another seed is another run
    assert set(ran) == set(SECTIONS)


def test_an_interrupted_run_leaves_a_partial_report_and_goes_on(own, monkeypatch):
    only(monkeypatch, "losslessness", "diffusion")
    right = SECTIONS["diffusion"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(SECTIONS, "diffusion", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        small(monkeypatch, own, out=own)
    assert caught.value.__notes__ == [
        f"{own / 'eval' / 'report.json'} holds the sections that were finished; the same command goes on from there"
    ]
    partial = document.read(own)
    assert partial["status"] == "partial"
    assert partial["sections"]["losslessness"]["status"] == "done"
    assert {"section": "diffusion", "reason": "not run yet"} in partial["skipped"]
    monkeypatch.setitem(SECTIONS, "diffusion", right)
    monkeypatch.setitem(SECTIONS, "losslessness", interrupted)  # would be seen if it ran
    whole = small(monkeypatch, own, out=own)
    assert whole.data["status"] == "complete"
    assert whole.section("losslessness") == partial["sections"]["losslessness"]["data"]


def test_what_does_not_fit_is_skipped_with_its_reason(own, monkeypatch):
    def no_room(*_):
        raise ResourceError("the base in float32 needs about 9 GiB of memory, 1 free")

    monkeypatch.setitem(SECTIONS, "diffusion", no_room)
    report = small(monkeypatch, own, context=[24, 4096], modes=["ar", "self_spec"])
    skipped = {one["section"]: one["reason"] for one in report.data["skipped"]}
    assert skipped["diffusion"].startswith("the base in float32 needs about 9 GiB")
    assert report.section("speed")["skipped_cells"][0]["context_tokens"] == 4096
    assert report.section("acceptance")["skipped_contexts"][0]["context_tokens"] == 4096
    assert report.data["status"] == "complete"


def test_modes_that_were_not_asked_for_are_skipped(own, monkeypatch):
    report = small(monkeypatch, own, modes=["ar"])
    skipped = {one["section"]: one["reason"] for one in report.data["skipped"]}
    assert skipped["losslessness"] == skipped["acceptance"] == "mode self_spec was not asked for"
    assert set(report.section("speed")["cells"][0]["ways"]) == {"ar", "transformers", "transformers_prompt_lookup"}
    assert {one["name"] for one in report.data["verdict"]["gates"]} == {"quality_answers", "quality_not_worse"}


def test_one_prompt_of_one_token_and_prompts_of_token_ids(own, monkeypatch):
    only(monkeypatch, "losslessness", "speed")
    report = small(monkeypatch, own, prompts=[[3]], context=None)
    assert report.section("compared")["prompts"]["count"] == 1
    assert {cell["context_tokens"] for cell in report.section("speed")["cells"]} == {1}


def test_the_users_own_prompts_beyond_the_suites_number_are_told_of_and_a_limit_takes_them_in(own, monkeypatch):
    only(monkeypatch)
    most, rows = SMALL.prompts, [[token] for token in range(1, SMALL.prompts + 4)]
    few = small(monkeypatch, own, prompts=rows)
    held = few.section("compared")["prompts"]
    assert (held["count"], held["left_out"]) == (most, 3)
    assert f"{most} of the user (3 more left out)" in few.markdown
    held = small(monkeypatch, own, prompts=rows, limit=len(rows)).section("compared")["prompts"]
    assert (held["count"], held["left_out"]) == (len(rows), 0)


def test_a_live_engine(base, monkeypatch, tmp_path):
    only(monkeypatch, "acceptance")
    with retrofit.Engine.from_model(build("llama")) as engine:
        report = small(monkeypatch, engine, prompts=[[1, 2, 3], [4]], out=tmp_path / "out", modes=["ar", "self_spec"])
        assert report.section("compared")["artifact"] is None
        skipped = {one["section"]: one["reason"] for one in report.data["skipped"]}
        assert skipped["training"] == "the engine holds no record of its training"
        assert report.section("acceptance")["claimed"] == {}
        assert report.section("acceptance")["skipped_contexts"][0]["reason"].startswith("without a tokenizer")
        engine.generate([[1]], max_new_tokens=1)  # it is still open


def test_fail_under_is_a_gate_of_the_verdict(own, monkeypatch):
    only(monkeypatch, "acceptance")
    report = small(monkeypatch, own, fail_under={"tau": 0.5, "tpf": 100.0})
    assert gate(report, "asked_tau")["ok"] and not gate(report, "asked_tpf")["ok"]
    assert f"tpf is {report.data['figures']['tpf']:g}; 100 is the least" in gate(report, "asked_tpf")["says"]
    skipped = small(monkeypatch, own, modes=["ar"], fail_under={"tau": 0.5})
    assert gate(skipped, "asked_tau")["says"] == "tau was not measured"
    assert skipped.data["verdict"]["ok"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": ["fast"]}, "mode 'fast' does not exist"),
        ({"modes": []}, "--modes is empty"),
        ({"batch": [0]}, "--batch is 0; it must be whole numbers from 1"),
        ({"context": []}, "--context is empty"),
        ({"limit": 0}, "--limit is 0"),
        ({"price": 0.0}, "price is 0.0; it must be above 0"),
        ({"fail_under": {"speedup": 1.0}}, "fail-under speedup: no such figure"),
        ({"prompts": []}, "prompts is empty"),
    ],
    ids=str,
)
def test_a_wrong_option_is_one_clear_error_before_anything_is_loaded(options, message, monkeypatch):
    small_suite(monkeypatch)
    with pytest.raises(UsageError) as caught:
        retrofit.evaluate("no-such-folder", **{"prompts": PROMPTS, **options})
    assert str(caught.value).startswith(message)


def test_another_suite_does_not_exist():
    with pytest.raises(UsageError, match="suite 'quik' does not exist; did you mean `quick`"):
        retrofit.evaluate("no-such-folder", "quik")


def test_no_prompts_in_a_file(tmp_path, own):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no prompt"):
        retrofit.evaluate(own, prompts=tmp_path / "none.jsonl")


def test_the_command_says_how_to_do_it_again(own, base, monkeypatch, tmp_path):
    only(monkeypatch)
    file = tmp_path / "my prompts.jsonl"
    file.write_text('{"prompt": "def a"}\n')
    report = small(
        monkeypatch, own, prompts=file, limit=1, batch=[1], context=None, seed=3, fail_under={"tau": 1.0},
        modes=["ar"], dtype="float32", packed=False, base=str(base), trust_remote_code=True,
    )  # fmt: skip
    assert report.data["command"] == (
        "retrofit eval own --suite quick --modes ar --batch 1 --limit 1 --prompts 'my prompts.jsonl' --seed 3"
        f" --dtype float32 --packed off --base {base.name} --trust-remote-code --fail-under tau=1"
    )


def test_a_report_does_not_go_into_another_artifact(own, base, tmp_path, monkeypatch):
    other = save_artifact(tmp_path / "other", base)
    with pytest.raises(UsageError, match="is another artifact"):
        small(monkeypatch, own, out=other)
    assert not (other / "eval").exists()
