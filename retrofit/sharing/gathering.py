"""An artifact as it is pushed: its folder, with what was found out about it where that is kept elsewhere.

Certificate and report of an artifact that ships with retrofit lie in the cache (`pulling.findings_folder`); they go to
others with it, as they go with any other artifact.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256
from retrofit.artifact.inspection import CERTIFICATE
from retrofit.artifact.safety import load_json, names_in
from retrofit.sharing.measured import REPORT, reported
from retrofit.sharing.pulling import findings_folder

HASH = ".sha256"


@contextmanager
def gathered(name: str | Path, folder: Path) -> Iterator[Path]:
    """The folder to push, while it lasts: the artifact's own, or a copy with what the cache holds of it.

    name: as the artifact was given; folder: where it is.  What is of another version of it is left out.
    """
    found = findings_folder(name, folder)
    if found == folder or not found.is_dir():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="retrofit-push-") as place:
        copy = Path(place) / folder.name
        shutil.copytree(folder, copy)
        if (found / CERTIFICATE).is_file() and _is_of(found / CERTIFICATE, folder):
            artifact.add(copy, CERTIFICATE, (found / CERTIFICATE).read_bytes())
        others = [one for one in names_in(found) if not one.startswith(CERTIFICATE) and not one.endswith(HASH)]
        for one in others:
            artifact.add(copy, f"{Path(REPORT).parent}/{one}", (found / one).read_bytes())
        if reported(copy) is None:
            shutil.rmtree((copy / REPORT).parent, ignore_errors=True)
        yield copy


def _is_of(certificate: Path, folder: Path) -> bool:
    return bool(load_json(certificate).get("manifest_sha256") == sha256(folder / artifact.MANIFEST))
