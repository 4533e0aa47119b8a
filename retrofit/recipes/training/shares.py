"""One optimizer step in several processes: who takes which documents, and how the results become one.

Every process draws the same batches and takes its share of each.  Losses and gradients are sums until their
denominators are known, so adding up those of all processes gives what one process would have, within rounding.  All
then hold the same gradients and take the same optimizer step; no weights travel.
Not here: how processes meet (`processes.py`), the loss (`step.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrofit.errors import TrainingError, UsageError
from retrofit.recipes.processes import Processes
from retrofit.recipes.schema import Recipe
from retrofit.recipes.training.checkpoint import Checkpoint, Checkpoints, Contents, checkpoints, folder_of
from retrofit.recipes.training.objective import Sums
from retrofit.recipes.training.order import Batch

Anchors = list[dict[str, list[int]]]


def assign(loads: Sequence[int], size: int) -> list[list[int]]:
    """Which items each of `size` processes takes, by number: the heaviest first, each to whoever has least so far.

    With as many items as processes or more, everyone gets one.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    carried = [0] * size
    for item in sorted(range(len(loads)), key=lambda item: (-loads[item], item)):
        process = min(range(size), key=lambda process: (len(shares[process]) > 0, carried[process], process))
        shares[process].append(item)
        carried[process] += loads[item]
    return [sorted(share) for share in shares]


def check_processes(plan: Recipe, live: bool, processes: Processes | None) -> None:
    """Raises UsageError for what several processes cannot do.  live: the model was given, not named."""
    if processes is None:
        return
    size, batch_size = processes.size, plan.train.batch_size
    if batch_size < size:
        raise UsageError(
            f"train.batch_size is {batch_size}, but there are {size} processes: each needs a sequence",
            f"add train.batch_size={size}, or start {batch_size} process{'es' if batch_size > 1 else ''}",
        )
    if processes.sharded and plan.profile == "joint":
        raise UsageError("profile joint does not go with FSDP", "start the processes without FSDP, or use one")
    if processes.sharded and live:
        raise UsageError("FSDP cannot split a live model", "give the model's folder or Hub id")
    if processes.sharded and plan.data.responses == "regenerate":
        hint = "regenerate first without FSDP (stop it when training begins: the responses are kept)"
        raise UsageError("data.responses=regenerate does not go with FSDP, which cannot decode", hint)
    if processes.sharded and plan.train.probe_every:
        raise UsageError("train.probe_every does not go with FSDP, which cannot decode", "set train.probe_every=0")


def loading_device(device: str, processes: Processes | None) -> str:
    """Where the base is loaded."""
    if processes is None:
        return device
    return "cpu" if processes.sharded else processes.device  # split there, so that no GPU has to hold it whole


class Shares:
    """Who takes what of one step's accumulation batches.  rows: draft rows of each document."""

    def __init__(self, batches: Sequence[Batch], processes: Processes, rows: int):
        self.processes, self.batches = processes, batches
        self.assigned = [assign([len(d.tokens) + rows for d, _ in batch], processes.size) for batch in batches]

    def own_batches(self) -> list[Batch]:
        own = [shares[self.processes.rank] for shares in self.assigned]
        return [[batch[item] for item in share] for batch, share in zip(self.batches, own, strict=True)]

    def merge_anchors(self, trained: Sequence[Tensor], anchors: Anchors) -> Anchors:
        """The anchors of all documents, in their order.

        Raises TrainingError where the processes read different text or hold different weights.
        """
        told = self.processes.exchange("step", (_digest(self.batches), checksum(trained), anchors))
        for what, number in (("read different text", 0), ("hold different weights", 1)):
            if any(value[number] != told[0][number] for value in told):
                wrong = [str(rank) for rank, value in enumerate(told) if value[number] != told[0][number]]
                hint = (
                    "let data.source be the same files for all of them",
                    "start them on machines of one kind, with the same versions and number of threads",
                )[number]
                raise TrainingError(f"processes 0 and {', '.join(wrong)} {what}", hint)
        queues = [iter(value[2]) for value in told]
        ordered: Anchors = []
        for shares in self.assigned:
            by_item = {item: next(queues[rank]) for rank, share in enumerate(shares) for item in share}
            ordered += [by_item[item] for item in sorted(by_item)]
        return ordered

    def add_up(self, sums: Sums, drafts: int, rows: tuple[int, int], buffers: Sequence[Tensor]) -> tuple[int, int]:
        """Make sums and gradients those of all processes; returns the clean and draft rows of all."""
        numbers = _packed(sums, drafts, rows)
        where = buffers[0].device if buffers else torch.device("cpu")
        numbers = numbers.to(where)
        self.processes.add_up([numbers, *buffers])
        return _unpacked(sums, drafts, numbers.cpu())


def checksum(tensors: Sequence[Tensor]) -> list[int]:
    """Equal bits give equal numbers, on any machine: whole numbers have no rounding."""
    return [int(t.detach().view(torch.int32).sum(dtype=torch.int64)) for t in tensors]


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for document, epoch in batch:
            digest.update(f"{document.id} {epoch}".encode())
            digest.update(np.asarray(document.tokens, dtype=np.int64).tobytes())
            digest.update(bytes(document.response))
    return digest.hexdigest()


def _packed(sums: Sums, drafts: int, rows: tuple[int, int]) -> Tensor:
    """All numbers as one fp64 vector, which holds counts below 2^53 exactly."""
    plain = [float(getattr(sums, field.name)) for field in fields(Sums) if field.name != "accept"]
    accept = sums.accept.detach().double().cpu() if sums.accept.numel() else torch.zeros(drafts, 3).double()
    return torch.cat([torch.tensor([*rows, *plain], dtype=torch.float64), accept.flatten()])


def _unpacked(sums: Sums, drafts: int, numbers: Tensor) -> tuple[int, int]:
    names = [field.name for field in fields(Sums) if field.name != "accept"]
    clean, draft, *plain = numbers[: 2 + len(names)].tolist()
    for name, value in zip(names, plain, strict=True):
        setattr(sums, name, type(getattr(sums, name))(value))
    sums.accept = numbers[2 + len(names) :].view(drafts, 3)
    return int(clean), int(draft)


class ReadOnlyCheckpoints(Checkpoints):
    """The checkpoints as another process than the main one has them: it reads them and writes nothing."""

    def save(self, step: int, contents: Contents) -> Path:
        return self.folder / f"step-{step:06d}"

    def record(self, step: int, content: Any) -> Path:
        return self.folder / f"stopped-{step:06d}.json"

    def begin_metrics(self, lines: bytes) -> None:
        pass

    def add_metrics(self, line: str) -> None:
        pass

    def clear(self) -> None:
        pass


@contextmanager
def shared_checkpoints(out: Path, processes: Processes | None) -> Iterator[Checkpoints]:
    """`checkpoints(out)` of the main process, which holds the lock; the others look on.  Raises what that raises."""
    if processes is not None and not processes.is_main:
        processes.exchange("lock")
        if not folder_of(out).is_dir():
            raise UsageError(
                f"process {processes.rank} does not see {folder_of(out)}, which the main process has made",
                "put the output (-o) where all processes see it",
            )
        yield ReadOnlyCheckpoints(folder_of(out))
        return
    with checkpoints(out) as saved:
        if processes is not None:
            processes.exchange("lock")
        yield saved


def same_start(processes: Processes, settings: dict[str, Any], newest: Checkpoint | None) -> None:
    """Raises UsageError where the processes were told different things or see different checkpoints."""
    step = newest.step if newest is not None else 0
    told = processes.exchange("start", (settings, step))
    for rank, (other, seen) in enumerate(told):
        if seen != told[0][1]:
            raise UsageError(
                f"process {rank} sees a checkpoint of step {seen}, the main process one of step {told[0][1]}",
                "put the output (-o) where all processes see it",
            )
        keys = [key for key in {**told[0][0], **other} if told[0][0].get(key) != other.get(key)]
        if keys:
            raise UsageError(f"process {rank} has another {keys[0]} than the main process", "start all of them alike")
