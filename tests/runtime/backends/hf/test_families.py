"""Families that differ by something `tiny_models.py` has no architecture of its own for, each whole and small.

What the architectures are put through at length, these are put through once: tokens, NaN in the adapter, gradients.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from decoding import Oracle, poison, random_prompts, randomise, reference_greedy, tokens_of
from tiny_models import WINDOW, build

from benchmarks import decoders
from benchmarks.naive_training import rows_and_gradients
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.recipes.text.documents import Document
from retrofit.recipes.training.clean.forward import clean_forward
from retrofit.runtime.backends.hf import attention, block_attention
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes

SINKS = ("flint", "granite_swa", "granitemoe_swa", "mimo_v2_flash")
"""Attention sinks: beside layers without RoPE, multipliers, layers without sinks and with other numbers of heads."""
HIDE_THE_PLAN = ("nemotron", "stablelm")
"""Their layers do not hand keyword arguments on."""
ASK_THE_CACHE = ("bart", "marian")
"""They take positions from the length of their cache: learned ones, and sines."""
COUNT_FROM_TWO = ("roberta",)
"""By itself; `generate` counts for it, from 0."""
LAYER_BEFORE_THE_HEAD = ("modernbert-decoder",)
"""Beside it, not around it."""
FAMILIES = (*SINKS, *HIDE_THE_PLAN, *ASK_THE_CACHE, *COUNT_FROM_TWO, *LAYER_BEFORE_THE_HEAD)
LENGTHS = (1, 5, 23)
NEW = 12
SEEDS = (3, 4, 5)
SAMPLED = {"temperature": 0.8, "top_p": 0.9}
WAYS: tuple[tuple[dict[str, Any], int], ...] = (
    ({"strategy": "two_forward"}, 3),
    ({"strategy": "fused", "tree": 0}, 1),
    ({"strategy": "fused", "tree": 9}, 3),
)


@cache
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, vocab=decoders.VOCABULARY)


def engine_of(name: str, **layout: Any) -> Engine:
    return Engine.from_model(decoders.build(name), layout=DraftLayout(block=5, **layout))


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_those_of_generate_and_of_ar(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = randomise(engine_of(name))
    options = {"max_new_tokens": NEW, "seed": SEEDS, "ignore_eos": True}
    greedy = reference_greedy(decoders.build(name), prompts(), NEW)
    assert tokens_of(engine, prompts(), "ar", batch_size=3, **options) == greedy
    sampled = tokens_of(engine, prompts(), "ar", batch_size=1, **options, **SAMPLED)
    assert sampled != greedy
    for truth, sampling in ((greedy, {}), (sampled, SAMPLED)):
        planted = Oracle(dict(zip(SEEDS, truth, strict=True)))
        for number, (way, batch) in enumerate(WAYS):
            with monkeypatch.context() as patch:
                if number:
                    patch.setattr(modes, "draft_tokens", planted)
                got = tokens_of(engine, prompts(), "self_spec", batch_size=batch, **way, **options, **sampling)
            assert got == truth, (way, batch, sampling)


@pytest.mark.parametrize("name", FAMILIES)
def test_nan_in_the_adapter_leaves_base_rows_bitwise_unchanged(name: str) -> None:
    engine, found = engine_of(name), []
    tokens = prompts()[2]
    rows = SequenceRows(0, 15, tokens[15:], [Block(17, [MASK] * 5), Block(23, [MASK] * 5)])
    for change in (randomise, poison):
        change(engine)
        cache = KVCache(1, 32)
        with torch.inference_mode():
            engine.backend.forward(engine.backend.row_plan([SequenceRows(0, 0, tokens[:15])]), cache)
            out = engine.backend.forward(engine.backend.row_plan([rows]), cache)
        found.append((out.base_logits, out.base_hidden, *(t for pair in cache.layers.values() for t in pair)))
        assert bool(out.draft_hidden.isnan().all()) == (change is poison)
    for other, fresh in zip(*found, strict=True):
        assert torch.equal(other, fresh)


def test_a_block_across_a_chunks_end_sees_what_the_original_sees() -> None:
    """Untrained and causal, draft rows that read the text are rows of the original: so are those in the next chunk."""
    model, tokens = build("llama4"), random_prompts((2 * WINDOW + 5,))[0]
    with torch.inference_mode():
        own = model(torch.tensor([tokens]), use_cache=False).logits[0]
    engine = Engine.from_model(model, layout=DraftLayout(block=8, attention="causal"))
    for start in (WINDOW - 5, WINDOW - 1, 2 * WINDOW - 3):
        rows = [
            SequenceRows(0, 0, tokens[:start]),
            SequenceRows(0, start, [], [Block(start, tokens[start : start + 8])]),
        ]
        cache = KVCache(1, 32)
        with torch.inference_mode():
            first, second = (engine.backend.forward(engine.backend.row_plan([one]), cache) for one in rows)
            drafted = engine.backend.head(second.draft_hidden)
        torch.testing.assert_close(first.base_logits, own[:start], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(drafted, own[start : start + 8], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("attention_of_block", ["bidirectional", "causal"])
@pytest.mark.parametrize("name", [*SINKS, "nemotron", "bart"])
def test_gradients_are_those_of_one_dense_softmax(
    name: str, attention_of_block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(attention.FEW_SCORES, "cpu", 0)
    monkeypatch.setitem(block_attention.TILE_SCORES, "cpu", 500)
    engine = randomise(engine_of(name, attention=attention_of_block))
    texts = random_prompts((21, 30), seed=5, vocab=decoders.VOCABULARY)
    cache, _ = clean_forward(
        engine.backend, [Document(str(n), tuple(t), (True,) * len(t)) for n, t in enumerate(texts)]
    )
    rows = [
        SequenceRows(s, 0, blocks=[Block(start, [MASK] * n) for start, n in ((4, 5), (7, 5), (17, 3 + s))])
        for s in (0, 1)
    ]
    weights = [p for n, p in engine.attached.peft_model.named_parameters() if ".lora_" in n]
    dense, ours = rows_and_gradients(engine, rows, cache, weights)
    assert len(dense) > 5
    for got, want in zip(ours, dense, strict=True):
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()
