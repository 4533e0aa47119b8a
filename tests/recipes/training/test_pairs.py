"""What the Markov head begins with: the base's mean logits behind each token, as closely as its rank allows."""

from types import SimpleNamespace

import pytest
import torch
from decoding import random_prompts
from torch import nn
from training_pieces import document, engine_for

from retrofit.adapters.layout import DraftLayout
from retrofit.quantised.linear import Dense, QuantisedLinear
from retrofit.recipes.training.clean import pairs as clean_pairs
from retrofit.recipes.training.clean.pairs import (
    PRIOR,
    Vocabulary,
    begin_with_pairs,
    factors,
    hidden_states,
    mean_hidden,
    vocabulary,
)

TEXTS = random_prompts((30, 26, 19), seed=3)
NAMES = ["llama", "gemma3"]


def pairs(engine, text=TEXTS):
    """(mean logits behind each token beyond those behind any, how often it was seen), one position after the other."""
    model, vocab = engine.attached.model, engine.attached.heads.vocab
    seen = [[] for _ in range(vocab)]
    for tokens in text:
        with torch.no_grad():
            hidden = engine.backend.trunk(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        for token, one in list(zip(tokens, hidden, strict=True))[1:]:
            seen[token].append(one)
    middle = torch.stack([one for some in seen for one in some]).mean(0)
    beyond = [sum((one - middle for one in some), torch.zeros_like(middle)) / (len(some) + PRIOR) for some in seen]
    weight = model.get_output_embeddings().weight * engine.backend.head.scale
    logits = torch.stack(beyond) @ weight.detach().T
    return logits - logits.mean(1, keepdim=True), torch.tensor([float(len(some)) for some in seen])


@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_full_rank_begins_with_the_means(name):
    engine = engine_for(name, DraftLayout(4))
    head, documents = engine.backend.head, [document(tokens) for tokens in TEXTS]
    tokens, mean, count = mean_hidden(*hidden_states(engine.backend, documents))
    expected, seen = pairs(engine)
    first, second = factors(mean, count, vocabulary(head), mean.shape[1])
    assert torch.equal(tokens, seen.nonzero()[:, 0]) and torch.equal(count, seen[tokens])
    assert torch.allclose(first @ second.T, expected[tokens], atol=1e-3 * float(expected.abs().max()))
    assert first.norm(dim=1).mean() == pytest.approx(1)


def test_a_smaller_rank_is_the_best_there_is():
    generator = torch.Generator().manual_seed(0)
    mean, weight = torch.randn(40, 12, generator=generator), torch.randn(40, 12, generator=generator)
    count = torch.randint(1, 9, (40,), generator=generator).float()
    first, second = factors(mean, count, Vocabulary(weight, 2.0), 3)
    scale = count.sqrt()[:, None]
    u, s, vt = torch.linalg.svd(scale * (mean @ (2 * (weight - weight.mean(0))).T))
    assert torch.allclose(scale * (first @ second.T), (u[:, :3] * s[:3]) @ vt[:3], atol=1e-3)


def test_pieces_are_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mean, weight = torch.randn(5, 12, generator=generator), torch.randn(40, 12, generator=generator)
    whole = factors(mean, torch.ones(5), Vocabulary(weight, 1.0), 3)
    monkeypatch.setattr(clean_pairs, "PIECE", 7)
    assert [len(piece) for piece in Vocabulary(weight, 1.0).pieces()] == [7, 7, 7, 7, 7, 5]
    for one, other in zip(whole, factors(mean, torch.ones(5), Vocabulary(weight, 1.0), 3), strict=True):
        assert torch.allclose(one.abs(), other.abs(), atol=1e-4)  # a singular vector's sign is free


def test_only_the_markov_head_is_filled():
    engine = engine_for("llama", DraftLayout(4))
    heads = engine.attached.heads
    before = {name: tensor.clone() for name, tensor in heads.state_dict().items()}
    begin_with_pairs(heads, engine.backend, [document(tokens) for tokens in TEXTS])
    changed = {name for name, tensor in heads.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"markov_w1", "markov_w2"}
    assert not heads.markov_w1[heads.unknown].any()  # what is masked says nothing
    begin_with_pairs(heads, engine.backend, [])


def test_a_quantised_projection_is_what_its_bits_stand_for():
    linear = nn.Linear(4, 6, bias=False)
    held = QuantisedLinear(Dense(linear.weight.detach()), (6, 4), torch.float32)
    heads = (SimpleNamespace(linear=one, project=one, before=None, scale=2.0) for one in (linear, held))
    want, found = (torch.cat(list(vocabulary(head).pieces())) for head in heads)
    assert torch.equal(found, want) and not found.isnan().any()
