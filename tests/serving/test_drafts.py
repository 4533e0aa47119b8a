"""Draft tokens and what they were drawn from; the expansion that stands in for a faulty kernel."""

from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from retrofit.adapters.heads import Heads
from retrofit.errors import UnsupportedModelError
from retrofit.serving.vllm import sampler
from retrofit.serving.vllm.drafts import Sampling, draft

V, K = 5, 3


def heads():
    made = Heads(hidden=4, vocab=V, drafts=K, markov_rank=2, confidence=True).requires_grad_(False)
    made.markov_w2.normal_()
    return made


def test_greedy_drafts_go_left_to_right_through_the_markov_head():
    made, root, trunk = heads(), torch.randn(2, V), torch.randn(2, K, V)
    tokens, drawn_from = draft(root, trunk, made, None)
    assert drawn_from is None
    previous = root.argmax(-1)
    assert tokens[:, 0].tolist() == previous.tolist()
    for slot in range(K):
        previous = (trunk[:, slot] + made.markov_w1[previous] @ made.markov_w2.T).argmax(-1)
        assert tokens[:, slot + 1].tolist() == previous.tolist()


def test_drafts_follow_what_they_are_said_to_be_drawn_from():
    N, made, logits, trunk = 4000, heads(), torch.randn(V), torch.randn(K, V)
    sampling = Sampling(torch.full((N,), 0.7))
    tokens, drawn_from = draft(logits.expand(N, V), trunk.expand(N, K, V), made, sampling)
    torch.testing.assert_close(drawn_from[0, 0], torch.softmax(logits / 0.7, -1))
    torch.testing.assert_close(drawn_from.sum(-1), torch.ones(N, K + 1))
    counts = torch.bincount(tokens[:, 0], minlength=V)
    assert chisquare(counts, (drawn_from[0, 0].double() / drawn_from[0, 0].double().sum()) * N).pvalue > 1e-4
    after = tokens[:, 0] == int(tokens[0, 0])
    want = torch.softmax(made.draft_logits(trunk[:1], tokens[:1, 0])[0] / 0.7, -1)
    torch.testing.assert_close(drawn_from[after, 1], want.expand(int(after.sum()), V))
    assert (
        chisquare(
            torch.bincount(tokens[after, 1], minlength=V), want.double() / want.double().sum() * int(after.sum())
        ).pvalue
        > 1e-4
    )


def test_greedy_requests_among_sampled_ones_are_greedy():
    made, root, trunk = heads(), torch.randn(3, V), torch.randn(3, K, V)
    tokens, _ = draft(root, trunk, made, Sampling(torch.tensor([0.0, 1.0, 0.0])))
    greedy, _ = draft(root, trunk, made, None)
    assert tokens[[0, 2]].tolist() == greedy[[0, 2]].tolist()


def test_a_seed_of_its_own_gives_the_same_drafts_whatever_else_is_drawn():
    made, root, trunk = heads(), torch.randn(2, V), torch.randn(2, K, V)

    def drafted():
        generators = {1: torch.Generator().manual_seed(7)}
        return draft(root, trunk, made, Sampling(torch.full((2,), 5.0), generators=generators))[0]

    several = [drafted() for _ in range(8)]
    assert {tuple(one[1].tolist()) for one in several} == {tuple(several[0][1].tolist())}
    assert len({tuple(one[0].tolist()) for one in several}) > 1


def test_excluded_tokens_are_not_drafted():
    root, trunk = torch.zeros(50, V), torch.zeros(50, K, V)

    def narrowed(logits_NV):
        return logits_NV.index_fill(1, torch.tensor([0, 2, 4]), -torch.inf)

    tokens, drawn_from = draft(root, trunk, heads(), Sampling(torch.ones(50), narrowed))
    assert set(tokens.flatten().tolist()) == {1, 3}
    assert drawn_from[..., [0, 2, 4]].max() == 0


def broken(x, cu_num_tokens, num_tokens, replace_from=0, replace_to=0):
    """As a kernel that writes into a copy."""
    return x.new_full((num_tokens,), 9)


def test_a_faulty_expansion_is_found_and_mended():
    faulty = SimpleNamespace(expand_batch_to_tokens=broken)
    assert sampler.mend(faulty, torch.device("cpu"))
    assert faulty.expand_batch_to_tokens is sampler.expanded
    assert not sampler.mend(faulty, torch.device("cpu"))


def test_a_fault_that_stays_is_refused(monkeypatch):
    monkeypatch.setattr(sampler, "expanded", broken)
    with pytest.raises(UnsupportedModelError, match="55005"):
        sampler.mend(SimpleNamespace(expand_batch_to_tokens=broken), torch.device("cpu"))


def test_the_expansion_by_hand():
    temperatures, ends = torch.tensor([0.7, 0.0, 1.2]), torch.tensor([2, 3, 3], dtype=torch.int32)
    assert sampler.expanded(temperatures, ends, 3, 0, 1).tolist() == pytest.approx([0.7, 0.7, 1.0])
