"""What `--against` names: other ways to decode the same original faster.

    lookup            transformers' prompt lookup
    assisted=MODEL    transformers' assisted decoding with a smaller model
    ARTIFACT          another artifact of the same base

Not here: what they are worth (`sections/against.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from retrofit.artifact import folder as artifacts
from retrofit.artifact.files import sha256
from retrofit.errors import UsageError
from retrofit.locating import locate
from retrofit.sharing.pulling import local_folder

LOOKUP, ASSISTED = "lookup", "assisted="
FORMS = f"give {LOOKUP}, {ASSISTED}MODEL or the folder of an artifact"


@dataclass(frozen=True)
class Rival:
    """name: for people and for commands, a folder by its name alone.  place: of the model or of the artifact."""

    kind: Literal["lookup", "assisted", "artifact"]
    name: str
    place: Path | None = None

    @property
    def identity(self) -> str:
        """Equal for what gives the same figures."""
        return self.name if self.kind != "artifact" else f"{self.name}@{sha256(self._manifest)[:12]}"

    @property
    def _manifest(self) -> Path:
        assert self.place is not None
        return self.place / artifacts.MANIFEST


def rivals(values: Sequence[str], offline: bool = False) -> tuple[Rival, ...]:
    """Each value as what it names, found on this machine or fetched.

    Raises UsageError for what names nothing and for two of one name, and what `locate` and `pull` raise.
    """
    found = [_rival(value, offline) for value in values]
    names = [one.name for one in found]
    twice = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if twice is not None:
        raise UsageError(f"--against names {twice} twice", "a folder goes by its name alone: rename one of two")
    return tuple(found)


def _rival(value: str, offline: bool) -> Rival:
    if value == LOOKUP:
        return Rival("lookup", LOOKUP)
    if value.startswith(ASSISTED):
        model = value.removeprefix(ASSISTED)
        if not model:
            raise UsageError(f"--against is {value}, which names no model", FORMS)
        place = locate(model, offline=offline)
        return Rival("assisted", f"{ASSISTED}{place.name if Path(model).exists() else model}", place)
    folder = local_folder(value, offline)
    if not (folder / artifacts.CONFIG).is_file():
        raise UsageError(f"--against is {value}, which is no artifact", FORMS)
    artifacts.check(folder)
    return Rival("artifact", folder.resolve().name, folder.resolve())
