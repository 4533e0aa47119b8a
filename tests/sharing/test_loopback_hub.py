"""The double of the Hub answers as the Hub's own library expects: what the other tests stand on."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from loopback_hub import HANG, LOST, RESET, SHORT, Hub

FILES = {"README.md": b"# card\n", "model.safetensors": bytes(range(256)) * 40, "eval/report.json": b"{}"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(data)
    return tmp_path / "source"


def upload(source: Path) -> None:
    HfApi().create_repo("user/model", private=True, exist_ok=True)
    HfApi().upload_folder(repo_id="user/model", folder_path=source)


def test_what_the_library_uploads_it_downloads(hub: Hub, source: Path) -> None:
    upload(source)
    assert hub.repositories["user/model"].private
    place = Path(snapshot_download("user/model"))
    assert {name: (place / name).read_bytes() for name in FILES} == FILES
    assert hub.requests("PUT", "^/storage/") and hub.token_seen_at == {"api"}


def test_an_unchanged_upload_makes_no_commit(hub: Hub, source: Path) -> None:
    upload(source)
    before = dict(hub.repositories["user/model"].commits)
    upload(source)
    assert hub.repositories["user/model"].commits == before


def test_what_is_not_there_is_told_apart(hub: Hub) -> None:
    hub.add("user/open", FILES)
    hub.add("user/hidden", FILES, private=True)
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("user/none")
    with pytest.raises(RepositoryNotFoundError):
        HfApi(token=False).model_info("user/hidden")
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("user/open", revision="none")
    assert HfApi().model_info("user/hidden").private


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_a_status_is_answered_as_often_as_asked(hub: Hub, status: int) -> None:
    hub.add("user/open", FILES)
    hub.fail("GET", "/revision/", status)
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().model_info("user/open", revision="main")
    assert caught.value.response.status_code == status
    assert HfApi().model_info("user/open", revision="main").sha


def test_half_a_body_is_completed(hub: Hub) -> None:
    hub.add("user/open", FILES)
    hub.fail("GET", r"/resolve/.*model\.safetensors", SHORT)
    place = Path(snapshot_download("user/open"))
    assert (place / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert len(hub.requests("GET", r"/resolve/.*model\.safetensors")) == 2


@pytest.mark.parametrize("kind", [HANG, RESET, LOST])
def test_no_answer_is_no_answer(hub: Hub, kind: str) -> None:
    hub.add("user/open", FILES)
    hub.fail("GET", "/revision/", kind)
    with pytest.raises(Exception, match=r"(?i)timed out|disconnected|reset|closed"):
        HfApi().model_info("user/open", revision="main", timeout=0.2)
