"""Steps planned, accepted and drafted on the device: the tokens are those of `ar`, the drafts those of the host's path.

Without a GPU the decoder runs on its plain-torch specification here; what plans and accepts runs as it is, and so does
what samples where drafts are compared.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from decoding import tokens_of
from device_requests import HOT, NEW, PROMPTS, WAYS, engines, fresh, oracle, truth
from fused_models import LAYOUT, WIDE, cycles, pair, small

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto import cost
from retrofit.runtime.device.steps import DeviceSteps
from retrofit.runtime.engine import Result

pytestmark = pytest.mark.usefixtures("fast")


@pytest.mark.parametrize(
    ("way", "name", "options"),
    [
        ("two_forward", "qwen3", {}),
        ("all", "mistral_window", HOT),
        ("last", "llama", HOT),
        ("number", "qwen2", {}),
        ("tree", "qwen3", HOT),
        ("tree_number", "llama", {}),
    ],
)
def test_own_drafts_are_those_of_the_host(way: str, name: str, options: dict[str, Any]) -> None:
    """Equal tokens, forwards, accepted and verified drafts of every cycle, for ragged prompts in a batch."""
    engine, hf = pair(small(name), LAYOUT)
    common = {"max_new_tokens": 8, "batch_size": 2, **WAYS[way], **options}
    got, want = (e.generate(PROMPTS[:2], "self_spec", **common) for e in (engine, hf))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert [cycles(r) for r in got] == [cycles(r) for r in want]


@pytest.mark.parametrize(
    "layout",
    [
        DraftLayout(block=3, input="noise"),
        DraftLayout(block=3, attention="causal"),
        DraftLayout(block=3, shift=0),
        DraftLayout(block=3, seed_row="draft", shift=0),
    ],
    ids=["noise", "causal", "shift_0", "seed_row_draft"],
)
def test_every_layout_of_blocks(layout: DraftLayout) -> None:
    engine, hf = pair(small("llama", num_hidden_layers=1), layout)
    way = WAYS["all" if layout.anchored else "two_forward"]
    common = {"max_new_tokens": 7, "batch_size": 1, **HOT, **way}
    got, want = (e.generate(PROMPTS[1:2], "self_spec", **common) for e in (engine, hf))
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert [cycles(r) for r in got] == [cycles(r) for r in want]


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(("way", "hot"), [(way, (n + hot) % 2) for hot in (0, 1) for n, way in enumerate(WAYS)])
def test_self_spec_is_ar(way: str, hot: int) -> None:
    """Three requests in two slots, so one is used again; long and short runs are accepted."""
    options = HOT if hot else {}
    tokens = truth("llama", **options)
    engine = oracle(fresh(), way, tokens, hot=bool(hot))
    results = engine.generate(PROMPTS, "self_spec", max_new_tokens=NEW, batch_size=2, **WAYS[way], **options)
    assert [r.tokens for r in results] == [t[:NEW] for t in tokens]
    accepted = [a for r in results for a in r.stats.accepted]
    assert min(accepted) == 0 or way == "auto"
    assert max(accepted) >= 2
    for r in results:
        assert (r.finish_reason, r.stats.tokens) == ("length", NEW - 1)
        assert sum(r.stats.accepted) + r.stats.decode_forwards == r.stats.tokens


@pytest.mark.usefixtures("faster")
def test_top_k_and_top_p() -> None:
    """top_k and top_p shape targets on the device; drafts may ignore them."""
    options = {"temperature": 1.1, "top_k": 7, "top_p": 0.8, "batch_size": 2}
    want = truth("llama", **{k: v for k, v in options.items() if k != "batch_size"})
    assert want != truth("llama", temperature=1.1)
    got = tokens_of(oracle(fresh(), "all", want), PROMPTS, "self_spec", max_new_tokens=NEW, **WAYS["all"], **options)
    assert got == [t[:NEW] for t in want]


@pytest.mark.usefixtures("faster")
def test_a_repetition_penalty_is_planned_on_the_host() -> None:
    engine, hf = pair(small("llama", num_hidden_layers=1), WIDE)
    options = {"repetition_penalty": 1.4, "max_new_tokens": 6, "batch_size": 2, **HOT}
    want = tokens_of(hf, PROMPTS, "ar", **options)
    assert want != [t[:6] for t in truth("llama", **HOT)]
    assert tokens_of(engine, PROMPTS, "self_spec", strategy="two_forward", **options) == want
    assert not engine.backend.cache.loops


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("way", ["all", "tree"])
def test_eos_in_the_middle_of_an_accepted_run(way: str) -> None:
    """The drafts behind it are right too, and none of them comes out."""
    free = truth("llama")
    eos = [free[0][3], free[1][5]]
    want = [t[: min((t.index(e) + 1 for e in eos if e in t), default=NEW)][:NEW] for t in free]
    assert len(want[0]) > 1
    engine = oracle(fresh(eos=eos), way, free, mistakes=0.0)
    results = engine.generate(PROMPTS, "self_spec", max_new_tokens=NEW, batch_size=2, **WAYS[way])
    assert [r.tokens for r in results] == want
    assert [r.finish_reason for r in results] == ["stop" if set(w) & set(eos) else "length" for w in want]
    assert all(sum(r.stats.accepted) <= r.stats.tokens == len(r.tokens) - 1 for r in results)
    ignored = engine.generate(PROMPTS[:1], "self_spec", max_new_tokens=NEW, ignore_eos=True, **WAYS[way])
    assert ignored[0].tokens == free[0][:NEW]


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("way", ["all", "two_forward"])
def test_max_new_tokens_is_exact(way: str) -> None:
    """1 by prefill, 1 by the first step, then up to 4 at once: the end falls on every place of a run."""
    free = truth("llama")
    engine = oracle(fresh(), way, free, mistakes=0.0)
    for count in range(1, 9):
        (result,) = engine.generate(PROMPTS[:1], "self_spec", max_new_tokens=count, **WAYS[way])
        assert (result.tokens, result.finish_reason) == (free[0][:count], "length")
        assert result.stats.tokens == count - 1


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("way", ["all", "tree", "auto"])
def test_the_end_of_the_context(way: str) -> None:
    """Rows, blocks and a tree's places all stay within what a request owns."""
    context = 20
    prompts = [PROMPTS[0] + PROMPTS[2], PROMPTS[1]]
    model = small("llama", num_hidden_layers=1, max_position_embeddings=context)
    engine, hf = pair(model, WIDE)
    want = tokens_of(hf, prompts, "ar", max_new_tokens=40)
    assert [len(t) for t in want] == [6, 17]
    oracle(engine, way, want, mistakes=0.2)
    assert tokens_of(engine, prompts, "self_spec", max_new_tokens=40, batch_size=2, **WAYS[way]) == want


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(chr(ord("A") + token) for token in tokens)


@pytest.mark.usefixtures("faster")
def test_stop_strings_and_streams() -> None:
    """The host finds a stop string while a later step is under way; the slot's next request gets nothing of it."""
    free = truth("llama")
    text = [Letters().decode(t) for t in free]
    stop = text[0][4:6]
    want = []
    for t in text:
        end = t[:NEW].find(stop)
        want.append((t[: end + 2], "stop") if end >= 0 else (t[:NEW], "length"))
    assert want[0][1] == "stop"
    engine, _ = pair(small("llama", num_hidden_layers=1), WIDE, tokenizer=Letters())
    oracle(engine, "all", free, mistakes=0.1)
    common = {"max_new_tokens": NEW, "stop": stop, "batch_size": 1, **WAYS["all"]}
    results: list[Result] = []
    pieces = ["", "", ""]
    for event in engine.stream(PROMPTS, "self_spec", **common):
        pieces[event.index] += event.text
        results += [event.result] if event.result is not None else []
    assert [(Letters().decode(r.tokens), r.finish_reason) for r in results] == want
    assert pieces == [r.text for r in results]
    assert results[0].text == text[0][: text[0].index(stop)]


@pytest.mark.usefixtures("faster")
def test_requests_one_after_another_in_one_slot() -> None:
    """What an earlier request left (tokens, drafts, K/V) is not seen by the next; nor from an earlier call."""
    tokens = truth("llama")
    engine = oracle(fresh(), "all", tokens, mistakes=0.5)
    for order in ((0, 1, 2), (2, 0, 1)):
        prompts, seeds = [PROMPTS[i] for i in order], list(order)
        got = tokens_of(engine, prompts, "self_spec", max_new_tokens=5, seed=seeds, batch_size=1, **WAYS["all"])
        assert got == [tokens[i][:5] for i in order]


@pytest.mark.usefixtures("faster")
def test_a_step_is_read_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    launch, read = DeviceSteps._launch, DeviceSteps._read
    monkeypatch.setattr(DeviceSteps, "_launch", lambda *a: order.append("launch") or launch(*a))
    monkeypatch.setattr(DeviceSteps, "_read", lambda *a: order.append("read") or read(*a))
    (result,) = engines("llama")[0].generate(PROMPTS[:1], "ar", max_new_tokens=4)
    assert order == ["launch", "launch", "read", "launch", "read", "launch", "read"]
    assert result.stats.forwards == {"prefill": 1, "ar": 3}


@pytest.mark.usefixtures("faster")
def test_auto_times_its_plans_without_touching_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "REPEATS", 1)
    engine, _ = pair(small("llama", num_hidden_layers=1), WIDE)
    tokens = tokens_of(engine, PROMPTS, "self_spec", max_new_tokens=4, batch_size=2)
    assert tokens == [t[:4] for t in truth("llama")]
    costs = engine.device_policy.costs[False]
    assert {2, 4, 8} <= set(costs.times.rows(False)) and {8, 32} <= set(costs.times.rows(True))
    assert not engine.policy.costs
