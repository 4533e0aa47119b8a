"""Run training code on tensors that have shapes and no memory, and write down what they would take.

What runs is the code itself, on PyTorch's fake tensors, so its memory is known for any model, device and recipe
without weights.  Values do not exist: where the code asks for one it gets an answer that leads the longest way, a
boolean is true, an index by a mask takes every row, all elements are distinct.
A GPU is rehearsed as a CPU with the GPU's sizes, so that none is needed: PyTorch without CUDA has no tensors of it,
fake ones neither.
Not here: what is run (`estimate.py`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from retrofit.recipes.allocator import CLibrary
from retrofit.recipes.objective import CHUNK_ELEMENTS
from retrofit.runtime.backends.attention import FEW_SCORES
from retrofit.runtime.backends.block_attention import TILE_SCORES

BASE = "base weights"
NUMBER = 1e-9
"""Any number asked for: small, so that differences are small, and not 0, which nothing could be divided by."""

SIZES: tuple[dict[str, int], ...] = (CHUNK_ELEMENTS, TILE_SCORES, FEW_SCORES)
"""What the training cuts its work by, by kind of device."""
BLOCK = 512
"""Bytes that PyTorch's CUDA allocator gives out a multiple of."""

KEPT = "freed, not given back"
NOTICED = 1 << 10
"""Bytes from which on a new block is worth asking the C library about."""


class Holdings:
    """Bytes that are alive by what they hold, now and at the fullest moment of each phase."""

    def __init__(self, library: CLibrary | None):
        self.library = library
        self.now: Counter[str] = Counter()
        self.fullest: dict[str, dict[str, int]] = {}
        self._total = 0
        self._most = (0, 0)
        self.begin("")

    def begin(self, phase: str) -> None:
        self.phase = phase
        before = self.fullest.get(phase, {})
        held = sum(before.values())
        self._most = (held, held - before.get(KEPT, 0))
        self._look()

    def change(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self._total += size
        if size >= NOTICED or (size > 0 and self.library is None):
            self._look()

    def _look(self) -> None:
        kept = 0
        if self.library is not None:
            kept = max(0, self.library.held - (self._total - self.now[BASE]))
        if (self._total + kept, self._total) > self._most:
            self._most = (self._total + kept, self._total)
            holds = {kind: size for kind, size in self.now.items() if size}
            self.fullest[self.phase] = holds | ({KEPT: kept} if kept else {})


@dataclass
class _Block:
    """A storage that is alive."""

    storage: weakref.ref[Any]
    kind: str
    size: int


class _Watch(TorchDispatchMode):
    """Notes storages as operations make them and as Python and autograd drop them.  block: what sizes are rounded
    up to a multiple of."""

    def __init__(self, holdings: Holdings, block: int):
        super().__init__()
        self.holdings, self.block, self.kind = holdings, block, BASE
        self.live: dict[int, _Block] = {}

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        place = storage._cdata
        if place in self.live:
            return
        live, holdings, library = self.live, self.holdings, self.holdings.library
        size = -(-storage.nbytes() // self.block) * self.block
        # The base lies in the pages of its file, and a real tensor, as an index is, has its memory.
        apart = library is None or self.kind == BASE or not size or not isinstance(tensor, FakeTensor)
        address = None if apart else library.make(size)  # type: ignore[union-attr]

        def gone(_: Any) -> None:
            holdings.change(live.pop(place).kind, -size)
            if address is not None:
                library.free(address)  # type: ignore[union-attr]

        live[place] = _Block(weakref.ref(storage, gone), self.kind, size)
        holdings.change(self.kind, size)

    def call(self, tensor: Tensor, kind: str) -> None:
        """Say what it holds."""
        block = self.live.get(tensor.untyped_storage()._cdata)
        if block is not None and block.kind != kind:
            self.holdings.now[block.kind] -= block.size
            self.holdings.now[kind] += block.size
            block.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if torch.is_inference_mode_enabled() and func.namespace == "aten":
            with self:  # in this mode operations arrive whole, and what they consist of would not be seen
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = _without_values(func, args, kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        for one in tree_iter(out):
            if isinstance(one, Tensor):
                self._add(one)
        return out


def _without_values(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation that fake tensors do not know is taken to give, as it depends on values; NotImplemented for
    all others."""
    aten, packet = torch.ops.aten, func.overloadpacket
    if packet is aten._local_scalar_dense or packet is aten.item:
        dtype = args[0].dtype
        return True if dtype is torch.bool else NUMBER if dtype.is_floating_point else 1
    if packet is aten._unique2:
        flat = args[0].reshape(-1)
        return torch.empty_like(flat), torch.empty_like(args[0], dtype=torch.long), torch.empty_like(flat)
    if packet is aten.nonzero:
        return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
    if packet is aten.index and len(args[1]) == 1 and args[1][0].dtype is torch.bool:
        mask = args[1][0]
        return args[0].new_empty((mask.numel(), *args[0].shape[mask.dim() :]))
    if packet is aten._grouped_mm:
        # PyTorch knows its shape for bfloat16 only.
        a, b = args[:2]
        groups = (len(args[2] if len(args) > 2 else kwargs["offs"]),) if a.dim() == b.dim() == 2 else a.shape[:-2]
        return a.new_empty((*groups, a.shape[-2], b.shape[-1]))
    return NotImplemented


class _Arrays(TorchFunctionMode):
    """Fake tensors have no array; what asks for one gets zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist) and isinstance(args[0], FakeTensor):
            zeros = np.zeros(tuple(args[0].shape), dtype=str(args[0].dtype).removeprefix("torch."))
            return zeros if func is Tensor.numpy else zeros.tolist()
        return func(*args, **(kwargs or {}))


class Rehearsal:
    """A rehearsal going on; `rehearsal(device)` makes it."""

    def __init__(self, watch: _Watch):
        self._watch = watch
        self.fullest = watch.holdings.fullest
        """By phase: bytes by what they held at its fullest moment."""

    def phase(self, name: str, kind: str) -> None:
        """A phase begins; what is made from here on holds `kind`, until it is called something else."""
        self._watch.kind = kind
        self._watch.holdings.begin(name)

    def call(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what these tensors hold."""
        for tensor in tensors:
            if tensor is not None:
                self._watch.call(tensor, kind)


@contextmanager
def rehearsal(kind: str, library: CLibrary | None = None) -> Iterator[Rehearsal]:
    """Inside, tensors that are made have no memory and are watched, first as the base's.

    kind: `cpu`, or `cuda` for a CPU that takes memory as a GPU does.
    """
    watch = _Watch(Holdings(library), 1 if kind == "cpu" else BLOCK)
    swap, before = torch.utils.swap_tensors, [sizes["cpu"] for sizes in SIZES]

    def move(to: Tensor, new: Tensor) -> None:
        try:
            swap(to, new)
        except RuntimeError:  # fake tensors may be referred to by PyTorch's own cache of them
            to.data = new.data

    try:
        torch.utils.swap_tensors = move
        for sizes in SIZES:
            sizes["cpu"] = sizes.get(kind, 0)
        with FakeTensorMode(allow_non_fake_inputs=True), _Arrays(), watch, torch.device("cpu"):
            yield Rehearsal(watch)
    finally:
        torch.utils.swap_tensors = swap
        for sizes, size in zip(SIZES, before, strict=True):
            sizes["cpu"] = size
