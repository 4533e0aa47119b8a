"""The causal convolution of a recurrent layer: every row sees the inputs of the few rows before it on its own path.

Prompts go through the model's own function, one sequence at a time; other rows through windows that the forest says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from retrofit.runtime.backends.hf import elementwise
from retrofit.runtime.backends.hf.recurrent.layer_rows import LayerRows


def causal_conv1d_fn(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What stands in for a model's function of this name; `own` is that function."""

    def over_rows(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        *,
        retrofit_rows: LayerRows,
        **_: Any,
    ) -> Tensor:
        """Inputs [1, C, N] of all rows, weight [C, reach + 1] -> [1, C, N]."""
        if retrofit_rows.plan.prompts:
            return _prompts(retrofit_rows, own, hidden_states, weight, bias, activation)
        run = _steps if retrofit_rows.states.record is None else _blocks
        return run(retrofit_rows, hidden_states[0].T, weight, bias, activation).T[None]

    return over_rows


def _prompts(
    rows: LayerRows,
    own: Callable[..., Tensor],
    inputs_1CN: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
) -> Tensor:
    reach = weight.shape[1] - 1
    held = rows.states.inputs_of(rows.layer, inputs_1CN[0].T, reach)
    outs = []
    for slot, start, some in rows.prompts():
        x = inputs_1CN[:, :, some]
        seen = x if start == 0 else torch.cat([held[slot].T[None], x], dim=2)
        outs.append(own(seen, weight, bias, activation=activation)[:, :, seen.shape[2] - x.shape[2] :])
        if rows.states.record is not None:
            rows.states.record.note(rows.layer, slot, start, {"before": x[0].T}, reach)
        held[slot] = F.pad(seen, (max(0, reach - seen.shape[2]), 0))[0, :, -reach:].T
    return rows.whole(outs, 2)


def _steps(rows: LayerRows, inputs_NC: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    reach = weight.shape[1] - 1
    held = rows.states.inputs_of(rows.layer, inputs_NC, reach)
    rows.states.step.inputs[rows.layer] = inputs_NC[: rows.plan.num_base]
    before = held[rows.forest.slots].flatten(0, 1)
    return windowed(torch.cat([before, inputs_NC]), rows.forest.windows(reach), weight, bias, activation)


def _blocks(rows: LayerRows, inputs_NC: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Blocks on texts that were recorded."""
    record, blocks, reach = rows.states.record, rows.plan.block_rows, weight.shape[1] - 1
    assert record is not None
    own = rows.blocks(inputs_NC)
    inputs = torch.cat([record.before(rows.layer, blocks, reach), own], dim=1)
    row = torch.arange(len(own) * blocks.block, device=own.device)
    first = row + row // blocks.block * reach
    windows = first + torch.arange(reach + 1, device=own.device)[:, None]
    out = windowed(inputs.flatten(0, 1), windows, weight, bias, activation)
    return rows.unblocked(out.view(own.shape))


def windowed(inputs_MC: Tensor, windows: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """[N, C] of rows whose inputs, oldest first, are those of these numbers [reach + 1, N].

    Summed in fp32 and in one order, and rounded where the model's own function rounds.
    """
    total = bias.float() if bias is not None else None
    for numbers, weight_C in zip(windows, weight.float().T, strict=True):
        term = inputs_MC[numbers].float() * weight_C
        total = term if total is None else total + term
    assert total is not None
    out = total.to(weight.dtype)
    if activation is not None:
        out = elementwise.by_one_thread(ACT2FN[activation], out)
    return out.to(inputs_MC.dtype)
