"""`retrofit export`: an artifact as a folder that other programs read.

    peft            a plain PEFT folder
    uno             one that SGLang's `--uno-lora-path` loads, with the command that starts it
    nemotron        adapter and base as a checkpoint of Nemotron-Labs-Diffusion
    transformers    `model.generate(custom_generate=FOLDER, ...)`, where retrofit is not installed

A folder is written beside its place, read back by what is to read it, compared with the artifact, and then renamed:
what stands there is whole and was seen to work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from retrofit.artifact import folder as artifacts
from retrofit.artifact.beside import beside
from retrofit.artifact.files import disk, sync_folder, write_file
from retrofit.artifact.tensors import pieces
from retrofit.errors import UsageError
from retrofit.exporting import nemotron, peft_folder, transformers_folder, uno
from retrofit.hub import Base, load_base, resolved_device
from retrofit.quantised.methods import other_precision
from retrofit.runtime.loading import check_same_base
from retrofit.sharing.pulling import local_folder

if TYPE_CHECKING:
    from retrofit.artifact.folder import Artifact


class Named(NamedTuple):
    """What a folder is made of besides the artifact.  called: what the base is called in it."""

    base: Base
    called: str
    mask_token: int | str | None


class Format(NamedTuple):
    """What is in a folder, which artifacts it is not for, and how it is tried out."""

    files: Callable[[Artifact, Named], Mapping[str, peft_folder.Content]]
    compare: Callable[[Path, Base, Artifact], str]
    refuse_unfit: Callable[[Artifact], None] | None = None


FORMATS = {
    "peft": Format(lambda read, named: peft_folder.files(read, named.called), peft_folder.compare),
    "uno": Format(lambda read, named: uno.files(read, named.called), uno.compare, uno.refuse_unfit),
    "nemotron": Format(lambda read, named: nemotron.files(read, *named), nemotron.compare, nemotron.refuse_unfit),
    "transformers": Format(
        lambda read, named: transformers_folder.files(read, named.called), transformers_folder.compare
    ),
}


@dataclass(frozen=True)
class Exported:
    """A folder that was written.  compared: what was found when it was read back; other_precision: what is to be said
    where that base was held otherwise than the adapter was trained."""

    folder: Path
    format: str
    compared: str
    other_precision: str | None


def export(
    artifact: str | Path,
    format: str,
    out: str | Path,
    *,
    base: str | None = None,
    mask_token: int | str | None = None,
    device: str = "auto",
    dtype: str = "float32",
    offline: bool = False,
    trust_remote_code: bool = False,
) -> Exported:
    """Write an artifact as a folder of another format, a key of FORMATS, and try it out.

    artifact: its folder, or OWNER/NAME on the Hub.  base: in place of the one it names.  mask_token: of nemotron, id or
    text of the token that becomes the mask; None takes one that the tokenizer does not have.  device, dtype: where and
    in which type the base is held while the folder is tried out.
    Raises UsageError for a folder that is not empty and, naming all that is to be changed, for an artifact that the
    format cannot express; UnsupportedModelError for such a base; GateError where what was written does not do what the
    artifact does; and what `Engine.load` raises.  None of them leaves anything behind.
    """
    if format not in FORMATS:
        raise UsageError(f"format {format!r} does not exist", f"it is one of {', '.join(FORMATS)}")
    if mask_token is not None and format != "nemotron":
        raise UsageError(f"a mask token is given, and the format {format} has none", "leave it out")
    files, compare, refuse_unfit = FORMATS[format]
    out = Path(out)
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise UsageError(f"{out}: is there already", "choose another name")
    read = artifacts.read(local_folder(artifact, offline))
    if refuse_unfit is not None:
        refuse_unfit(read)
    named = read.config["base"]
    name = base or artifacts.base_of(read.folder, read.config)
    loaded = load_base(
        name,
        None if base else named["revision"],
        dtype=dtype,
        device=resolved_device(device),
        offline=offline,
        trust_remote_code=trust_remote_code,
        need_tokenizer=False,
    )
    check_same_base(loaded, read)
    compared = _written(out, files(read, Named(loaded, _called(read), mask_token)), compare, loaded, read)
    return Exported(out, format, compared, other_precision(named.get("quantization"), loaded.precision))


def _called(read: Artifact) -> str:
    """What the base is called: the name that is loaded, or the folder of the model that an artifact has of its own,
    whose last stroke tells it from a Hub id."""
    name = artifacts.published_name(read.config["base"])
    return f"{read.folder.resolve().name}/{name}/" if read.config["profile"] == "joint" else name


def _written(
    out: Path,
    files: Mapping[str, peft_folder.Content],
    compare: Callable[[Path, Base, Artifact], str],
    base: Base,
    artifact: Artifact,
) -> str:
    """Bring a folder into its place, whole and compared, or not at all.  Returns what the comparison found."""
    size = sum(len(one) if isinstance(one, bytes) else sum(t.nbytes for t in one.values()) for one in files.values())
    with beside(out, size) as new:
        with disk(out, size):
            for name, content in files.items():
                (new / name).parent.mkdir(exist_ok=True)
                write_file(new / name, content if isinstance(content, bytes) else pieces(content))
            sync_folder(new)
        found = compare(new, base, artifact)
        with disk(out, size):
            artifacts.put(new, out)
        return found
