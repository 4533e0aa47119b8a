"""Metrics on hand-worked traces, and the comparisons on tiny random models."""

from types import SimpleNamespace

import pytest
import torch
from decoding import randomise
from tiny_models import VOCABULARY, build

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UsageError
from retrofit.eval.acceptance import (
    Difference,
    compare,
    looping_share,
    lossless,
    measure,
    reference_tokens,
    same_as_ar,
    summary,
)
from retrofit.eval.speed import seconds_per_token
from retrofit.machine import hardware
from retrofit.runtime.engine import Engine, Result
from retrofit.runtime.request import Stats

PROMPTS = [[3, 10, 17, 24, 31], [5, 12, 19], [1, 8, 15, 22, 29, 36, 43]]


@pytest.fixture(scope="module")
def engine():
    return randomise(Engine.from_model(build("llama"), layout=DraftLayout(block=4)))


@pytest.fixture(scope="module")
def original():
    return build("llama")


def result(tokens: list[int], **stats: object) -> Result:
    return Result(0, [1], tokens, None, "length", Stats(tokens=len(tokens) - 1, **stats))


def test_two_fused_requests_summed_by_hand():
    # first: draft only (1 token), then 2 of 4, 0 of 4, 1 of 1 accepted, each with a bonus: 1 + 3 + 1 + 2 = 7
    # second: draft only (1 token), then 4 of 4 with a bonus: 1 + 5 = 6
    first = result(
        list(range(8)), accepted=[2, 0, 1], verified=[4, 4, 1], rows=50, widest=25,
        forwards={"prefill": 1, "draft": 1, "fused": 2, "verify": 1},
    )  # fmt: skip
    second = result(
        list(range(7)), accepted=[4], verified=[4], rows=15, forwards={"prefill": 1, "draft": 1, "verify": 1}
    )
    got = summary([first, second])
    assert got["forwards_by_kind"] == {"prefill": 2, "draft": 2, "fused": 2, "verify": 2}
    assert (got["tokens"], got["forwards"], got["most_rows"]) == (13, 6, 25)
    assert got["tpf"] == round(13 / 6, 4)  # not the mean of 7/4 and 6/2
    assert got["tau"] == round(13 / 4, 4)
    assert got["tau_macro"] == round((7 / 3 + 6 / 1) / 2, 4)
    assert got["rows_per_token"] == 5.0
    assert got["accepted_histogram"] == {0: 1, 1: 1, 2: 1, 4: 1}


def test_ar_is_one_everywhere_and_diffusion_has_no_tau():
    ar = summary([result([1, 2, 3, 4], rows=3, forwards={"prefill": 1, "ar": 3})])
    assert (ar["tpf"], ar["tau"], ar["tau_macro"], ar["rows_per_token"]) == (1.0, 1.0, 1.0, 1.0)
    forwards = {"prefill": 1, "denoise": 1, "commit": 1}
    diffusion = summary([result([1, 2, 3, 4, 5], rows=16, forwards=forwards)])
    assert (diffusion["tpf"], diffusion["tau"], diffusion["rows_per_token"]) == (2.0, None, 4.0)
    assert summary([])["tpf"] is None


def test_a_lookup_that_finds_nothing_counts_as_a_cycle():
    forwards = {"prefill": 1, "ar": 3, "verify": 1}
    lookup = summary([result(list(range(8)), accepted=[3], verified=[4], rows=8, forwards=forwards)])
    assert lookup["tau"] == lookup["tpf"] == round(7 / 4, 4)


@pytest.mark.parametrize(
    ("gap", "times", "expected"),
    [
        (0, 3, 1.0),  # the 8-gram three times in 24 tokens
        (0, 2, 0.0),
        (36, 3, 1.0),  # 8 + 36 + 8 + 36 + 8 = 96 tokens
        (37, 3, 0.0),  # 98 tokens
    ],
)
def test_looping_share(gap, times, expected):
    gram, fresh, tokens = list(range(8)), iter(range(100, 1000)), []
    for i in range(times):
        tokens += gram + [next(fresh) for _ in range(gap if i < times - 1 else 0)]
    assert looping_share([tokens]) == expected
    assert looping_share([tokens, list(range(2000, 2128))]) == expected / 2


def test_looping_finds_a_dense_stretch_after_a_sparse_one():
    gram = list(range(8))
    far = list(range(1000, 1200))
    assert looping_share([gram + far + gram + gram + gram]) == 1.0
    assert looping_share([gram + far + gram + gram]) == 0.0


def test_short_and_no_outputs_do_not_loop():
    assert looping_share([[], [1] * 9]) == 0.0
    assert looping_share([[1] * 10]) == 1.0
    assert looping_share([]) == 0.0


def test_compare_says_where_outputs_part():
    got = compare([[1, 2, 3], [1, 9, 3], [1, 2], [1, 2, 3, 4]], [[1, 2, 3]] * 4)
    assert (got.equal, got.total, got.all_equal) == (1, 4, False)
    assert got.differences == [
        Difference(1, 1, 2, 9), Difference(2, 2, 3, None), Difference(3, 3, None, 4),
    ]  # fmt: skip
    assert not compare([], []).all_equal


def test_reference_is_the_same_padded_in_a_batch_and_alone(original):
    alone = reference_tokens(original, PROMPTS, max_new_tokens=12)
    assert reference_tokens(original, PROMPTS, max_new_tokens=12, batch_size=3) == alone
    assert [len(tokens) for tokens in alone] == [12, 12, 12]


def test_reference_is_neutral_and_leaves_the_model_as_it_was(original):
    plain = reference_tokens(original, PROMPTS, max_new_tokens=12)
    own = original.generation_config
    before = own.to_dict()
    own.update(repetition_penalty=5.0, eos_token_id=plain[0][2], do_sample=True, num_beams=3)
    try:
        assert reference_tokens(original, PROMPTS, max_new_tokens=12) == plain
        assert original.generation_config is own
    finally:
        own.update(**before)


def test_reference_keeps_eos_and_ends_there(original):
    plain = reference_tokens(original, PROMPTS, max_new_tokens=12)
    eos = plain[0][4]
    ended = reference_tokens(original, PROMPTS, max_new_tokens=12, batch_size=3, eos=[eos])
    assert ended == [p[: p.index(eos) + 1] if eos in p else p for p in plain]


@pytest.mark.parametrize(
    "way",
    [
        {"strategy": "fused", "tree": 0},
        {"strategy": "fused", "tree": 6},
        {"strategy": "fused", "prepare": "last"},
        {"strategy": "two_forward"},
        {"strategy": "prompt_lookup"},
    ],
    ids=str,
)
def test_engine_compares_equal(engine, original, way):
    assert lossless(engine, original, PROMPTS, **way, max_new_tokens=12, batch_size=2).all_equal
    assert same_as_ar(engine, PROMPTS, **way, temperature=0.8, max_new_tokens=12, batch_size=2).all_equal


def test_a_wrong_output_is_reported(engine, original):
    expected = reference_tokens(original, PROMPTS, max_new_tokens=16)
    expected[1][5] = (expected[1][5] + 1) % VOCABULARY
    got = lossless(engine, expected, PROMPTS, max_new_tokens=16)
    assert (got.equal, got.total) == (2, 3)
    assert [(d.prompt, d.at, d.expected) for d in got.differences] == [(1, 5, expected[1][5])]


def test_measure_agrees_with_the_results_and_sees_the_widest_forward(engine):
    got = measure(engine, PROMPTS, strategy="fused", temperature=0.8, max_new_tokens=24, batch_size=2)
    results = engine.generate(
        PROMPTS, strategy="fused", temperature=0.8, max_new_tokens=24, batch_size=2, ignore_eos=True
    )
    assert got == summary(results)
    assert got["most_rows"] == 5 + 5 * 4  # seed and 4 drafts, 5 blocks of 4
    assert got["tokens"] == 3 * 23


def test_measure_ar_and_auto_do_not_count_probes(engine):
    ar = measure(engine, PROMPTS, mode="ar", max_new_tokens=8)
    assert (ar["tpf"], ar["tau"], ar["most_rows"]) == (1.0, 1.0, 1)
    auto = measure(engine, PROMPTS, strategy="auto", max_new_tokens=8)
    assert auto["tokens"] == ar["tokens"]
    assert auto["most_rows"] <= 25


def test_speed_takes_turns(engine, original):
    ran: list[str] = []
    got = seconds_per_token(
        engine, PROMPTS, ways=("ar", "fused", "transformers"), reference=original, max_new_tokens=4,
        repeats=2, per_turn=2, notify=ran.append,
    )  # fmt: skip
    warm_up = first = ["ar", "fused", "transformers"]
    assert ran == [*warm_up, *first, "fused", "transformers", "ar"]
    assert {way: len(times) for way, times in got["seconds_per_token"].items()} == dict.fromkeys(
        ("ar", "fused", "transformers"), 2
    )
    assert got["ratio"]["ar"] == 1.0
    assert min(got["median"].values()) > 0


def test_speed_refuses_what_it_cannot_time(engine):
    with pytest.raises(UsageError, match="'warp' does not exist"):
        seconds_per_token(engine, PROMPTS, ways=("warp",))
    with pytest.raises(UsageError, match="needs the original model"):
        seconds_per_token(engine, PROMPTS)


def test_hardware_says_what_a_figure_needs():
    got = hardware()
    assert got["cpu"] and got["cores"] >= 1 and got["threads"] >= 1
    assert got["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"commit", "date", "gpu", "python", "retrofit"} <= set(got)


def test_requests_without_a_cycle_have_no_part_in_the_mean():
    ended = result([1], forwards={"prefill": 1})
    got = summary([ended, result([1, 2, 3], accepted=[1], verified=[1], rows=2, forwards={"prefill": 1, "verify": 1})])
    assert (got["tau_macro"], got["tau"], got["requests"]) == (2.0, 2.0, 2)


class Asked:
    """An engine that emits the tokens 7 and 8, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, object]]] = []
        self.backend = SimpleNamespace(eos={9, 3})

    def generate(self, prompts, mode="self_spec", **options):
        self.calls.append((mode, options))
        return [result([7, 8], forwards={"prefill": 1, "ar": 1}) for _ in prompts]


WAY = {"strategy": "two_forward", "prepare": 3, "tree": 5, "max_new_tokens": 6, "batch_size": 4, "ignore_eos": False}
OWN = {"original_settings": False}
"""What is measured is the model's own distribution, not what its settings make of it."""


def test_what_is_compared_is_what_was_asked_for():
    """Each option reaches the engine: a comparison of `ar` with itself would always succeed."""
    engine = Asked()
    assert lossless(engine, [[7, 8]] * 3, PROMPTS, **WAY).all_equal
    assert engine.calls == [("self_spec", {**WAY, **OWN})]

    engine = Asked()
    assert same_as_ar(engine, PROMPTS, **WAY, temperature=0.7, seed=5).all_equal
    alone = {"max_new_tokens": 6, "batch_size": 1, "ignore_eos": False, "temperature": 0.7, "seed": 5}
    assert engine.calls == [("ar", {**alone, **OWN}), ("self_spec", {**WAY, **OWN, "temperature": 0.7, "seed": 5})]
    assert not same_as_ar(engine, PROMPTS, **WAY, temperature=0.7, expected=[[7, 8], [7, 9], [7, 8]]).all_equal
    assert len(engine.calls) == 3, "what is known already is not decoded again"

    engine = Asked()
    measure(engine, PROMPTS, **WAY, temperature=0.7, seed=5)
    assert engine.calls == [("self_spec", {**WAY, **OWN, "temperature": 0.7, "seed": 5})]
    measure(engine, PROMPTS, strategy="auto", batch_size=2)
    assert [options["max_new_tokens"] for _, options in engine.calls[1:]] == [1, 128], "probes come first"


def test_lossless_ends_where_the_engine_does(original):
    plain = reference_tokens(original, PROMPTS, max_new_tokens=8)
    model = build("llama")
    model.generation_config.eos_token_id = plain[0][2]
    ending = randomise(Engine.from_model(model, layout=DraftLayout(block=4)))
    for ignore_eos in (False, True):
        assert lossless(ending, original, PROMPTS, max_new_tokens=8, ignore_eos=ignore_eos).all_equal


def test_a_sampled_reference_draws_from_the_whole_distribution(original, monkeypatch):
    configs = []
    monkeypatch.setattr(
        original, "generate", lambda ids, generation_config, **_: configs.append(generation_config) or ids
    )
    reference_tokens(original, PROMPTS[:1], max_new_tokens=4, temperature=0.7)
    reference_tokens(original, PROMPTS[:1], max_new_tokens=4)
    hot, greedy = configs
    assert (hot.do_sample, hot.temperature, hot.top_k, hot.top_p) == (True, 0.7, 0, 1.0)
    assert not greedy.do_sample
    assert all((c.repetition_penalty, c.num_beams) == (1.0, 1) for c in configs)
