"""A Hub in trouble: what passes is waited for, the rest is one error with a cure, and no commit is made twice."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import refused, run
from loopback_hub import HANG, LOST, RESET, SHORT, Hub

from retrofit import push
from retrofit.errors import ArtifactError, ResourceError
from retrofit.sharing import waiting

NAME = "user/adapter"
PLACES = {
    "look": ("GET", f"^/api/models/{NAME}(/revision|$)"),
    "list": ("GET", "/tree/"),
    "create": ("POST", "/api/repos/create"),
    "ask": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "store": ("PUT", "^/storage/"),
    "commit": ("POST", "/commit/"),
    "fetch": ("GET", r"/resolve/.*\.safetensors"),
}
PASSING = {"429, 500, reset": (429, 500, RESET), "503, hang, lost": (503, HANG, LOST)}


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patience of a second, so that silence is noticed at once."""
    monkeypatch.setattr(waiting, "ANSWER", 0.3)
    monkeypatch.setattr(waiting, "COMMIT_ANSWER", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)


@pytest.mark.parametrize("kinds", PASSING.values(), ids=PASSING)
@pytest.mark.parametrize("place", PLACES)
def test_what_passes_is_waited_for_and_nothing_is_done_twice(
    hub: Hub, folder: Path, place: str, kinds: tuple[int | str, ...]
) -> None:
    for kind in kinds:
        hub.fail(*PLACES[place], kind, **({"Retry_After": "2"} if kind == 429 else {}))
    pushed = push(folder, NAME)
    assert pushed.verified and len(hub.repositories[NAME].messages) == 2
    if place != "commit":  # of which the last answer that is lost ends it
        assert [fault.times for fault in hub.faults] == [0, 0, 0]


@pytest.mark.parametrize("kind", [LOST, 503])
def test_files_are_not_removed_twice(hub: Hub, folder: Path, changed: Callable[..., Path], kind: int | str) -> None:
    push(folder, NAME)
    hub.fail("POST", "/commit/", kind)
    pushed = push(changed(certified=False), NAME, uncertified=True)
    assert len(hub.repositories[NAME].messages) == 3
    assert pushed.commit == hub.repositories[NAME].branches["main"]


def test_half_a_file_is_completed_when_it_is_compared(hub: Hub, folder: Path) -> None:
    hub.fail(*PLACES["fetch"], SHORT)
    assert push(folder, NAME).verified


STANDING = {
    "401": ("commit", 401, 4, "does not accept the access token", "hf auth login"),
    "403": ("commit", 403, 4, "does not let this account write to it", "hf auth login"),
    "404": ("commit", 404, 2, "not found on the Hub", "check the spelling"),
    "409": ("commit", 409, 4, "somebody else changed it", "run it again"),
    "412": ("commit", 412, 4, "somebody else changed it", "run it again"),
    "429": ("ask", 429, 4, "too many requests|does not answer as it should", "run it again later"),
    "500": ("look", 500, 4, r"in trouble \(status 500\)", "run it again later"),
    "503": ("batch", 503, 4, r"in trouble \(status 503\)|does not answer as it should", "run it again later"),
    "hang": ("list", HANG, 4, "cannot be reached|does not answer as it should", "run it again later"),
    "silent commit": ("commit", HANG, 4, "cannot be reached|does not answer as it should", "run it again later"),
    "reset": ("store", RESET, 4, "cannot be reached|does not answer as it should", "run it again later"),
}


@pytest.mark.parametrize(("place", "kind", "code", "problem", "cure"), STANDING.values(), ids=STANDING)
def test_what_stands_is_one_error_with_a_cure(
    hub: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    kind: int | str,
    code: int,
    problem: str,
    cure: str,
) -> None:
    monkeypatch.setattr(waiting, "GIVE_UP", 2.0)
    push(folder, NAME)
    (folder / "README.md").write_text("# another\n")
    hub.fail(*PLACES[place], kind, times=1000)
    if place in ("batch", "store"):
        del hub.repositories[NAME]
        hub.stored.clear()
    began = time.monotonic()
    error = refused(run("push", folder, NAME), code)
    assert time.monotonic() - began < 30
    assert re.search(problem, error) and cure in error and NAME in error
    if NAME in hub.repositories:
        assert len(hub.repositories[NAME].messages) <= 2


def test_a_server_that_asks_to_wait_for_an_hour_is_not_waited_for(hub: Hub, folder: Path, naps: list[float]) -> None:
    hub.fail("POST", "/preupload/", 429, times=9, Retry_After="3600")
    with pytest.raises(ResourceError, match="asks to wait for 3,600 s"):
        push(folder, NAME)
    assert not [nap for nap in naps if nap > 60]


@pytest.mark.parametrize("kind", [LOST, 503, HANG])
def test_a_pull_request_is_not_made_twice(
    hub: Hub, folder: Path, changed: Callable[..., Path], kind: int | str
) -> None:
    push(folder, NAME)
    hub.fail("POST", "/commit/", kind, times=9)
    with pytest.raises(ResourceError, match="did not say whether it made the pull request") as caught:
        push(changed(), NAME, create_pr=True)
    assert f"{hub.url}/{NAME}/discussions" in str(caught.value.hint)
    assert len(hub.requests("POST", "/commit/")) == 2


def test_a_commit_of_somebody_else_in_between_is_left_alone(
    hub: Hub, folder: Path, changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(folder, NAME)
    from huggingface_hub import HfApi

    upload = HfApi.preupload_lfs_files

    def meanwhile(*arguments, **options):
        hub.repositories[NAME].commit({**hub.repositories[NAME].files, "README.md": b"theirs"}, message="theirs")
        return upload(*arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", meanwhile)
    with pytest.raises(ResourceError, match="somebody else changed it"):
        push(changed(), NAME)
    assert hub.repositories[NAME].messages[-1] == "theirs"


def test_what_the_hub_holds_otherwise_is_found(hub: Hub, folder: Path) -> None:
    real = hub.server.RequestHandlerClass.commit

    def altering(handler, name, repository, *arguments):
        answer = real(handler, name, repository, *arguments)
        files = repository.commits[answer[1]["commitOid"]]
        data = files["heads.safetensors"]
        files["heads.safetensors"] = data[:-1] + bytes([data[-1] ^ 1])
        return answer

    hub.server.RequestHandlerClass.commit = altering
    with pytest.raises(ArtifactError, match=r"what the Hub holds of heads\.safetensors is not what was sent"):
        push(folder, NAME)
