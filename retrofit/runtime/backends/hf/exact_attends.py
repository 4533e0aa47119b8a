"""In which form do the rows of a model's attention keep their bits, on this machine?

Over a cache of random K and V, for each distinct shape of the model's layers: a row alone, among its sequence's rows,
beside another sequence, in another slot, in a tree.  Part of the self-test `exact_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrofit.adapters.rows import RowPlan, SequenceRows
from retrofit.adapters.visibility import Chunk, Window
from retrofit.runtime.backends.hf.attention import ForwardContext, row_attention
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.exact_attention import FORMS, Form
from retrofit.runtime.backends.hf.exact_products import NEARLY, cancelled, cancelling
from retrofit.runtime.backends.hf.refused import has_sliding_window
from retrofit.runtime.backends.hf.sparse.indexers import INDEX, every_key
from retrofit.runtime.backends.levels import Check
from retrofit.runtime.backends.threads import thread_limit, work_sizes

STARTS = (60, 251, 1021)
"""Where the rows that attend begin: behind them lie multiples of 64, of a piece of 256 and of one of 1,024."""
LONGER = 400
"""By so many positions another sequence is longer: the keys that it adds weigh nothing for a row of this one."""
SPREAD = 3.0
ATTENDING = 60
"""Rows that attend together: with siblings in a tree, more than any tile."""
ALONE = 12
"""How many of them also attend one by one."""
COUNTS = (2, 3, 5, 9, 11, 16, 17, 33)
"""How many of them attend together besides: libraries choose by the number."""


def exact_form(backend: HFBackend, generator: torch.Generator) -> tuple[Form, list[Check]]:
    """The cheapest form in which every shape is exact, and its checks; the last form's where none is."""
    checks: list[Check] = []
    for form in FORMS:
        checks = [_attends(backend, form, case, generator) for case in _shapes(backend)]
        if all(check.equal for check in checks):
            return form, checks
    return FORMS[-1], checks


class _Shape(NamedTuple):
    """Of the attention of a layer."""

    heads: int
    kv_heads: int
    width: int
    value_width: int
    window: Window | None
    softcap: float | None
    sinks: bool
    picked: bool
    """Whether an indexer picks the keys."""


def _shapes(backend: HFBackend) -> list[_Shape]:
    """Those of the model's layers."""
    cache = KVCache(1, 2)
    backend.hold("off", None)
    backend.forward(backend.row_plan([SequenceRows(0, 0, [0] * 2)]), cache)
    heads = backend.config.num_attention_heads
    found = {(heads, k.shape[1], k.shape[3], v.shape[3]) for layer, (k, v) in cache.layers.items() if layer < INDEX}
    slides = has_sliding_window(backend.config, backend.context_length)
    windows = {None, backend.config.sliding_window if slides else None, *backend.chunks.values()}
    softcap = getattr(backend.config, "attn_logit_softcapping", None)
    # Where some layers have sinks and others do not, every size is tried in both ways.
    sinks = {module.sinks is not None for module in backend.trunk.modules() if hasattr(module, "sinks")} or {False}
    picked = (False, True) if backend.indexed else (False,)
    ways = [(w, softcap, has, by) for w in windows for has in sorted(sinks) for by in picked]
    return [_Shape(*sizes, *way) for sizes in sorted(found) for way in ways]


@dataclass
class _Attending:
    """Rows of one chain that attend from `start` on, over a cache of random K and V; slot 1 holds what slot 0 does."""

    form: Form
    window: Window | None
    softcap: float | None
    sinks: Tensor | None
    start: int
    cache: KVCache
    own: tuple[Tensor, ...]
    """q, k and v of the chain's rows, each [heads, chain, width]."""
    beside: tuple[Tensor, ...]
    """The same of other rows."""
    picked: bool
    """Whether they attend as if an indexer had picked all keys."""

    @property
    def chain(self) -> int:
        return self.own[0].shape[1]

    def run(self, *sequences: tuple[SequenceRows, list[int]]) -> Tensor:
        """[N, Hq, Dv]; numbers say which row of the chain each is, and from -1 down which of the others."""
        numbers = torch.tensor([n for _, rows in sequences for n in rows], device=self.own[0].device)
        query, key, value = (
            torch.where((numbers >= 0)[:, None], own[:, numbers.clamp(min=0)], other[:, (-1 - numbers).clamp(min=0)])
            for own, other in zip(self.own, self.beside, strict=True)
        )
        plan = RowPlan([s for s, _ in sequences], query.device)
        context = ForwardContext(plan, self.cache, self.form)
        attend: Any = row_attention  # of a module that it asks for its number only
        layer = SimpleNamespace(layer_idx=0)
        return attend(
            layer, query[None], key[None], value[None], None, sliding_window=self.window, softcap=self.softcap,
            s_aux=self.sinks, retrofit_rows=context, indices=every_key(plan) if self.picked else None,
        )[0][0]  # fmt: skip

    def rows(self, slot: int, first: int = 0, count: int | None = None) -> tuple[SequenceRows, list[int]]:
        count = self.chain if count is None else count
        return SequenceRows(slot, self.start + first, [0] * count), list(range(first, first + count))

    def differing(self) -> str | None:
        """The first arrangement in which a row of the chain has other bits."""
        chain = self.chain
        whole = self.run(self.rows(0))
        few = min(2, chain)
        other, longer = (
            (SequenceRows(2, start, [0] * few), [-1, -2][:few]) for start in (self.start // 2, self.start + LONGER)
        )
        # Not in slot 1: what is written there would be in the way of "another slot", the next time.
        places = ((2, self.start // 2), (3, self.start + LONGER))
        first, last = ((SequenceRows(slot, at, [0]), [-1]) for slot, at in places)
        # Every token of the chain has a sibling that stands before it: 0, then -1 1, -2 2, ...
        parents = [-1] + [p for i in range(chain - 1) for p in (max(0, 2 * i), max(0, 2 * i))]
        numbers = [0] + [n for i in range(1, chain) for n in (-i, i)]
        branched = SequenceRows(0, self.start, [0] * len(numbers), parents=parents)
        arrangements: dict[str, Callable[[], Tensor]] = {
            "another slot": lambda: self.run(self.rows(1)),
            "another sequence": lambda: self.run(other, self.rows(0))[few:],
            "a longer one": lambda: self.run(longer, self.rows(0))[few:],
            "a tree": lambda: self.run((branched, numbers))[::2],
            **{f"{n} together": partial(lambda n: self.run(self.rows(0, 0, n)), n) for n in COUNTS if n < chain},
            "one row beside others": lambda: torch.cat(
                [self.run(first, last, self.rows(0, j, 1))[2:] for j in range(min(ALONE, chain))]
            ),
            "alone": lambda: torch.cat([self.run(self.rows(0, j, 1)) for j in range(min(ALONE, chain))]),
        }
        for work in work_sizes(whole.device):
            with thread_limit(whole.device, work):
                for name, arranged in arrangements.items():
                    got = arranged()
                    if not torch.equal(got, whole[: len(got)]):
                        return f"{name}, at {self.start}"
        return None


def _attends(backend: HFBackend, form: Form, shape: _Shape, generator: torch.Generator) -> Check:
    differs = None
    for start in STARTS:
        differs = differs or _drawn(backend, form, shape, start, generator)
    said = f"{shape.heads} heads, {shape.kv_heads} K/V, width {shape.width}"
    said += f", chunks of {shape.window.size}" if isinstance(shape.window, Chunk) else ""
    said += f", window {shape.window}" if isinstance(shape.window, int) else ""
    said += ", sinks" if shape.sinks else ""
    said += ", picked keys" if shape.picked else ""
    tried = f"alone, 2 to {ATTENDING} rows, beside others, another slot, a tree; at {', '.join(map(str, STARTS))}"
    return Check("attention", said, form.name, differs or tried, differs is None)


def _drawn(backend: HFBackend, form: Form, shape: _Shape, start: int, generator: torch.Generator) -> str | None:
    """What `differing` says of random rows in which most of every sum cancels out, so that its order shows."""
    heads, kv_heads, width, value_width, window, softcap, has_sinks, picked = shape
    length, dtype, device = start + ATTENDING, backend.dtype, backend.device
    key = cancelling(kv_heads * length, width, torch.empty(0, dtype=dtype, device=device), generator)
    key = key.view(kv_heads, length, width)
    value = torch.randn(kv_heads, length, value_width, device=device, generator=generator)
    # Sizes far apart: sums of neighbours in size are exact in fp32, in whatever order.
    value = (value * torch.exp(SPREAD * torch.randn(value.shape, device=device, generator=generator))).to(dtype)
    # Keys come in pairs three places apart, with opposite values: 0 1 2 -0 -1 -2 3 4 5 -3 ...
    second = torch.arange(length, device=device)
    second = second[second % 6 >= 3]
    key[:, second] = key[:, second - 3]
    near = 1 + NEARLY * torch.randn(kv_heads, len(second), value_width, device=device, generator=generator)
    value[:, second] = (-value[:, second - 3] * near).to(dtype)
    query = cancelled(heads * ATTENDING, width, dtype, device, generator).view(heads, ATTENDING, width)

    cache = KVCache(4, start + LONGER + ATTENDING)
    cache.layers[0] = tuple(  # type: ignore[assignment]
        torch.randn(cache.slots, kv_heads, cache.capacity, w, device=device, generator=generator).to(dtype)
        for w in (width, value_width)
    )
    for kept, drawn in zip(cache.layers[0], (key, value), strict=True):
        kept[:2, :, :start] = drawn[:, :start]
    own = query, key[:, start:], value[:, start:]
    beside = tuple(torch.randn(t.shape, device=device, generator=generator).to(dtype) for t in own)
    sinks = torch.randn(heads, device=device, generator=generator).to(dtype) if has_sinks else None
    return _Attending(form, window, softcap, sinks, start, cache, own, beside, picked).differing()
