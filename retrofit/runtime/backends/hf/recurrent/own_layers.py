"""Recurrent layers whose `forward` has its recurrence in it, not in a function beside it: what runs in its place.

Lightning attention (MiniMax-01, arXiv 2501.08313): S <- exp(-slope) S + key value^T, its slope one of each head.
RG-LRU (Griffin, De et al. 2024, arXiv 2402.19427): h <- a h + x, each channel with a gate `a` of its own.
Projections, gates and norms are the layer's modules, called as it calls them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.runtime.backends.hf.recurrent.advance import Told
from retrofit.runtime.backends.hf.recurrent.anchors import Inputs
from retrofit.runtime.backends.hf.recurrent.convolution import causal_conv1d_fn
from retrofit.runtime.backends.hf.recurrent.layer_rows import LayerRows
from retrofit.runtime.backends.hf.recurrent.rules import alone, of_blocks, of_prompts, of_steps


def lightning_attention(layer: Any, hidden_1NH: Tensor, rows: LayerRows, **_: Any) -> tuple[Tensor, None]:
    """In the place of MiniMax's `MiniMaxLightningAttention.forward`."""
    heads, width = layer.num_attention_heads, layer.head_dim
    qkv = layer.act_fn(layer.qkv_proj(hidden_1NH)).unflatten(-1, (heads, 3 * width))
    names = ("query", "key", "value")
    inputs = dict(zip(names, (t.float() for t in qkv.split(width, dim=-1)), strict=True))
    slope = layer.slope_rate.view(heads).float()
    states = rows.states.matrices_of(rows.layer, heads, width, width, hidden_1NH.device)

    def run(begin: Tensor | None, some: Inputs) -> tuple[Tensor, Tensor]:
        outs, state = [], begin
        for first in range(0, some["key"].shape[1], layer.block_size):
            part = {name: t[:, first : first + layer.block_size] for name, t in some.items()}
            out, state = decayed_sums(part, slope, state)
            outs.append(out)
        assert state is not None
        return torch.cat(outs, dim=1), state

    def told(some: Inputs) -> Told:
        k, v = some["key"], some["value"]
        return Told(torch.exp(-slope).expand(k.shape[:-1])[..., None], k, lambda _, at: v[at])

    if rows.plan.prompts:
        out = of_prompts(rows, states, inputs, ("key", "value"), run)
    elif rows.states.record is not None:
        out = of_blocks(rows, inputs, lambda some, begin: decayed_sums(some, slope, begin)[0], told)[None]
    else:
        out = of_steps(rows, states, told(alone(inputs)), inputs["query"][0], width)[None]
    out = layer.norm(out.flatten(2).to(hidden_1NH.dtype))
    return layer.out_proj(torch.sigmoid(layer.output_gate(hidden_1NH)) * out), None


def decayed_sums(inputs: Inputs, slope: Tensor, begin: Tensor | None) -> tuple[Tensor, Tensor]:
    """query, key, value [n, m, H, D], slope [H] -> outputs [n, m, H, D] and the states [n, H, D, D] behind them.

    begin: states before; None: zero.
    """
    q, k, v = (inputs[name].transpose(1, 2) for name in ("query", "key", "value"))
    n, heads, m, width = k.shape
    state = k.new_zeros(n, heads, width, width) if begin is None else begin
    passed, slope = torch.arange(1, m + 1, device=k.device), slope[:, None]
    apart = (passed[:, None] - passed).clamp_min(0)
    weights = torch.exp(-slope[..., None] * apart).tril()
    out = (q @ k.mT * weights) @ v + (q @ state) * torch.exp(-slope * passed)[..., None]
    left = torch.exp(-slope * (m - passed))[..., None]
    return out.transpose(1, 2), state * torch.exp(-slope * m)[..., None] + (k * left).mT @ v


def recurrent_block(
    layer: Any, hidden_1NH: Tensor, rows: LayerRows, position_ids: Tensor, **_: Any
) -> tuple[Tensor, None]:
    """In the place of RecurrentGemma's `RecurrentGemmaRecurrentBlock.forward`."""
    gate = layer.act_fn(layer.linear_y(hidden_1NH))
    convolution = layer.conv_1d
    convolved = causal_conv1d_fn(_convolve)(
        layer.linear_x(hidden_1NH).mT, convolution.weight[:, 0], convolution.bias, retrofit_rows=rows
    )
    lru = layer.rg_lru
    found = type(lru).forward(_WithScan(lru, rows), convolved.mT, position_ids)
    return layer.linear_out(found * gate), None


class _WithScan:
    """Stands for an RG-LRU while its `forward` runs: its weights, our scan, and no state that is kept in it."""

    def __init__(self, lru: Any, rows: LayerRows):
        self.lru, self.rows = lru, rows
        self.recurrent_states = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lru, name)

    def _rnn_scan(
        self, hidden_states: Tensor, recurrent_gate: Tensor, reset: Tensor, recurrent_states: None
    ) -> tuple[Tensor, None]:
        """hidden_states, recurrent_gate [1, N, C], reset [1, N, 1] -> [1, N, C]."""
        rows, channels = self.rows, hidden_states.shape[2]
        states = rows.states.matrices_of(rows.layer, channels, 1, 1, hidden_states.device)
        inputs = {"written": hidden_states.float(), "decay": (recurrent_gate * ~reset).float()}
        if rows.plan.prompts:
            out = of_prompts(rows, states, inputs, tuple(inputs), self._scanned)
        elif rows.states.record is not None:
            out = of_blocks(rows, inputs, lambda some, begin: self._scanned(begin, some)[0], self._told)[None]
        else:
            told = self._told(alone(inputs))
            out = of_steps(rows, states, told, told.left, 1)[None, ..., 0]
        return out.to(hidden_states.dtype), None

    def _scanned(self, begin: Tensor | None, some: Inputs) -> tuple[Tensor, Tensor]:
        none = torch.zeros_like(some["decay"][:, :, :1], dtype=torch.bool)
        begin = some["decay"].new_zeros(len(none), some["decay"].shape[2]) if begin is None else begin[..., 0, 0]
        out, state = type(self.lru)._rnn_scan(self.lru, some["written"], some["decay"], none, begin)
        return out, state[..., None, None]

    def _told(self, some: Inputs) -> Told:
        written, decay = (some[name][..., None] for name in ("written", "decay"))
        return Told(decay, torch.ones_like(decay[..., :1, :]), lambda _, at: written[at])


def _convolve(inputs_1CL: Tensor, weight: Tensor, bias: Tensor | None, activation: None = None) -> Tensor:
    """Causal, over one text."""
    length, reach = inputs_1CL.shape[2], weight.shape[1] - 1
    return F.conv1d(inputs_1CL, weight[:, None], bias, padding=reach, groups=len(weight))[..., :length]
