"""The fused backend in half precision against transformers in the same type: rounding must explain every difference.

Tokens are compared on free runs, and classed by how far they fall short of the likeliest in fp32, in units of the run's
own precision (`eval/audit.py`): match, tie, near are rounding, bug is not.
"""

from __future__ import annotations

import copy

import pytest
import torch
from decoding import reference_greedy
from fused_models import DEVICE, fused, small

from retrofit.adapters.layout import DraftLayout
from retrofit.eval.audit import class_differences
from retrofit.runtime.engine import Engine

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
NEW = 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_differences_from_transformers_are_rounding(name: str, dtype: torch.dtype) -> None:
    model = small(name)
    checkpoint = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    low = copy.deepcopy(model).to(DEVICE, dtype)
    wide = copy.deepcopy(model)
    engine = fused(Engine.from_model(model, layout=DraftLayout(block=2)), checkpoint, dtype=dtype)
    results = engine.generate(PROMPTS, "ar", max_new_tokens=NEW, ignore_eos=True)
    texts = [result.tokens for result in results]
    found = class_differences(lambda: wide, PROMPTS, reference_greedy(low, PROMPTS, NEW), texts, dtype)
    assert found["bug"] == 0, found
    assert found["match"] >= NEW * len(PROMPTS) // 2, found  # ties are rare even here
