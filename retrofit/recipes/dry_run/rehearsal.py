"""Run training code on tensors that have shapes and no memory, and write down what they would take.

What runs is the code itself, on PyTorch's meta tensors, so its memory is known for any model, device and recipe
without weights.  Values do not exist: where the code asks for one it gets an answer that leads the longest way, a
boolean is true, an index by a mask takes every row, all elements are distinct.
CPU and GPU differ by the sizes that the training cuts its work by, so that no GPU is needed to rehearse one.
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
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from retrofit.runtime.backends.sizes import standing_in
from retrofit.runtime.rules.sampling import hash_constants
from retrofit.weight_files import dtype_name

BASE = "base weights"
NUMBER = 1e-9
"""Any number asked for: small, so that differences are small, and not 0, which nothing could be divided by."""

BLOCK = 512
"""Bytes that PyTorch's CUDA allocator gives out a multiple of."""

META = torch.device("meta")


class Holdings:
    """Bytes that are alive by what they hold, now and at the fullest moment of each phase."""

    def __init__(self) -> None:
        self.now: Counter[str] = Counter()
        self.fullest: dict[str, dict[str, int]] = {}
        self._total = self._most = 0
        self.begin("")

    def begin(self, phase: str) -> None:
        self.phase = phase
        self._most = sum(self.fullest.get(phase, {}).values())
        self._look()

    def change(self, kind: str, size: int) -> None:
        self.now[kind] += size
        self._total += size
        if size > 0:
            self._look()

    def _look(self) -> None:
        if self._total > self._most:
            self._most = self._total
            self.fullest[self.phase] = {kind: size for kind, size in self.now.items() if size}


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
        live, holdings = self.live, self.holdings
        size = -(-storage.nbytes() // self.block) * self.block

        def gone(_: Any) -> None:
            holdings.change(live.pop(place).kind, -size)

        live[place] = _Block(weakref.ref(storage, gone), self.kind, size)
        holdings.change(self.kind, size)

    def label(self, tensor: Tensor, kind: str) -> None:
        """Say what it holds."""
        block = self.live.get(tensor.untyped_storage()._cdata)
        if block is not None and block.kind != kind:
            self.holdings.now[block.kind] -= block.size
            self.holdings.now[kind] += block.size
            block.kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
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
    """What an operation that meta tensors do not know is taken to give, as it depends on values, and what one in place
    gives, which they take long for; NotImplemented for all others."""
    aten, packet = torch.ops.aten, func.overloadpacket
    if func.__name__.partition(".")[0].endswith("_") and func._schema.is_mutable and isinstance(args[0], Tensor):
        return args[0]  # in place: nothing is made
    if packet is aten._local_scalar_dense or packet is aten.item:
        dtype = args[0].dtype
        return True if dtype is torch.bool else NUMBER if dtype.is_floating_point else 1
    if packet is aten._to_copy and kwargs.get("device") is not None and args[0].is_meta:
        return func(*args, **{**kwargs, "device": META})  # whatever is moved to the CPU has no values there either
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
    """Meta tensors have no array; what asks for one gets zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.numpy, Tensor.tolist) and args[0].is_meta:
            zeros = np.zeros(tuple(args[0].shape), dtype=dtype_name(args[0].dtype))
            return zeros if func is Tensor.numpy else zeros.tolist()
        return func(*args, **(kwargs or {}))


def _is_fused(
    kind: str, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **others: Any
) -> bool:
    """Whether PyTorch attends without a matrix of scores; elsewhere meta tensors show what it takes.

    On a GPU masks and float32 are for the kernels that know no grouped queries.
    """
    if len({t.shape[-1] for t in (query, key, value)}) > 1:
        return False
    alike = query.shape[1] == key.shape[1]
    return kind == "cpu" or alike or (attn_mask is None and query.dtype in (torch.float16, torch.bfloat16))


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

    def label(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Say what these tensors hold."""
        for tensor in tensors:
            if tensor is not None:
                self._watch.label(tensor, kind)


@contextmanager
def rehearsal(kind: str) -> Iterator[Rehearsal]:
    """Inside, tensors that are made have no memory and are watched, first as the base's.

    kind: `cpu`, or `cuda` for a CPU that takes memory as a GPU does.
    """
    watch = _Watch(Holdings(), 1 if kind == "cpu" else BLOCK)
    fork, attention = torch.random.fork_rng, F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, **others: Any) -> Tensor:
        if not _is_fused(kind, query, key, value, **others):
            return attention(query, key, value, **others)
        mask, causal, scale = (others.get(name) for name in ("attn_mask", "is_causal", "scale"))
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = fused(query, key, value, 0.0, bool(causal), attn_mask=mask, scale=scale)[0]
        return out

    try:
        hash_constants.cache_clear()  # no tensor may outlast its world, neither way
        F.scaled_dot_product_attention = attend  # type: ignore[assignment]
        # meta tensors draw nothing
        torch.random.fork_rng = lambda devices=(), enabled=True, **_: fork(devices=[], enabled=enabled)
        with standing_in(kind), META, _Arrays(), watch:
            yield Rehearsal(watch)
    finally:
        torch.random.fork_rng, F.scaled_dot_product_attention = fork, attention
        hash_constants.cache_clear()
