"""`push` of what is named otherwise than by its folder: an artifact that ships, and one of the Hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from artifact_folders import certify, contents
from commands import done
from loopback_hub import Hub

from retrofit import named_bases, push
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256
from retrofit.errors import GateError
from retrofit.sharing.pulling import findings_folder, local_folder, pull

NAME, SHIPPED = "user/adapter", "smollm2-135m"


@pytest.fixture
def shipped(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The artifact under a name, its certificate left out."""
    (tmp_path / "shipped").mkdir()
    monkeypatch.setattr(named_bases, "SHIPPED", tmp_path / "shipped")
    for part in ("certificate.json", "certificate.json.sha256"):
        (folder / part).unlink()
    return folder.rename(tmp_path / "shipped" / SHIPPED)


def found_out(shipped: Path, **certificate: object) -> Path:
    """The folder of the cache, with a certificate and a report as `certify` and `eval` leave them there."""
    found = findings_folder(SHIPPED, shipped)
    found.mkdir(parents=True)
    of = sha256(shipped / artifact.MANIFEST)
    (found / "certificate.json").write_text(json.dumps({"ok": True, "manifest_sha256": of, **certificate}))
    compared = {
        "engine": {"dtype": "float32", "backend": "hf"},
        "hardware": {"gpu": None, "cpu": "a processor", "threads": 1, "cores": 1},
        "prompts": {"count": 2},
        "artifact": {"manifest_sha256": of},
    }
    report = {"status": "complete", "verdict": {"lines": ["It pays."]}, "command": "retrofit eval", "figures": {}}
    report["sections"] = {"compared": {"data": compared}}
    (found / "report.json").write_text(json.dumps(report))
    (found / "report.svg").write_text("<svg/>")
    return found


def test_what_was_found_out_about_an_artifact_that_ships_is_pushed_with_it(hub: Hub, shipped: Path) -> None:
    before = contents(shipped)
    with pytest.raises(GateError, match=f"^{SHIPPED}: there is no certificate"):
        push(SHIPPED, NAME)
    found_out(shipped)
    pushed = push(SHIPPED, NAME)
    files = hub.repositories[NAME].files
    assert pushed.certified and "certificate.json" in files and files["eval/report.svg"] == b"<svg/>"
    assert b"It pays." in files["README.md"]
    assert contents(shipped) == before  # what is installed is not written to
    artifact.check(pull(NAME))
    assert push(SHIPPED, NAME).commit is None


def test_what_was_found_out_about_another_version_is_not(hub: Hub, shipped: Path) -> None:
    found = found_out(shipped, manifest_sha256="another")
    report = json.loads((found / "report.json").read_text())
    report["sections"]["compared"]["data"]["artifact"]["manifest_sha256"] = "another"
    (found / "report.json").write_text(json.dumps(report))
    pushed = push(SHIPPED, NAME, uncertified=True)
    assert not pushed.certified
    assert not [name for name in hub.repositories[NAME].files if name.startswith(("certificate", "eval"))]


def test_an_artifact_of_the_hub_is_pushed_by_its_name(hub: Hub, folder: Path) -> None:
    push(folder, NAME)
    assert done("push", NAME, "user/copy", "-q").endswith("/user/copy\n")
    one, other = (hub.repositories[name].files for name in (NAME, "user/copy"))
    assert {name for name in one if one[name] != other[name]} == {"README.md"}
    assert local_folder("user/copy").is_dir()


def test_what_ships_is_pulled_by_its_name_without_the_hub(hub: Hub, shipped: Path, tmp_path: Path) -> None:
    assert pull(SHIPPED) == shipped
    assert contents(pull(SHIPPED, tmp_path / "copy")) == contents(shipped)
    assert hub.log == []


def test_the_certificate_that_failed_last_counts(hub: Hub, shipped: Path) -> None:
    certify(shipped)
    found_out(shipped, ok=False)
    with pytest.raises(GateError):
        push(SHIPPED, NAME)
