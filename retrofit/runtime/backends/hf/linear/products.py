"""Products of rows with a model's weights: plain, or with weights in oneDNN's own layout, which is faster on a CPU.

A packed product reads its weight in the order that the instructions want, and a row's bits depend less on the rows
beside it: in fp32 not at all from 2 rows on, where plain products take another path for every few rows.  Where they
still do, the rows are cut (`Cut`); whether that suffices on a machine is for the self-test to say.

    Product   one linear layer's
    Shared    of several layers that are given the same rows (q, k, v; gate, up): the first to be asked makes all

Not here: which layers, and what becomes of the plain weights (`packing.py`); routed experts (`experts.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from retrofit.adapters.gated_lora import Gate
from retrofit.adapters.one_call import one_call
from retrofit.errors import UsageError
from retrofit.runtime.backends.hf.linear.low_rank import LowRank

LINEAR = (nn.Linear, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer and nothing more: Llama 4's routers are linear layers that also choose."""
    return isinstance(module, LINEAR) and not hasattr(module, "top_k")


LAID_OUT_FOR = 16
"""Rows that a packed weight is laid out for; it serves any number."""

Run = Callable[[Tensor], Tensor]


@dataclass
class Cut:
    """How many rows a product has; one for all products of a backend."""

    least: int = 1
    """Fewer are filled up."""
    most: int | None = None
    """More run in several products of so many; None: any number."""


def in_cut(run: Run, x: Tensor, cut: Cut) -> Tensor:
    """x [..., N, in] through a product of `cut.least` to `cut.most` rows at a time -> [..., N, out]."""
    rows = x.numel() // x.shape[-1]
    if cut.least <= rows and (cut.most is None or rows <= cut.most):
        return run(x)
    flat = x.reshape(-1, x.shape[-1])
    if rows < cut.least:
        out = run(F.pad(flat, (0, 0, 0, cut.least - rows)))[:rows]
    else:
        assert cut.most is not None
        rest = rows % cut.most
        made = [run(part) for part in flat[: rows - rest].split(cut.most)]
        if rest:
            made.append(run(flat[-max(rest, cut.least) :])[-rest:])
        out = torch.cat(made)
    return out.view(*x.shape[:-1], out.shape[-1])


class Packed:
    """A weight [out, in] as oneDNN lays it out; calling it multiplies.  `plain` gives back the bits it was made of."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), LAID_OUT_FOR)
        self.bias = None if bias is None else bias.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """Raises UsageError where a gradient is wanted: there would be none, and nothing would say so."""
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError("packed weights give no gradients", "load the model with packed=False")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return out

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def span(self) -> tuple[int, int]:
        """Addresses of its numbers."""
        first = int(torch.ops.mkldnn.data_ptr(self.weight))
        return first, first + self.weight.numel() * self.weight.element_size()

    def plain(self) -> Tensor:
        """[out, in], a new tensor."""
        dense: Tensor = self.weight.to_dense()
        return dense

    def __deepcopy__(self, memo: Any) -> Packed:
        """Nobody writes to it, and a tensor in this layout cannot be copied."""
        return self


class Shared:
    """Products of layers that are given the same rows, as one product.  Each thread has its own rows."""

    def __init__(self, packed: Packed, sizes: Sequence[int], cut: Cut):
        self.packed, self.sizes, self.cut = packed, list(sizes), cut
        self.low_rank: LowRank | None = None
        """The adapter's update, where all of them have one."""
        self._made = threading.local()

    def part(self, number: int, x: Tensor, first: int | None = None) -> Tensor:
        """[..., N, sizes[number]] of x [..., N, in]; made with the others' unless this very tensor's were.

        first: the first row that gets the adapter's update; None: none does.
        """
        made = self._made
        if getattr(made, "of", None) is not x or made.first != first:
            made.of, made.first, made.left = x, first, len(self.sizes)
            out = in_cut(self.packed, x, self.cut)
            if first is not None:
                assert self.low_rank is not None
                self.low_rank.add_to(out, x, first)
            made.parts = out.split_with_sizes(self.sizes, -1)
        part: Tensor = made.parts[number]
        made.left -= 1
        if not made.left:
            made.of = made.parts = None
        return part

    def plain(self, number: int) -> Tensor:
        """[sizes[number], in], a new tensor."""
        return self.packed.plain().split(self.sizes)[number].clone()

    def __deepcopy__(self, memo: Any) -> Shared:
        return self


def _is_packed(product: Product, x: Tensor) -> bool:
    return product.is_packed and (product.alone or product.gate.base_rows is not None)


class Product:
    """What a linear layer computes in our forwards; it obeys the cut of the backend.

    Where the plain weight was let go it is also what the layer computes otherwise.
    """

    def __init__(self, module: nn.Module, gate: Gate, cut: Cut):
        self.module, self.gate, self.cut = module, gate, cut
        self.packed: Packed | None = None
        self.shared: tuple[Shared, int] | None = None
        self.low_rank: LowRank | None = None
        """The adapter's update of this layer; `shared` has its own."""
        self.alone = False
        """Whether the plain weight was let go."""

    @property
    def device(self) -> torch.device:
        """Where it multiplies; a weight that was let go is said to be nowhere."""
        return torch.device("cpu") if self.alone else self.module._parameters["weight"].device  # type: ignore[union-attr]

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., N, in] -> [..., N, out]."""
        if self.shared is not None:
            shared, number = self.shared
            return shared.part(number, x)
        return in_cut(self.packed or self._own, x, self.cut)

    def updated(self, x: Tensor, first: int) -> Tensor | None:
        """With the adapter's update of rows `first` and later; None: that is not prepared."""
        if self.shared is not None:
            shared, number = self.shared
            return None if shared.low_rank is None else shared.part(number, x, first)
        if self.low_rank is None:
            return None
        out = self(x)
        self.low_rank.add_to(out, x, first)
        return out

    @property
    def weights(self) -> Packed | None:
        """The packed weight that it reads, its own or one of several layers; None: the layer's."""
        return self.packed if self.shared is None else self.shared[0].packed

    @property
    def is_packed(self) -> bool:
        return self.weights is not None

    @partial(one_call, plain=_is_packed)
    def forward(self, x: Tensor) -> Tensor:
        """As the layer's: the product in a forward of ours, its own otherwise."""
        return self(x) if self.alone or self.gate.base_rows is not None else self._own(x)

    def plain(self) -> Tensor:
        """The weight as the layer has it, a new tensor; of a packed one."""
        if self.shared is not None:
            shared, number = self.shared
            weight = shared.plain(number)
        else:
            assert self.packed is not None
            weight = self.packed.plain()
        return weight.T.contiguous() if isinstance(self.module, Conv1D) else weight

    def _own(self, x: Tensor) -> Tensor:
        parameters = self.module._parameters
        if type(self.module) is nn.Linear:
            # What the layer would do, past the module machinery: a tenth of a small model's decode step.
            return F.linear(x, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
        out: Tensor = type(self.module).forward(self.module, x)
        return out


def packed_weights(products: Iterable[Product]) -> list[Packed]:
    """Those that are read now."""
    return [product.weights for product in products if product.weights is not None]


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in]."""
    weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight
