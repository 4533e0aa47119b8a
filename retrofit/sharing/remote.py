"""What a repository of the Hub holds, without a file of it being fetched: its commit, and names, sizes and hashes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from retrofit.sharing.faults import refused
from retrofit.sharing.waiting import ANSWER, retried

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True)
class LocalFile:
    """A file to be sent: bytes, or a path to read them from."""

    source: Path | bytes
    size: int
    sha256: str

    @property
    def blob(self) -> str:
        """What git calls a file of these bytes."""
        data = self.source if isinstance(self.source, bytes) else self.source.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub.  size: bytes; sha256: of a large file, else None; blob: what git calls a small one."""

    size: int
    sha256: str | None
    blob: str

    def holds(self, file: LocalFile) -> bool:
        """Whether that is its content."""
        return self.size == file.size and (self.sha256 == file.sha256 if self.sha256 else self.blob == file.blob)


@dataclass(frozen=True)
class Remote:
    """A repository at a commit.  files: by POSIX path."""

    commit: str
    private: bool
    files: dict[str, RemoteFile]


def look(api: HfApi, repository: str, revision: str | None = None) -> Remote | None:
    """What is there; None where there is no such repository or revision, or none that this account may see.

    Raises ResourceError where the Hub cannot be asked.
    """
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def asked() -> Remote:
        about = api.model_info(repository, revision=revision, timeout=ANSWER)
        listed = api.list_repo_tree(repository, recursive=True, revision=about.sha)
        files = {
            one.path: RemoteFile(one.size, one.lfs.sha256 if one.lfs else None, one.blob_id)
            for one in listed
            if isinstance(one, RepoFile)
        }
        return Remote(str(about.sha), bool(about.private), files)

    try:
        return retried(repository, "read", asked, let=(RepositoryNotFoundError, RevisionNotFoundError))
    except GatedRepoError as error:
        raise refused(error, repository, "read") from error
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None
