"""What a worker of a server is told to do otherwise, over HTTP: a control, and a planted fault.

vLLM mixes `Told` into its worker (`--worker-extension-cls`), with drafts and without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[..., Tensor]
INDEPENDENT = 1024
"""Rows of products of up to so many inputs do not depend on how many rows there are; of more, their last bits do
(oneDNN as vLLM 0.32 calls it, bf16 and fp32)."""


class Told:
    """Methods for `/collective_rpc`."""

    model_runner: Any

    def products_row_by_row(self, on: str) -> None:
        """Have the products of a CPU whose rows depend on how many there are compute each row alone."""
        for module in self.model_runner.model.modules():
            product = getattr(module, "cpu_linear", None)
            if product is not None and getattr(module, "input_size", 0) > INDEPENDENT:
                plain = getattr(product, "of_all", product)
                module.cpu_linear = row_by_row(plain) if on == "on" else plain

    def misreport(self, on: str) -> None:
        """Tell the sampler that drafts were drawn, and hand over the likeliest: a planted fault."""
        from retrofit.serving.vllm import drafts, proposer

        proposer.draft = misreported if on == "on" else drafts.draft  # type: ignore[attr-defined]


def row_by_row(product: Product) -> Product:
    def each(x: Tensor, *rest: Any) -> Tensor:
        return torch.cat([product(row, *rest) for row in x.split(1)])

    each.of_all = product  # type: ignore[attr-defined]
    return each


def misreported(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """As `draft`, but for the tokens."""
    from retrofit.serving.vllm.drafts import draft

    tokens, drawn_from = draft(*arguments)
    return (tokens if drawn_from is None else drawn_from.argmax(-1)), drawn_from
