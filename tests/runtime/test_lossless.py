"""`self_spec` is the original model, token for token: every architecture, strategy, block, batch and temperature."""

from functools import cache, lru_cache
from typing import Any

import pytest
from decoding import Oracle, random_prompts, randomise, reference_greedy, tokens_of
from tiny_models import ARCHITECTURES, CONTEXT, ORIGINAL_CONTEXT, WINDOW, build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import drafting, modes

BLOCKS = (1, 4, 8, 16)
NEW = 8
# A single token; crossing the sliding window; crossing the longrope boundary; up to the end of the context.
LENGTHS = (1, WINDOW - 3, ORIGINAL_CONTEXT - 5, CONTEXT - 6)
SEEDS = (11, 12, 13, 14)
SAMPLED = {"temperature": 0.8, "top_k": 24, "top_p": 0.9, "repetition_penalty": 1.3}
STRATEGIES: tuple[dict[str, Any], ...] = (
    {"strategy": "two_forward"},
    {"strategy": "fused", "prepare": "all"},
    {"strategy": "fused", "prepare": "last"},
    {"strategy": "fused", "prepare": 2},
    {"strategy": "fused", "tree": 9},
    {"strategy": "auto"},
    {"strategy": "prompt_lookup"},
    {"strategy": "hybrid"},
    {"strategy": "hybrid", "prepare": "none", "tree": 5},
)
NUMBERED = list(enumerate(ARCHITECTURES))


@lru_cache(maxsize=1)
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS)


@cache
def greedy_reference(name: str) -> list[list[int]]:
    return reference_greedy(build(name), prompts(), NEW, context=CONTEXT)


@cache
def sampled_reference(name: str) -> list[list[int]]:
    """`ar` one request at a time; test_sampling.py shows that its distribution is the model's."""
    engine = Engine.from_model(build(name))
    return tokens_of(engine, prompts(), "ar", max_new_tokens=NEW, seed=SEEDS, batch_size=1, ignore_eos=True, **SAMPLED)


def decode(engine: Engine, which: slice = slice(None), **options: Any) -> list[list[int]]:
    options |= {"max_new_tokens": NEW, "seed": SEEDS[which], "ignore_eos": True}
    return tokens_of(engine, prompts()[which], "self_spec", **options)


@pytest.mark.usefixtures("restless_auto")
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("number", "name"), NUMBERED, ids=ARCHITECTURES)
def test_every_architecture_block_and_batch(
    number: int, name: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy against transformers, sampled against `ar`; which strategy meets which pair rotates over architectures."""
    greedy, sampled = greedy_reference(name), sampled_reference(name)
    engine = Engine.from_model(build(name), layout=DraftLayout(block=block))
    if (number + BLOCKS.index(block)) % 2:
        randomise(engine, seed=block)
    one_by_one = slice(number // 2 % 2, None, 2)  # half of the prompts: batch 1 takes as many forwards as tokens
    for pair, batch, which in (
        (2 * BLOCKS.index(block), 1, one_by_one),
        (2 * BLOCKS.index(block) + 1, 3, slice(None)),
    ):
        first, second, third = (STRATEGIES[(number + pair + shift) % len(STRATEGIES)] for shift in (0, 2, 4))
        assert decode(engine, which, batch_size=batch, **first) == greedy[which], ("own drafts", batch, first)
        with monkeypatch.context() as patch:
            Oracle(dict(zip(SEEDS, greedy, strict=True))).plant(patch)
            assert decode(engine, which, batch_size=batch, **second) == greedy[which], ("good", batch, second)
            Oracle(dict(zip(SEEDS, sampled, strict=True))).plant(patch)
            got = decode(engine, which, batch_size=batch, **third, **SAMPLED)
            assert got == sampled[which], ("sampled", batch, third)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_ar_is_transformers(name: str) -> None:
    engine = randomise(Engine.from_model(build(name)))
    results = engine.generate(prompts(), "ar", max_new_tokens=NEW, batch_size=3, ignore_eos=True)
    assert [r.tokens for r in results] == greedy_reference(name)
    assert [r.finish_reason for r in results] == ["length"] * 4
    assert [len(r.tokens) for r in results] == [NEW, NEW, NEW, CONTEXT - LENGTHS[3]]


@pytest.mark.parametrize("name", ["llama", "gemma3", "deepseek_v3"])
def test_auto_with_its_own_measurements(name: str) -> None:
    engine = randomise(Engine.from_model(build(name), layout=DraftLayout(block=4)))
    assert decode(engine, strategy="auto", batch_size=3) == greedy_reference(name)
    assert decode(engine, strategy="auto", batch_size=3, **SAMPLED) == sampled_reference(name)


LAYOUTS = [
    DraftLayout(block=4, input=fill, attention=attention, shift=shift, seed_row=seed_row)
    for fill in ("mask", "noise")
    for attention in ("bidirectional", "causal")
    for shift, seed_row in ((1, "base"), (1, "draft"), (0, "draft"))
]


@pytest.mark.usefixtures("restless_auto")
@pytest.mark.parametrize("name", ["llama", "phi3_longrope"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.input}-{x.attention}-{x.shift}-{x.seed_row}")
def test_every_draft_layout(name: str, layout: DraftLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    greedy, sampled = greedy_reference(name), sampled_reference(name)
    engine = randomise(Engine.from_model(build(name), layout=layout))
    strategies = ["two_forward", "auto", *(["fused", "hybrid"] if layout.anchored else [])]
    for n, strategy in enumerate(strategies):
        batch = (1, 3)[n % 2]
        assert decode(engine, strategy=strategy, batch_size=batch) == greedy
        with monkeypatch.context() as patch:
            Oracle(dict(zip(SEEDS, sampled, strict=True))).plant(patch)
            assert decode(engine, strategy=strategy, batch_size=4 - batch, **SAMPLED) == sampled


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3_moe"])
def test_among_how_few_tokens_drafts_are_chosen_changes_none_that_is_emitted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = randomise(Engine.from_model(build(name), layout=DraftLayout(block=4)))
    monkeypatch.setattr(drafting, "LARGE_VOCABULARY", 1)
    for candidates in (2, 5):
        monkeypatch.setattr(drafting, "CANDIDATES", candidates)
        for way in ({"strategy": "two_forward"}, {"strategy": "fused", "prepare": 2}, {"strategy": "fused", "tree": 9}):
            # A tree's ranks need as many candidates; these trees are grown from chances of four.
            if candidates >= 4 or "tree" not in way:
                assert decode(engine, batch_size=3, **way) == greedy_reference(name)
                assert decode(engine, batch_size=3, **way, **SAMPLED) == sampled_reference(name)


# What the comparison must catch


class Mutant:
    """One planted fault each; `plant` puts it in."""

    @staticmethod
    def accepts_one_too_many(patch: pytest.MonkeyPatch) -> None:
        right = modes.accepted_length
        patch.setattr(
            modes,
            "accepted_length",
            lambda draft, target, lengths: (right(draft, target, lengths) + 1).minimum(lengths),
        )

    @staticmethod
    def keeps_a_stale_cache_slot(patch: pytest.MonkeyPatch) -> None:
        """A position written once is not written again: the K/V of a rejected draft stays."""
        from retrofit.runtime.backends.hf.cache import KVCache

        right, written = KVCache.write, set()

        def write(self: KVCache, layer: int, slots: Any, positions: Any, key: Any, value: Any) -> None:
            fresh = [
                n
                for n, place in enumerate(zip(slots.tolist(), positions.tolist(), strict=True))
                if (id(self), layer, place) not in written
            ]
            written.update((id(self), layer, (int(slots[n]), int(positions[n]))) for n in fresh)
            right(self, layer, slots[fresh], positions[fresh], key[fresh], value[fresh])

        patch.setattr(KVCache, "write", write)

    @staticmethod
    def reuses_a_noise_key(patch: pytest.MonkeyPatch) -> None:
        right = modes._targets
        patch.setattr(
            modes,
            "_targets",
            lambda run, logits, owners, steps, *paths: right(run, logits, owners, [0] * len(steps), *paths),
        )

    @staticmethod
    def penalises_the_committed_prefix_only(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(modes, "path_seen", lambda seen, drafts: seen.repeat(len(drafts) + 1, 1))

    @staticmethod
    def stores_the_first_rows_of_a_tree(patch: pytest.MonkeyPatch) -> None:
        """K/V of the accepted path must be picked out of the tree, not taken from its front."""
        right = modes._store

        def store(run: Any, requests: Any, rows: Any, paths: list[list[int]]) -> None:
            right(run, requests, rows, [list(range(len(path))) for path in paths])

        patch.setattr(modes, "_store", store)

    @staticmethod
    def hangs_blocks_one_too_early(patch: pytest.MonkeyPatch) -> None:
        """Harmless on purpose: a bad draft costs speed, never the output."""
        from retrofit.runtime import plan

        right = plan.draft_block
        patch.setattr(plan, "draft_block", lambda r, start, *rest: right(r, max(start - 1, 0), *rest))


@pytest.mark.parametrize(
    ("plant", "tree", "caught"),
    [
        (Mutant.accepts_one_too_many, 0, True),
        (Mutant.keeps_a_stale_cache_slot, 0, True),
        (Mutant.reuses_a_noise_key, 0, True),
        (Mutant.penalises_the_committed_prefix_only, 0, True),
        (Mutant.stores_the_first_rows_of_a_tree, 12, True),
        (Mutant.hangs_blocks_one_too_early, 0, False),
        (lambda patch: None, 12, False),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_planted_faults(plant: Any, tree: int, caught: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = sampled_reference("llama")
    engine = randomise(Engine.from_model(build("llama"), layout=DraftLayout(block=4)))
    Oracle(dict(zip(SEEDS, sampled, strict=True))).plant(monkeypatch)
    plant(monkeypatch)
    got = decode(engine, strategy="fused", tree=tree, batch_size=3, **SAMPLED)
    assert (got != sampled) is caught
    if tree:
        assert (decode(engine, strategy="hybrid", tree=tree, batch_size=3, **SAMPLED) != sampled) is caught
