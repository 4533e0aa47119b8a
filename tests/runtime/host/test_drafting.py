"""Drafts of a block by hand: a head that is the identity, and a Markov head that says which token follows which."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK
from retrofit.runtime.host import drafting
from retrofit.runtime.host.diffusion import _end_early, _fill
from retrofit.runtime.host.drafting import draft_tokens
from retrofit.runtime.host.infilling import fill_surest
from retrofit.runtime.host.modes import Hanging, _draft
from retrofit.runtime.plan import Limits
from retrofit.runtime.request import Request
from retrofit.runtime.rules.sampling import Processing, hash_bits_plain
from retrofit.runtime.rules.tree import DraftTree, grow
from retrofit.runtime.run import Run

V, BLOCK = 8, 3


def known_run(follows: float, params: Processing | None = None, **options: Any) -> Run:
    """After token t the Markov head adds `follows` to token t + 1; what the trunk says are its hidden states."""
    heads = Heads(V, V, BLOCK, V + 1, True).requires_grad_(False)
    heads.markov_w1.copy_(torch.eye(V + 1))
    heads.markov_w2.zero_()
    heads.markov_w2[(torch.arange(V) + 1) % V, torch.arange(V)] = follows
    backend: Any = SimpleNamespace(heads=heads, head=lambda hidden: hidden, device=torch.device("cpu"))
    cache: Any = None
    options = {"layout": DraftLayout(BLOCK), "with_confidence": True, **options}
    return Run(backend, cache, params or Processing(), limits=Limits(99), **options)


def request(last: int, most: int = 20, seed: int = 0) -> Request:
    """The newest token is `last`; the one before it, 0, would be followed by 1."""
    one = Request(0, [2, 0], seed, most, frozenset(), slot=0)
    one.emit([0, last])
    return one


def best(*tokens: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(tokens), V).float()


def test_each_draft_follows_the_one_before_it_and_the_first_the_newest_token() -> None:
    one, other = request(3), request(5)
    _draft(known_run(2.0), [Hanging(one, best(0, 0, 0)), Hanging(other, best(0, 0, 0))], None)
    assert (one.drafts, other.drafts) == ([4, 5, 6], [6, 7, 0])
    assert one.confidence == [0.5] * 3 and one.tree is None
    _draft(known_run(0.5), [Hanging(one, best(7, 1, 2))], None)
    assert one.drafts == [7, 1, 2], "a trunk that is surer"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_confidence_is_that_of_the_slot_and_of_how_tokens_are_chosen(temperature: float) -> None:
    run, one = known_run(0.0, Processing(temperature=temperature)), request(3)
    run.backend.heads.confidence_bias.copy_(torch.tensor([2.0, -3.0]))  # greedy, sampled
    run.backend.heads.confidence_temperature.copy_(torch.tensor([[1.0, 2.0, 4.0], [3.0, 6.0, 1.0]]))
    _draft(run, [Hanging(one, best(0, 0, 0))], None)
    logits = torch.tensor([-1.0, -0.5, -3.0] if temperature else [2.0, 1.0, 0.5])
    assert one.confidence == pytest.approx(torch.sigmoid(logits).tolist())


def test_no_more_is_drafted_than_can_be_used() -> None:
    """Two tokens are left to the first: one draft and the bonus; none to the second; the third's block was cut."""
    requests = [request(3, most=4), request(3, most=3), request(3)]
    _draft(known_run(2.0), [Hanging(r, best(0, 0, 0)[:n]) for r, n in zip(requests, (3, 3, 2), strict=True)], None)
    assert [r.drafts for r in requests] == [[4], [], [4, 5]]
    assert [len(r.confidence) for r in requests] == [1, 0, 2]


def noise(seed: int, index: int) -> Tensor:
    bits = torch.tensor([hash_bits_plain(seed, index, token) >> 9 for token in range(V)], dtype=torch.float64)
    return -(-((bits + 0.5) * 2.0**-23).log()).log()


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_sampled_drafts_share_the_noise_of_the_tokens_they_stand_for(seed: int) -> None:
    """Two tokens were emitted, so the drafts are for outputs 2, 3 and 4 of the request."""
    one = request(3, seed=seed)
    _draft(known_run(0.0, Processing(temperature=0.7)), [Hanging(one, best(6, 6, 6))], None)
    assert one.drafts == [int((best(6)[0] / 0.7 + noise(seed, index)).argmax()) for index in (2, 3, 4)]


def test_drafts_of_a_tree() -> None:
    #   seed -> a (rank 0) -> c (rank 0) -> e (rank 0);  seed -> b (rank 1) -> d (rank 1)
    tree = DraftTree((-1, 0, 0, 1, 2, 3), (0, 0, 1, 0, 1, 0), (1.0, 0.5, 0.3, 0.2, 0.1, 0.1))
    trunk = best(0, 0, 7) * torch.tensor([[1.5], [1.5], [3.0]])
    one, short = request(3), request(3, most=5)
    _draft(known_run(2.0), [Hanging(one, trunk), Hanging(short, trunk)], tree)
    # 4 follows 3 and 0 is second; 5 follows 4; of the followers of 0, 1 is first and 0 second; in slot 3 stands 7
    assert one.drafts == [4, 0, 5, 0, 7] and one.tree == tree
    # three tokens are left: two drafts and a bonus
    assert short.drafts == [4, 0, 5, 0] and short.tree == tree.cut(2)


def test_a_penalty_on_what_was_seen_reaches_the_drafts_of_the_same_block() -> None:
    one = request(3)
    one.watch(V, torch.device("cpu"))  # 0, 2 and 3 were seen, so of them a quarter is left
    trunk = torch.tensor([[2.0, 0.1, 2.2, 0.1, 0.1, 0.1, 1.0, 0.1]] * 3)
    _draft(known_run(0.0, Processing(repetition_penalty=4.0)), [Hanging(one, trunk)], None)
    assert one.drafts == [6, 2, 2], "once 6 was drafted it counts 1/4, and 2 more than that"


# Candidates


WAYS = {
    "greedy": Processing(),
    "sampled": Processing(temperature=0.8),
    "warped": Processing(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01),
    "penalties": Processing(0.8, repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.4),
}
BRANCHING = grow([[0.6, 0.3, 0.2], [0.5, 0.3, 0.1], [0.4, 0.2, 0.1]], 11)


def drafts_of(
    params: Processing, tree: DraftTree | None, *, vocab: int = 90, blocks: int = 3, only: Tensor | None = None
) -> Tensor:
    """Of random blocks, with a Markov head that matters and texts that repeat some tokens."""
    torch.manual_seed(2)
    heads = Heads(8, vocab, 3, 6, False).requires_grad_(False)
    heads.markov_w2.normal_()
    trunk, seen = torch.randn(blocks, 3, vocab), torch.rand(blocks, vocab) < 0.3
    counts = seen * torch.randint(1, 4, seen.shape).float()
    if only is not None:
        trunk = torch.full_like(trunk, -torch.inf).scatter(2, only, trunk.gather(2, only))
    known = (seen if params.needs_seen else None, counts if params.needs_counts else None)
    previous, seeds, indices = [5, 6, 7][:blocks], [1, 2**62, 3][:blocks], [0, 9, 4][:blocks]
    arguments = (previous, seeds, indices, known[0], trunk, heads, params, False, tree, None, known[1])
    return draft_tokens(torch.zeros(blocks, 3, 8), *arguments).tokens


@pytest.mark.parametrize("tree", [None, BRANCHING], ids=["chain", "tree"])
@pytest.mark.parametrize("way", WAYS)
def test_with_every_token_a_candidate_drafts_are_those_of_the_whole_vocabulary(
    way: str, tree: DraftTree | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = drafts_of(WAYS[way], tree)
    monkeypatch.setattr(drafting, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(drafting, "CANDIDATES", 90)
    assert torch.equal(drafts_of(WAYS[way], tree), whole)
    monkeypatch.setattr(drafting, "CANDIDATES", 4)
    assert not torch.equal(drafts_of(WAYS[way], tree), whole), "no token beyond the candidates matters here"


@pytest.mark.parametrize("tree", [None, BRANCHING], ids=["chain", "tree"])
def test_drafts_are_candidates(tree: DraftTree | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(drafting, "CANDIDATES", 4)
    found: list[Tensor] = []
    right = drafting.likeliest

    def seen(*arguments: Any) -> Tensor:
        found.append(right(*arguments))
        return found[-1]

    monkeypatch.setattr(drafting, "likeliest", seen)
    tokens = drafts_of(WAYS["sampled"], tree)
    depths = range(1, 4) if tree is None else tree.depths[1:]
    ids = torch.stack(found)
    for j, depth in enumerate(depths):
        assert (ids[:, depth - 1] == tokens[:, j : j + 1]).any(1).all()


@pytest.mark.parametrize("tree", [None, BRANCHING], ids=["chain", "tree"])
@pytest.mark.parametrize("way", ["greedy", "sampled", "penalties"])
def test_among_candidates_is_as_if_no_other_token_were_possible(
    way: str, tree: DraftTree | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.rand(3, 3, 90).topk(7).indices.sort().values
    want = drafts_of(WAYS[way], tree, only=ids)
    monkeypatch.setattr(drafting, "LARGE_VOCABULARY", 1)
    given = iter(ids)
    monkeypatch.setattr(drafting, "_candidates", lambda *_: next(given))
    assert torch.equal(drafts_of(WAYS[way], tree), want)


def test_a_token_that_the_noise_favours_is_a_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Markov head a few candidates hold the whole vocabulary's choice, likely or not."""
    heads, trunk = Heads(8, 90, 3, 0, False), torch.zeros(2, 3, 90)
    trunk[..., :45] = 0.2
    arguments = ([5, 6], [1, 8], [0, 9], None, trunk, heads, Processing(temperature=0.7), False)
    whole = draft_tokens(torch.zeros(2, 3, 8), *arguments).tokens
    assert (whole >= 45).any()
    monkeypatch.setattr(drafting, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(drafting, "CANDIDATES", 2)
    assert torch.equal(draft_tokens(torch.zeros(2, 3, 8), *arguments).tokens, whole)


def test_rules_and_a_bias_look_at_the_whole_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    biased = Processing(logit_bias=((4, 30.0),))
    monkeypatch.setattr(drafting, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(drafting, "CANDIDATES", 2)
    assert (drafts_of(biased, None) == 4).all()


# Filling a block in mode `diffusion`


def opened(run: Run, hidden: Tensor, most: int = 20) -> list[int]:
    one = request(3, most)
    _fill(run, one, hidden, revised=run.tolerance < float("inf"))
    return one.block


def test_a_block_is_filled_up_to_the_first_slot_that_is_not_sure_enough() -> None:
    """A row predicts the token after it.  Of weight w, a token has e^w / (e^w + 7): w = 5 gives .955, 4 gives .886."""
    run = known_run(0.0, threshold=0.9)
    assert opened(run, best(4, 5, 6) * 5) == [3, 4, 5, 6]
    assert opened(run, best(4, 5, 6) * torch.tensor([[5.0], [4.0], [5.0]])) == [3, 4]
    assert opened(run, best(4, 5, 6) * 4) == [3]
    assert opened(known_run(0.0, threshold=0.0), torch.zeros(3, V)) == [3, 0, 0, 0]
    assert opened(known_run(5.0, threshold=0.9), torch.zeros(3, V)) == [3, 4, 5, 6], "behind what was filled in"
    late = known_run(0.0, threshold=0.9, layout=DraftLayout(4, shift=0, seed_row="draft"))
    assert opened(late, best(7, 4, 5, 6) * 5) == [3, 4, 5, 6], "a row of shift 0 predicts its own token"


def test_no_more_is_filled_than_the_budget_and_the_context_can_use() -> None:
    """Of 5 tokens 2 are emitted.  A base that may take tokens back emits one of its own behind them."""
    run = known_run(0.0, threshold=0.0)
    assert len(opened(run, best(4, 5, 6), most=5)) == 1 + 3
    assert len(opened(run, best(4, 5, 6), most=4)) == 1 + 2
    run.tolerance = 0.0
    assert len(opened(run, best(4, 5, 6), most=5)) == 1 + 2
    run.limits = Limits(5)  # the seed stands at 3
    assert len(opened(run, best(4, 5, 6))) == 1 + 1


# Filling a gap


def filled(run: Run, block: list[int], hidden: Tensor, seed: int = 0) -> list[int]:
    one = request(block[0], seed=seed)
    one.block = list(block)
    fill_surest(run, one, hidden)
    return one.block


def test_what_is_sure_enough_is_filled_in_and_the_surest_in_any_case() -> None:
    """A row predicts the token after it.  Of weight w, a token has e^w / (e^w + 7): w = 5 gives .955, 4 gives .886."""
    open_block = [3, MASK, MASK, MASK]
    run = known_run(0.0, threshold=0.9)
    assert filled(run, open_block, best(4, 5, 6) * 5) == [3, 4, 5, 6]
    assert filled(run, open_block, best(4, 5, 6) * torch.tensor([[4.0], [5.0], [4.0]])) == [3, MASK, 5, MASK]
    assert filled(run, open_block, best(4, 5, 6) * torch.tensor([[1.0], [2.0], [3.0]])) == [3, MASK, MASK, 6]
    assert filled(run, [3, MASK, 5, MASK], best(4, 5, 6) * 5) == [3, 4, 5, 6]
    assert filled(run, [3, MASK, 1, MASK], best(4, 5, 6) * torch.tensor([[2.0], [9.0], [1.0]])) == [3, 4, 1, MASK]
    # all have exactly 1/8
    assert filled(known_run(0.0, threshold=0.125), open_block, torch.zeros(3, V)) == [3, 0, 0, 0]


def test_a_row_of_shift_0_predicts_its_own_token() -> None:
    run = known_run(0.0, layout=DraftLayout(4, shift=0, seed_row="draft"))
    assert filled(run, [3, MASK, MASK, MASK], best(7, 4, 5, 6) * 5) == [3, 4, 5, 6]


def test_a_left_neighbour_counts_once_it_is_filled_and_is_unknown_till_then() -> None:
    """After t comes t + 1; after a token that is not known, 6."""
    run = known_run(5.0, threshold=0.9)
    run.backend.heads.markov_w2[6, V] = 5.0
    assert filled(run, [3, MASK, MASK, MASK], torch.zeros(3, V)) == [3, 4, 5, 6]
    assert filled(run, [3, 1, MASK, MASK], torch.zeros(3, V)) == [3, 1, 2, 3]
    unsure = best(0, 0, 0) * torch.tensor([[4.0], [0.0], [0.0]])
    assert filled(run, [3, MASK, MASK, MASK], unsure) == [3, MASK, 6, 7]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_filled_tokens_are_drawn_with_the_noise_of_their_outputs_and_as_sure_as_without_it(seed: int) -> None:
    run = known_run(0.0, Processing(temperature=0.7), threshold=0.0)
    trunk = best(6, 6, 6)
    want = [int((trunk[0] / 0.7 + noise(seed, index)).argmax()) for index in (2, 3, 4)]
    assert filled(run, [3, MASK, MASK, MASK], trunk, seed) == [3, *want]
    # untempered, one of weight 4 has .886 and stays open beside a surer one, though at T = 0.7 it would have .977
    run = known_run(0.0, Processing(temperature=0.7), threshold=0.9)
    got = filled(run, [3, MASK, MASK, MASK], best(4, 5, 6) * torch.tensor([[4.0], [40.0], [4.0]]), seed)
    assert got == [3, MASK, 5, MASK]


def test_a_block_ends_its_request_where_nothing_more_can_come() -> None:
    for block, most, eos, emitted, reason in (
        ([3, 4, 5], 20, 5, [4, 5], "stop"),
        ([3, 4, 5, 6], 20, 5, [4, 5], "stop"),
        ([3, 4, 5, 6], 5, 7, [4, 5, 6], "length"),  # three tokens were left: no forward to commit them
        ([3, 4, 5, 6], 6, 7, [], None),
    ):
        one = Request(0, [2, 0], 0, most, frozenset({eos}), slot=0)
        one.emit([0, 3])
        one.block = list(block)
        _end_early(one)
        assert (one.emitted[2:], one.finish_reason) == (emitted, reason)
