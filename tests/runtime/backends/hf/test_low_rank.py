"""The adapter's update of layers that share their rows: as one layer's after another, whatever is done to either."""

from __future__ import annotations

import pytest
import torch
from decoding import random_prompts, randomise
from tiny_models import ARCHITECTURES, build

from retrofit.adapters.attach import attach
from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.backends.hf.backend import HFBackend, wrap
from retrofit.runtime.backends.hf.linear.packing import pack
from retrofit.runtime.backends.hf.linear.products import Product
from retrofit.runtime.engine import Engine

LAYOUT = DraftLayout(block=4)
PROMPT = random_prompts((12,))[0]


def packed(name: str) -> HFBackend:
    backend: HFBackend = randomise(Engine.from_model(build(name), layout=LAYOUT, packed=True)).backend
    return backend


def drafts(backend: HFBackend) -> torch.Tensor:
    """[8, H] last hidden states of two blocks behind a prompt."""
    plan = backend.row_plan([SequenceRows(0, 0, PROMPT, [Block(12, [MASK] * 4), Block(9, [MASK] * 4)])])
    with torch.inference_mode():
        return backend.forward(plan, backend.new_cache(1, 40)).draft_hidden


def layer_by_layer(backend: HFBackend, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(Product, "updated", lambda self, x, first: None)
        return drafts(backend)


def adapted(backend: HFBackend) -> list[GatedLoraLinear]:
    return [m for m in backend.trunk.modules() if isinstance(m, GatedLoraLinear)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_as_one_layer_after_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = packed(name)
    want = layer_by_layer(backend, monkeypatch)
    torch.testing.assert_close(drafts(backend), want, rtol=1e-3, atol=1e-4)


def test_all_layers_of_a_llama_are_taken_together() -> None:
    """q, k and v; o; gate and up; down."""
    products = packed("llama").products.values()
    together = {id(p.shared[0].low_rank if p.shared else p.low_rank) for p in products if p.packed or p.shared}
    layers = 2
    assert len(together - {id(None)}) == 4 * layers


def test_what_is_written_to_the_adapter_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = packed("llama")
    before = drafts(backend)
    with torch.no_grad():
        for layer in adapted(backend):
            layer.lora_B["default"].weight.mul_(-3)
    after = drafts(backend)
    assert not torch.allclose(after, before, atol=1e-3)
    torch.testing.assert_close(after, layer_by_layer(backend, monkeypatch), rtol=1e-3, atol=1e-4)
    for layer in adapted(backend):
        layer.scaling["default"] = 0.0
    torch.testing.assert_close(drafts(backend), layer_by_layer(backend, monkeypatch), rtol=1e-3, atol=1e-4)


def test_a_hook_on_a_base_layer_sees_the_base_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the update is added once.  k of the first layer: its rows are the same whatever the adapter does."""
    backend = packed("llama")
    want = drafts(backend)
    seen: list[torch.Tensor] = []
    layer = adapted(backend)[1]
    layer.base_layer.register_forward_hook(lambda module, given, out: seen.append(out.clone()))
    torch.testing.assert_close(drafts(backend), want, rtol=1e-3, atol=1e-4)
    with monkeypatch.context() as patched:
        patched.setattr(GatedLoraLinear, "factors", lambda self: (*_zeros(self), 0.0))
        drafts(backend)
    assert torch.equal(*seen)


def _zeros(layer: GatedLoraLinear) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros_like(layer.lora_A["default"].weight), torch.zeros_like(layer.lora_B["default"].weight)


def test_base_rows_keep_their_bits_beside_an_adapter_of_nan() -> None:
    backend = packed("llama")
    rows = SequenceRows(0, 0, PROMPT)
    behind = SequenceRows(0, 0, PROMPT, [Block(12, [MASK] * 4)])
    found = []
    for poisoned in (False, True):
        with torch.no_grad():
            for layer in adapted(backend):
                if poisoned:
                    layer.lora_B["default"].weight.fill_(float("nan"))
        plan = backend.row_plan([behind if poisoned else rows])
        with torch.inference_mode():
            found.append(backend.forward(plan, backend.new_cache(1, 40)).base_hidden)
    assert torch.equal(*found)


def test_layers_without_an_adapter_beside_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """q has one, k and v have not: then each for itself."""
    model = build("llama")
    choice = {"rank": 2, "alpha": 4.0, "targets": ("q", "down"), "markov_rank": 2, "confidence": False}
    attached, backend = wrap(model, lambda: attach(model, LAYOUT, **choice))
    with torch.no_grad():
        for parameter in attached.lora_parameters():
            parameter.normal_()
    pack(backend, alone=False)
    torch.testing.assert_close(drafts(backend), layer_by_layer(backend, monkeypatch), rtol=1e-3, atol=1e-4)
    shared = [p.shared[0] for p in backend.products.values() if p.shared]
    assert all(one.low_rank is None for one in shared)
