"""FSDP2: each process holds a part of the base's layers, and gathers a layer when it is computed.

Every process first loads the whole base into the memory of its machine; no GPU ever has to hold it.
The adapter is not split (under 2 % of the base, and every process takes the whole optimizer step), nor are the
embedding, the vocabulary head and the last norm: the loss uses the head in many chunks.
Each layer is gathered by all processes at once, so all must run the same number of forwards and backwards; they
meet before each, so that one too many is an error and not a wait without end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from retrofit.adapters.attach import Attached
from retrofit.adapters.rows import RowPlan
from retrofit.errors import UnsupportedModelError
from retrofit.quantised.linear import quantised_layers
from retrofit.recipes.processes import Processes
from retrofit.recipes.training.recompute import decoder_layers
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.cache import KVCache


def shard(attached: Attached, backend: HFBackend, processes: Processes) -> None:
    """Split the layers of a base that lies on the CPU over the processes' devices, one layer at a time.

    Raises UnsupportedModelError where that is not in force afterwards, and for quantised layers.
    """
    if quantised_layers(backend.model):
        raise UnsupportedModelError(
            "FSDP cannot split quantised weights", "start without FSDP: they take little memory"
        )
    attached.trainable.clear()  # it would keep the whole weights alive; a base that was loaded is given back to no one
    device = torch.device(processes.device)
    mesh = init_device_mesh(device.type, (processes.size,))
    layers = decoder_layers(backend)
    whole = {p for name, p in backend.trunk.named_parameters() if "lora_" in name}
    for layer in layers:
        types = [p.dtype for p in layer.parameters() if p not in whole]
        most = max(set(types), key=types.count)
        # A router kept in fp32 beside bf16 weights is small.
        kept = {p for p in layer.parameters() if p in whole or p.dtype != most}
        whole |= kept
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    within = {p for layer in layers for p in layer.parameters()}
    whole |= {p for p in backend.trunk.parameters() if p not in within}
    # The root lets the layers share streams: the next is gathered while one computes.
    fully_shard(backend.trunk, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for tensor in [*attached.peft_model.parameters(), *attached.peft_model.buffers()]:
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
    attached.heads.to(device)
    backend.device = backend.embedding.weight.device
    check_sharded(layers, processes.size)
    backend.run_trunk = _in_step(backend.run_trunk, processes)  # type: ignore[method-assign]


def _in_step(forward: Callable[..., Tensor], processes: Processes) -> Callable[..., Tensor]:
    def run_trunk(plan: RowPlan, cache: KVCache) -> Tensor:
        processes.exchange("forward and backward" if torch.is_grad_enabled() else "forward")
        return forward(plan, cache)

    return run_trunk


def check_sharded(layers: list[nn.Module], size: int) -> None:
    """Raises UnsupportedModelError unless this process holds about one part in `size` of the layers' weights."""
    total = held = slack = whole = 0
    for layer in layers:
        for name, p in layer.named_parameters():
            if "lora_" in name:
                continue
            total += p.numel() * p.element_size()
            if isinstance(p, DTensor):
                held += p.to_local().numel() * p.element_size()
                slack += p[:1].numel() * p.element_size() if p.dim() else p.element_size()  # a row over, at most
            else:
                whole += p.numel() * p.element_size()
    if not total or held + whole > total / size + slack or whole > 0.01 * total:
        raise UnsupportedModelError(
            f"FSDP did not split the layers: of {total:,} bytes this process holds {held + whole:,}, "
            f"{size} processes share them",
            "start without FSDP; the base then has to fit each GPU",
        )
