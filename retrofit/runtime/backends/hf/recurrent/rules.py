"""The recurrences of recurrent layers, over rows: what stands in for a model's functions that run a text through one.

Prompts go through the model's own function, which works in chunks, as they do in transformers' prefill; other rows
advance one by one, as in its decoding.  The two add up in different orders, so a state that decoding left behind has
not the bits of one that a prefill of the same text leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.runtime.backends.hf.elementwise import in_lanes
from retrofit.runtime.backends.hf.recurrent.advance import Told, advance, folded
from retrofit.runtime.backends.hf.recurrent.anchors import Inputs, at_anchors
from retrofit.runtime.backends.hf.recurrent.forest import Index
from retrofit.runtime.backends.hf.recurrent.layer_rows import LayerRows

NORM_EPS = 1e-6
"""Of the lengths of queries and keys; transformers and flash-linear-attention have no setting for it."""


def torch_chunk_gated_delta_rule(own: Callable[..., Any]) -> Callable[..., Any]:
    """Gated delta rule: a row reads what its key has stored, and writes how far that is from its value.

    Kimi's has a decay for each number of a key.
    """

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
        """query, key [1, N, Hk, Dk], value [1, N, Hv, Dv], beta [1, N, Hv] -> [1, N, Hv, Dv].

        g [1, N, Hv] or [1, N, Hv, Dk]: log of the decay.
        """
        rows, heads = retrofit_rows, value.shape[2]
        states = rows.states.matrices_of(rows.layer, heads, key.shape[3], value.shape[3], value.device)
        normed = {"use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel}
        inputs = {"query": query, "key": key, "value": value, "g": g, "beta": beta}
        if rows.plan.prompts:

            def run(begin: Tensor | None, some: Inputs) -> tuple[Tensor, Tensor]:
                out, state = own(**some, initial_state=begin, output_final_state=True, **normed)
                return out, state

            return of_prompts(rows, states, inputs, ("key", "value", "g", "beta"), run), None

        def normal(x: Tensor) -> Tensor:
            x = x.float()
            if use_qk_l2norm_in_kernel:
                x = x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS)
            return x.repeat_interleave(heads // x.shape[-2], dim=-2)

        def told(some: Inputs) -> Told:
            k, v, write, g = normal(some["key"]), *(some[name].float() for name in ("value", "beta", "g"))
            decay = in_lanes(torch.exp, g)

            def right_of(state: Tensor, at: Index) -> Tensor:
                return (v[at] - folded(state * k[at][..., None])) * write[at][..., None]

            return Told(decay if decay.ndim == k.ndim else decay[..., None], k, right_of)

        if rows.states.record is not None:

            def blocks(some: Inputs, begin: Tensor) -> Tensor:
                out: Tensor = own(**some, chunk_size=some["key"].shape[1], initial_state=begin, **normed)[0]
                return out

            return of_blocks(rows, inputs, blocks, told)[None], None
        read = normal(query[0]) / query.shape[-1] ** 0.5
        out = of_steps(rows, states, told(alone(inputs)), read, value.shape[3])
        return out.to(query.dtype)[None], None

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
        dt_bias: Tensor | float | None = None,
        dt_softplus: bool = False,
        *,
        retrofit_rows: LayerRows,
        **more: Any,
    ) -> Tensor:
        """hidden_states [1, N, H, P], dt [1, N, H], A [H], B, C [1, N, groups, state], D [H] -> [1, N, H, P]."""
        rows, heads, width = retrofit_rows, hidden_states.shape[2], hidden_states.shape[3]
        states = rows.states.matrices_of(rows.layer, heads, B.shape[3], width, B.device)
        inputs = {"hidden_states": hidden_states, "dt": dt, "B": B, "C": C}
        if rows.plan.prompts:
            same = {**more, "A": A, "D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "chunk_size": chunk_size}

            def run(begin: Tensor | None, some: Inputs) -> tuple[Tensor, Tensor]:
                named = {**same, "initial_states": None if begin is None else begin.mT, "return_final_states": True}
                out, state = own(**some, **named)
                return out, state.mT

            return of_prompts(rows, states, inputs, ("hidden_states", "dt", "B"), run)
        record = rows.states.record
        # As decoding's own function, which has no limits.
        limits = (0.0, float("inf")) if record is None else more.get("dt_limit", (0.0, float("inf")))

        def passed(dt: Tensor) -> Tensor:
            time = dt + dt_bias.to(dt.dtype) if isinstance(dt_bias, Tensor) else dt
            return (in_lanes(F.softplus, time) if dt_softplus else time).clamp(*limits)

        def told(some: Inputs) -> Told:
            time = passed(some["dt"]).float()
            written = some["hidden_states"].float() * time[..., None]
            decay = in_lanes(torch.exp, time * A.float())[..., None]
            return Told(decay, spread(some["B"]), lambda _, at: written[at])

        def spread(x: Tensor) -> Tensor:
            return x.float().repeat_interleave(heads // x.shape[-2], dim=-2)

        if record is not None:

            def blocks(some: Inputs, begin: Tensor) -> Tensor:
                some, K = {**some, "dt": passed(some["dt"])}, some["dt"].shape[1]
                out: Tensor = own(**some, A=A, D=D, chunk_size=K, initial_states=begin.mT)
                return out

            return of_blocks(rows, inputs, blocks, told)[None]
        out = of_steps(rows, states, told(alone(inputs)), spread(C[0]), width)
        return (out if D is None else out + hidden_states[0].float() * D.float()[:, None])[None]

    return over_rows


def mamba_selective_scan(own: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba: each channel has a state of its own and writes its input, scaled by its time step.

    The model's function begins with no state.  The recurrence is linear, so of one that was there before, what has not
    decayed yet is added.
    """

    def over_rows(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        *,
        retrofit_rows: LayerRows,
        return_last_state: bool = False,
        **more: Any,
    ) -> Tensor:
        """hidden_states, dt, z [1, channels, N], A [channels, S], B, C [1, S, N], D [channels] -> [1, channels, N]."""
        rows, channels = retrofit_rows, hidden_states.shape[1]
        states = rows.states.matrices_of(rows.layer, channels, A.shape[1], 1, A.device)
        inputs = {"hidden_states": hidden_states.mT, "dt": dt.mT, "B": B.mT, "C": C.mT}

        def passed(dt: Tensor) -> Tensor:
            time = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)
            return (in_lanes(F.softplus, time) if delta_softplus else time).float()

        def run(begin: Tensor | None, some: Inputs) -> tuple[Tensor, Tensor]:
            x, *rest = (some[name].mT for name in ("hidden_states", "B", "C"))
            time = passed(some["dt"])
            out, state = own(x, time.mT, A, *rest, D=D, return_last_state=True, **more)
            out, state = out.mT, state.float()[..., None]
            if begin is None:
                return out, state
            left = torch.exp(A.float() * time.cumsum(1)[..., None]) * begin[:, None, ..., 0]
            return out + (left @ some["C"].float()[..., None])[..., 0], state + left[:, -1, ..., None]

        def told(some: Inputs) -> Told:
            time = passed(some["dt"])
            written = (some["hidden_states"].float() * time)[..., None]
            decay = in_lanes(torch.exp, time[..., None] * A.float())
            return Told(decay, some["B"].float()[..., None, :], lambda _, at: written[at])

        if rows.plan.prompts:
            out = of_prompts(rows, states, inputs, ("hidden_states", "dt", "B"), run)
        elif rows.states.record is not None:
            out = of_blocks(rows, inputs, lambda some, begin: run(begin, some)[0], told)[None]
        else:
            out = of_steps(rows, states, told(alone(inputs)), inputs["C"][0].float()[:, None], 1)[..., 0]
            out = (out if D is None else out + inputs["hidden_states"][0].float() * D.float())[None]
        out = out if z is None else out * in_lanes(F.silu, z.mT)
        return out.mT

    return over_rows


def alone(inputs: Inputs) -> Inputs:
    """Of the one sequence that all rows travel as: [N, ..]."""
    return {name: tensor[0] for name, tensor in inputs.items()}


def of_prompts(
    rows: LayerRows,
    states: Tensor,
    inputs: Inputs,
    kept: Sequence[str],
    run: Callable[[Tensor | None, Inputs], tuple[Tensor, Tensor]],
) -> Tensor:
    """Prompts, one after another; `kept`: the inputs that change the state.  run: (state, inputs) -> (out, state)."""
    outs = []
    for slot, start, some in rows.prompts():
        given = {name: tensor[:, some] for name, tensor in inputs.items()}
        before = None if start == 0 else states[slot : slot + 1]
        if before is not None and before.requires_grad:
            before = before.clone()  # the state behind these rows is written over it
        out, states[slot : slot + 1] = run(before, given)
        outs.append(out)
        if rows.states.record is not None:
            rows.states.record.note(rows.layer, slot, start, {name: given[name][0] for name in kept})
            rows.states.record.passed(rows.layer, slot, start + out.shape[1], states[slot])
    return rows.whole(outs, 1)


def of_blocks(
    rows: LayerRows, inputs: Inputs, run: Callable[[Inputs, Tensor], Tensor], told: Callable[[Inputs], Told]
) -> Tensor:
    """[N, H, width] of blocks that hang on recorded texts."""
    assert rows.states.record is not None
    given = {name: rows.blocks(tensor[0]) for name, tensor in inputs.items()}
    return rows.unblocked(at_anchors(rows.states.record, rows.layer, rows.plan.block_rows, given, run, told))


def of_steps(rows: LayerRows, states: Tensor, told: Told, read: Tensor, width: int) -> Tensor:
    """[N, H, width] of rows that advance one by one."""
    out, writes = advance(rows.forest, states, told, read, width)
    rows.states.step.writes[rows.layer] = writes.some(slice(rows.plan.num_base))
    return out
