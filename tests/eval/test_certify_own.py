"""A certificate of kind `own`: of an artifact whose model was trained along, against that model's own `ar`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from certifying import command, converted, small

from retrofit.artifact import folder as artifact
from retrofit.sharing.card import published_card

JOINT = {"profile": "joint", "joint__rank": 2, "joint__lr": 1e-3}


@pytest.mark.parametrize("weights", ["lora", "full"])
def test_it_is_lossless_against_its_own_ar_and_says_how_far_from_the_original(
    tmp_path: Path, flat: Path, texts: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(tmp_path / "out", flat, texts, joint__weights=weights, **JOINT)
    small(monkeypatch)
    result, checks = command(folder)
    assert result.exit_code == 0, result.output
    assert {check["status"] for check in checks.values()} == {"passed"}
    certificate = json.loads((folder / "certificate.json").read_text())
    config = artifact.read_config(folder)
    assert certificate["kind"] == "own" and certificate["drift"] == config["drift"]
    assert certificate["original"]["model"] == config["original"]["model"]
    assert "kind own: against its own `ar`, not that of" in result.stderr
    card = published_card((folder / "README.md").read_text(), "me/own", config, certificate)
    assert "gives the output of its own `ar`" in card and "its output is not that of the original" in card
    assert 'subfolder="model"' in card and "untouched" not in card and "original model" not in card


def test_of_a_frozen_base_it_is_of_kind_original(
    tmp_path: Path, flat: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted(tmp_path / "out", flat, texts)
    small(monkeypatch, only=("base-weights",))
    command(folder)
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate["kind"] == "original" and "drift" not in certificate
