"""Layers that keep no more than their window: the same bits as with everything kept, and few bytes."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from decoding import randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, SequenceRows
from retrofit.runtime.backends.hf import cache as cache_module
from retrofit.runtime.backends.hf.cache import KVCache
from retrofit.runtime.backends.hf.exact_attention import KERNEL, TILED
from retrofit.runtime.engine import Engine

CASES = {
    "gemma3": ("gemma3", KERNEL),
    "gemma3, products": ("gemma3", TILED),
    "gemma3, off": ("gemma3", None),
    "gemma2, soft-capped": ("gemma2", KERNEL),
    "mistral": ("mistral_window", KERNEL),
    "phi3": ("phi3_window", KERNEL),
    "gpt_oss, sinks": ("gpt_oss", KERNEL),
}
CAPACITY = 256


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps and room so small that a short text uses them up many times."""
    monkeypatch.setattr(cache_module, "STEP", 32)
    monkeypatch.setattr(cache_module, "ROOM", 72)


def engine_of(name: str, form: Any) -> Engine:
    model = build(name)
    model.config.max_position_embeddings = CAPACITY
    engine = randomise(Engine.from_model(model, layout=DraftLayout(block=4), exact="off"))
    if form is not None:
        engine.backend.hold("invariant", replace(form, keys=32, piece=32), 2)
    return engine


class Both:
    """Two caches of one backend, one of which keeps everything, through the same forwards."""

    def __init__(self, engine: Engine, slots: int):
        self.backend: Any = engine.backend
        self.rolled = KVCache(slots, CAPACITY, self.backend.sliding)
        self.full = KVCache(slots, CAPACITY)
        assert self.rolled.sliding and self.rolled.length < CAPACITY

    def forward(self, sequences: list[SequenceRows], exactly: bool) -> None:
        out = [self.backend.forward(self.backend.row_plan(sequences), cache) for cache in (self.rolled, self.full)]
        for name in ("base_logits", "draft_hidden"):
            got, want = (getattr(one, name) for one in out)
            if exactly and name == "base_logits":
                assert torch.equal(got, want), sequences
            else:
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)

    def store(self, *where: list[int]) -> None:
        for cache in (self.rolled, self.full):
            cache.store(*(torch.tensor(v) for v in where))


def step(draw: random.Random, slot: int, start: int, tree: bool) -> tuple[SequenceRows, list[int]]:
    """Rows of one sequence, and which of them are accepted, in the order of their positions."""
    count = draw.randint(1, 9)
    tokens = [draw.randrange(40) for _ in range(count)]
    parents = [-1] + [draw.randrange(i) for i in range(1, count)] if tree else None
    path = [0]
    while draw.random() < 0.9:
        follow = [i for i in range(count) if (parents[i] if parents else i - 1) == path[-1]]
        if not follow:
            break
        path.append(draw.choice(follow))
    blocks = [Block(start + len(path), [MASK] * 4, anchor=path[-1])] if draw.random() < 0.5 else []
    return SequenceRows(slot, start, tokens, blocks, parents=parents), path


@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_random_steps_have_the_bits_of_a_cache_that_keeps_everything(case: str, small: None) -> None:
    name, form = CASES[case]
    both, draw = Both(engine_of(name, form), 3), random.Random(0)
    at = {0: 0, 2: 0}
    while max(at.values()) < CAPACITY - 20:
        for slot in at:
            count = draw.choice([1, 7, 40]) if at[slot] < 100 else 0
            if count:
                tokens = [draw.randrange(40) for _ in range(count)]
                both.forward([SequenceRows(slot, at[slot], tokens, last_logits_only=True)], form is not None)
                at[slot] += count
        tree = draw.random() < 0.4
        rows = [(slot, *step(draw, slot, at[slot], tree)) for slot in at if draw.random() < 0.8]
        if not rows:
            continue
        both.forward([row for _, row, _ in rows], form is not None)
        if tree:
            index, slots, positions, first = [], [], [], 0
            for slot, row, path in rows:
                index += [first + j for j in path]
                slots += [slot] * len(path)
                positions += range(at[slot], at[slot] + len(path))
                first += len(row.tokens)
            both.store(index, slots, positions)
        for slot, _, path in rows:
            at[slot] += len(path)
    assert min(both.rolled.begins[slot] for slot in at) > 2 * cache_module.STEP


@torch.inference_mode()
def test_a_slot_begins_again(small: None) -> None:
    """Another sequence in it, or the same run again from its start."""
    both = Both(engine_of("gemma3", KERNEL), 1)
    for again in (200, 170):
        for start in range(0, again, 10):
            both.forward([SequenceRows(0, start, list(range(10)))], True)
        assert both.rolled.begins[0] > 0
    both.rolled.open(0, CAPACITY)
    assert both.rolled.begins == [0]


@pytest.mark.parametrize("name", ["gemma3", "mistral_window"])
@torch.inference_mode()
def test_what_is_taken_out_and_put_in_decodes_alike(small: None, name: str) -> None:
    """In one part, and in parts that are taken out as they come; also where no layer has them all."""
    both = Both(engine_of(name, KERNEL), 3)
    cache, parts = both.rolled, []
    for start in range(0, 176, 16):
        both.forward([SequenceRows(0, start, [(3 * start + 5 * i) % 64 for i in range(16)])], True)
        assert cache.begins[0] <= start
        parts.append(cache.take_out(0, start, start + 16))
    cache.put_in(1, 0, parts)
    cache.put_in(2, 0, [cache.take_out(0, 0, 176)], 176)
    rows = [SequenceRows(slot, 176, [1, 2, 3]) for slot in range(3)]
    outs = [both.backend.forward(both.backend.row_plan([row]), cache).base_logits for row in rows]
    assert torch.equal(outs[1], outs[0]) and torch.equal(outs[2], outs[0])


@torch.inference_mode()
def test_rows_that_do_not_fit_and_positions_that_are_gone_are_refused(small: None) -> None:
    both = Both(engine_of("gemma3", KERNEL), 1)
    for start in range(0, 200, 10):
        both.forward([SequenceRows(0, start, list(range(10)))], True)
    with pytest.raises(ValueError, match="do not fit"):
        both.rolled.make_room(0, 200, both.rolled.length + 1)
    with pytest.raises(ValueError, match="holds positions from"):
        both.rolled.make_room(0, 10, 1)


def test_a_model_of_gemma_3s_shape_keeps_a_third_at_8k() -> None:
    """Five of six layers slide over 1,024 positions."""
    row = torch.zeros(1, 1, 1, 256, dtype=torch.bfloat16)
    caches = [KVCache(1, 8192, sliding) for sliding in ({n: 1024 for n in range(24) if n % 6 != 5}, {})]
    for cache in caches:
        for layer in range(24):
            cache.append(layer, 0, 0, row, row)
    assert caches[0].nbytes <= 0.35 * caches[1].nbytes


def test_prompts_come_in_forwards_that_fit(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt and a long answer through an engine, whose sliding layers keep little, and one that keeps all."""
    texts = []
    for sliding in (True, False):
        engine = engine_of("gemma3", KERNEL)
        if not sliding:
            engine.backend.sliding = {}
        engine.limits = replace(engine.limits, context=CAPACITY)
        prompt = [(7 * i * i + 3 * i) % 40 for i in range(150)]
        results = engine.generate([prompt, prompt[:20]], strategy="fused", max_new_tokens=60, ignore_eos=True)
        texts.append([result.tokens for result in results])
        engine.close()
    assert texts[0] == texts[1]
