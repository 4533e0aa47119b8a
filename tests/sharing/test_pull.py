"""`pull`, `Engine.load` and `inspect` of a repository: whole, pinned to a commit, and kept for when there is no Hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from artifact_folders import contents
from commands import done, refused, run
from loopback_hub import HANG, LARGE, RESET, SHORT, Hub
from saved import save_artifact

from retrofit import Engine, named_bases, pull, push
from retrofit.artifact import folder as artifact
from retrofit.errors import ArtifactError, ResourceError, UsageError
from retrofit.sharing import waiting
from retrofit.sharing.pulling import local_folder, source

NAME = "user/adapter"


@pytest.fixture
def pushed(hub: Hub, folder: Path) -> str:
    """The commit of a repository with `folder` in it and a file of another program."""
    push(folder, NAME)
    there = hub.repositories[NAME]
    commit = there.commit({**there.files, "pytorch_model.bin": b"a pickle", "notes.txt": b"theirs"})
    hub.log.clear()
    return commit


def shared(folder: Path) -> dict[str, bytes]:
    return {
        name: data for name, data in contents(folder).items() if name not in ("README.md", "local.json", "notes.md")
    }


def test_what_was_pushed_is_pulled(hub: Hub, folder: Path, pushed: str) -> None:
    found = pull(NAME)
    pulled = contents(found)
    assert pulled.pop("README.md") == hub.repositories[NAME].files["README.md"]
    assert pulled == shared(folder)
    assert found.name == pushed and source(found) == {"repository": NAME, "commit": pushed}
    assert not hub.requests("GET", "pytorch_model|notes|gitattributes")
    artifact.read(found)


def test_into_a_folder(hub: Hub, folder: Path, pushed: str, tmp_path: Path) -> None:
    out = pull(NAME, tmp_path / "some" / "where")
    assert {**contents(out), "README.md": b""} == {**shared(folder), "README.md": b""}
    assert [path.name for path in out.parent.iterdir()] == ["where"] and source(out) is None
    with pytest.raises(UsageError, match="holds an artifact already"):
        pull(NAME, out)
    assert pull(NAME, out, overwrite=True) == out


def test_a_second_pull_fetches_nothing(hub: Hub, pushed: str) -> None:
    first = pull(NAME)
    hub.log.clear()
    assert pull(NAME) == first
    assert [path for _, path in hub.log] == [f"/api/models/{NAME}"]


def test_a_commit_stays_what_it_was(hub: Hub, pushed: str, changed: Callable[..., Path]) -> None:
    first = pull(NAME)
    later = push(changed(), NAME).commit
    assert pull(f"{NAME}@{pushed}") == first
    assert pull(NAME).name == later != pushed
    push(changed(2), NAME, revision="next")
    assert pull(f"{NAME}@next").name == hub.repositories[NAME].branches["next"]


def test_without_the_hub_it_is_what_was_pulled_last(hub: Hub, pushed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pull(NAME)
    hub.log.clear()
    assert pull(NAME, offline=True) == local_folder(NAME, offline=True) == found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert pull(NAME) == found
    assert hub.log == []
    with pytest.raises(ResourceError, match="user/none: not a folder here, and nothing of that name from the Hub"):
        pull("user/none")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.fail("GET", "", 503, times=99)
    assert pull(NAME) == found
    with pytest.raises(ResourceError, match=r"in trouble \(status 503\)"):
        pull("user/none")


def test_what_is_damaged_in_the_cache_is_fetched_again(hub: Hub, pushed: str) -> None:
    found = pull(NAME)
    path = found / artifact.HEADS
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="sha256"):
        artifact.read(local_folder(NAME))
    assert pull(NAME) == found and path.read_bytes() == data


@pytest.mark.parametrize("kind", [429, 500, 503, HANG, RESET, SHORT])
@pytest.mark.parametrize("path", [f"/api/models/{NAME}$", "/tree/", rf"/resolve/.*{LARGE}", "/resolve/.*json"])
def test_what_passes_is_waited_for(
    hub: Hub, folder: Path, pushed: str, path: str, kind: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "ANSWER", 0.3)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    hub.fail("GET", path, kind, **({"Retry_After": "1"} if kind == 429 else {}))
    assert {**contents(pull(NAME)), "README.md": b""} == {**shared(folder), "README.md": b""}


@pytest.mark.parametrize(
    ("status", "code", "problem"),
    [
        (401, 4, "does not accept the access token"),
        (403, 4, "does not let this account read"),
        (404, 2, "not found on the Hub"),
        (500, 4, "the Hub does not answer as it should"),
    ],
)
def test_what_stands_is_one_error_and_nothing_half_there(
    hub: Hub, pushed: str, tmp_path: Path, status: int, code: int, problem: str
) -> None:
    hub.fail("GET", rf"/resolve/.*{LARGE}", status, times=99)
    hub.fail("HEAD", rf"/resolve/.*{LARGE}", status, times=99)
    assert problem in refused(run("pull", NAME, "-o", tmp_path / "out"), code)
    assert not (tmp_path / "out").exists()
    left = [path for path in (tmp_path / "cache" / "artifacts").rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["@default"]


def test_what_is_not_there_is_said(hub: Hub) -> None:
    with pytest.raises(UsageError, match="user/none: not a folder here, and no repository on the Hub"):
        pull("user/none")
    hub.add("user/model", {"config.json": b"{}"})
    with pytest.raises(ArtifactError, match=r"user/model: holds no retrofit\.json, so it is no artifact"):
        pull("user/model")
    with pytest.raises(UsageError, match="user/model@none: no such revision"):
        pull("user/model@none")


def test_the_engine_loads_a_repository(hub: Hub, base: Path, tmp_path: Path) -> None:
    saved = artifact.read(save_artifact(tmp_path / "saved", base))
    named = {**saved.config["base"], "model": "base", "revision": None, "local": True}
    own = artifact.write(
        tmp_path / "own",
        adapter_config=saved.adapter_config,
        adapter_state=saved.adapter_state,
        heads=saved.heads,
        config={**saved.config, "base": named},
        recipe_yaml="profile: frozen\n",
        card="# card\n",
    )
    push(own, NAME, uncertified=True)
    with pytest.raises(UsageError, match="lay on another machine"):
        Engine.load(NAME)
    asked = {"max_new_tokens": 8, "ignore_eos": True}
    with Engine.load(NAME, base=str(base)) as engine:
        tokens = engine.generate(["def area"], **asked)[0].tokens
    with Engine.load(own, base=str(base)) as engine:
        assert engine.generate(["def area"], **asked)[0].tokens == tokens
    hub.log.clear()
    with Engine.load(NAME, base=str(base), offline=True) as engine:
        assert engine.generate(["def area"], **asked)[0].tokens == tokens
    assert hub.log == []


def test_inspect_tells_what_a_repository_holds(hub: Hub, folder: Path, pushed: str) -> None:
    described = json.loads(done("inspect", NAME, "--json"))
    assert described["hub"] == {"repository": NAME, "commit": pushed}
    assert described["base"] == artifact.read_config(folder)["base"]
    assert f"{NAME} @ {pushed}" in done("inspect", NAME, "--offline")


def test_a_folder_of_that_name_is_meant_first(
    hub: Hub, folder: Path, pushed: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "user").mkdir()
    folder.rename(tmp_path / NAME)
    monkeypatch.chdir(tmp_path)
    assert local_folder(NAME) == Path(NAME) and hub.log == []
    assert done("pull", NAME).strip().endswith(pushed)


def test_a_base_whose_artifact_ships_with_retrofit_names_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "smollm2-135m"
    shipped.mkdir()
    monkeypatch.setattr(named_bases, "SHIPPED", tmp_path)
    assert local_folder("smollm2-135m") == shipped
    monkeypatch.chdir(tmp_path)  # a folder of that name is ./NAME
    assert local_folder("./smollm2-135m") == Path("./smollm2-135m")
    with pytest.raises(UsageError, match="tiny is a base and no artifact"):
        local_folder("tiny")
