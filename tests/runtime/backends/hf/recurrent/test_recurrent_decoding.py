"""Recurrent layers in decoding: `self_spec` is the original model, token for token; a rejected row leaves nothing."""

from functools import cache, partial
from typing import Any

import pytest
import torch
from decoding import Oracle, poison, random_prompts, randomise, reference_greedy, tokens_of
from recurrent_models import RECURRENT, build

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import GateError, UsageError
from retrofit.runtime.backends.hf.recurrent import advance, states
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes

NEW = 10
SEEDS = (11, 12, 13)
PROMPTS = random_prompts((1, 5, 70))  # 70 is more than a chunk of the models' own functions
SAMPLED = {"temperature": 0.8, "top_k": 24, "repetition_penalty": 1.3}
STRATEGIES: tuple[dict[str, Any], ...] = (
    {"strategy": "two_forward"},
    {"strategy": "fused", "prepare": "all"},
    {"strategy": "fused", "tree": 9},
    {"strategy": "fused", "prepare": 2},
    {"strategy": "prompt_lookup"},
    {"strategy": "auto"},
)
NUMBERED = list(enumerate(RECURRENT))


@cache
def greedy_reference(name: str) -> list[list[int]]:
    return reference_greedy(build(name), PROMPTS, NEW)


def decode(engine: Engine, mode: str = "self_spec", **options: Any) -> list[list[int]]:
    return tokens_of(engine, PROMPTS, mode, **{"max_new_tokens": NEW, "seed": SEEDS, "ignore_eos": True, **options})


@pytest.mark.usefixtures("restless_auto")
@pytest.mark.parametrize(("number", "name"), NUMBERED, ids=RECURRENT)
def test_every_family(number: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy against transformers, sampled against `ar`; two strategies a family, in turn."""
    engine, greedy = Engine.from_model(build(name), layout=DraftLayout(block=4)), greedy_reference(name)
    assert decode(engine, "ar", batch_size=3) == greedy
    sampled = decode(engine, "ar", batch_size=1, **SAMPLED)
    randomise(engine)
    for turn, batch in enumerate((3, 1)):
        way = STRATEGIES[(number + 3 * turn) % len(STRATEGIES)]
        with monkeypatch.context() as patch:
            patch.setattr(modes, "draft_tokens", Oracle(dict(zip(SEEDS, greedy, strict=True))))
            assert decode(engine, batch_size=batch, **way) == greedy, way
            patch.setattr(modes, "draft_tokens", Oracle(dict(zip(SEEDS, sampled, strict=True))))
            assert decode(engine, batch_size=4 - batch, **way, **SAMPLED) == sampled, way
    assert decode(poison(engine), strategy="fused", batch_size=3) == greedy
    engine.close()
    assert not any("forward" in module.__dict__ for module in engine._attached.model.modules())  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
@pytest.mark.parametrize(
    "layout", [DraftLayout(block=4, seed_row="draft"), DraftLayout(block=4, attention="causal", input="noise")], ids=str
)
def test_other_layouts(name: str, layout: DraftLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = randomise(Engine.from_model(build(name), layout=layout))
    monkeypatch.setattr(modes, "draft_tokens", Oracle(dict(zip(SEEDS, greedy_reference(name), strict=True))))
    assert decode(engine, strategy="two_forward", batch_size=3) == greedy_reference(name)


def test_diffusion_commits_to_the_state_that_plain_decoding_has() -> None:
    """Whatever was denoised: the token behind a block is a base row's, and what plain decoding says of that text."""
    engine = randomise(Engine.from_model(build("qwen3_5"), layout=DraftLayout(block=4)))
    texts = decode(engine, "diffusion", batch_size=3, max_new_tokens=5)
    before = [[*prompt, *text[:4]] for prompt, text in zip(PROMPTS, texts, strict=True)]
    following = tokens_of(engine, before, "ar", max_new_tokens=1, ignore_eos=True)
    assert [text[4:] for text in texts] == following


def test_outputs_of_one_prompt_copy_its_state() -> None:
    engine = Engine.from_model(build("qwen3_next"))
    results = engine.generate([PROMPTS[2]], "ar", max_new_tokens=NEW, n=3, ignore_eos=True)
    assert [r.tokens for r in results] == [greedy_reference("qwen3_next")[2]] * 3
    assert sum(r.stats.reused for r in results) == 2 * len(PROMPTS[2])


def test_prefixes_are_not_kept() -> None:
    """A state stands at one position, and prompts run in another order of addition than steps."""
    engine = Engine.from_model(build("qwen3_5"))
    assert engine.prefixes is None
    engine.close()
    with pytest.raises(UsageError, match="computes prompts in another order"):
        Engine.from_model(build("qwen3_5"), prefix_cache="1MB")


def test_half_precision_at_a_level_of_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_5", dtype=torch.bfloat16)
    try:
        engine = Engine.from_model(model, layout=DraftLayout(block=4), exact="bucket")
    except GateError:
        pytest.skip("this machine does not hold the level")
    alone = decode(engine, "ar", batch_size=1)
    randomise(engine)
    monkeypatch.setattr(modes, "draft_tokens", Oracle(dict(zip(SEEDS, alone, strict=True))))
    for way in ({"strategy": "fused", "tree": 9}, {"strategy": "two_forward"}):
        assert decode(engine, batch_size=3, **way) == alone, way


def test_rows_of_any_number_promise_nothing() -> None:
    """On a CPU the gates of the last rows are computed by another function, where the numbers fill no vectors."""
    with pytest.raises(GateError, match="gates"):
        Engine.from_model(build("qwen3_5"), layout=DraftLayout(block=4), exact="invariant")


# What the comparison must catch


def no_replay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(states, "replay", lambda *_: None)


def keeps_rejected_rows(patch: pytest.MonkeyPatch) -> None:
    """Every row of a step stays in the state."""
    right = states.States.begin

    def begin(self: states.States, plan: Any) -> None:
        for sequence in plan.sequences:
            step, rows = self.pending.get(sequence.slot, (self.step, None))
            count = sequence.start - self.at[sequence.slot]
            if rows and 0 < count < len(rows):
                self.pending[sequence.slot] = step, [*rows[: count - 1], rows[-1]]
        right(self, plan)

    patch.setattr(states.States, "begin", begin)


def follows_the_row_before(patch: pytest.MonkeyPatch) -> None:
    """Siblings of a tree see each other."""
    from retrofit.runtime.backends.hf import attention

    right = attention.forest_of

    def forest_of(plan: Any) -> Any:
        forest = right(plan)
        forest.parents[forest.parents > 0] += 1
        return forest

    patch.setattr(attention, "forest_of", forest_of)


@pytest.mark.parametrize(("plant", "tree"), [(no_replay, 9), (keeps_rejected_rows, 0), (follows_the_row_before, 9)])
def test_planted_faults_are_caught(plant: Any, tree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.from_model(build("qwen3_5"), layout=DraftLayout(block=4))
    greedy = greedy_reference("qwen3_5")
    monkeypatch.setattr(modes, "draft_tokens", Oracle(dict(zip(SEEDS, greedy, strict=True))))
    run = partial(decode, engine, strategy="fused", tree=tree, batch_size=3)
    assert run() == greedy
    plant(monkeypatch)
    assert run() != greedy


def test_a_sum_does_not_depend_on_what_stands_beside_it() -> None:
    x = torch.randn(5, 3, 11, 7)
    assert torch.equal(advance.folded(x)[2:3, 1:2], advance.folded(x[2:3, 1:2]))
    torch.testing.assert_close(advance.folded(x), x.sum(-2))
