"""Prompts that share a forward: each has the calls and the bits it has alone, or the self-test keeps them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoding import random_prompts, randomise
from tiny_models import build
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import SequenceRows
from retrofit.runtime.backends.hf import attention
from retrofit.runtime.backends.hf.exact_prompts import LENGTHS, prompts_share
from retrofit.runtime.backends.hf.exact_rows import settle
from retrofit.runtime.backends.interface import EXACT_PREFILL_ROWS
from retrofit.runtime.engine import Engine

LAYOUT = DraftLayout(block=4)
FAMILIES = ("llama", "gemma2", "mistral_window", "phi3_longrope", "qwen3_moe", "deepseek_v3")


def engine_of(name: str) -> Engine:
    return randomise(Engine.from_model(build(name), layout=LAYOUT, exact="off", packed=True, prefix_cache=0))


def settled(name: str) -> Engine:
    engine = engine_of(name)
    if settle(engine.backend, "auto", LAYOUT.drafts).level != "invariant":
        pytest.skip("on this machine invariant does not hold")
    return engine


def prompts_of(*lengths: int) -> list[SequenceRows]:
    return [SequenceRows(slot, 0, prompt, last_logits_only=True) for slot, prompt in enumerate(random_prompts(lengths))]


def test_as_many_rows_are_tried_as_a_forward_of_prompts_has() -> None:
    assert sum(LENGTHS) == EXACT_PREFILL_ROWS


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_attends_beside_others_as_it_does_alone(name: str, monkeypatch: Any) -> None:
    """The same calls over the same shapes, and so the same bits, whatever a machine's products are like."""
    engine, seen = settled(name), []
    exact_rows = attention._exact_rows

    def watched(group: Any, query: Tensor, key: Tensor, value: Tensor, how: Any, form: Any) -> Tensor:
        seen.append((tuple(query.shape), tuple(key.shape), group.keys, group.last))
        return exact_rows(group, query, key, value, how, form)

    monkeypatch.setattr(attention, "_exact_rows", watched)
    rows, cache = prompts_of(3, 21, 1, 30), engine.backend.new_cache(4, 40)
    with torch.inference_mode():
        for one in rows:
            engine.backend.forward(engine.backend.row_plan([one]), cache)
        alone, layers = list(seen), len(seen) // 4
        seen.clear()
        engine.backend.forward(engine.backend.row_plan(rows), cache)
    assert seen == [alone[n * layers + layer] for layer in range(layers) for n in range(4)]


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_those_of_prompts_that_ran_alone(name: str) -> None:
    engine = settled(name)
    prompts = random_prompts((30, 2, 17, 1, 9, 25))
    for options in ({}, {"temperature": 0.8}):
        told = {"mode": "ar", "max_new_tokens": 5, "seed": 3, "ignore_eos": True, "logprobs": 2, **options}
        want = engine.generate(prompts, batch_size=1, **told)
        for batch in (3, 6):
            got = engine.generate(prompts, batch_size=batch, **told)
            assert [(r.tokens, r.logprobs) for r in got] == [(r.tokens, r.logprobs) for r in want], (options, batch)
    engine.close()


def careless_norm(monkeypatch: Any) -> None:
    """Other bits from 200 rows on: more than a step or the self-test of products has."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: norm(self, x) * (1 + 2**-20 * (x.shape[-2] > 200)))


def careless_attention(monkeypatch: Any) -> None:
    """Other bits in a forward of several prompts."""
    alone = attention._alone

    def shifted(context: Any, plan: Any, *rest: Any) -> Tensor:
        out: Tensor = alone(context, plan, *rest)
        return out if plan.alone else out + 2**-18

    monkeypatch.setattr(attention, "_alone", shifted)


@pytest.mark.parametrize("plant", [careless_norm, careless_attention])
def test_prompts_run_one_by_one_where_they_have_other_bits_beside_others(plant: Any, monkeypatch: Any) -> None:
    engine = settled("llama")
    assert not engine.backend.prefill_alone and prompts_share(engine.backend)
    plant(monkeypatch)
    found = settle(engine.backend, "auto", LAYOUT.drafts)
    assert (found.level, engine.backend.prefill_alone) == ("invariant", True) and "one by one" in found.why
    engine.close()


def test_a_backend_that_holds_as_another_does_runs_prompts_as_that_one_does() -> None:
    one, other = settled("llama"), engine_of("llama")
    other.backend.hold_as(one.backend)
    assert (other.backend.exact, other.backend.prefill_alone) == ("invariant", False)
    one.backend.hold("bucket", one.backend.form, 8)
    assert one.backend.prefill_alone
