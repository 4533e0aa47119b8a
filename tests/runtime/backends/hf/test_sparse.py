"""Sparse attention: base rows see what their model's own indexer picks, in every mode."""

import pytest
import torch
from decoding import Oracle, poison, random_prompts, randomise, reference_greedy
from transformers import AutoModelForCausalLM, DeepseekV32Config

from benchmarks import decoders
from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UnsupportedModelError
from retrofit.runtime.backends.hf.sparse import indexers
from retrofit.runtime.engine import Engine

NAMES = ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text"]
"""Keys for all heads, layers that share them, and blocks of keys for each head of K/V."""
COUNT = 16
PROMPTS = random_prompts((1, 5, 23), vocab=decoders.VOCABULARY)
CHAIN, TREE = ({"strategy": "fused", "tree": nodes} for nodes in (0, 12))


def engine_of(model, **options):
    return randomise(Engine.from_model(model, layout=DraftLayout(block=4), **options))


def tokens_of(engine, prompts=PROMPTS, **options):
    return [r.tokens for r in engine.generate(prompts, **{"max_new_tokens": COUNT, "ignore_eos": True, **options})]


@pytest.mark.parametrize("name", NAMES)
def test_every_mode_is_generate(name, monkeypatch):
    want = reference_greedy(decoders.build(name), PROMPTS, COUNT)
    with engine_of(decoders.build(name)) as engine:
        for way in ({"mode": "ar"}, CHAIN, TREE):
            assert tokens_of(engine, **way) == want, way
        sampled = {"temperature": 1.0, "seed": 3, "n": 2}
        assert tokens_of(engine, **TREE, **sampled) == tokens_of(engine, mode="ar", **sampled)
        Oracle(dict(enumerate(want))).plant(monkeypatch)
        for way in (CHAIN, TREE, {"strategy": "two_forward"}):
            assert tokens_of(engine, **way) == want, way


def test_what_is_not_picked_counts():
    dense = decoders.build("deepseek_v32")
    for layer in dense.model.layers:
        layer.self_attn.indexer.index_topk = decoders.CONTEXT
    want, all_seen = (reference_greedy(m, PROMPTS, COUNT) for m in (decoders.build("deepseek_v32"), dense))
    assert want[2] != all_seen[2]
    with engine_of(dense) as engine:
        assert tokens_of(engine, **TREE) == all_seen


def test_a_prompt_in_pieces():
    want = reference_greedy(decoders.build("glm_moe_dsa"), PROMPTS, COUNT)
    with engine_of(decoders.build("glm_moe_dsa")) as engine:
        engine.backend.prefill_rows = 7
        assert tokens_of(engine) == want


def test_keys_of_equal_scores():
    """Two heads fire for few keys, so most scores are 0; which of those `topk` takes hangs on how many there are."""

    def build():
        model = AutoModelForCausalLM.from_config(decoders.shrunk(DeepseekV32Config, {"index_n_heads": 2}))
        decoders.enliven(model, 0)
        return model.eval()

    prompts = random_prompts((5, 61, 40), vocab=decoders.VOCABULARY)
    want = reference_greedy(build(), prompts, COUNT)
    with engine_of(build()) as engine:
        for rows in (64, 33, 7):  # of a forward of prompts
            engine.backend.prefill_rows = rows
            for way in ({"mode": "ar", "batch_size": 1}, CHAIN, TREE):
                assert tokens_of(engine, prompts, **way) == want, (rows, way)


def test_half_precision_at_the_level_that_holds():
    with engine_of(decoders.build("deepseek_v32").bfloat16(), exact="auto") as engine:
        assert engine.backend.exact != "off"
        want = tokens_of(engine, mode="ar")
        assert tokens_of(engine, **CHAIN) == want
        assert tokens_of(engine, **TREE) == want
        assert tokens_of(engine, batch_size=1, mode="ar") == want


def test_a_poisoned_adapter_reaches_no_row_of_the_base():
    want = reference_greedy(decoders.build("deepseek_v32"), PROMPTS, COUNT)
    with engine_of(decoders.build("deepseek_v32")) as engine:
        poison(engine)
        assert tokens_of(engine, **CHAIN) == want


def test_an_indexer_that_does_not_run_is_caught_at_load(monkeypatch):
    monkeypatch.setattr(
        indexers, "_as_mask", lambda _, index, positions: torch.ones(1, 1, index.shape[1], positions) > 0
    )
    with pytest.raises(UnsupportedModelError, match="differ from the model's own"):
        Engine.from_model(decoders.build("deepseek_v32"))


def test_the_model_is_given_back():
    model = decoders.build("deepseek_v32")
    ids = torch.tensor(PROMPTS[2:])
    with torch.no_grad():
        before = model(ids).logits
        Engine.from_model(model).close()
        assert torch.equal(model(ids).logits, before)
    assert all("forward" not in module.__dict__ for module in indexers.indexers_of(model.model))
