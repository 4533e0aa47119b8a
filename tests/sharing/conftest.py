"""A Hub on loopback that the library of the Hub takes for the real one, and what is pushed to it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from artifact_folders import certify, write
from huggingface_hub import close_session, constants, hf_api
from loopback_hub import TOKEN, Hub


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits between two tries; how long they would have waited."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    return slept


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, naps: list[float]) -> Iterator[Hub]:
    with Hub() as served:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(hf_api.api, "endpoint", served.url)  # whose functions PEFT calls
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        close_session()
        yield served
        close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A certified artifact of a few bytes, with a file of this machine and one that is nobody's business."""
    made = write(tmp_path / "artifact", local={"base": "somewhere"}, added={"metrics.jsonl": b"{}\n"})
    certify(made)
    (made / "notes.md").write_text("not for others")
    return made


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Another version of the artifact, in a folder of its own."""

    def make(seed: int = 1, certified: bool = True) -> Path:
        made = write(tmp_path / f"artifact-{seed}", seed)
        if certified:
            certify(made)
        return made

    return make
