"""`retrofit certify`: what it writes and prints, and how it ends."""

import json
import os

import pytest
from artifact_folders import contents
from commands import done, refused, run

import retrofit
from retrofit import named_bases, progress
from retrofit.artifact import folder as artifact
from retrofit.eval import certify

NAME = certify.CERTIFICATE


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


@pytest.fixture
def passing(monkeypatch):
    certificate = certify.Certificate({}, {}, "quick", [certify.Check("gate", "passed", "fine")], "today")
    monkeypatch.setattr(retrofit, "certify", lambda *arguments, **options: certificate, raising=False)


@pytest.mark.usefixtures("passing")
def test_the_certificate_of_what_ships_goes_into_the_cache(own, tmp_path, monkeypatch):
    (tmp_path / "shipped").mkdir()
    place = own.rename(tmp_path / "shipped" / "smollm2-135m")
    monkeypatch.setattr(named_bases, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
    before = contents(place)
    written = tmp_path / "cache" / "shipped" / "smollm2-135m" / "certificate.json"
    assert f"wrote {written}" in run("certify", "smollm2-135m").stderr
    assert json.loads(written.read_text())["ok"] is True and contents(place) == before


@pytest.mark.usefixtures("passing")
def test_the_certificate_goes_where_it_is_told(own, made, tmp_path):
    for place, written in ((tmp_path / "a" / "b.json", tmp_path / "a" / "b.json"), (tmp_path, tmp_path / NAME)):
        assert f"wrote {written}" in run("certify", own, "-o", place).stderr and written.is_file()
    assert not (own / NAME).exists()
    assert "is another artifact" in refused(run("certify", own, "-o", made), 2)
    assert f"wrote {own / NAME}" in run("certify", own, "-o", own).stderr


def test_a_certificate_that_cannot_be_written_is_refused_before_the_checks_run(own, tmp_path, monkeypatch):
    monkeypatch.setattr(retrofit, "certify", lambda *_, **__: pytest.fail("checks ran"), raising=False)
    (tmp_path / "notes.txt").write_text("a file")
    message = refused(run("certify", own, "-o", tmp_path / "notes.txt" / "c.json"), 4)
    assert f"{tmp_path / 'notes.txt'} is no folder" in message
    may = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and may(path, mode))  # also for root
    assert f"{own} is not writable" in refused(run("certify", own), 4)
