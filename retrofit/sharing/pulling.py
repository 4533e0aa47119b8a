"""`retrofit pull`: an artifact from a repository of the Hub, checked whole before it is anywhere.

    RETROFIT_CACHE/artifacts/OWNER--NAME/COMMIT/           the artifact
    RETROFIT_CACHE/artifacts/OWNER--NAME/refs/REVISION     the commit a branch or tag led to when it was last asked
    RETROFIT_CACHE/shipped/NAME/                           what was found out about an artifact that ships with retrofit

A repository is written by strangers: only files that `is_shared` names are fetched, sizes are compared before anything
large is, and nothing is opened that could run code.  Not here: what makes an artifact whole (`retrofit.artifact`).
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from retrofit import __version__
from retrofit.artifact import folder as artifact
from retrofit.artifact.beside import beside
from retrofit.artifact.files import check_room, disk, replace_file
from retrofit.errors import ArtifactError, ResourceError, UsageError
from retrofit.locating import is_offline
from retrofit.named_bases import EMBEDDED, shipped_artifact
from retrofit.sharing.faults import UnreachableError
from retrofit.sharing.fetching import download
from retrofit.sharing.names import Repository, is_shared, on_hub
from retrofit.sharing.names import repository as parsed
from retrofit.sharing.remote import RemoteFile, look
from retrofit.sharing.waiting import ANSWER, retried

COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT = "@default"
"""Under this name the commit of the default branch is kept; no branch can have it."""
FIRST = (artifact.CONFIG, artifact.ADAPTER_CONFIG, artifact.MANIFEST)
"""What says how large the rest is."""
LARGEST_TEXT = 1 << 26
"""Bytes of a file that is not weights."""
MOST_FILES = 2000
OWNER = "its owner has to push it again; nothing of it was kept"


def pull(repository: str, out: str | Path | None = None, *, overwrite: bool = False, offline: bool = False) -> Path:
    """Fetch an artifact, OWNER/NAME or OWNER/NAME@REVISION, and return its folder.

    out: where to put it, as `convert` does; None: in the cache, where `Engine.load` looks for it.  What is there
    already and whole is not fetched again; nor is an artifact that ships with retrofit, given by its name.
    Raises UsageError, ArtifactError for what is no intact artifact, ResourceError.
    """
    if out is not None:
        artifact.check_writable(Path(out), overwrite)
    kept = shipped_artifact(repository) or _kept(parsed(repository), offline, whole=True)
    if out is None:
        return kept
    out = Path(out)
    size = sum(path.stat().st_size for path in kept.rglob("*") if path.is_file())
    with beside(out, size) as new, disk(out, size):
        shutil.copytree(kept, new, dirs_exist_ok=True)
        artifact.put(new, out)
    return out


def local_folder(name: str | Path, offline: bool = False) -> Path:
    """The folder of an artifact named by its folder, by a base whose artifact ships with retrofit, or by its repository
    on the Hub, from where it is fetched if need be.

    What it holds is not checked, as whoever reads it does.  Raises what `pull` raises.
    """
    if not str(name):  # as a path it would be the working folder
        raise UsageError("the name of the artifact is empty", "name a folder that `retrofit convert` wrote")
    if (shipped := shipped_artifact(name)) is not None:
        return shipped
    if name == EMBEDDED and not Path(name).exists():
        raise UsageError(f"{name} is a base and no artifact", f"`retrofit convert -o {name}-retrofit` makes one of it")
    artifact.restore(Path(name))
    found = on_hub(name)
    return Path(name) if found is None else _kept(found, offline, whole=False)


def findings_folder(name: str | Path, folder: Path) -> Path:
    """Where certificate and report of an artifact go: into it, but of one that ships with retrofit into the cache.

    name: as it was given; folder: where `local_folder` found it.  What is installed is not written to.
    """
    if shipped_artifact(name) is None:
        return folder
    from retrofit.machine import cache_folder

    return cache_folder() / "shipped" / name


def source(folder: Path) -> dict[str, str] | None:
    """`repository` and `commit` of a folder of the cache; None of any other."""
    if COMMIT.fullmatch(folder.name) is None or folder.parent.parent != _cache():
        return None
    return {"repository": folder.parent.name.replace("--", "/", 1), "commit": folder.name}


def _cache() -> Path:
    from retrofit.machine import cache_folder  # imports torch, which a folder of this machine is inspected without

    return cache_folder() / "artifacts"


def _kept(asked: Repository, offline: bool, whole: bool) -> Path:
    """whole: whether what is kept is to be checked, and fetched again where it is damaged."""
    home = _cache() / asked.id.replace("/", "--", 1)
    offline = is_offline(offline)
    commit = resolved(asked, home, offline)
    kept = home / commit
    if _is_there(kept, whole):
        return kept
    if offline:
        raise not_kept(asked)
    _fetch(asked, commit, kept)
    return kept


def _is_there(kept: Path, whole: bool) -> bool:
    if not (kept / artifact.CONFIG).is_file():
        return False
    if whole:
        with suppress(ArtifactError):
            artifact.check(kept)
            return True
    return not whole


def not_kept(asked: Repository) -> ResourceError:
    """What to say of a repository that there is no network for."""
    problem = f"{asked}: not a folder here, and nothing of that name from the Hub is kept"
    return ResourceError(problem, "check the spelling, or go online once")


def resolved(asked: Repository, home: Path, offline: bool) -> str:
    """The commit that a name means; where the Hub cannot be asked, the one that it meant last.

    home: the folder of the cache where it is kept what that was.  Raises ResourceError.
    """
    from huggingface_hub import HfApi

    if asked.revision is not None and COMMIT.fullmatch(asked.revision):
        return asked.revision
    ref = home / "refs" / quote(asked.revision or DEFAULT, safe="@")
    known = ref.read_text(encoding="utf-8") if ref.is_file() else ""
    known = known if COMMIT.fullmatch(known) else ""
    if offline:
        if not known:
            raise not_kept(asked)
        return known
    api = HfApi(library_name="retrofit", library_version=__version__)
    try:
        about = retried(str(asked), "read", lambda: api.model_info(asked.id, revision=asked.revision, timeout=ANSWER))
    except UnreachableError:
        if known:
            return known
        raise
    commit = str(about.sha)
    if COMMIT.fullmatch(commit) is None:
        raise ResourceError(f"{asked}: the Hub named no commit", "run it again later")
    if commit != known:
        with disk(ref, len(commit)):
            replace_file(ref, commit.encode())
    return commit


def _fetch(asked: Repository, commit: str, kept: Path) -> None:
    """Bring an artifact into its place in the cache, whole or not at all."""
    files = files_of(asked, commit)
    names = _wanted(asked, files)
    with room_beside(kept, asked, commit, sum(files[name].size for name in names), OWNER) as new:
        download(asked.id, commit, FIRST, new)
        _check_sizes(new, files)
        download(asked.id, commit, names, new)
        artifact.check(new)
        if not _is_there(kept, whole=True):  # another process may have been faster
            artifact.put(new, kept)


def files_of(asked: Repository, commit: str) -> dict[str, RemoteFile]:
    """The files of a commit by name.  Raises UsageError where there is none to be seen, and ResourceError."""
    from huggingface_hub import HfApi

    remote = look(HfApi(library_name="retrofit", library_version=__version__), asked.id, commit)
    if remote is None:
        raise UsageError(f"{asked}: no such commit on the Hub that you can see", "check what stands after the @")
    return remote.files


@contextmanager
def room_beside(kept: Path, asked: Repository, commit: str, size: int, cure: str) -> Iterator[Path]:
    """A folder beside `kept` to fetch `size` bytes into, which is gone afterwards.

    Raises ResourceError where there is no room.  An ArtifactError names the repository and the cure.
    """
    check_room(kept, size)
    with beside(kept, size, cached=True) as new:
        try:
            yield new
        except ArtifactError as error:
            problem = str(error).replace(f"{new}{os.sep}", "")
            raise ArtifactError(f"{asked} at {commit[:12]}: {problem}", cure) from None


def _wanted(asked: Repository, files: dict[str, RemoteFile]) -> list[str]:
    """The files to fetch.  Raises ArtifactError for a repository that is no artifact, or is made to do harm."""
    for name in files:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name or ":" in name or not name.isprintable():
            raise ArtifactError(f"{asked}: holds a file whose name leads elsewhere, {name!r}", "do not use it")
    missing = [name for name in (*artifact.LOAD_BEARING, artifact.MANIFEST) if name not in files]
    if missing:
        hint = "name a repository that `retrofit push` wrote"
        raise ArtifactError(f"{asked}: holds no {missing[0]}, so it is no artifact", hint)
    wanted = sorted(name for name in files if is_shared(name))
    if len(wanted) > MOST_FILES:
        raise ArtifactError(f"{asked}: holds {len(wanted):,} files, more than an artifact has", "do not use it")
    for name in wanted:
        if not name.endswith(".safetensors") and files[name].size > LARGEST_TEXT:
            problem = f"{name} has {files[name].size:,} bytes, more than text of an artifact has"
            raise ArtifactError(f"{asked}: {problem}", "do not use it")
    return wanted


def _check_sizes(new: Path, files: dict[str, RemoteFile]) -> None:
    """Before anything large is fetched: the configuration is one, and the manifest is of these files."""
    artifact.read_config(new)
    for name, (size, _) in artifact.recorded(new).items():
        if name not in files:
            raise ArtifactError(f"{name}: is not there, though the manifest names it", OWNER)
        if files[name].size != size:
            raise ArtifactError(f"{name}: has {files[name].size:,} bytes, the manifest says {size:,}", OWNER)
