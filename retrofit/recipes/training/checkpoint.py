"""The checkpoints of a running conversion: `OUT.checkpoints/` beside the artifact to be.

    lock                 held by the process that writes here, with its id
    metrics.jsonl        one line a step, of the run as it goes on
    step-000120/         a checkpoint; the newest two are kept, and those they need
      weights.safetensors  optimizer.safetensors  documents.safetensors  state.json  metrics.jsonl
      manifest.json      size and sha256 of the files above, written last
    stopped-000121.json  the batch at which training had to stop

A checkpoint is written beside its place, flushed to the disk and renamed into it; only then are older ones
removed.  So whatever ends the process, what stands there is whole, and what is not is found out by its
manifest.  Tensors are safetensors, the rest is JSON: there is no pickle.
Not here: what a checkpoint means to the training (`session.py`).
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors.torch import load_file
from torch import Tensor

from retrofit.artifact import folder as artifact
from retrofit.artifact.files import ELSEWHERE, check_room, disk, json_bytes, sha256, sync_folder, write_file
from retrofit.artifact.tensors import pieces
from retrofit.errors import ResourceError, UsageError

FORMAT = 1
KEPT = 2
MANIFEST = "manifest.json"
STATE = "state.json"
METRICS = "metrics.jsonl"
LOCK = "lock"
RESTART = "start anew with --restart"
"""What can be done about a checkpoint that is of no use."""
_STEP = re.compile(r"step-(\d{6,})")
_PART = re.compile(r"\.(step|stopped)-\d{6,}(\.json)?\.[0-9a-f]{8}\.part")
HEADER = 200
"""Bytes to allow for a tensor's name, type, shape and place."""

Contents = Mapping[str, "bytes | Mapping[str, Tensor]"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are those of its manifest."""

    folder: Path
    step: int
    state: dict[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Tensors of a file, on the CPU."""
        return load_file(self.folder / name)

    def metrics(self) -> bytes:
        return (self.folder / METRICS).read_bytes()


class Checkpoints:
    """The checkpoint folder of one conversion; `checkpoints(out)` makes it and holds its lock."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._damaged: set[Path] = set()

    @property
    def metrics(self) -> Path:
        """Where the running conversion writes a line a step."""
        return self.folder / METRICS

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; names those that are not.  Raises UsageError for another format."""
        for folder in reversed(self._steps()):
            problem = _problem(folder)
            if problem is None:
                state = json.loads((folder / STATE).read_bytes())
                return Checkpoint(folder, int(state["step"]), state)
            say(f"skipped {folder}: {problem}")
            self._damaged.add(folder)
        return None

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of a step that another one needs.  Raises UsageError where it is gone or damaged."""
        folder = self._folder(step)
        problem = _problem(folder)
        if problem is not None:
            raise UsageError(
                f"{folder}, which holds the weights to publish, cannot be used: {problem}",
                f"publish the last ones, train.publish=last with --force-resume, or {RESTART}",
            )
        return Checkpoint(folder, step, json.loads((folder / STATE).read_bytes()))

    def save(self, step: int, contents: Contents) -> Path:
        """Write the checkpoint of a step, then remove all but the newest KEPT and those that they need.

        state.json may name steps in `needs`.  Returns the folder.
        Raises ResourceError when the disk is full or not writable; the checkpoints that are there stay.
        """
        folder = self._folder(step)
        size = sum(map(_size, contents.values()))
        check_room(folder, size)
        part = self._beside(folder)
        with disk(folder, size):
            try:
                part.mkdir()
                entries = {}
                for name, content in contents.items():
                    data = content if isinstance(content, bytes) else pieces(content)
                    entries[name] = write_file(part / name, data)
                write_file(part / MANIFEST, json_bytes({"files": entries, "format": FORMAT}))
                sync_folder(part)
                if folder.exists():  # damaged, or of a run that was ahead of the checkpoint this one began with
                    shutil.rmtree(folder)
                part.rename(folder)
                sync_folder(self.folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)  # gone already when all went well
        self._damaged.discard(folder)
        self._prune()
        return folder

    def record(self, step: int, content: Mapping[str, Any]) -> Path:
        """Write down the batch at which training stopped.  Raises ResourceError."""
        path = self.folder / f"stopped-{step:06d}.json"
        data, part = json_bytes(content), self._beside(path)
        check_room(path, len(data))
        with disk(path, len(data)):
            try:
                write_file(part, data)
                part.replace(path)
                sync_folder(self.folder)
            finally:
                part.unlink(missing_ok=True)
        return path

    def begin_metrics(self, lines: bytes) -> None:
        """Let metrics.jsonl hold these lines and no others: those of the steps that are done."""
        with disk(self.metrics, len(lines)):
            self.metrics.write_bytes(lines)

    def add_metrics(self, line: str) -> None:
        """Append a line.  Raises ResourceError."""
        with disk(self.metrics, len(line)), self.metrics.open("a", encoding="utf-8") as out:
            out.write(line)

    def clear(self) -> None:
        """Remove what conversions wrote here."""
        self.metrics.unlink(missing_ok=True)
        for path in self._steps():
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("stopped-*.json"):
            path.unlink(missing_ok=True)

    def is_empty(self) -> bool:
        """Whether nothing here is of use to anyone."""
        return not self._steps() and not any(self.folder.glob("stopped-*.json"))

    def _prune(self) -> None:
        whole = [folder for folder in self._steps() if folder not in self._damaged]
        needed = {self._folder(step) for folder in whole[-KEPT:] for step in _needs(folder)}
        for folder in [*whole[:-KEPT], *self._damaged]:
            if folder not in needed:
                shutil.rmtree(folder, ignore_errors=True)

    def _steps(self) -> list[Path]:
        """Folders of checkpoints, oldest first."""
        found = [path for path in self.folder.iterdir() if _STEP.fullmatch(path.name)]
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def _folder(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _beside(self, path: Path) -> Path:
        return self.folder / f".{path.name}.{secrets.token_hex(4)}.part"


def read(folder: Path) -> Checkpoint:
    """A checkpoint by its folder.  Raises UsageError where it is damaged, or of another format."""
    problem = _problem(folder)
    if problem is not None:
        raise UsageError(f"{folder} is no whole checkpoint: {problem}", "name another one")
    state = json.loads((folder / STATE).read_bytes())
    return Checkpoint(folder, int(state["step"]), state)


def folder_of(out: Path) -> Path:
    """Where the checkpoints of the conversion that writes `out` lie."""
    return out.with_name(f"{out.name}.checkpoints")


@contextmanager
def checkpoints(out: Path) -> Iterator[Checkpoints]:
    """The checkpoint folder of `out`, for this process alone; removed at the end if there is nothing in it to keep.

    Raises UsageError while another process holds it, ResourceError where it cannot be made.
    """
    held = Checkpoints(folder_of(out))
    lock = _lock(held.folder, out)
    try:
        _sweep(held.folder, out)
        yield held
    finally:
        if held.is_empty():
            held.clear()
        (held.folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # it holds a checkpoint, or something that is not ours
            held.folder.rmdir()
        lock.release()  # the system does so too when a process is killed


def _lock(folder: Path, out: Path) -> FileLock:
    """The lock file, locked.  A file left behind by a killed process is no obstacle."""
    path = folder / LOCK
    lock = FileLock(path, fallback_to_soft=False)
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(f"{folder}: cannot write there: {error.strerror}", ELSEWHERE) from error
        try:
            _acquire(lock)
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
            return lock
        except FileNotFoundError:  # the other process has just removed the folder
            lock.release()
        except Timeout:
            hint = "wait for it, end it, or choose another name with -o"
            problem = f"another conversion is writing it ({_owner(path) or 'a process just started'})"
            raise UsageError(f"{out}: {problem}", hint) from None
        except OSError as error:
            what = f"{path}: cannot be locked" if path.exists() else f"{folder}: cannot write there"
            raise ResourceError(f"{what}: {error.strerror}", ELSEWHERE) from error


def _acquire(lock: FileLock) -> None:
    """Lock, where the file system knows how: some network mounts do not, and a conversion runs there all the same.

    Raises Timeout where another process holds it, OSError.
    """
    try:
        lock.acquire(blocking=False)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def _owner(lock: Path) -> str:
    """What its owner wrote into the lock file; nothing where it has not yet, or where nobody else may read it."""
    try:
        return lock.read_text(encoding="utf-8", errors="replace")[:200].strip()
    except OSError:
        return ""


def _sweep(folder: Path, out: Path) -> None:
    """Remove what killed processes left half-written or half-removed, of checkpoints and of the artifact."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name):
            _remove(path)
    artifact.restore(out)
    beside = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.(part|old)")
    for path in out.parent.iterdir():
        # what an artifact replaced is all there is of it until the new one is in its place
        if (found := beside.fullmatch(path.name)) and (found[1] == "part" or out.exists()):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None when its files are those of its manifest.  Raises UsageError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version, files = manifest["format"], manifest["files"]
        if version != FORMAT:
            raise UsageError(
                f"{folder}: a checkpoint of format {version!r}; this retrofit reads format {FORMAT}",
                f"go on with the retrofit that wrote it, or {RESTART}",
            )
        for name, entry in files.items():
            path = folder / Path(name).name
            if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
                return f"{name} is damaged"
        return None if STATE in files and METRICS in files else f"{MANIFEST} is damaged"
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return f"{MANIFEST} is damaged"


def _needs(folder: Path) -> list[int]:
    """Steps whose checkpoints this one is no use without."""
    try:
        return [int(step) for step in json.loads((folder / STATE).read_bytes()).get("needs", [])]
    except (OSError, ValueError, TypeError, AttributeError):
        return []


def _size(content: bytes | Mapping[str, Tensor]) -> int:
    """Bytes of a file, nearly."""
    if isinstance(content, bytes):
        return len(content)
    return sum(t.numel() * t.element_size() + HEADER for t in content.values())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key that is not the same in both, in the order of `new`."""
    keys = [*new, *(key for key in old if key not in new)]
    missing = "nothing"
    lines = []
    for key in keys:
        before, after = old.get(key, missing), new.get(key, missing)
        if before != after:
            lines.append(f"{key}: {_shown(before)} -> {_shown(after)}")
    return lines


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
