"""Routed experts in our forwards: base rows and draft rows in calls of their own, on packed weights if there are any.

Grouped kernels change a row's bits with the rows beside it, and a base row's must not depend on a draft row's.

    plain     transformers' own implementations; `batched_mm` copies an expert's weights for every row that chose it
    packed    each expert multiplies the rows that chose it, read in place; a row's products keep their bits at any
              number of rows, and its experts' outputs are added in the order of its choices

Not here: which implementation a forward runs (`backend.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrofit.adapters.gated_lora import Gate
from retrofit.adapters.one_call import one_call
from retrofit.runtime.backends.hf.instead import instead, unbound
from retrofit.runtime.backends.hf.linear.products import Cut, Packed, in_cut

GATHER_BYTES = 1 << 28
"""Expert weights that one `batched_mm` call may gather; more rows run in several calls, with the same bits."""
UP, DOWN = ("gate_up_proj", "up_proj"), ("down_proj",)


class PackedExperts:
    """All experts of a layer: products up, each with its gate beside it where there is one, and down."""

    def __init__(self, experts: nn.Module, cut: Cut):
        self.cut = cut
        self.names = [next(name for name in names if hasattr(experts, name)) for names in (UP, DOWN)]
        self.transposed = bool(getattr(experts, "is_transposed", False))
        self.packed = []
        for name in self.names:
            weights: Tensor = getattr(experts, name)
            bias: Tensor | None = getattr(experts, f"{name}_bias", None)
            self.packed.append(
                [
                    Packed(w.T.contiguous() if self.transposed else w, None if bias is None else bias[number])
                    for number, w in enumerate(weights.detach())
                ]
            )
        self.alone = False
        """Whether the plain weights were let go."""

    def plain(self) -> dict[str, Tensor]:
        """The parameters by name, new tensors."""
        dense = ([one.plain() for one in packed] for packed in self.packed)
        return {
            name: torch.stack([w.T if self.transposed else w for w in weights])
            for name, weights in zip(self.names, dense, strict=True)
        }

    def __call__(self, experts: Any, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """[N, H] hidden states, the experts chosen [N, K] and their weights [N, K] -> [N, H]."""
        N, K = index_NK.shape
        chosen = index_NK.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        counts = torch.bincount(chosen, minlength=len(self.packed[0])).tolist()
        out = hidden_NH.new_empty(N * K, hidden_NH.shape[-1])
        for number, places in enumerate(order.split(counts)):
            if len(places):
                up, down = (packed[number] for packed in self.packed)
                inner = in_cut(up, hidden_NH[places // K], self.cut)
                inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
                out[places] = in_cut(down, inner, self.cut)
        if experts.has_post_expert_norm:
            out = experts.post_expert_norm(out)
        weighted = out * weights_NK.reshape(-1, 1)
        return weighted.view(N, K, -1).sum(dim=1).to(hidden_NH.dtype)

    def __deepcopy__(self, memo: Any) -> PackedExperts:
        """As `Packed`."""
        return self


def routed(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name that hold the weights of all experts of a layer."""
    return {
        name: module
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "experts" and not isinstance(module, nn.ModuleList)
    }


def can_pack(experts: Any) -> bool:
    """Whether these are experts as transformers' `use_experts_implementation` makes them, of weights in one place."""
    known = all(hasattr(experts, name) for name in ("has_gate", "has_bias", "has_post_expert_norm", "_apply_gate"))
    weights = [[getattr(experts, name, None) for name in names] for names in (UP, DOWN)]
    return known and all(any(w is not None and type(w.data) is Tensor and w.dim() == 3 for w in one) for one in weights)


def separate_experts(model: PreTrainedModel, gate: Gate, cut: Cut) -> Callable[[], None]:
    """Make routed experts run base rows and draft rows in calls of their own; returns the undo.

    cut: of experts that all rows go through.
    """
    undone: list[tuple[nn.Module, Callable[[], None]]] = []
    for module in routed(model).values():
        undone.append((module, instead(module, _split_rows(module, gate, cut, model.config.get_text_config()))))

    def undo() -> None:
        for module, one in undone:
            packed: PackedExperts | None = module.__dict__.get("retrofit_packed")
            if packed is None or not packed.alone:  # else they have no other weights
                one()

    return undo


def _split_rows(experts: nn.Module, gate: Gate, cut: Cut, config: Any) -> Callable[..., Tensor]:
    forward = unbound(experts)
    per_row = _gathered_bytes_per_row(experts)

    @one_call
    def split(
        self: nn.Module, hidden: Tensor, index_NK: Tensor | None = None, weights_NK: Tensor | None = None
    ) -> Tensor:
        n, packed = gate.base_rows, self.__dict__.get("retrofit_packed")
        if index_NK is None or weights_NK is None:
            return forward(self, hidden) if n is None else _every_row(self, forward, hidden, cut)
        if n is None:
            return (
                packed(self, hidden, index_NK, weights_NK)
                if packed is not None and packed.alone
                else forward(self, hidden, index_NK, weights_NK)
            )
        hidden_NH = hidden.reshape(-1, hidden.shape[-1])  # DBRX hands [1, N, H] on
        parts = [slice(0, n), slice(n, len(hidden_NH))]
        if packed is None and config._experts_implementation == "batched_mm":
            size = max(1, GATHER_BYTES // (per_row * index_NK.shape[1]))
            parts = [slice(i, min(i + size, p.stop)) for p in parts for i in range(p.start, p.stop, size)]
        parts = [p for p in parts if p.stop > p.start]
        run = forward if packed is None else packed
        out = [run(self, hidden_NH[p], index_NK[p], weights_NK[p]) for p in parts]
        return (out[0] if len(out) == 1 else torch.cat(out)).reshape(hidden.shape)

    return MethodType(split, experts)


def _every_row(experts: Any, forward: Callable[..., Tensor], hidden: Tensor, cut: Cut) -> Tensor:
    """[E * N, H] -> [E * N, H]: all rows for the first expert, then for the second, and so on (Llama 4).

    That is a product like a linear layer's, of rows that do not depend on each other, and so in the same cut.
    """
    E, H = experts.num_experts, hidden.shape[-1]

    def run(rows_NX: Tensor) -> Tensor:
        return _by_row(forward(experts, rows_NX.view(-1, E, H).transpose(0, 1).reshape(-1, H)), E)

    out = in_cut(run, _by_row(hidden, E), cut)
    return out.view(-1, E, H).transpose(0, 1).reshape(hidden.shape)


def _by_row(hidden: Tensor, experts: int) -> Tensor:
    """[E * N, H] -> [N, E * H]."""
    return hidden.view(experts, -1, hidden.shape[-1]).transpose(0, 1).flatten(1)


def _gathered_bytes_per_row(experts: nn.Module) -> int:
    """Bytes of one expert's weights: what `batched_mm` copies per row and chosen expert."""
    return sum(p[0].numel() * p.element_size() for p in experts.parameters() if p.dim() == 3) or 1
