"""Files added to an artifact later: the manifest carries their hash, nothing else changes."""

import hashlib
import os

import pytest
from artifact_folders import FULL, contents, failing, write

from retrofit.artifact import files
from retrofit.artifact import folder as artifact
from retrofit.errors import ArtifactError, ResourceError, RetrofitError, UsageError


def test_added_files_carry_their_hash(folder):
    path = artifact.add(folder, "eval/figures/tau.svg", b"<svg/>")
    assert path.read_bytes() == b"<svg/>"
    digest = hashlib.sha256(b"<svg/>").hexdigest()
    assert (path.parent / "tau.svg.sha256").read_text() == f"{digest}  tau.svg\n"
    artifact.add(folder, "eval/figures/tau.svg", "<svg>2</svg>")
    artifact.check(folder)
    path.write_bytes(b"<svg>3</svg>")
    with pytest.raises(ArtifactError, match=r"tau\.svg: damaged or altered"):
        artifact.check(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"tau\.svg: missing"):
        artifact.check(folder)


def test_the_card_may_be_edited(folder):
    artifact.add(folder, "README.md", "# new\n")
    (folder / "README.md").write_text("# mine\n")
    artifact.check(folder)
    assert not (folder / "README.md.sha256").exists()


BAD_NAMES = [
    "",
    "../x.json",
    "/x.json",
    "a\\b.json",
    "x.pt",
    "x",
    "retrofit.json",
    "./retrofit.json",
    "manifest.sha256.json",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_cannot_be_added(folder, name):
    before = contents(folder.parent)
    with pytest.raises(UsageError):
        artifact.add(folder, name, "x")
    assert contents(folder.parent) == before


def test_add_does_not_follow_a_link_outside(folder, tmp_path):
    (tmp_path / "outside").mkdir()
    (folder / "eval").symlink_to(tmp_path / "outside")
    with pytest.raises(ArtifactError, match="leads out"):
        artifact.add(folder, "eval/report.md", "x")
    assert not any((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("after", [0, 1])
def test_a_failed_add_leaves_no_wrong_hash_and_no_temporary_file(folder, monkeypatch, after):
    artifact.add(folder, "certificate.json", "old")
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", failing(files.write_file, after, FULL))
        with pytest.raises(ResourceError, match=r"certificate\.json: cannot write 3 bytes"):
            artifact.add(folder, "certificate.json", "new")
    artifact.check(folder)
    assert not list(folder.glob(".*"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_not_writable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RetrofitError, match="cannot write") as caught:
        write(tmp_path / "a")
    assert isinstance(caught.value, ResourceError)
