"""`retrofit certify`: what it writes and prints, and how it ends."""

import json

import pytest
from commands import done, run

import retrofit
from retrofit import progress
from retrofit.artifact import folder as artifact
from retrofit.eval import certify


def test_certify_writes_the_certificate_and_prints_the_checks(own, monkeypatch):
    monkeypatch.setitem(certify.LEVELS, "quick", certify.Size(prompts=2, tokens=8, samples=0))
    monkeypatch.setattr(certify, "distribution", lambda *_: certify.Verdict(True, "not run here", {}))
    monkeypatch.setattr(progress, "EVERY", float("inf"))
    result = run("certify", own, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    content = json.loads((own / "certificate.json").read_text())
    assert content["ok"] is True
    assert [line.split()[:2] for line in result.stdout.splitlines()] == [
        ["passed", check["name"]] for check in content["checks"]
    ]
    assert result.stderr == (
        f"certified was the hf backend, exact={content['exact']}, in float32 on cpu\nwrote {own / 'certificate.json'}\n"
    )
    artifact.check(own)
    assert "certificate  ok" in done("inspect", own)


@pytest.mark.parametrize("status", ["failed", "skipped"])
def test_certify_ends_with_3_when_a_check_is_not_met(own, monkeypatch, status):
    checks = [certify.Check("gate", "passed", "fine"), certify.Check("greedy-fp32", status, "1 of 8")]
    certificate = certify.Certificate({}, {}, "quick", checks, "today")
    monkeypatch.setattr(retrofit, "certify", lambda *arguments, **options: certificate, raising=False)
    result = run("certify", own, "--json", "-q")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["ok"] is False
    assert result.stderr == f"Error: not certified: greedy-fp32 {status}\n"
    assert "NOT OK" in done("inspect", own)
