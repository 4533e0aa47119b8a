"""The recurrences of recurrent layers, over rows: what stands in for a model's functions that run a text through one.

Prompts go through the model's own function, which works in chunks, as they do in transformers' prefill; other rows
advance one by one, as in its decoding.  The two add up in different orders, so a state that decoding left behind has
not the bits of one that a prefill of the same text leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.runtime.backends.hf.recurrent.advance import advance, folded
from retrofit.runtime.backends.hf.recurrent.forest import Index
from retrofit.runtime.backends.hf.recurrent.layer_rows import LayerRows

NORM_EPS = 1e-6
"""Of the lengths of queries and keys; transformers and flash-linear-attention have no setting for it."""


def torch_chunk_gated_delta_rule(own: Callable[..., Any]) -> Callable[..., Any]:
    """Gated delta rule: a row reads what its key has stored, and writes how far that is from its value."""

    def over_rows(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *,
        retrofit_rows: LayerRows,
        use_qk_l2norm_in_kernel: bool = False,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """query, key [1, N, Hk, Dk], value [1, N, Hv, Dv], g (log of the decay), beta [1, N, Hv] -> [1, N, Hv, Dv]."""
        rows, heads = retrofit_rows, value.shape[2]
        states = rows.states.matrices_of(rows.layer, heads, key.shape[3], value.shape[3], value.device)
        if rows.plan.prompts:
            outs = []
            for slot, start, some in rows.prompts():
                out, states[slot : slot + 1] = own(
                    *(t[:, some] for t in (query, key, value)),
                    g=g[:, some],
                    beta=beta[:, some],
                    initial_state=None if start == 0 else states[slot : slot + 1],
                    output_final_state=True,
                    use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                )
                outs.append(out)
            return rows.whole(outs, 1), None
        q, k, v, decay, write = (t[0].float() for t in (query, key, value, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = (t * torch.rsqrt((t * t).sum(-1, keepdim=True) + NORM_EPS) for t in (q, k))
        q = q / q.shape[-1] ** 0.5
        q, k = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (q, k))

        def right_of(state: Tensor, some: Index) -> Tensor:
            return (v[some] - folded(state * k[some][..., None])) * write[some][..., None]

        return _steps(rows, states, decay.exp(), k, q, right_of, value.shape[3]).to(query.dtype)[None], None

    return over_rows


def mamba2_chunk_scan(own: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba-2: a row writes its input, scaled by its time step."""

    def over_rows(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        *,
        retrofit_rows: LayerRows,
        **more: Any,
    ) -> Tensor:
        """hidden_states [1, N, H, P], dt [1, N, H], A [H], B, C [1, N, groups, state], D [H] -> [1, N, H, P]."""
        rows, heads, width = retrofit_rows, hidden_states.shape[2], hidden_states.shape[3]
        states = rows.states.matrices_of(rows.layer, heads, B.shape[3], width, B.device)
        if rows.plan.prompts:
            same = {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "chunk_size": chunk_size, **more}
            outs = []
            for slot, start, some in rows.prompts():
                x, step, left, read = (t[:, some] for t in (hidden_states, dt, B, C))
                begin = None if start == 0 else states[slot : slot + 1].mT
                named = {**same, "initial_states": begin, "return_final_states": True}
                out, state = own(x, step, A, left, read, **named)
                states[slot] = state[0].mT
                outs.append(out)
            return rows.whole(outs, 1)
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        if dt_softplus:
            dt = F.softplus(dt)
        x, time = hidden_states[0].float(), dt[0].float()
        left, read = (t[0].float().repeat_interleave(heads // t.shape[2], dim=1) for t in (B, C))
        written = x * time[..., None]
        out = _steps(rows, states, (time * A.float()).exp(), left, read, lambda _, some: written[some], width)
        return (out if D is None else out + x * D.float()[:, None])[None]

    return over_rows


def _steps(
    rows: LayerRows,
    states: Tensor,
    decay: Tensor,
    left: Tensor,
    read: Tensor,
    right_of: Callable[[Tensor, Index], Tensor],
    width: int,
) -> Tensor:
    """[N, H, width] of rows that advance one by one."""
    out, writes = advance(rows.forest, states, decay, left, read, right_of, width)
    rows.states.step.writes[rows.layer] = writes.some(slice(rows.plan.num_base))
    return out
