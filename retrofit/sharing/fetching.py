"""Files of a repository of the Hub, at a commit, as plain files in a folder.

Not here: whether they are an artifact (`pulling.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from retrofit.progress import downloading
from retrofit.sharing.waiting import retried

LIBRARY = ".cache"
"""What the Hub's library keeps beside the files for itself."""


def download(repository: str, commit: str, names: Sequence[str], place: Path) -> None:
    """Fetch files of a repository into a folder.  What broke off is completed.

    names: POSIX paths without characters that mean something in a pattern.  Raises ResourceError, UsageError.
    """
    from huggingface_hub import snapshot_download

    with downloading(f"downloading {repository}") as bar:
        fetch = partial(
            snapshot_download,
            repository,
            revision=commit,
            local_dir=place,
            allow_patterns=list(names),
            tqdm_class=bar,
        )
        retried(repository, "read", fetch)
    shutil.rmtree(place / LIBRARY, ignore_errors=True)
