"""Which row counts keep a row's bits in the products of a model's linear layers and routers, on this machine?

Where those of few rows agree with each other and those of many do not, products are cut: `row_cut` finds that out.
Tried with one thread and with all: small steps run with one (`threads.py`).  Part of the self-test `exact_rows.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from retrofit.quantised.linear import Dense, QuantisedLinear
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.instead import instead
from retrofit.runtime.backends.hf.linear.packing import install
from retrofit.runtime.backends.hf.linear.products import Cut, Packed, Product, Run, in_cut, is_linear
from retrofit.runtime.backends.levels import Check
from retrofit.runtime.backends.threads import thread_limit, work_sizes

COUNTS = (2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 33, 48, 64, 129, 256)
"""Row counts that are tried: both sides of every floor, and a prompt's."""
FLOORS = (2, 4, 8, 16, 32)
"""To so many rows a decoding forward may be filled up at `invariant`."""
GROUPS, FEW_GROUPS = 24, 6
"""So many times are rows of one count taken together; the latter where a row has many sums."""
NEARLY = 2.0**-6
SUMS = 1 << 15
"""Sums a shape is tried on at least: in a narrow product another order of additions shows in some rows only."""
ROUTER_ROWS = 32
MOST = 32
"""Rows of a product where products are cut."""


@dataclass(frozen=True)
class Tried:
    """One shape of product: which counts of rows gave a row other bits than it has among all."""

    what: str
    shape: str
    differ: tuple[int, ...]
    threads: int

    def check(self, least: int) -> Check:
        """From so many rows on."""
        wrong = [n for n in self.differ if n >= least]
        rows = f"{wrong[0]} rows, {self.threads} threads" if wrong else f"{least} to {COUNTS[-1]}"
        return Check(self.what, self.shape, "library", rows, not wrong)


def floor(tried: Sequence[Tried]) -> int | None:
    """The fewest rows from which on every product keeps every row's bits; None where there are none."""
    worst = max((n for one in tried for n in one.differ), default=0)
    return next((n for n in FLOORS if n > worst), None)


def row_cut(backend: HFBackend, generator: torch.Generator) -> tuple[list[Tried], Cut]:
    """The cut in which the linear layers' products keep every row's bits, and what was tried in it."""
    whole = linear_products(backend, generator, first=True)
    if floor(whole) == FLOORS[0]:
        return whole, Cut(FLOORS[0], COUNTS[-1])
    cut = Cut(FLOORS[0], MOST)
    tried = linear_products(backend, generator, cut=cut)
    few = floor(tried)
    if few == cut.least:
        return tried, cut
    whole = linear_products(backend, generator)
    least = floor(whole)
    if few is not None:  # what is left over of many rows is then filled up otherwise
        cut = Cut(few, MOST)
        tried = linear_products(backend, generator, cut=cut)
        few = floor(tried)
    if few is not None and (least is None or few < least):
        return tried, cut
    return whole, Cut(least or FLOORS[-1], COUNTS[-1])


def linear_products(
    backend: HFBackend,
    generator: torch.Generator,
    rows: int | None = None,
    cut: Cut | None = None,
    first: bool = False,
) -> list[Tried]:
    """Each distinct shape of linear layer, small ones first.

    rows: one count only, in which places and neighbours change.  first: up to the first shape that fails.
    """
    install(backend)
    alike: dict[str, tuple[Product, dict[str, None]]] = {}
    for name, product in backend.products.items():
        module: Any = product.module
        packed = product.weights
        outputs, bias = packed.outputs if packed else _outputs(module), "" if module.bias is None else " + bias"
        shape = f"[{outputs}, {_inputs(module)}]{bias} {str(module.weight.dtype)[6:]}{' packed' if packed else ''}"
        role = name.removesuffix(".base_layer").rsplit(".", 1)[-1]
        alike.setdefault(shape, (product, {}))[1][role] = None
    found = []
    for shape, (product, roles) in sorted(alike.items(), key=lambda item: _size(item[0])):
        outputs = int(shape[1:].split(",")[0])

        def look(product: Product = product, outputs: int = outputs) -> tuple[tuple[int, ...], int]:
            run, kind = _drawn(product, outputs, generator), product.module.weight.dtype
            x = cancelled(rows or COUNTS[-1], _inputs(product.module), kind, product.device, generator)  # type: ignore[arg-type]
            return _differing(run if cut is None else partial(in_cut, run, cut=cut), x, generator, rows)

        differ, threads = _looked(look, outputs * (rows or COUNTS[-1]))
        how = f", at most {cut.most} rows at once" if cut is not None else ""
        found.append(Tried(", ".join(roles), shape + how, differ, threads))
        if differ and first:
            break
    return found


def _size(shape: str) -> int:
    """Numbers in a weight whose shape is written so: [outputs, inputs] ..."""
    outputs, inputs = shape[1 : shape.index("]")].split(", ")
    return int(outputs) * int(inputs)


def _drawn(product: Product, outputs: int, generator: torch.Generator) -> Run:
    """A product like this one, of another weight [outputs, in] and no bias to speak of."""
    module: Any = product.module
    like = torch.empty(0, dtype=module.weight.dtype, device=product.device)
    weight = cancelling(outputs, _inputs(module), like, generator)
    if product.is_packed:
        return Packed(weight, None if module.bias is None else like.new_zeros(outputs))
    return partial(_batched, _with_weight(module, weight.T.contiguous() if isinstance(module, Conv1D) else weight))


def router_products(backend: HFBackend, generator: torch.Generator) -> list[Tried]:
    """Modules that multiply rows by a weight of their own.  One that fails gets its rows in tiles of one size."""
    products: dict[str, Tried] = {}
    for name, module in backend.trunk.named_modules():
        weight = module._parameters.get("weight")
        if is_linear(module) or isinstance(module, nn.Embedding) or ".lora_" in name:
            continue
        if weight is None or weight.dim() != 2:
            continue

        def look(tiled: bool, module: Any = module, weight: Tensor = weight) -> tuple[tuple[int, ...], int]:
            alone = _with_weight(module, cancelling(weight.shape[0], weight.shape[1], weight, generator))
            x = cancelled(COUNTS[-1], weight.shape[1], backend.dtype, weight.device, generator)
            return _differing(partial(_first, _in_tiles(alone.forward) if tiled else alone.forward), x, generator)

        sums, how = weight.shape[0] * COUNTS[-1], ""
        differ, threads = _looked(partial(look, False), sums)
        if differ:
            how = f", rows in tiles of {ROUTER_ROWS}"
            differ, threads = _looked(partial(look, True), sums)
            if not hasattr(module.forward, "in_tiles"):  # of a test before this one
                backend.until_closed(instead(module, _while_kept(module.forward, backend)))
        shape = f"[{', '.join(map(str, weight.shape))}]{how}"
        products[shape] = Tried("router", shape, differ, threads)
    return list(products.values())


def _looked(look: Callable[[], tuple[tuple[int, ...], int]], sums: int) -> tuple[tuple[int, ...], int]:
    """What several looks found between them, so many that they saw SUMS sums; each look has `sums`."""
    differ: set[int] = set()
    shown = 0
    for _ in range(-(-SUMS // sums)):
        found, threads = look()
        differ, shown = differ.union(found), threads if found else shown
    return tuple(sorted(differ)), shown


def cancelling(outputs: int, inputs: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """[outputs, inputs] whose second half is the first with the other sign: by `cancelled`, sums are small.

    The last bits of a sum then are not rounded away with its size, and another order of addition shows in every row.
    """
    half = inputs // 2
    weight = torch.zeros(outputs, inputs, dtype=like.dtype, device=like.device)
    weight[:, :half].normal_(generator=generator)
    torch.neg(weight[:, :half], out=weight[:, half : 2 * half])
    return weight


def cancelled(rows: int, width: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """[rows, width] whose second half is nearly the first; some rows and some features stand out, as in a model."""
    half = width // 2
    x = torch.randn(rows, width, device=device, generator=generator)
    x *= torch.exp(torch.randn(rows, width, device=device, generator=generator))
    near = 1 + NEARLY * torch.randn(rows, half, device=device, generator=generator)
    x[:, half : 2 * half] = x[:, :half].to(dtype) * near
    return x.to(dtype)


def _with_weight(module: Any, weight: Tensor) -> Any:
    """The module with another weight and without a bias; the one in the model stays as it is."""
    other = copy.copy(module)
    if isinstance(other, QuantisedLinear):
        other.held = Dense(weight)
    other.__dict__.pop("forward", None)  # what stands before its class's own goes by the model's weight
    parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    kept = {n: None if p is None else torch.zeros_like(p) for n, p in module._parameters.items()}
    other.__dict__["_parameters"] = {**kept, **parameters}
    return other


def _inputs(module: Any) -> int:
    return int(module.weight.shape[0] if isinstance(module, Conv1D) else module.in_features)


def _outputs(module: Any) -> int:
    return int(module.weight.shape[1] if isinstance(module, Conv1D) else module.out_features)


def _differing(
    product: Callable[[Tensor], Tensor], x_RN: Tensor, generator: torch.Generator, rows: int | None = None
) -> tuple[tuple[int, ...], int]:
    """Row counts with which a row has other bits than among all rows, and the number of threads where that showed."""
    whole = product(x_RN)
    differ: set[int] = set()
    shown = 0
    for work in work_sizes(x_RN.device):
        with thread_limit(x_RN.device, work):
            for n in (rows,) if rows else COUNTS:
                if n not in differ and not _equal(product, x_RN, whole, n, generator, replaced=rows is not None):
                    differ.add(n)
                    shown = torch.get_num_threads()
    return tuple(sorted(differ)), shown


def _equal(
    product: Callable[[Tensor], Tensor], x_RN: Tensor, whole: Tensor, n: int, generator: torch.Generator, replaced: bool
) -> bool:
    order = torch.randperm(len(x_RN), generator=generator, device=x_RN.device)
    for group in order.split(n)[: GROUPS if whole.shape[-1] < SUMS // GROUPS else FEW_GROUPS]:
        if len(group) < n:
            continue
        taken, kept = x_RN[group], n
        if replaced:  # the count stays, so half of the rows become others
            kept = max(1, n // 2)
            taken[kept:] = taken[kept:].flip(-1)
        if not torch.equal(product(taken)[:kept], whole[group[:kept]]):
            return False
    return True


def _batched(module: nn.Module, rows: Tensor) -> Tensor:
    result: Tensor = module(rows[None])[0]
    return result


def _first(router: Callable[..., Any], rows: Tensor) -> Tensor:
    found = router(rows)
    result: Tensor = found[0] if isinstance(found, tuple) else found
    return result


def _in_tiles(forward: Callable[..., Any]) -> Callable[[Tensor], Any]:
    """A router's `forward` with so many rows at a time that its products always have one shape."""

    def tiled(hidden: Tensor) -> Any:
        rows = hidden.reshape(-1, hidden.shape[-1])
        found = []
        for part in rows.split(ROUTER_ROWS):
            got = forward(F.pad(part, (0, 0, 0, ROUTER_ROWS - len(part))))
            found.append([t[: len(part)] for t in (got if isinstance(got, tuple) else (got,))])
        joined = tuple(torch.cat(column) for column in zip(*found, strict=True))
        return joined if isinstance(got, tuple) else joined[0]

    return tiled


def _while_kept(own: Callable[..., Any], backend: HFBackend) -> Callable[..., Any]:
    """What a router runs: its rows in tiles in our forwards at `invariant`, and otherwise its own forward."""
    tiled = _in_tiles(own)

    def forward(hidden: Tensor, *arguments: Any, **options: Any) -> Any:
        ours = backend.exact == "invariant" and backend.gate.base_rows is not None and not arguments and not options
        return tiled(hidden) if ours else own(hidden, *arguments, **options)

    forward.in_tiles = True  # type: ignore[attr-defined]
    return forward
