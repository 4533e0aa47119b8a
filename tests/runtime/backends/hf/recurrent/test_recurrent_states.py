"""Rollback: whatever was drafted and rejected on the way, a state is that of the accepted text alone, bit for bit.

The rows' inputs are a function of position and token, so what differs can only come from the states.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.adapters.rows import Block, RowPlan, SequenceRows
from retrofit.runtime.backends.hf.attention import ForwardContext
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.recurrent.convolution import causal_conv1d_fn
from retrofit.runtime.backends.hf.recurrent.layer_rows import LayerRows
from retrofit.runtime.backends.hf.recurrent.own_layers import _WithScan, lightning_attention
from retrofit.runtime.backends.hf.recurrent.rules import (
    mamba2_chunk_scan,
    mamba_selective_scan,
    torch_chunk_gated_delta_rule,
)

STEPS = 200
VOCABULARY = 5
K_HEADS, HEADS, WIDE, WIDTH, REACH = 4, 4, 6, 12, 3
CHANNELS = 2 * K_HEADS * WIDE + HEADS * WIDTH


class Layer:
    """A layer made of our functions alone, on inputs that are drawn once for every position and token."""

    def __init__(self, rule: str):
        generator = torch.Generator().manual_seed(0)
        draw = (STEPS * 4, VOCABULARY)
        self.rule = rule
        self.inputs = torch.randn(*draw, CHANNELS, generator=generator)
        first, second = torch.randn(2, *draw, HEADS, generator=generator)
        if rule == "kimi":
            first = torch.randn(*draw, HEADS, WIDE, generator=generator)
        self.gates = (-first.exp(), second.sigmoid()) if rule in ("delta", "kimi") else (first, second)
        self.weight = torch.randn(CHANNELS, REACH + 1, generator=generator)

    def rows(self, cache: KVCache, sequences: list[SequenceRows]) -> Tensor:
        """[N, HEADS, WIDTH] of all rows; of `mamba` [N, HEADS * WIDTH]."""
        plan = RowPlan(sequences)
        cache.states.begin(plan)
        at = plan.positions[0], plan.ids
        rows: Any = LayerRows(ForwardContext(plan, cache), 0)
        mixed = causal_conv1d_fn(None)(self.inputs[at].T[None], self.weight, activation="silu", retrofit_rows=rows)  # type: ignore[arg-type]
        parts = mixed.transpose(1, 2).split([K_HEADS * WIDE, K_HEADS * WIDE, HEADS * WIDTH], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, w)) for t, w in zip(parts, (WIDE, WIDE, WIDTH), strict=True))
        first, second = (t[at][None] for t in self.gates)
        if self.rule == "lightning":
            return self.lightning(q, k, v, rows)
        if self.rule == "rg-lru":
            return self.rg_lru(v.flatten(2), rows)
        if self.rule == "mamba":
            return self.mamba(v, q, k, rows)
        if self.rule in ("delta", "kimi"):
            found = torch_chunk_gated_delta_rule(None)(  # type: ignore[arg-type]
                q, k, v, first, second, use_qk_l2norm_in_kernel=True, retrofit_rows=rows
            )[0]
        else:
            A, D = -torch.arange(1.0, HEADS + 1), torch.ones(HEADS)
            found = mamba2_chunk_scan(None)(v, first, A, q, k, 4, D=D, dt_softplus=True, retrofit_rows=rows)  # type: ignore[arg-type]
        return found[0]

    def mamba(self, x: Tensor, B: Tensor, C: Tensor, rows: Any) -> Tensor:
        """Each of HEADS x WIDTH numbers is a channel, which takes its time step from what it writes."""
        channels = x.flatten(2).mT
        A, D = -torch.rand(channels.shape[1], WIDE, generator=torch.Generator().manual_seed(1)), channels.new_ones(1)
        out = mamba_selective_scan(None)(  # type: ignore[arg-type]
            channels, channels, A, B[:, :, 0].mT, C[:, :, 0].mT, D=D, z=channels, delta_softplus=True,
            delta_bias=D, retrofit_rows=rows,
        )  # fmt: skip
        return out[0].T

    def lightning(self, q: Tensor, k: Tensor, v: Tensor, rows: Any) -> Tensor:
        """The layer around it is left out."""
        parts = torch.cat([q, k, v[..., :WIDE]], dim=-1).flatten(2)
        same = torch.nn.Identity()
        layer = SimpleNamespace(
            num_attention_heads=HEADS, head_dim=WIDE, act_fn=same, qkv_proj=same, norm=same, out_proj=same,
            output_gate=lambda x: x[..., : HEADS * WIDE], slope_rate=torch.arange(1.0, HEADS + 1) / 8,
        )  # fmt: skip
        return lightning_attention(layer, parts, rows)[0][0]

    def rg_lru(self, x: Tensor, rows: Any) -> Tensor:
        none = torch.zeros(1, x.shape[1], 1, dtype=torch.bool)
        return _WithScan(torch.nn.Identity(), rows)._rnn_scan(x, x.sigmoid(), none, None)[0][0]


class Text:
    """One sequence under random drafts."""

    def __init__(self, slot: int, rng: random.Random):
        self.slot, self.rng = slot, rng
        self.tokens: list[int] = []
        self.outs: list[Tensor] = []

    def drafted(self) -> SequenceRows:
        """A chain or a tree behind the text, with blocks on some rows."""
        start, count = len(self.tokens), self.rng.randint(1, 6)
        parents = [-1, *(self.rng.randrange(n) for n in range(1, count))] if self.rng.random() < 0.5 else None
        tokens = [self.rng.randrange(VOCABULARY) for _ in range(count)]
        depths: list[int] = []
        for n in range(count):
            before = n - 1 if parents is None else parents[n]
            depths.append(0 if before < 0 else depths[before] + 1)
        anchors = [n for n in range(count) if self.rng.random() < 0.4]
        blocks = [Block(start + depths[n] + 1, [self.rng.randrange(VOCABULARY)] * 3, n) for n in anchors]
        return SequenceRows(self.slot, start, tokens, blocks, parents=parents)

    def accept(self, rows: SequenceRows) -> list[int]:
        """A path of base rows, at random: never none."""
        end = self.rng.randrange(len(rows.tokens))
        path = [end]
        while (before := path[0] - 1 if rows.parents is None else rows.parents[path[0]]) >= 0:
            path.insert(0, before)
        return path


@pytest.mark.parametrize("rule", ["delta", "kimi", "mamba", "mamba2", "lightning", "rg-lru"])
def test_random_drafts_leave_the_state_of_the_text(rule: str) -> None:
    layer, rng = Layer(rule), random.Random(0)
    cache = KVCache(3, 8)
    texts = [Text(slot, rng) for slot in (2, 0)]
    for _ in range(STEPS):
        running = [text for text in texts if rng.random() < 0.8] or texts
        plan = [text.drafted() for text in running]
        outs = layer.rows(cache, plan)
        branched = any(rows.parents is not None for rows in plan)
        row, kept, slots = 0, [], []
        for text, rows in zip(running, plan, strict=True):
            path = text.accept(rows)
            kept += [row + n for n in path]
            slots += [text.slot] * len(path)
            text.tokens += [rows.tokens[n] for n in path]
            text.outs += [outs[row + n] for n in path]
            row += len(rows.tokens)
        if branched:
            cache.store(torch.tensor(kept), torch.tensor(slots), torch.tensor(kept))
    for text in texts:
        alone = KVCache(1, 8)
        for position, (token, out) in enumerate(zip(text.tokens, text.outs, strict=True)):
            assert torch.equal(layer.rows(alone, [SequenceRows(0, position, [token])])[0], out), position
        end = len(text.tokens)
        for states in (alone.states, cache.states):
            slot = 0 if states is alone.states else text.slot
            states.begin(RowPlan([SequenceRows(slot, end, [0])]))
        for held in ("inputs", "matrices"):
            one, many = (getattr(states, held)[0] for states in (alone.states, cache.states))
            assert torch.equal(one[0], many[text.slot])
        assert alone.states.matrices[0].abs().max() > 0


def test_a_state_does_not_go_back() -> None:
    layer, cache = Layer("delta"), KVCache(1, 8)
    layer.rows(cache, [SequenceRows(0, 0, [1, 2, 3])])
    layer.rows(cache, [SequenceRows(0, 2, [1])])
    for start in (1, 4):
        with pytest.raises(ValueError, match="at position 2"):
            layer.rows(cache, [SequenceRows(0, start, [1])])
