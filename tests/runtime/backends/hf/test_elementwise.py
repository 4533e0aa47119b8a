"""Activations on several threads: a row's bits are those it has alone."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import randomise
from tiny_models import build
from torch import nn
from transformers.activations import ACT2FN

from retrofit.adapters.gated_lora import Gate
from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.backends.hf import elementwise
from retrofit.runtime.backends.hf.elementwise import activations, by_one_thread
from retrofit.runtime.engine import Engine

WIDTH, ROWS = 4864, 40


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    """With so many the shares of a tensor begin anywhere in a row."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def rows() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


def installed(module: nn.Module) -> Any:
    backend: Any = SimpleNamespace(trunk=nn.Sequential(module), gate=Gate(), until_closed=[].append, exact="invariant")
    backend.gate.base_rows = ROWS
    elementwise.install(backend)
    return backend


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu2", "tanh", "sigmoid"])
def test_a_row_beside_others_is_the_row_alone(name: str) -> None:
    module, x = ACT2FN[name], rows()
    backend = installed(module)
    with torch.inference_mode():
        alone = torch.cat([module(row[None]) for row in x])
        for count in (7, 9, 17, 18, 23, 33, ROWS):
            assert torch.equal(module(x[:count]), alone[:count]), count
        assert torch.equal(by_one_thread(torch.tanh, x), torch.cat([torch.tanh(row[None]) for row in x]))
    assert torch.get_num_threads() == 3
    assert backend.trunk[0] is module


def test_a_row_is_the_same_at_any_place_of_a_bucket() -> None:
    with randomise(Engine.from_model(build("llama"), layout=DraftLayout(block=2), exact="off")) as engine:
        backend, x = engine.backend, rows()[:32]
        backend.hold("bucket", backend.form, len(x))
        (module, *_) = activations(backend.trunk)
        backend.gate.base_rows = len(x)
        with torch.inference_mode():
            here = module(x)
            for places in (1, 5, 10, 16, 31):
                assert torch.equal(module(x.roll(places, 0)), here.roll(places, 0)), places
        backend.gate.base_rows = None


def test_other_forwards_run_as_ever() -> None:
    module = nn.SiLU()
    backend = installed(module)
    threads: list[int] = []
    own = nn.functional.silu

    def silu(x: torch.Tensor, **how: Any) -> torch.Tensor:
        threads.append(torch.get_num_threads())
        return own(x, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "silu", silu)
        with torch.inference_mode():
            module(rows())
            backend.gate.base_rows = None
            module(rows())
        backend.gate.base_rows = 0
        module(rows().requires_grad_()).sum().backward()
    assert threads == [1, 3, 3]


def test_the_model_is_given_back() -> None:
    model = build("llama")
    found = activations(model.model)
    assert len(found) == 2
    with randomise(Engine.from_model(model, layout=DraftLayout(block=2), exact="invariant")):
        assert all("forward" in module.__dict__ for module in found)
    assert not any("forward" in module.__dict__ for module in found)
