"""The drafting kernel against the reference and against what the torch runtime drafts: chains, trees, ties, and
requests that know nothing of each other."""

import math

import pytest
import torch
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.runtime.host.drafting import draft_tokens
from retrofit.runtime.kernels import drafting, reference
from retrofit.runtime.kernels.drafting import draft
from retrofit.runtime.kernels.sampling import candidates
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.rules.tree import DraftTree, grow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V, B, K = 40, 2, 3
CHANCE = [[0.6, 0.3, 0.2], [0.5, 0.3, 0.1], [0.4, 0.2, 0.1]]
TREE = grow(CHANCE, 7)
HOLES = grow([[0.0, 0.3, 0.2], [0.0, 0.0, 0.3], [0.4, 0.2, 0.1]], 5)
"""Ranks 1 and 2 of the first slot, 2 of the second: likelier ones need not have been measured so."""
CHAIN = DraftTree((-1, 0, 1, 2), (0, 0, 0, 0), (1.0,) * 4)


def integers(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def on_device(tree: DraftTree) -> tuple[Tensor, Tensor, Tensor]:
    return integers(*tree.parents), integers(*tree.ranks), integers(*tree.depths)


def problem(count: int, rank: int, dtype: torch.dtype, requests: int = B) -> dict[str, Tensor | None]:
    """Logits of more rows than are asked for, in memory apart; candidates in no order; a Markov head that matters."""
    logits = torch.randn(requests * K + 2, V + 5).to(dtype)[:, :V]
    return {
        "logits_RV": logits.to(DEVICE),
        "chosen_BK": (torch.randperm(requests * K).view(requests, K) + 2).to(DEVICE),
        "candidates_BKC": torch.rand(requests, K, V).argsort(-1)[..., :count].contiguous().to(DEVICE),
        "previous_B": torch.randint(V + 1, (requests,)).to(DEVICE),
        "w1": torch.randn(V + 1, rank).to(dtype).to(DEVICE) if rank else None,
        "w2": torch.randn(V, rank).to(dtype).to(DEVICE) if rank else None,
        "seed_B": torch.randint(2**62, (requests,)).to(DEVICE) * 2 + 1,
        "index_B": torch.randint(500, (requests,)).to(DEVICE),
    }


def expected(given: dict, tree: DraftTree, temperature: float) -> Tensor:
    return reference.draft(**given, parents=tree.parents, ranks=tree.ranks, depths=tree.depths, temperature=temperature)


def drafted(given: dict, tree: DraftTree, temperature: float) -> Tensor:
    parents, ranks, depths = on_device(tree)
    return draft(**given, parents=parents, ranks=ranks, depths=depths, temperature=temperature)


@pytest.mark.parametrize("tree", [CHAIN, TREE, HOLES], ids=["chain", "tree", "holes"])
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize(
    ("count", "rank", "dtype"),
    [(16, 0, torch.float32), (7, 5, torch.bfloat16), (16, 8, torch.float16), (3, 1, torch.float32)],
)
def test_draft(poisoned_memory: None, tree: DraftTree, temperature: float, count: int, rank: int, dtype: torch.dtype):
    given = problem(count, rank, dtype)
    tokens = drafted(given, tree, temperature)
    assert torch.equal(tokens, expected(given, tree, temperature))
    if rank:
        plain = drafted({**given, "w1": None, "w2": None}, tree, temperature)
        assert not torch.equal(tokens, plain)


@pytest.mark.parametrize("tile", [16, 64])
def test_a_wide_markov_head_is_read_in_blocks(monkeypatch: pytest.MonkeyPatch, tile: int):
    monkeypatch.setattr(drafting, "TILE", tile)
    given = problem(8, 13, torch.float32)
    assert torch.equal(drafted(given, TREE, 0.8), expected(given, TREE, 0.8))


@pytest.mark.parametrize("rank", [0, 6])
@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("tree", [None, TREE], ids=["chain", "tree"])
def test_with_every_token_a_candidate_it_drafts_what_torch_drafts(
    tree: DraftTree | None, temperature: float, rank: int
):
    H = 8
    heads = Heads(H, V, K, rank, confidence=False).to(DEVICE).requires_grad_(False)
    if heads.markov_w2 is not None:
        heads.markov_w2.normal_()
    hidden, weight = torch.randn(B, K, H, device=DEVICE), torch.randn(V, H, device=DEVICE)
    previous, seeds, indices = [3, V - 1], [1, 2**63 - 1], [0, 400]
    params = Processing(temperature=temperature)
    trunk = hidden @ weight.T
    torch_tokens = draft_tokens(hidden, previous, seeds, indices, None, trunk, heads, params, False, tree).tokens

    logits = trunk.view(B * K, V)
    chosen, seed, index = torch.arange(B * K, device=DEVICE), integers(*seeds), integers(*indices)
    index_BK = (index[:, None] + torch.arange(K, device=DEVICE)).flatten()
    found = candidates(logits, chosen, V, temperature, seed.repeat_interleave(K), index_BK).view(B, K, V)
    parents, ranks, depths = on_device(tree or CHAIN)
    w1, w2 = heads.markov_w1, heads.markov_w2
    tokens = draft(
        logits, chosen.view(B, K), found, integers(*previous), w1, w2, parents, ranks, depths, temperature, seed, index
    )
    assert torch.equal(tokens, torch_tokens)


def test_equal_scores_go_by_id_whatever_the_order_of_candidates():
    given = problem(5, 0, torch.float32)
    given["logits_RV"] = torch.zeros_like(given["logits_RV"])
    given["logits_RV"][::2] = -0.0
    tree = DraftTree((-1, 0, 0, 0, 1), (0, 0, 1, 2, 4), (1.0,) * 5)
    first, second = (given["candidates_BKC"][:, slot].sort(-1).values for slot in (0, 1))
    assert torch.equal(drafted(given, tree, 0), torch.cat([first[:, :3], second[:, 4:]], dim=1))


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_slot_that_no_row_proposes(temperature: float):
    """Its drafts are some of its candidates, whatever row 0 of the logits holds; the slots before it are as ever."""
    given = problem(6, 4, torch.float32, requests=3)
    normal = drafted(given, CHAIN, temperature)
    given["logits_RV"][0] = math.nan
    given["chosen_BK"][1, 1:] = -1
    given["chosen_BK"][2] = -1
    tokens = drafted(given, CHAIN, temperature)
    assert torch.equal(tokens[0], normal[0]) and tokens[1, 0] == normal[1, 0]
    assert (given["candidates_BKC"] == tokens[..., None]).any(-1).all()


@pytest.mark.parametrize("temperature", [0, 0.8])
def test_a_request_is_drafted_alike_alone_and_among_others(temperature: float):
    """Coarse logits and no head, so that ties decide too; the others' logits hold NaN."""
    for rank in (0, 5):
        given = problem(9, rank, torch.bfloat16, requests=3)
        given["logits_RV"] = given["logits_RV"].round()
        together = drafted(given, TREE, temperature)
        for b in (0, 2):
            logits = torch.full_like(given["logits_RV"], math.nan)
            logits[given["chosen_BK"][b]] = given["logits_RV"][given["chosen_BK"][b]]
            per_request = ("chosen_BK", "candidates_BKC", "previous_B", "seed_B", "index_B")
            alone = {**given, "logits_RV": logits} | {name: given[name][b : b + 1] for name in per_request}
            assert torch.equal(drafted(alone, TREE, temperature), together[b : b + 1])
