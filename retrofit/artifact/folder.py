"""The artifact folder: write it, check it, read it.

    retrofit.json              what the runtime needs; its keys are in `schema.py`
    adapter/                   adapter_config.json and adapter_model.safetensors: plain PEFT, in a subfolder
                               because transformers would load it from the root, ungated
    heads.safetensors          mask vector, Markov and confidence heads
    recipe.yaml                the fully resolved recipe
    model/                     of the profile `joint`: the base as it was trained along, a plain transformers folder
    manifest.sha256.json       size and sha256 of the files above; checked on every load
    README.md                  the card, for people to read and edit; in no manifest
    local.json                 where this machine has the base and the text; for `Engine.load` here, never to be
                               published, in no manifest
    certificate.json, eval/*   added later, each beside its own NAME.sha256 in the format of `sha256sum`

A folder is written beside its place and renamed into it, so what stands there is whole.  A pickle is
refused by its name, unread; a link that leads out of the folder is not followed.  Torch is imported by
`write` and `read` only.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from retrofit.artifact.beside import beside
from retrofit.artifact.files import disk, json_bytes, replace_file, sha256, sync_folder, write_file
from retrofit.artifact.own import MODEL, own_names, written_model
from retrofit.artifact.safety import AGAIN, check_safetensors, load_json, names_in, reading, stays_inside
from retrofit.artifact.schema import FORMAT as FORMAT
from retrofit.artifact.schema import FORMATS, check_adapter_config, check_config
from retrofit.errors import ArtifactError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "retrofit.json"
ADAPTER_CONFIG = "adapter/adapter_config.json"
ADAPTER = "adapter/adapter_model.safetensors"
HEADS = "heads.safetensors"
RECIPE = "recipe.yaml"
CARD = "README.md"
LOCAL = "local.json"
"""Paths of this machine: whoever publishes an artifact leaves this file out."""
MANIFEST = "manifest.sha256.json"
INSTEAD = "go on from it with `--from {} -o ANOTHER`, "
"""What a conversion can do with an artifact that is in its way, beside replacing it."""
LOAD_BEARING = (CONFIG, ADAPTER_CONFIG, ADAPTER, HEADS, RECIPE)

ADDED_SUFFIXES = (".json", ".jsonl", ".yaml", ".md", ".html", ".svg", ".safetensors")


@dataclass(frozen=True)
class Artifact:
    """A checked artifact.  Tensors lie on the CPU, in the types they were saved in."""

    folder: Path
    config: dict[str, Any]
    adapter_config: dict[str, Any]
    adapter_state: dict[str, Tensor]
    heads: dict[str, Tensor]


def write(
    folder: str | Path,
    *,
    adapter_config: Mapping[str, Any],
    adapter_state: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
    config: Mapping[str, Any],
    recipe_yaml: str,
    card: str,
    added: Mapping[str, bytes] | None = None,
    local: Mapping[str, Any] | None = None,
    model: tuple[Callable[[Path], Mapping[str, Any]], int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a new artifact, all of it or nothing, and return its folder.

    `added` are files in the root as `add` takes them, there from the start; `local` is what local.json holds, if it is
    to be there.  `model`, of the profile `joint`: what writes the files of model/ into a new folder and returns what
    `base` of the config says beside what it says already, and about how many bytes they are.  A folder that exists is
    refused unless it is empty, or is an artifact and `overwrite` is set; then it is replaced whole, with what was added
    to it.  Raises UsageError for a folder that may not be written, ArtifactError for a config that `read` would
    refuse, ResourceError when the disk is full or not writable; none of them leaves anything behind.
    """
    from retrofit.artifact.tensors import pieces

    folder = Path(folder)
    check_writable(folder, overwrite)
    if model is None:
        check_config(dict(config), folder / CONFIG)
    check_adapter_config(dict(adapter_config), folder / ADAPTER_CONFIG)
    contents = {
        ADAPTER_CONFIG: json_bytes(adapter_config),
        RECIPE: recipe_yaml.encode(),
        CARD: card.encode(),
    }
    if local:
        contents[LOCAL] = json_bytes(local)
    weights = {ADAPTER: adapter_state, HEADS: heads}
    for name, data in (added or {}).items():
        contents |= {name: data, f"{name}.sha256": _beside_hash(name, data)}
    size = sum(t.numel() * t.element_size() for tensors in weights.values() for t in tensors.values())
    size += sum(map(len, contents.values())) + (0 if model is None else model[1])
    with beside(folder, size) as new, disk(folder, size):
        (new / ADAPTER).parent.mkdir(parents=True)
        held, own = ({}, {}) if model is None else written_model(new, model[0])
        config = {**config, "base": {**config["base"], **own}}
        check_config(config, folder / CONFIG)
        contents[CONFIG] = json_bytes(config)
        written = {name: write_file(new / name, data) for name, data in contents.items()}
        written |= {name: write_file(new / name, pieces(tensors)) for name, tensors in weights.items()}
        files = {name: written[name] for name in LOAD_BEARING} | held
        manifest = {"files": files, "format": FORMATS[config["profile"]]}
        write_file(new / MANIFEST, json_bytes(manifest))
        for inside in (new / "adapter", new):
            sync_folder(inside)
        put(new, folder)
    return folder


def check(folder: str | Path) -> None:
    """Refuse an artifact that is damaged, unsafe or of another format.

    Every hash on record is compared, those of added files too.  Raises UsageError where there is no
    artifact, ArtifactError that names the file otherwise.
    """
    root = Path(folder)
    _exists(root)
    names = names_in(root)
    config = read_config(root)
    expected = recorded(root)
    own_names(root, names, list(expected), config["profile"])
    for name in expected:
        path = root / name
        if name not in names:
            raise ArtifactError(f"{path}: missing", AGAIN)
        size, digest = expected[name]
        with reading(path):
            found = path.stat().st_size
            if found != size:
                what = "truncated" if found < size else "too long"
                raise ArtifactError(f"{path}: {what}: {found} bytes, the manifest says {size}", AGAIN)
            if sha256(path) != digest:
                raise ArtifactError(f"{path}: damaged or altered: its sha256 is not the manifest's", AGAIN)
            if path.suffix == ".safetensors":
                check_safetensors(path)
    check_adapter_config(load_json(root / ADAPTER_CONFIG), root / ADAPTER_CONFIG)
    for name in names:
        if name.endswith(".sha256"):
            _check_added(root / name)


def read(folder: str | Path) -> Artifact:
    """Check an artifact, then load it.  Raises what `check` raises."""
    from safetensors.torch import load_file

    root = Path(folder)
    check(root)
    return Artifact(
        folder=root,
        config=load_json(root / CONFIG),
        adapter_config=load_json(root / ADAPTER_CONFIG),
        adapter_state=load_file(root / ADAPTER),
        heads=load_file(root / HEADS),
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """`retrofit.json`, checked against its schema but not its hash.  Raises UsageError or ArtifactError."""
    root = Path(folder)
    _exists(root)
    path = root / CONFIG
    stays_inside(path, root)
    config = load_json(path)
    check_config(config, path)
    return config


def base_of(folder: str | Path, config: Mapping[str, Any]) -> str:
    """The base of an artifact, as one loads it here: what `retrofit.json` names, the place that local.json does, or the
    model that it has of its own.

    Raises UsageError where the artifact was made of a folder or file that is not here, ArtifactError for a local.json
    that is none.
    """
    if config["profile"] == "joint":
        return str(Path(folder) / MODEL)
    return original_of(folder, config)


def original_of(folder: str | Path, config: Mapping[str, Any]) -> str:
    """The model that was converted, as one loads it here: the base, unless that was trained along.

    Raises what `base_of` raises.
    """
    named = config.get("original", config["base"])
    if named.get("local") is not True:
        return published_name(named)
    path = Path(folder) / LOCAL
    place = load_json(path).get("base") if path.is_file() else None
    if isinstance(place, str) and Path(place).exists():
        return place
    problem = f"{place}, which is gone" if place else f"{named['model']}, a model that lay on another machine"
    raise UsageError(f"{folder} was made of {problem}", "give the base with --base, base= in Python")


def published_name(named: Mapping[str, Any]) -> str:
    """What a base is called where it is loaded: of a GGUF file on the Hub, the Hub id and the file.

    named: `base` of `retrofit.json`.
    """
    file = named.get("gguf", {}).get("file")
    return f"{named['model']}/{file}" if file and "/" in named["model"] else str(named["model"])


def add(folder: str | Path, name: str, data: bytes | str) -> Path:
    """Put a file such as `certificate.json` or `eval/report.md` into an artifact, or replace it.

    The file comes whole or not at all.  Its hash is put beside it; not that of README.md, which people may
    edit.  Raises UsageError for a name that leads elsewhere, is load-bearing, or ends in none of
    `ADDED_SUFFIXES`; ResourceError when the disk is full or not writable.
    """
    root = Path(folder)
    _exists(root)
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ".." in parts:
        raise UsageError(f"{name}: not a name inside an artifact")
    name = "/".join(parts)
    if name in (*LOAD_BEARING, MANIFEST, LOCAL) or parts[0] == MODEL:
        raise UsageError(f"{name}: part of what was trained, cannot be replaced", "write a new artifact")
    if PurePosixPath(name).suffix not in ADDED_SUFFIXES:
        raise UsageError(f"{name}: an artifact takes {', '.join(ADDED_SUFFIXES)} only")
    path = root.joinpath(*parts)
    stays_inside(path, root)
    data = data.encode() if isinstance(data, str) else data
    with disk(path, len(data)):
        hashed = path.with_name(f"{path.name}.sha256")
        # without a hash in between, never with a wrong one
        hashed.unlink(missing_ok=True)
        replace_file(path, data)
        if name != CARD:
            replace_file(hashed, _beside_hash(path.name, data))
    return path


def restore(folder: Path) -> None:
    """Where a killed process had moved the artifact aside and not yet put the new one in its place, put it back."""
    if folder.is_symlink() or folder.exists():
        return
    aside = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.old")
    with suppress(OSError):  # what cannot be read or renamed is as good as not there
        found = [path for path in folder.parent.iterdir() if aside.fullmatch(path.name) and (path / CONFIG).is_file()]
        if found:
            max(found, key=lambda path: path.stat().st_ctime_ns).rename(folder)


def check_writable(folder: Path, overwrite: bool, instead: str = "") -> None:
    """Raises UsageError for a folder that `write` would refuse.  instead: what else could be done with the artifact."""
    restore(folder)
    if not folder.is_symlink() and not folder.exists():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UsageError(f"{folder}: exists and is no folder", "choose another name with -o")
    if not any(folder.iterdir()):
        return
    if not (folder / CONFIG).is_file():
        raise UsageError(f"{folder}: holds files that are no artifact", "choose another name with -o")
    if not overwrite:
        hint = f"replace it with --overwrite, {instead}or choose another name with -o"
        raise UsageError(f"{folder}: holds an artifact already", hint)


def _beside_hash(name: str, data: bytes) -> bytes:
    """What NAME.sha256 holds, as `sha256sum` writes it."""
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


def put(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; what stands there is moved aside first and back again should that fail."""
    old = new.with_suffix(".old")
    try:
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            folder.rename(old)  # someone who came to read had put it back
            new.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    with suppress(OSError):  # a leftover harms nobody under a name that `restore` does not know
        old = old.rename(old.with_suffix(".part"))
    shutil.rmtree(old, ignore_errors=True)


def _exists(root: Path) -> None:
    restore(root)
    if not root.is_dir():
        raise UsageError(f"{root}: no such artifact folder", "name a folder that `retrofit convert` wrote")
    if not (root / CONFIG).is_file():
        model = (root / "config.json").is_file() or any(root.glob("*.gguf"))
        hint = f"this is a model: `retrofit convert {root} -o OUT` makes an artifact of it" if model else AGAIN
        raise ArtifactError(f"{root / CONFIG}: missing, so this is no artifact", hint)


def recorded(root: Path) -> dict[str, tuple[int, str]]:
    """(size, sha256) of every load-bearing file, as the manifest has them.  Raises ArtifactError."""
    path = root / MANIFEST
    content = load_json(path)
    files, version = content.get("files"), content.get("format")
    names = [name for name in files if not name.startswith(f"{MODEL}/")] if isinstance(files, dict) else []
    as_written = json_bytes({"files": files, "format": version}) == path.read_bytes()
    known = type(version) is int and version in FORMATS.values()
    if sorted(names) != sorted(LOAD_BEARING) or not (as_written and known):
        raise ArtifactError(f"{path}: damaged or altered: not as retrofit writes it", AGAIN)
    recorded = {}
    for name, entry in content["files"].items():
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(digest, str):
            raise ArtifactError(f"{path}: damaged or altered: no size and sha256 of {name}", AGAIN)
        recorded[name] = (size, digest)
    return recorded


def _check_added(beside: Path) -> None:
    path = beside.with_suffix("")
    with reading(beside):
        recorded = beside.read_bytes()
    if not path.is_file():
        raise ArtifactError(f"{path}: missing, though {beside.name} is there", f"delete {beside.name}")
    with reading(path):
        found = f"{sha256(path)}  {path.name}\n".encode()
    if recorded != found:
        hint = f"write it anew, or delete it and {beside.name}"
        raise ArtifactError(f"{path}: damaged or altered: its sha256 is not the recorded one", hint)
