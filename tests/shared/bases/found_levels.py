"""The level of exactness that a load of a model of the same sizes has found: what the self-test would say once more."""

import json
from collections.abc import Hashable
from typing import Any

import torch

from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.exact_rows import Settled, settle

FOUND: dict[Hashable, tuple[Settled, tuple[Any, ...], bool]] = {}
"""What was settled, as what it is held, and whether prompts run alone."""


def settle_once(backend: HFBackend, wanted: str, drafts: int, rows: int | None = None) -> Settled:
    """`settle`, which looks only where no model like this one was looked at in this process.

    A router may be wrapped by what is found of it, so models that have one are always looked at.
    """
    asked = (*like(backend), wanted, drafts, rows)
    if asked not in FOUND:
        settled = settle(backend, wanted, drafts, rows)
        if all(check.what != "router" for check in settled.checks):
            held = (backend.exact, backend.form, backend.least_rows, backend.cut.most)
            FOUND[asked] = (settled, held, backend.prefill_alone)
        return settled
    settled, held, alone = FOUND[asked]
    backend.hold(*held)
    backend.prefill_alone = alone
    return settled


def like(backend: HFBackend) -> tuple[Hashable, ...]:
    """All that a row's bits can depend on but the values of the weights."""
    model = backend.model
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    kinds = tuple(type(module) for module in model.modules())
    sizes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in model.named_parameters())
    heads = backend.heads is None
    place = (str(backend.device), backend.dtype, backend.packed, torch.get_num_threads())
    return (json.dumps(config, sort_keys=True, default=str), kinds, sizes, heads, *place)
