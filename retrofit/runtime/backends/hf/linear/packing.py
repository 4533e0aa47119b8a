"""Lay a model's weights out for packed products, and give them back bit for bit.

    alone     the model was loaded for us: the plain weight is let go, and its place is held by a tensor without memory;
              a weight that something else reads too, such as a tied embedding, stays
    beside    the model is somebody's: a second copy, used in our forwards only

Layers that are given the very same rows (q, k, v; gate, up) become one product; which those are, a forward shows.
Not here: the products (`products.py`, `experts.py`), and whether rows keep their bits in them (`exact_products.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.rows import SequenceRows
from retrofit.errors import ResourceError, RetrofitError
from retrofit.quantised.linear import quantised_layers
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.instead import instead
from retrofit.runtime.backends.hf.linear.experts import PackedExperts, can_pack, routed
from retrofit.runtime.backends.hf.linear.huge_pages import on_huge_pages
from retrofit.runtime.backends.hf.linear.low_rank import LowRank
from retrofit.runtime.backends.hf.linear.products import (
    LINEAR,
    Packed,
    Product,
    Shared,
    is_linear,
    matrix,
    packed_weights,
)
from retrofit.runtime.backends.hf.load_check import differs, row_logits

if TYPE_CHECKING:
    from retrofit.runtime.backends.hf.backend import HFBackend

PACKED = ("auto", True, False)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
TRIED = 64
"""Width of the weight that packing is tried on."""
WRONG = 0.05
"""Largest error of a packed product, to the size of its numbers: rounding in bfloat16 costs 0.01."""
ROWS = 4
"""Rows of the forward that shows which layers share theirs, and of the one that is compared."""


def install(backend: HFBackend) -> None:
    """Let every linear layer of the model run as a `Product` in our forwards.  Done before: nothing happens."""
    if backend.products:
        return
    layers = {name: m for name, m in backend.trunk.named_modules() if is_linear(m) and ".lora_" not in name}
    for name, module in {**layers, "vocabulary": backend.head.linear}.items():
        if is_linear(module) and "forward" not in module.__dict__:
            product = backend.products[name] = Product(module, backend.gate, backend.cut)
            backend.until_closed(_unless_alone(product, instead(module, product.forward)))
    gated = _gated(backend)
    for product in backend.products.values():
        holder = gated.get(id(product.module))
        if holder is not None:
            holder.product = product


def _gated(backend: HFBackend) -> dict[int, GatedLoraLinear]:
    """The adapter's layers by the id of the base layer they hold."""
    return {id(m.plain): m for m in backend.trunk.modules() if isinstance(m, GatedLoraLinear) and m.plain is not None}


def _unless_alone(product: Product, undo: Callable[[], None]) -> Callable[[], None]:
    """A layer whose plain weight was let go computes by the packed one, also when the engine is closed."""
    return lambda: None if product.alone else undo()


def refused(backend: HFBackend) -> str | None:
    """Why this model's weights cannot be packed on this machine."""
    if backend.device.type != "cpu":
        return f"packed products are for CPUs; this model is on {backend.device}"
    if quantised_layers(backend.trunk):
        return "its weights are quantised, and packed ones would take up what that spares"
    if backend.dtype not in TYPES:
        return f"there are no packed products in {str(backend.dtype).removeprefix('torch.')}"
    return missing(backend.dtype)


def missing(dtype: torch.dtype) -> str | None:
    """What this machine's processor or PyTorch lacks for packed products of this type."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(TRIED, TRIED, generator=generator).to(dtype) for _ in range(2))
    try:
        packed = Packed(weight)
        error = (packed(x).double() - x.double() @ weight.double().T).abs().max()
        same = torch.equal(packed.plain(), weight)
    except (AttributeError, RuntimeError, NotImplementedError) as problem:
        return f"this PyTorch has no packed products here: {str(problem).splitlines()[0][:120]}"
    if not same or error > WRONG * TRIED**0.5:
        return "packed products are wrong on this machine"
    return None


@contextmanager
def packed_meanwhile(backend: Any) -> Iterator[None]:
    """Decode with packed weights inside, beside the plain ones, where this machine and model can."""
    undo = None
    if backend.name == "hf" and not backend.packed:
        with suppress(ResourceError):  # then with plain ones
            undo = pack(backend, alone=False)
    try:
        yield
    finally:
        if undo is not None:
            undo()


@torch.inference_mode()
def pack(backend: HFBackend, alone: bool) -> Callable[[], None]:
    """Pack all weights that products read; returns the undo.

    The model's logits are compared before and after; where they differ, everything is undone.  Raises ResourceError
    where this machine or model cannot.
    """
    why = refused(backend)
    if why is not None:
        raise ResourceError(why, "leave packed at 'auto', or give packed=False")
    before = _logits(backend)
    install(backend)
    undone: list[Callable[[], None]] = []

    def undo() -> None:
        backend.recorded.forget()
        backend.packed = False
        while undone:
            undone.pop()()

    try:
        _pack_linear(backend, alone, undone)
        _pack_experts(backend, alone, undone)
        backend.recorded.forget()  # it holds the plain weights
        backend.packed = True
        with suppress(AttributeError):  # where addresses cannot be had
            on_huge_pages([one.span for one in _packed(backend)])
        routed_here = bool(routed(backend.model))
        if differs(_logits(backend), before, backend.dtype, routed_here):
            raise ResourceError(f"{type(backend.model).__name__} computes something else with packed weights")
    except BaseException as error:
        undo()
        if isinstance(error, RetrofitError) or not isinstance(error, RuntimeError):
            raise
        raise ResourceError(f"weights cannot be packed: {str(error).splitlines()[0][:160]}") from error
    return undo


def own_memory(model: nn.Module) -> None:
    """Give every weight that lies in somebody else's memory one of its own.

    As loaded, a weight lies in the mapping of its file, which stays whole in memory as long as any weight does.
    Outside of `inference_mode`: who writes to a weight later is to be noticed (`adapters/written.py`).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and not tensor.untyped_storage().resizable():
            tensor.data = tensor.data.clone()


def _packed(backend: HFBackend) -> Iterator[Packed]:
    yield from packed_weights(backend.products.values())
    for module in routed(backend.model).values():
        experts: PackedExperts | None = module.__dict__.get("retrofit_packed")
        yield from () if experts is None else (one for packed in experts.packed for one in packed)


def _logits(backend: HFBackend) -> Tensor:
    rows = min(ROWS, backend.context_length)
    plan = backend.row_plan([SequenceRows(0, 0, [(7 * i + 3) % backend.input_vocab for i in range(rows)])])
    return row_logits(backend, plan, KVCache(1, rows))


def _pack_linear(backend: HFBackend, alone: bool, undone: list[Callable[[], None]]) -> None:
    readers = Counter(id(p) for m in backend.model.modules() for p in m._parameters.values() if p is not None)
    products = {id(p.module): p for p in backend.products.values() if _fits(backend, p.module)}
    together = [[m for m in group if id(m) in products] for group in _sharing(backend)]
    grouped = {id(m) for group in together if len(group) > 1 for m in group}
    gated = _gated(backend)
    for group in [*together, *([p.module] for p in products.values() if id(p.module) not in grouped)]:
        if not group:
            continue
        mine = [products[id(module)] for module in group]
        weights = [matrix(module) for module in group]
        biases = [module._parameters["bias"] for module in group]
        packed = Packed(_joined(weights), None if biases[0] is None else _joined(biases))  # type: ignore[arg-type]
        low_rank = LowRank([gated[id(m)] for m in group]) if all(id(m) in gated for m in group) else None
        if len(mine) == 1:
            mine[0].packed, mine[0].low_rank = packed, low_rank
        else:
            shared = Shared(packed, [len(w) for w in weights], backend.cut)
            shared.low_rank = low_rank
            for number, product in enumerate(mine):
                product.shared = shared, number
        for product in mine:
            undone.append(_plain_again(product))
            if alone and readers[id(product.module._parameters["weight"])] == 1:
                undone.append(_let_go(product.module, product, {"weight": product.plain}))


def _pack_experts(backend: HFBackend, alone: bool, undone: list[Callable[[], None]]) -> None:
    for module in routed(backend.model).values():
        if not can_pack(module):
            continue
        packed = PackedExperts(module, backend.cut)
        module.retrofit_packed = packed  # type: ignore[assignment]
        undone.append(lambda module=module: module.__dict__.pop("retrofit_packed"))  # type: ignore[misc]
        if alone:
            plain = {name: lambda name=name, packed=packed: packed.plain()[name] for name in packed.names}
            undone.append(_let_go(module, packed, plain))  # type: ignore[arg-type]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _fits(backend: HFBackend, module: nn.Module) -> bool:
    """Whether this layer is a plain product of a weight of its own."""
    weight = module._parameters.get("weight")
    if type(module) not in LINEAR or weight is None or type(weight.data) is not Tensor:  # shared out over processes
        return False
    return weight.dtype in TYPES and not module._forward_pre_hooks


def _sharing(backend: HFBackend) -> list[list[nn.Module]]:
    """Layers that a forward gave the very same rows, in the order of their turns."""
    given: list[tuple[Tensor, list[nn.Module]]] = []
    times: Counter[int] = Counter()

    def saw(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        times[id(module)] += 1
        for rows, modules in given:
            if rows is arguments[0] and _alike(modules[0], module):
                modules.append(module)
                return
        given.append((arguments[0], [module]))

    watched = [p.module.register_forward_pre_hook(saw) for p in backend.products.values()]
    try:
        _logits(backend)
    finally:
        for handle in watched:
            handle.remove()
    return [modules for _, modules in given if len(modules) > 1 and all(times[id(m)] == 1 for m in modules)]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether their weights may be one."""
    weights = [m._parameters["weight"] for m in (one, other)]
    biases = [m._parameters["bias"] is None for m in (one, other)]
    return weights[0].dtype == weights[1].dtype and biases[0] == biases[1]  # type: ignore[union-attr]


def _plain_again(product: Product) -> Callable[[], None]:
    def undo() -> None:
        product.packed = product.shared = product.low_rank = None

    return undo


def _let_go(module: nn.Module, packed: Any, plain: dict[str, Callable[[], Tensor]]) -> Callable[[], None]:
    """Let parameters go that `plain` gives back; `state_dict` has them still.  Returns the undo."""
    for name in plain:
        empty = torch.empty_like(module._parameters[name], device="meta")  # type: ignore[arg-type]
        module._parameters[name] = nn.Parameter(empty, requires_grad=False)
    packed.alone = True

    def tell(_: nn.Module, state: dict[str, Tensor], prefix: str, __: Any) -> None:
        for name, give in plain.items():
            if f"{prefix}{name}" in state:
                state[f"{prefix}{name}"] = give()

    handle = module.register_state_dict_post_hook(tell)

    def undo() -> None:
        handle.remove()
        for name, give in plain.items():
            module._parameters[name] = nn.Parameter(give(), requires_grad=False)
        packed.alone = False

    return undo
