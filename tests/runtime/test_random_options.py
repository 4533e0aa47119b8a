"""The property: whatever the options, `self_spec` emits the tokens of `ar`.

Random options for every request, many requests of different options in one batch.
"""

import random
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from decoding import Oracle, random_prompts
from optioned import EOS, close, engine

from retrofit import SamplingParams
from retrofit.runtime.host import modes
from retrofit.runtime.results import Result

SETS = 200
WAYS: tuple[dict[str, Any], ...] = (
    {"strategy": "two_forward"},
    {"strategy": "fused", "tree": 0},
    {"strategy": "fused", "tree": 7},
    {"strategy": "fused", "prepare": "last"},
    {"strategy": "fused", "prepare": 2, "tree": 0},
    {"strategy": "prompt_lookup"},
    {"strategy": "hybrid", "tree": 7},
    {"strategy": "hybrid", "prepare": "none"},
    {"strategy": "auto"},
)


def random_options(rng: random.Random) -> SamplingParams:
    """Each option on or off; few tokens, so that the penalties meet tokens again."""

    def maybe(*values: Any, off: Any = None) -> Any:
        return rng.choice(values) if rng.random() < 0.4 else off

    most = rng.randint(1, 9)
    return SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.3)),
        top_k=maybe(1, 5, 20),
        top_p=maybe(0.5, 0.9),
        min_p=maybe(0.02, 0.3),
        repetition_penalty=maybe(0.7, 1.3, 2.0),
        presence_penalty=maybe(-1.5, 0.8, 2.0, off=0.0),
        frequency_penalty=maybe(-2.0, 0.6, 2.0, off=0.0),
        logit_bias=maybe({3: 4.0, 9: 5.0}, {EOS: 6.0, 1: -9.0}, dict.fromkeys(range(8), 3.0)),
        seed=rng.randrange(99),
        n=rng.choice((1, 1, 1, 2)),
        max_new_tokens=most,
        min_new_tokens=maybe(0, rng.randint(0, most)),
        stop_token_ids=maybe((7,), (3, 4), tuple(range(0, 64, 8)), off=()),
        stop=maybe("1.", ("2.4", "3", "end"), off=()),
        ignore_eos=rng.random() < 0.3,
        logprobs=maybe(0, 3),
        prompt_logprobs=maybe(0, 2),
    )


@lru_cache(maxsize=1)
def asked() -> tuple[list[list[int]], list[SamplingParams]]:
    rng = random.Random(10)
    # one half of a small vocabulary: prompts share tokens with what follows
    prompts = random_prompts([1 + n % 6 for n in range(SETS)], seed=3, vocab=16)
    return prompts, [random_options(rng) for _ in range(SETS)]


@lru_cache(maxsize=1)
def alone() -> list[Result]:
    """`ar`, one request at a time."""
    prompts, params = asked()
    return engine().generate(prompts, params, "ar", batch_size=1)


def truths(results: list[Result], params: list[SamplingParams]) -> dict[int, list[int]]:
    """seed -> tokens, as far as seeds are unique; of the others only one is known, and its drafts are good."""
    return {params[r.index].seed + r.sample: r.tokens for r in results}


def differences(got: list[Result], want: list[Result]) -> list[int]:
    """Prompts whose outputs differ in anything but rounding and cost."""
    found = []
    for mine, other in zip(got, want, strict=True):
        same = [
            getattr(mine, name) == getattr(other, name)
            for name in ("index", "sample", "prompt", "tokens", "finish_reason", "stop_reason", "text")
        ]
        same.append(close(mine.logprobs, other.logprobs) and close(mine.prompt_logprobs, other.prompt_logprobs))
        if not all(same):
            found.append(mine.index)
    return found


@pytest.mark.usefixtures("restless_auto")
@pytest.mark.parametrize("way", [{"mode": "ar"}, *WAYS], ids=lambda way: "-".join(map(str, way.values())))
def test_self_spec_is_ar_under_every_option(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = asked()
    want = alone()
    Oracle(truths(want, params), mistakes=0.2).plant(monkeypatch)
    assert differences(engine().generate(prompts, params, batch_size=32, **way), want) == []


@pytest.mark.usefixtures("restless_auto")
@pytest.mark.parametrize("way", WAYS[1:3], ids=["chain", "tree"])
def test_drafts_of_the_model_under_every_option(way: dict[str, Any]) -> None:
    """Penalties and rules reach the drafter, too: its own drafts go through them."""
    prompts, params = asked()
    assert differences(engine().generate(prompts[:60], params[:60], batch_size=20, **way), alone()[: outputs(60)]) == []


def test_diffusion_of_a_batch_is_that_of_each_alone() -> None:
    prompts, params = asked()
    some = [replace(one, logprobs=None) for one in params[:50]]
    want = engine().generate(prompts[:50], some, "diffusion", batch_size=1)
    assert differences(engine().generate(prompts[:50], some, "diffusion", batch_size=16), want) == []


@pytest.mark.parametrize("mistakes", [0.2, None], ids=["some right", "of the model"])
def test_diffusion_that_tolerates_nothing_is_ar(mistakes: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base takes back every token but its own, drawn ones too; steps that fill nothing more make no difference."""
    prompts, params = asked()
    some, want = [replace(one, logprobs=None) for one in params], alone()
    if mistakes is not None:
        Oracle(truths(want, params), mistakes).plant(monkeypatch)
    got = engine().generate(prompts[:100], some[:100], "diffusion", batch_size=16, tolerance=0.0)
    plain = [replace(one, logprobs=None) for one in want[: outputs(100)]]
    assert differences(got, plain) == []


def outputs(prompts: int) -> int:
    return sum(params.n for params in asked()[1][:prompts])


def test_the_options_are_met() -> None:
    """Every option changes some output, or the property would say nothing of it."""
    want, (prompts, params) = alone(), asked()
    neutral = SamplingParams()
    for field in fields(SamplingParams):
        if field.name == "template":
            continue  # is for messages, and these prompts are tokens
        # enough prompts to show it, other ones for each option
        some = [n for n, one in enumerate(params) if getattr(one, field.name) != getattr(neutral, field.name)][:40]
        without = [replace(params[n], **{field.name: getattr(neutral, field.name)}) for n in some]
        got = engine().generate([prompts[n] for n in some], without, "ar", batch_size=64)
        held = [[r for r in want if r.index == n] for n in some]
        now = [[r for r in got if r.index == n] for n in range(len(some))]
        changed = [len(a) != len(b) or differences(a, b) for a, b in zip(now, held, strict=True)]
        assert any(changed), field.name
    assert {r.finish_reason for r in want} == {"stop", "length"}
    assert {r.stop_reason for r in want} >= {None, 3, "1.", "3"}
    assert sum(r.sample for r in want) > 20


def counts_of_the_committed_text(requests: Any, rows: Any) -> torch.Tensor | None:
    counts = [r.counts.repeat(len(row.tokens), 1) for r, row in zip(requests, rows, strict=True) if row.tokens]
    return torch.cat(counts)


@pytest.mark.parametrize("way", WAYS[1:3], ids=["chain", "tree"])
def test_counts_that_do_not_follow_the_draft_path_are_caught(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, params = asked()
    monkeypatch.setattr(modes, "draft_tokens", Oracle(truths(alone(), params), mistakes=0.0))
    monkeypatch.setattr(modes, "_path_counts", counts_of_the_committed_text)
    assert differences(engine().generate(prompts, params, batch_size=32, **way), alone())


def test_processing_of_another_request_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, params = asked()
    plain = [replace(one, repetition_penalty=None, presence_penalty=0.0, frequency_penalty=0.0) for one in params[:20]]
    want = engine().generate(prompts[:20], plain, "ar", batch_size=1)
    assert differences(engine().generate(prompts[:20], plain, "ar", batch_size=20), want) == []
    monkeypatch.setattr(modes, "_params", lambda run, requests: run.params)
    assert differences(engine().generate(prompts[:20], plain, "ar", batch_size=20), want)
