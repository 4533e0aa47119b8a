"""A PEFT adapter that retrofit did not write: its two files, from a folder here or from a repository of the Hub.

    RETROFIT_CACHE/adapters/OWNER--NAME/COMMIT/[SUBFOLDER/]          adapter_config.json, adapter_model.safetensors
    RETROFIT_CACHE/adapters/OWNER--NAME/refs/REVISION                as `pulling.py` keeps it

As there, a stranger wrote it: only these two files are fetched, and a pickle in their place is refused by its name.
Not here: what they say (`retrofit.importing`).
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from retrofit.artifact import folder as artifact
from retrofit.artifact.safety import LARGEST_JSON, check_safetensors, stays_inside
from retrofit.errors import ArtifactError, UsageError
from retrofit.locating import is_offline
from retrofit.sharing.fetching import download
from retrofit.sharing.names import Repository, on_hub
from retrofit.sharing.pulling import files_of, not_kept, resolved, room_beside

CONFIG, WEIGHTS = (PurePosixPath(name).name for name in (artifact.ADAPTER_CONFIG, artifact.ADAPTER))
INSIDE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)


class Adapter(NamedTuple):
    """Where the files lie.

    repository, commit: where they were fetched from, the subfolder included; None of a folder that was here.
    """

    folder: Path
    repository: str | None = None
    commit: str | None = None


def adapter_folder(name: str | Path, subfolder: str | None = None, offline: bool = False) -> Adapter:
    """The folder of a PEFT adapter, named by its folder or as OWNER/NAME or OWNER/NAME@REVISION on the Hub.

    subfolder: where in there it is.  Both files are there, and the weights are an intact safetensors file; more is not
    looked at.  Raises UsageError, ArtifactError, ResourceError.
    """
    if subfolder is not None and (INSIDE.fullmatch(subfolder) is None or ".." in subfolder):
        raise UsageError(f"subfolder {subfolder!r} is no folder inside of {name}", "give its name, such as lora")
    asked = on_hub(name)
    if asked is None:
        place = Path(name, subfolder or "")
        _check(place)
        return Adapter(place)
    from retrofit.machine import cache_folder

    home = cache_folder() / "adapters" / asked.id.replace("/", "--", 1)
    offline = is_offline(offline)
    commit = resolved(asked, home, offline)
    kept = home / (commit if subfolder is None else f"{commit}--{subfolder.replace('/', '--')}")
    if not kept.is_dir():
        if offline:
            raise not_kept(asked)
        _fetch(asked, commit, subfolder, kept)
    inside = subfolder or ""
    return Adapter(kept / inside, f"{asked.id}/{inside}".rstrip("/"), commit)


def _check(place: Path) -> None:
    """Raises UsageError where there is no adapter, ArtifactError for one that is not to be opened."""
    if not place.is_dir():
        raise UsageError(f"{place}: no such folder", "name a folder that PEFT wrote, or OWNER/NAME on the Hub")
    beside = {path.name for path in place.iterdir()}
    for name in (CONFIG, WEIGHTS):
        if name not in beside:
            raise _missing(str(place), name, beside, [])
        stays_inside(place / name, place)
    check_safetensors(place / WEIGHTS)


def _fetch(asked: Repository, commit: str, subfolder: str | None, kept: Path) -> None:
    """Bring the two files into their place in the cache, whole or not at all."""
    files = files_of(asked, commit)
    inside = PurePosixPath(subfolder or "")
    beside = {PurePosixPath(name).name for name in files if PurePosixPath(name).parent == inside}
    others = [str(PurePosixPath(name).parent) for name in files if PurePosixPath(name).name == CONFIG]
    names = [str(inside / name) for name in (CONFIG, WEIGHTS)]
    for name in names:
        if name not in files:
            raise _missing(str(asked), name, beside, sorted(others))
    if files[names[0]].size > LARGEST_JSON:
        raise ArtifactError(f"{asked}: {names[0]} has {files[names[0]].size:,} bytes", "do not use it")
    size, cure = sum(files[name].size for name in names), "its owner has to upload it again"
    with room_beside(kept, asked, commit, size, cure) as new:
        download(asked.id, commit, names, new)
        _check(new / inside)
        if not kept.is_dir():  # another process may have been faster
            artifact.put(new, kept)


def _missing(where: str, name: str, beside: set[str], others: list[str]) -> ArtifactError:
    """What to say of a file that is not there.  beside: names that are; others: folders that hold an adapter."""
    if name.endswith(WEIGHTS) and f"{Path(WEIGHTS).stem}.bin" in beside:
        hint = "have PEFT save it again, which writes safetensors"
        return ArtifactError(f"{where}: {Path(WEIGHTS).stem}.bin may be a pickle, which can run code when read", hint)
    hint = f"add --subfolder {others[0]}" if others else "name what PEFT's save_pretrained wrote"
    return ArtifactError(f"{where}: holds no {name}, so it is no PEFT adapter", hint)
