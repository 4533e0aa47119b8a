"""What the base keeps of a block that was filled in, and how wide a tolerance is."""

import math

import pytest
import torch
from decoding import Oracle, random_prompts, randomise, tokens_of
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UsageError
from retrofit.runtime.engine import Engine

NEW = 20
SEEDS = {"greedy": 0.0, "sampled": 0.9}


def engine(**layout: str) -> Engine:
    return randomise(Engine.from_model(build("llama"), layout=DraftLayout(4, **layout)))


def shortfalls(prompt: list[int], tokens: list[int]) -> list[float]:
    """By how many nats each token is less likely than the likeliest, by the model itself."""
    model = build("llama")
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        logs = model(input_ids=ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
    return (logs.amax(-1) - logs.gather(-1, torch.tensor(tokens)[:, None])[:, 0]).tolist()


@pytest.mark.parametrize("seed_row", ["base", "draft"])
@pytest.mark.parametrize("tolerance", [0.0, 0.05, 0.4, math.inf])
def test_no_token_falls_short_by_more_than_is_tolerated(tolerance: float, seed_row: str) -> None:
    prompts = random_prompts((3, 9, 14, 6))
    texts = tokens_of(engine(seed_row=seed_row), prompts, "diffusion", max_new_tokens=NEW, tolerance=tolerance)
    short = [value for prompt, text in zip(prompts, texts, strict=True) for value in shortfalls(prompt, text)]
    assert len(short) == 4 * NEW and max(short) <= tolerance + 1e-4
    assert sum(value > 1e-4 for value in short) > (0 if tolerance >= 0.4 else -1), "it is made use of"


@pytest.mark.parametrize("temperature", SEEDS.values(), ids=SEEDS)
@pytest.mark.parametrize("seed_row", ["base", "draft"])
def test_without_tolerance_the_text_is_that_of_ar(
    temperature: float, seed_row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts((3, 9, 14, 6))
    options = {"max_new_tokens": NEW, "temperature": temperature}
    want = tokens_of(engine(seed_row=seed_row), prompts, "ar", **options)
    Oracle(dict(enumerate(want)), 0.3).plant(monkeypatch)
    got = engine(seed_row=seed_row).generate(prompts, "diffusion", tolerance=0.0, batch_size=3, **options)
    assert [r.tokens for r in got] == want
    assert sum(r.stats.forwards["commit"] for r in got) < 4 * (NEW - 1), "several tokens a forward"


def test_a_bucket_of_rows_cuts_the_blocks_and_not_the_text() -> None:
    """Of 16 rows a commit of 5 has room for two blocks of 4, of 6 for none: then a commit alone comes between."""
    prompts = random_prompts((3, 9, 14))
    want = tokens_of(engine(), prompts, "ar", max_new_tokens=NEW)
    for rows in (6, 16):
        held = randomise(Engine.from_model(build("llama"), layout=DraftLayout(4), exact="bucket", rows=rows))
        got = held.generate(prompts, "diffusion", max_new_tokens=NEW, tolerance=0.0, batch_size=3)
        assert [r.tokens for r in got] == want
        assert max(r.stats.widest for r in got) <= rows


def test_what_a_tolerance_may_be() -> None:
    one = engine()
    for wrong in (-0.1, math.nan, "low", True):
        with pytest.raises(UsageError, match="tolerance is"):
            one.generate([[1]], "diffusion", tolerance=wrong)
    with pytest.raises(UsageError, match="tolerance means nothing in mode ar"):
        one.generate([[1]], "ar", tolerance=0.1)
