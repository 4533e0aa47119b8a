"""Oracle acceptance: by hand, against what real decoding accepts, and with a drafter that knows the text."""

import pytest
import torch
from saved import save_artifact

from retrofit.eval.bounds.oracle import block_ranks, walked
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7]]
LENGTH = 14


def test_a_walk_by_hand():
    # Two drafts a block.  One candidate: 5 -> both, on to 8 -> none, 9 -> one, 11 -> a short block ends it.
    ranks = {5: [0, 0], 6: [0, 0], 7: [0, 0], 8: [1, 0], 9: [0, 2], 10: [0, 0], 11: [0]}
    one = walked([ranks], 2, 1)
    assert (one["cycles"], one["tokens_per_cycle"]) == (3, 1 + 3 / 3)
    assert one["accept_cond"] == [round(2 / 3, 4), 0.5]
    # Two: 5 -> both, 8 -> both, 11 ends it.
    two = walked([ranks], 2, 2)
    assert (two["cycles"], two["tokens_per_cycle"], two["accept_cond"]) == (2, 3.0, [1.0, 1.0])
    assert walked([{}, {3: [0]}], 2, 1) == {"candidates": 1, "cycles": 0, "tokens_per_cycle": None, "accept_cond": []}


@pytest.fixture(scope="module")
def engine(tmp_path_factory, base):
    artifact = save_artifact(tmp_path_factory.mktemp("oracle") / "own", base)
    with Engine.load(artifact, exact="off", packed=False) as made, torch.no_grad():
        made.backend.heads.markov_w2.mul_(1000)  # so that it matters what stands before
        yield made


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_candidate_is_the_chain_that_decoding_accepts(engine, temperature):
    texts = block_ranks(engine, PROMPTS, temperature=temperature, max_new_tokens=LENGTH, seed=3)
    assert [sorted(ranks) for ranks in texts] == [list(range(2, 2 + len(texts[0])))] * 2  # every position, once
    assert modes.draft_tokens.__module__ == "retrofit.runtime.host.drafting"  # put back
    results = engine.generate(
        PROMPTS, "self_spec", strategy="fused", tree=0, temperature=temperature, max_new_tokens=LENGTH, seed=3,
        ignore_eos=True, original_settings=False,
    )  # fmt: skip
    slots = engine.layout.drafts
    for ranks, result in zip(texts, results, strict=True):
        at = 2
        for accepted, verified in zip(result.stats.accepted, result.stats.verified, strict=True):
            if verified < slots or len(ranks.get(at, [])) < slots:
                break
            assert accepted == next((slot for slot, rank in enumerate(ranks[at]) if rank), slots)
            at += accepted + 1
        assert at > 2


def test_more_candidates_never_hold_less(engine):
    texts = block_ranks(engine, PROMPTS, temperature=0.0, max_new_tokens=LENGTH)
    vocab = engine.backend.head.vocab
    held = [walked(texts, engine.layout.drafts, count)["tokens_per_cycle"] for count in (1, 4, vocab)]
    assert held == sorted(held) and held[-1] == 1 + engine.layout.drafts
