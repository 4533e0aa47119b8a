"""What several test files share: random adapters, reference decoding, and drafts that are right on purpose.

A random adapter on a random model drafts one token in 64 right, so accepted drafts would hardly be tested. `Oracle`
stands in for the drafter and proposes the true continuation with planted mistakes: long, short and empty accepted
prefixes all occur, at any temperature.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from retrofit.adapters.heads import Heads
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import diffusion, modes
from retrofit.runtime.host.drafting import Drafted, Slots
from retrofit.runtime.rules.sampling import Processing


@torch.no_grad()
def randomise(engine: Engine, seed: int = 0) -> Engine:
    """Give every adapter parameter a value that matters: drafts become arbitrary, base rows must not notice."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in engine.attached.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return engine


@torch.no_grad()
def poison(engine: Engine) -> Engine:
    """Fill LoRA, mask vector and heads with NaN: whatever an adapter value reaches turns NaN."""
    for parameter in engine.attached.parameters():
        parameter.fill_(float("nan"))
    return engine


def random_prompts(lengths: Sequence[int], seed: int = 1, vocab: int = 64) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]


def reference_greedy(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    count: int,
    eos: Sequence[int] = (),
    context: int | None = None,
) -> list[list[int]]:
    """New tokens of transformers' own greedy decoding, one prompt at a time, nothing but EOS read from the model."""
    neutral = GenerationConfig(do_sample=False, eos_token_id=list(eos) or None, pad_token_id=0)
    model.generation_config, kept = neutral, model.generation_config
    outputs = []
    try:
        for prompt in prompts:
            room = count if context is None else min(count, context - len(prompt))
            ids = torch.tensor([list(prompt)])
            out = model.generate(
                ids, generation_config=neutral, attention_mask=torch.ones_like(ids), max_new_tokens=room
            )
            outputs.append(out[0, len(prompt) :].tolist())
    finally:
        model.generation_config = kept
    return outputs


class Oracle:
    """Drop-in for `drafting.draft_tokens`: the truth of each request (found by its seed), some drafts wrong.

    truth: seed -> the tokens the request is to emit. mistakes: share of drafts that are wrong, keyed by
    (seed, output index), so the same at any batch and strategy.
    """

    def __init__(self, truth: Mapping[int, Sequence[int]], mistakes: float = 0.25, vocab: int = 64):
        self.truth, self.mistakes, self.vocab = truth, mistakes, vocab
        self.drafted = 0

    def token(self, seed: int, index: int) -> int:
        known = self.truth[seed]
        token = known[index] if index < len(known) else 0
        rng = random.Random(1000 * seed + index)
        return (token + 1) % self.vocab if rng.random() < self.mistakes else token

    def tree(self, seed: int, index: int, shape: Any) -> list[int]:
        """The truth stands at a rank that varies by output index, or at none; siblings differ."""
        tokens = [0]
        for parent, rank, depth in list(zip(shape.parents, shape.ranks, shape.depths, strict=True))[1:]:
            place = index + depth - 1
            siblings = sum(p == parent for p in shape.parents)
            rng = random.Random(1000 * seed + place)
            known = self.truth[seed]
            true = known[place] if place < len(known) else 0
            holds_truth = rng.randrange(siblings + (self.mistakes > 0)) == rank
            tokens.append(true if holds_truth else (true + 1 + rank) % self.vocab)
        return tokens

    def likeliest(self, slots: Slots, depth: int, before_BP: Tensor, count: int, *paths: Any) -> tuple[Tensor, Tensor]:
        """Stands in for `Slots.likeliest`: the truth is one of four candidates, at any rank, or none of them."""
        tokens = []
        for seed, index in zip(slots.seed_B.tolist(), slots.index_B.tolist(), strict=True):
            place, known = index + depth, self.truth[seed]
            true = known[place] if place < len(known) else 0
            first = random.Random(1000 * seed + place).randrange(4 + (self.mistakes > 0))
            tokens.append([(true + first - rank) % self.vocab for rank in range(min(count, 4))])
        self.drafted += len(tokens)
        P = before_BP.shape[1]
        chances = torch.tensor([0.4, 0.2, 0.1, 0.05][:count]).expand(len(tokens), P, -1)
        return torch.tensor(tokens)[:, None].expand(-1, P, -1), chances

    def plant(self, patch: Any) -> None:
        """Let all drafts be this one's, those of `hybrid` and of diffusion too."""
        patch.setattr(modes, "draft_tokens", self)
        surely = lambda _, r, slot, trunk: (self.token(r.seed, r.output_index + slot - 1), 1.0)  # noqa: E731
        patch.setattr(diffusion, "best_of_slot", surely)
        patch.setattr(Slots, "likeliest", lambda slots, *given: self.likeliest(slots, *given))

    def __call__(
        self,
        hidden_BDH: Tensor,
        previous: Sequence[int],
        seeds: Sequence[int],
        indices: Sequence[int],
        seen_BV: Tensor | None,
        trunk_BDV: Tensor,
        heads: Heads,
        params: Processing,
        with_confidence: bool,
        shape: Any = None,
        guards: Any = None,
        counts_BV: Any = None,
    ) -> Drafted:
        B, D, _ = hidden_BDH.shape
        if shape is not None:
            trees = [self.tree(seed, index, shape) for seed, index in zip(seeds, indices, strict=True)]
            return Drafted(torch.tensor(trees)[:, 1:], None)
        tokens = [[self.token(seed, index + d) for d in range(D)] for seed, index in zip(seeds, indices, strict=True)]
        self.drafted += B * D
        # Confidence only steers `prepare = h`: something that prefers long accepted prefixes and varies.
        confidence = torch.rand(B, D) if with_confidence else None
        return Drafted(torch.tensor(tokens).view(B, D), confidence)


def tokens_of(engine: Engine, prompts: Sequence[Any], mode: str, **options: Any) -> list[list[int]]:
    return [result.tokens for result in engine.generate(prompts, mode, **options)]
