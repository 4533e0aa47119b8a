"""What PEFT saves of our own adapters fits the base it was on, of every family, and means the same modules."""

import pytest
import torch
from tiny_models import ARCHITECTURES
from transformers import GPT2Config, GPT2LMHeadModel

from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.importing.fit import fit

SMALL = {"vocab_size": 64, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 4}
MADE = {**ARCHITECTURES, "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SMALL))}


@pytest.mark.parametrize("targets", [ROLES, ("q", "o")], ids=["all", "two"])
@pytest.mark.parametrize("name", MADE)
def test_an_adapter_of_each_family(name, targets):
    attached = attach(MADE[name](), DraftLayout(), rank=3, alpha=6, targets=targets, markov_rank=0, confidence=False)
    state = {name: torch.randn_like(tensor) for name, tensor in attached.adapter_state().items()}
    config = attached.adapter_config()
    attached.detach()
    fitted, problems = fit(attached.model, config, state)
    assert problems == []
    assert fitted.state == state and (fitted.rank, fitted.alpha) == (3, 6)
    again = attach(
        attached.model, DraftLayout(), rank=3, alpha=6, targets=fitted.targets, markov_rank=0, confidence=False
    )
    assert again.adapter_state().keys() == state.keys()
