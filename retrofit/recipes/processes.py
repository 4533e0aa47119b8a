"""Several processes that convert together, started by `torchrun` or `accelerate launch`.

Every process runs the same program on the same text; what leaves a trace (checkpoints, the artifact, progress, talk)
is the main process's alone.  They meet in `exchange`, where each tells all others something, and in `add_up`.  One
that fails leaves its error in the store; the main process, which looks there while it waits, raises it as its own and
says so in the store, and the others end without a word.  So an error is told once.

Not here: how a batch is shared out (`training/shares.py`), who holds which weights (`training/shards.py`).
"""

from __future__ import annotations

import atexit
import json
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from retrofit import errors
from retrofit.errors import ResourceError, RetrofitError, TrainingError, UsageError
from retrofit.launch import Launch, launched, speaks

CONNECT_TIMEOUT = timedelta(minutes=30)
"""How long the processes wait for each other at the start, and inside a computation they all are in."""
EXCHANGE_TIMEOUT = timedelta(hours=12)
"""How long they wait in `exchange`: one of them may be writing or reading something large."""
REPORT_SECONDS = 600.0
"""Seconds a failed process waits for the main one, which may be in a long step, before it tells of its error itself."""
REPORT_SECONDS_SHARDED = 30.0
"""The same with FSDP: the main one may be waiting for this process's weights, and never come."""
LOST_SECONDS = 2.0
"""Seconds the main process looks for the error of one whose connection was lost."""
POLL_SECONDS = 0.1
"""Seconds between two looks into the store."""
BUCKET = 1 << 24
"""Numbers that are added up in one call."""

_current: Processes | None = None
_met = 0


class Processes:
    """The processes of one conversion.  `device` is this one's own."""

    def __init__(self, launch: Launch, device: str):
        """Meet the others.  Raises UsageError, ResourceError."""
        global _met
        self.rank, self.size, self.sharded = launch.rank, launch.size, launch.sharded
        self.device = _own_device(launch, device)
        if not dist.is_initialized():
            _connect(self.device)
        _met += 1
        store = dist.distributed_c10d._get_default_store()
        self._store = dist.PrefixStore(f"retrofit/{_met}", store)
        self._talk = dist.new_group(backend="gloo", timeout=EXCHANGE_TIMEOUT)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """Wait for all processes; returns the value of each, by rank.  Raises TrainingError where one does not come."""
        data = torch.frombuffer(bytearray(pickle.dumps((what, value))), dtype=torch.uint8)
        sizes = [int(size) for size in self._gather(torch.tensor([len(data)]))]
        parts = self._gather(F.pad(data, (0, max(sizes) - len(data))))
        found = [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]
        if any(other != what for other, _ in found):
            where = ", ".join(other for other, _ in found)
            raise TrainingError(f"the processes are not at the same place ({where})", "this is a bug; please report it")
        return [value for _, value in found]

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, on the CPU.  Waits in Python, so that signals are heard and failures seen."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        work = dist.all_gather(found, tensor, group=self._talk, async_op=True)
        begin = looked = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            if now - looked > POLL_SECONDS:
                looked = now
                if self._store.check(["failed" if self.is_main else "told"]):
                    raise _Failed
            time.sleep(min(POLL_SECONDS, (now - begin) / 10))
        work.wait()
        return found

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes; afterwards all hold the same bits."""
        waiting: list[Tensor] = []
        for number, tensor in enumerate(tensors):
            waiting.append(tensor)
            following = tensors[number + 1] if number + 1 < len(tensors) else None
            full = following is None or following.dtype != tensor.dtype
            if full or sum(t.numel() for t in waiting) + following.numel() > BUCKET:  # type: ignore[union-attr]
                flat = torch.cat([t.reshape(-1) for t in waiting])
                dist.all_reduce(flat)
                for whole, part in zip(waiting, flat.split([t.numel() for t in waiting]), strict=True):
                    whole.copy_(part.view_as(whole))
                waiting = []

    def _final_error(self, error: BaseException) -> BaseException:
        """What this process ends with, given what happened to it; tells the others."""
        if self.is_main:
            other = self._failure() if lost(error) else None
            with suppress(RuntimeError):
                self._store.set("told", "")
            return _as_own_error(other, error) if lost(error) else error
        if lost(error):
            return SystemExit(1)  # the main process is gone, or knows why another one is
        if not isinstance(error, Exception):
            return error
        code = error.exit_code if isinstance(error, RetrofitError) else 1
        try:
            self._store.compare_set("failed", "", json.dumps(_described(error, self.rank)))
            if self.sharded and self.device == "cpu":
                return SystemExit(code)  # the main one's calls fail as soon as this process is gone
            if self._appears("told", REPORT_SECONDS_SHARDED if self.sharded else REPORT_SECONDS):
                return SystemExit(code)
        except RuntimeError:  # the store is gone with the main process
            return SystemExit(code)
        error.add_note(f"in process {self.rank} of {self.size}")
        return error

    def _failure(self) -> dict[str, Any] | None:
        """What the first process that failed said of it."""
        with suppress(RuntimeError):
            if self._appears("failed", LOST_SECONDS):
                found: dict[str, Any] = json.loads(self._store.get("failed"))
                return found
        return None

    def _appears(self, key: str, seconds: float) -> bool:
        """Whether a key is in the store by then.  `Store.wait` would write to stderr."""
        end = time.monotonic() + seconds
        while not (there := bool(self._store.check([key]))) and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        return there


class _Failed(Exception):
    """The store says that another process has failed."""


@contextmanager
def joined(device: str) -> Iterator[Processes | None]:
    """The processes this one was started with, None where it is alone; inside another such block the same ones.

    What ends the block is told once, by the main process; the others end with SystemExit.
    Raises UsageError, ResourceError where they cannot meet.
    """
    global _current
    if _current is not None:
        yield _current
        return
    try:
        launch = launched()
        processes = Processes(launch, device) if launch is not None else None
    except RetrofitError as error:
        if speaks():
            raise
        raise SystemExit(error.exit_code) from None  # every process of this machine sees the same
    if processes is None:
        yield None
        return
    _current = processes
    try:
        with _signals_ignored(processes):
            yield processes
    except BaseException as error:
        atexit.unregister(_disconnect)  # it would wait for calls that no one answers any more
        end = processes._final_error(error)
        if end is error:
            raise
        raise end from None
    finally:
        _current = None


def lost(error: BaseException) -> bool:
    """Whether this is what a process gets when another one has failed or is gone."""
    connection = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return connection or isinstance(error, _Failed | dist.DistError)


def _connect(device: str) -> None:
    from accelerate import PartialState

    try:
        PartialState(cpu=device == "cpu", timeout=CONNECT_TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = "start them by torchrun or accelerate launch; for one process unset RANK, WORLD_SIZE and LOCAL_RANK"
        raise ResourceError(f"the processes did not meet: {first}", hint) from error
    atexit.register(_disconnect)


def _own_device(launch: Launch, device: str) -> str:
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    if index:
        raise UsageError(f"--device {device} with {launch.size} processes", "say cuda: each process takes its own GPU")
    count = torch.cuda.device_count()
    if count < launch.local_size:
        raise ResourceError(f"{launch.local_size} processes, but {count} GPU(s) here", "start one process for each GPU")
    return f"cuda:{launch.local_rank}"


def _described(error: Exception, rank: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "kind": type(error).__name__,
        "message": str(error),
        "hint": getattr(error, "hint", None),
        "trace": "".join(traceback.format_exception(error)),
    }


def _as_own_error(failure: dict[str, Any] | None, error: BaseException) -> Exception:
    """The error of the process that is gone, as the main process's own."""
    notes = getattr(error, "__notes__", [])
    if failure is None:
        hint = "see what ended it (memory?); the same command goes on from the last checkpoint"
        return ResourceError("the connection to another process was lost", "; ".join([hint, *notes]))
    kind = getattr(errors, failure["kind"], None)
    if isinstance(kind, type) and issubclass(kind, RetrofitError):
        hint = "; ".join([*([failure["hint"]] if failure["hint"] else []), *notes])
        taken: Exception = kind(f"{failure['message']} (in process {failure['rank']})", hint or None)
    else:
        memory = {"OutOfMemoryError": torch.OutOfMemoryError, "MemoryError": MemoryError}
        known = memory.get(failure["kind"], RuntimeError)
        taken = known(f"process {failure['rank']}: {failure['kind']}: {failure['message']}")
    taken.add_note(failure["trace"])
    return taken


@contextmanager
def _signals_ignored(processes: Processes) -> Iterator[None]:
    """Ctrl-C and SIGTERM, which launchers send to all processes, are the main one's: the others follow it."""
    if processes.is_main or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _disconnect() -> None:
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group()
