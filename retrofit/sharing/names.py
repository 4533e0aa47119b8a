"""Names: of repositories, and of the files of an artifact that go to the Hub and come from it.

Not here: what is in those files (`retrofit.artifact`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from retrofit.artifact.folder import CARD, LOAD_BEARING, MANIFEST
from retrofit.artifact.own import ADAPTERS, FILE
from retrofit.errors import UsageError

REPOSITORY = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)
ADDED = re.compile(
    r"(certificate\.json|metrics\.jsonl|eval(/\w[\w.-]*){1,3}\.(json|jsonl|yaml|md|html|svg))(\.sha256)?", re.ASCII
)
"""What may have been added to an artifact and is for others too."""


class Repository(NamedTuple):
    """A repository of the Hub, and the branch, tag or commit that was asked for; None: the default branch."""

    id: str
    revision: str | None

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id}@{self.revision}"


def repository(name: str) -> Repository:
    """OWNER/NAME or OWNER/NAME@REVISION.  Raises UsageError for anything else."""
    found = REPOSITORY.fullmatch(name)
    if found is None or ".." in name or "--" in found["id"]:
        raise UsageError(f"{name!r} is no repository of the Hub", "give OWNER/NAME, such as me/qwen-retrofit")
    return Repository(found["id"], found["revision"])


def on_hub(name: str | Path) -> Repository | None:
    """The repository that a name means; None for a folder that is here, and for what can only be a path."""
    if not isinstance(name, str) or REPOSITORY.fullmatch(name) is None or Path(name).exists():
        return None
    return repository(name)


def is_shared(name: str) -> bool:
    """Whether a file of an artifact, by its POSIX path, is pushed and fetched.  Any other stays where it is."""
    of_model = FILE.fullmatch(name) is not None and name not in ADAPTERS
    return name in (*LOAD_BEARING, MANIFEST, CARD) or of_model or ADDED.fullmatch(name) is not None
