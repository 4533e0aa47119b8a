"""`retrofit certify` on artifacts that the real `convert` wrote: every layout, with and without measured ranks."""

import json
import shutil

import pytest
from certifying import command, converted, ranks_of, small
from recurrent_models import build
from tiny_conversion import tokenizer

from benchmarks import decoders
from retrofit.eval import audit, bitwise, certify
from retrofit.runtime.engine import Engine

LAYOUTS = {
    "mask bidirectional": {},
    "noise causal, grown blocks": {"draft__input": "noise", "draft__attention": "causal", "train__curriculum": [2]},
    "mask causal, no ranks": {"draft__attention": "causal", "data__held_out": 0},
    "noise bidirectional, seed draft": {"draft__input": "noise", "draft__seed_row": "draft"},
    "seed draft, shift 0, no ranks": {"draft__seed_row": "draft", "draft__shift": 0, "data__held_out": 0},
    "mask bidirectional, seed draft": {"draft__seed_row": "draft", "objective__draft_loss": "lk"},
    "causal, seed draft": {"draft__attention": "causal", "draft__seed_row": "draft"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, flat, texts):
    """Each layout's artifact, converted when it is first asked for."""
    folders = {}

    def make(name):
        if name not in folders:
            folders[name] = converted(tmp_path_factory.mktemp("made") / "artifact", flat, texts, **LAYOUTS[name])
        return folders[name]

    return make


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_certified(made, name, monkeypatch):
    small(monkeypatch)
    folder = made(name)
    assert (ranks_of(folder) is None) == ("no ranks" in name)
    result, checks = command(folder, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert list(checks) == list(certify.CHECKS)
    runs = checks["audit"]["details"]["runs"]
    grown = {way for way, figures in runs.items() if figures["branched"]}
    anchored = "seed draft" not in name
    assert ("fused" in runs) == anchored
    # Trees are what `fused` runs as soon as the artifact knows its candidates' chances; sampled ones here are not 0.
    trees = {"fused, prepare 2, penalty", "fused, ragged"}
    assert trees <= grown if anchored and ranks_of(folder) else not grown & trees
    assert all(figures["targets"] for figures in runs.values())
    assert sum(figures["accepted"] for figures in runs.values()) > 0


@pytest.mark.parametrize(("name", "make"), [("qwen3_5", build), ("deepseek_v32", decoders.build)])
def test_bases_that_recur_or_pick_their_keys_are_certified(name, make, tmp_path, texts, monkeypatch):
    small(monkeypatch, prompts=1, tokens=4)
    base = tmp_path / "base"
    make(name).save_pretrained(base)
    tokenizer().save_pretrained(base)
    result, checks = command(converted(tmp_path / "artifact", base, texts), "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert list(checks) == list(certify.CHECKS)


def test_what_was_certified_is_said(made, monkeypatch):
    small(monkeypatch, only=("gate",))
    folder = made("mask bidirectional")
    result, _ = command(folder, "--exact", "off")
    assert result.exit_code == 0, result.output
    assert "certified was the hf backend, exact=off, in float32 on cpu\n" in result.stderr
    content = json.loads((folder / "certificate.json").read_text())
    assert (content["backend"], content["exact"], content["dtype"]) == ("hf", "off", "float32")


def test_half_precision_without_a_level_is_not_certified(made, monkeypatch):
    small(monkeypatch, only=("bitwise",))
    result, checks = command(made("mask bidirectional"), "--dtype", "bfloat16", "--exact", "off")
    assert result.exit_code == 3
    found = checks["bitwise"]
    assert found["status"] == "skipped"
    assert found["detail"].startswith("level off promises no bitwise equality in bfloat16: ")
    assert f"{found['details']['equal']} of {found['details']['texts']} texts" in found["detail"]
    control = found["details"]["control"]
    assert control["texts"] == 3
    assert 0 <= control["transformers_in_another_batch"] <= 3 and 0 <= control["ar_equals_transformers"] <= 3
    assert "not certified: bitwise skipped" in result.stderr


def test_a_level_that_does_not_keep_its_promise_fails(made, monkeypatch):
    """A text that leaves `ar`'s is excused at no level but `off`."""
    small(monkeypatch, only=("bitwise",))
    folder = made("mask bidirectional")
    right = Engine.generate

    def other(self, prompts, mode="self_spec", **options):
        results = right(self, prompts, mode, **options)
        if mode == "self_spec" and options["batch_size"] == 3 and options["strategy"] == "prompt_lookup":
            results[1].tokens[-1] ^= 1
        return results

    monkeypatch.setattr(Engine, "generate", other)
    result, checks = command(folder, "--exact", "off")
    assert result.exit_code == 3
    assert checks["bitwise"]["status"] == "failed"
    assert {(d["strategy"], d["prompt"]) for d in checks["bitwise"]["details"]["differences"]} == {("prompt_lookup", 1)}
    monkeypatch.setattr(bitwise, "HALF", ())
    monkeypatch.setattr(bitwise, "mark_excused", lambda *_: 0)  # a margin too small for fp32 to tell
    assert command(folder, "--exact", "off")[0].exit_code == 0
    load = Engine.load

    def with_level(*arguments, **options):
        engine = load(*arguments, **options)
        engine.backend.exact = "invariant"
        return engine

    monkeypatch.setattr(Engine, "load", with_level)
    result, checks = command(folder, "--exact", "off")
    assert checks["bitwise"]["status"] == "failed"
    assert checks["bitwise"]["detail"].startswith("level invariant, float32: ")


def test_bitwise_covers_every_strategy_and_batch(made):
    engine = Engine.load(made("mask bidirectional"))
    ran = list(bitwise.runs(engine, 8, 64))
    assert {options["batch_size"] for _, options, _, _ in ran} == {1, 3, 8}
    spec = [(o["strategy"], o["batch_size"]) for mode, o, _, _ in ran if mode == "self_spec"]
    assert set(spec) == {(s, b) for s in ("auto", "fused", "hybrid", "prompt_lookup", "two_forward") for b in (1, 3, 8)}
    assert {o["batch_size"] for mode, o, _, _ in ran if mode == "ar"} == {1, 3}


def test_a_ragged_run_ends_at_an_eos_and_uses_slots_again(made):
    engine = Engine.load(made("mask bidirectional"))
    prompts = [[i, i + 1, 2 * i, 5, 9, 11, 3] for i in range(8)]
    cut, limits = audit.ragged(prompts, 20)
    assert len(set(map(len, cut))) > 3 and len(set(limits)) > 2
    eos = audit.common_token(engine, cut, limits, audit.SAMPLED)
    assert len(eos) == 1
    with audit.ended_by(engine, eos):
        found = audit.audit_run(engine, cut, limits, audit.SAMPLED, eos, strategy="two_forward", batch_size=3)
    assert engine.backend.eos == frozenset()
    assert not found.problems
    ended = [text[-1] in eos for text in found.texts]
    assert any(ended) and not all(ended)
    assert all(len(text) == limit for text, limit, end in zip(found.texts, limits, ended, strict=True) if not end)


def test_auto_is_put_back(made):
    engine = Engine.load(made("mask bidirectional"))
    costs = engine.policy.costs
    with audit.every_plan(engine):
        engine.generate([[1, 2, 3]], strategy="auto", max_new_tokens=4)
        assert engine.policy.costs is not costs
    assert engine.policy.costs is costs and not vars(engine.policy).keys() & {"choose", "trials"}


def test_demo_ends_with_the_certificate(made, tmp_path, monkeypatch):
    """Its verdict is part of the summary and of the exit code."""
    from benchmarks import demo

    small(monkeypatch, only=("gate", "audit"))
    folder = shutil.copytree(made("mask bidirectional"), tmp_path / "artifact")
    figures = demo.certified(folder)
    assert figures["ok"] and [c["name"] for c in figures["checks"]] == ["artifact", "gate", "audit"]
    assert (folder / "certificate.json").is_file()
    said = demo.certificate_lines(figures)
    assert "certified: the hf backend" in said and "audit" in said
    same = {"greedy": {"equal": 2, "total": 2}}
    assert demo.exit_code({"lossless": same, "certificate": figures}) == 0
    assert demo.exit_code({"lossless": same, "certificate": {**figures, "ok": False}}) == 3
    assert demo.exit_code({"lossless": {"greedy": {"equal": 1, "total": 2}}, "certificate": figures}) == 3
    assert "NOT certified" in demo.certificate_lines({**figures, "ok": False})
