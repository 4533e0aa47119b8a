"""`retrofit push`: an artifact into a repository of the Hub, in one commit, and the proof that it arrived.

Only what `is_shared` names is sent.  A commit names the one that it was made for, so that none is ever made twice,
whatever answers are lost on the way.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrofit import __version__
from retrofit.artifact import folder as artifact
from retrofit.artifact.files import sha256
from retrofit.artifact.inspection import CERTIFICATE, certificate
from retrofit.artifact.safety import names_in
from retrofit.errors import ArtifactError, GateError, ResourceError, UsageError
from retrofit.locating import is_path
from retrofit.sharing.card import published_card
from retrofit.sharing.faults import LOG_IN, TOKEN, is_passing, status_of
from retrofit.sharing.gathering import gathered
from retrofit.sharing.measured import reported
from retrofit.sharing.names import is_shared
from retrofit.sharing.names import repository as parsed
from retrofit.sharing.pulling import local_folder
from retrofit.sharing.remote import LocalFile, Remote, look
from retrofit.sharing.waiting import retried

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

CERTIFY = "run `retrofit certify` first, or push it with --uncertified, which the card then says"
MOVED = 412
"""The status of a commit that was made for another state of the repository."""


@dataclass(frozen=True)
class Change:
    """What becomes of one file.  what: new, changed, same or removed; size: bytes, of what is sent."""

    name: str
    size: int
    what: str


@dataclass(frozen=True)
class Pushed:
    """What was done, or with dry_run would be.  commit: None where nothing had to be sent, or of a dry run."""

    repository: str
    url: str
    private: bool
    certified: bool
    changes: tuple[Change, ...]
    left_out: tuple[str, ...]
    card: str
    commit: str | None = None
    pull_request: str | None = None
    verified: int = 0
    """Files that were fetched again and had the sha256 they have here."""

    @property
    def bytes(self) -> int:
        """To be sent."""
        return sum(change.size for change in self.changes if change.what in ("new", "changed"))


def push(
    folder: str | Path,
    repository: str,
    *,
    public: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
    uncertified: bool = False,
) -> Pushed:
    """Put an artifact into a repository of the Hub, which is made if need be.

    public: who may see a new repository; one that is there stays as it is, and has to be as asked.  create_pr: propose
    the change.  revision: the branch, made if need be.  dry_run: change nothing.  uncertified: also without a valid
    certificate.  The access token is the environment's, or that of `hf auth login`.  What the folder lacks of an
    artifact's files goes from the repository; files of other kinds there stay.
    folder: of the artifact, or what else names one, as for `Engine.load`.
    Raises UsageError, ArtifactError, GateError for an artifact without a valid certificate, and ResourceError for what
    the Hub did.
    """
    name = parsed(repository).id
    if name != repository:
        raise UsageError(f"{repository}: a push goes to a branch", "name it with --revision, without the @")
    if create_pr and revision is not None:
        raise UsageError("a pull request is made against the default branch", "leave out --create-pr or --revision")
    place = local_folder(folder)
    artifact.check(place)
    _refuse_paths(place, artifact.read_config(place)["base"])
    with gathered(folder, place) as root:
        if _valid_certificate(root) is None and not uncertified:
            raise GateError(f"{folder}: there is no certificate of what is in it that passed", CERTIFY)
        return _pushed(root, name, public, create_pr, revision, dry_run)


def _pushed(root: Path, name: str, public: bool, create_pr: bool, revision: str | None, dry_run: bool) -> Pushed:
    """As `push` does it, of a folder that may be sent."""
    from huggingface_hub import HfApi

    valid, text = _valid_certificate(root), (root / artifact.CARD).read_text(encoding="utf-8")
    card = published_card(text, name, artifact.read_config(root), valid, reported(root))
    sent, left_out = _files(root, card, valid is not None)
    api = HfApi(library_name="retrofit", library_version=__version__)
    _refuse_tokens(sent, _token(needed=not dry_run))
    there, branch = _there(api, name, public, revision)
    changes = _changes(sent, branch)
    url = f"{api.endpoint}/{name}"
    plan = Pushed(name, url, not public, valid is not None, changes, left_out, card)
    if dry_run or (branch is not None and not _operations(sent, changes)):
        return plan
    branch = branch or _prepared(api, name, public, revision, there)
    commit, pull = _commit(api, name, sent, branch, revision, create_pr)
    return replace(plan, commit=commit, pull_request=pull, verified=_verify(name, commit, sent))


def _refuse_paths(root: Path, named: Mapping[str, Any]) -> None:
    if is_path(named["model"]):
        problem = f"{root / artifact.CONFIG}: names its base by a path of this machine, {named['model']}"
        raise UsageError(problem, "convert it again; artifacts name no paths any more")


def _valid_certificate(root: Path) -> dict[str, Any] | None:
    """The certificate, if every check passed and it is of what the folder holds."""
    content = certificate(root)
    if content is None or content.get("ok") is not True:
        return None
    return content if content.get("manifest_sha256") == sha256(root / artifact.MANIFEST) else None


def _files(root: Path, card: str, certified: bool) -> tuple[dict[str, LocalFile], tuple[str, ...]]:
    """What is sent, and the names of what is not.  A certificate that is none is not."""
    sent: dict[str, LocalFile] = {}
    left_out = []
    for name in names_in(root):
        if not is_shared(name) or (name.startswith(CERTIFICATE) and not certified):
            left_out.append(name)
        elif name == artifact.CARD:
            data = card.encode()
            sent[name] = LocalFile(data, len(data), hashlib.sha256(data).hexdigest())
        else:
            sent[name] = LocalFile(root / name, (root / name).stat().st_size, sha256(root / name))
    return sent, tuple(left_out)


def _token(needed: bool) -> str | None:
    from huggingface_hub import get_token

    token = get_token()
    if token is None and needed:
        raise ResourceError("there is no access token for the Hub", LOG_IN)
    return token


def _refuse_tokens(sent: Mapping[str, LocalFile], token: str | None) -> None:
    """Raises UsageError for a file with an access token in it."""
    for name, file in sent.items():
        if isinstance(file.source, bytes):
            found = _has_token(name, file.source, token)
        elif file.size == 0:
            continue
        else:
            with file.source.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _has_token(name, data, token)
        if found:
            raise UsageError(f"{name}: holds an access token of the Hub, so nothing was sent", "take it out of there")


def _has_token(name: str, data: bytes | mmap.mmap, token: str | None) -> bool:
    if token and data.find(token.encode()) >= 0:
        return True
    # among random bytes of weights anything of this form is chance
    return not name.endswith(".safetensors") and TOKEN.search(data[:].decode("utf-8", "replace")) is not None


def _there(api: HfApi, name: str, public: bool, revision: str | None) -> tuple[Remote | None, Remote | None]:
    """The repository's default branch, and the branch that is pushed to; None for what is not there.

    Raises UsageError for a repository that others can see, unless they are to.
    """
    default = look(api, name)
    if default is None:
        return None, None
    if default.private == public:
        seen, hint = ("private", "leave out --public, or open it in its settings on the Hub")
        if not default.private:
            seen, hint = "public", "give --public, or choose another name"
        raise UsageError(f"{name}: is there already, and {seen}", hint)
    return default, default if revision is None else look(api, name, revision)


def _changes(sent: Mapping[str, LocalFile], branch: Remote | None) -> tuple[Change, ...]:
    there = {} if branch is None else branch.files
    changes = []
    for name, file in sorted(sent.items()):
        what = "new" if name not in there else "same" if there[name].holds(file) else "changed"
        changes.append(Change(name, file.size, what))
    gone = sorted(name for name in there if is_shared(name) and name not in sent)
    return (*changes, *(Change(name, 0, "removed") for name in gone))


def _operations(
    sent: Mapping[str, LocalFile], changes: tuple[Change, ...]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    made: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(change.name, sent[change.name].source)
        for change in changes
        if change.what in ("new", "changed")
    ]
    return made + [CommitOperationDelete(change.name) for change in changes if change.what == "removed"]


def _prepared(api: HfApi, name: str, public: bool, revision: str | None, there: Remote | None) -> Remote:
    """The branch to push to, made together with the repository where they are not there."""
    if there is None:
        retried(name, "make it", partial(api.create_repo, name, private=not public, exist_ok=True))
    if revision is not None:
        retried(name, "write to it", partial(api.create_branch, name, branch=revision, exist_ok=True))
    made = look(api, name, revision)
    if made is None:
        raise ResourceError(f"{name}: was made, and cannot be seen", "look at it on the Hub, then run it again")
    return made


def _commit(
    api: HfApi, name: str, sent: Mapping[str, LocalFile], branch: Remote, revision: str | None, create_pr: bool
) -> tuple[str, str | None]:
    """(commit, pull request or None).

    Each try begins with what the branch holds by then: where an answer was lost after the commit was made, nothing is
    left to do; where the branch is as it was, the commit is still for that state of it, and no other.
    """
    from huggingface_hub import CommitOperationAdd

    planned = _operations(sent, _changes(sent, branch))
    if additions := [one for one in planned if isinstance(one, CommitOperationAdd)]:
        upload = partial(api.preupload_lfs_files, name, additions, revision=revision, create_pr=create_pr)
        retried(name, "write to it", upload)

    def tried() -> tuple[str, str | None]:
        now = look(api, name, revision)
        if now is None:
            raise ResourceError(f"{name}: vanished while it was pushed to", "look at it on the Hub, then run it again")
        operations = _operations(sent, _changes(sent, now))
        if not operations:
            return now.commit, None
        if now.commit != branch.commit:
            raise ResourceError(f"{name}: somebody else changed it at the same time", "look at it, then run it again")
        try:
            made = api.create_commit(
                name, operations, commit_message="Push with retrofit", revision=revision, create_pr=create_pr,
                parent_commit=now.commit,
            )  # fmt: skip
        except Exception as error:
            if create_pr and is_passing(error) and status_of(error) != 429:
                # a pull request leaves the branch as it was, so nothing tells whether it was made
                hint = f"look at {api.endpoint}/{name}/discussions before you run it again"
                raise ResourceError(f"{name}: the Hub did not say whether it made the pull request", hint) from error
            moved = look(api, name, revision) if status_of(error) == MOVED else None
            if moved is not None and not _operations(sent, _changes(sent, moved)):
                return moved.commit, None  # an earlier try had arrived after all
            raise
        return made.oid, made.pr_url

    return retried(name, "write to it", tried)


def _verify(name: str, commit: str, sent: Mapping[str, LocalFile]) -> int:
    """Fetch what was pushed and compare every sha256; how many files that were.  Raises ArtifactError."""
    from retrofit.sharing.fetching import download

    with tempfile.TemporaryDirectory(prefix="retrofit-push-") as place:
        download(name, commit, sorted(sent), Path(place))
        for file, local in sent.items():
            path = Path(place) / file
            if not path.is_file() or sha256(path) != local.sha256:
                problem = f"{name}: what the Hub holds of {file} is not what was sent"
                raise ArtifactError(f"{problem} (commit {commit})", "push it again, and check the disk and memory here")
    return len(sent)
