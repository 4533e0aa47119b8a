"""One batch decoded one way: every token has its time, whoever decodes."""

import pytest
from reporting import Ticking
from tiny_models import build

from retrofit.eval.acceptance import reference_tokens
from retrofit.eval.clocked import by_engine, by_transformers, seconds_per_token
from retrofit.eval.latency import Timeline
from retrofit.runtime.engine import Engine

PROMPTS = [[3, 10, 17, 24, 31, 3, 10, 17], [5, 12, 19]]


@pytest.mark.parametrize(
    "way", [{"mode": "ar"}, {"mode": "self_spec", "strategy": "fused"}, {"mode": "diffusion"}], ids=str
)
def test_an_engines_chunks_are_all_tokens_in_the_order_of_time(way):
    with Engine.from_model(build("llama")) as engine:
        found = by_engine(engine, PROMPTS, way, clock=Ticking(), max_new_tokens=9, temperature=0.8)
    assert [(one.sent, one.prompt_tokens, one.tokens) for one in found] == [(1.0, 8, 9), (1.0, 3, 9)]
    for one in found:
        times = [time for time, _ in one.chunks]
        assert times == sorted(set(times)) and times[0] > 1.0 and all(count > 0 for _, count in one.chunks)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_transformers_tells_every_step_of_a_batch(temperature):
    found = by_transformers(build("llama"), PROMPTS, clock=Ticking(), max_new_tokens=5, temperature=temperature)
    assert [one.chunks for one in found] == [[(float(2 + step), 1) for step in range(5)]] * 2


def test_transformers_prompt_lookup_gives_the_same_tokens_in_fewer_chunks():
    model = build("llama")
    plain = reference_tokens(model, PROMPTS[:1], max_new_tokens=24)
    assert reference_tokens(model, PROMPTS[:1], max_new_tokens=24, lookup=4) == plain
    (found,) = by_transformers(model, PROMPTS[:1], clock=Ticking(), max_new_tokens=24, temperature=0.0, lookup=4)
    assert found.tokens == 24 and len(found.chunks) <= 24


def test_seconds_per_token_is_from_the_first_sending_to_the_last_token():
    assert seconds_per_token([Timeline(1.0, 1, [(2.0, 1), (4.0, 2)]), Timeline(2.0, 1, [(3.0, 1)])]) == 0.75
