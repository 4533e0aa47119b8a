"""Steps planned, accepted and drafted on the device: the tokens are those of `ar`, the drafts those of the host's path.

Without a GPU the decoder runs on its plain-torch specification here; what plans and accepts runs as it is, and so does
what samples where drafts are compared.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from fused_models import LAYOUT, VOCABULARY, Planted, cycles, pair, plain_decoder, plain_sampling, planted, small
from helpers import random_prompts, tokens_of
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto import cost, policy
from retrofit.runtime.auto.cost import CostModel, Template
from retrofit.runtime.auto.policy import AutoPolicy, tree_shape
from retrofit.runtime.device import loop as device_loop
from retrofit.runtime.device.kinds import Kind, chain, fixed_template, kinds_of
from retrofit.runtime.device.loop import DeviceLoop, DeviceSteps
from retrofit.runtime.engine import Engine, Result
from retrofit.runtime.kernels.state import ALL, GIVEN, LAST
from retrofit.runtime.rules.tree import grow

WIDE = DraftLayout(block=3)
PROMPTS = random_prompts((9, 3, 5), vocab=VOCABULARY)
NEW = 10
WAYS: dict[str, dict[str, Any]] = {
    "two_forward": {"strategy": "two_forward"},
    "all": {"strategy": "fused"},
    "last": {"strategy": "fused", "prepare": "last"},
    "number": {"strategy": "fused", "prepare": 2},
    "tree": {"strategy": "fused", "tree": 6},
    "tree_number": {"strategy": "fused", "tree": 6, "prepare": 2},
    "auto": {"strategy": "auto"},
}
HOT = {"temperature": 0.8}
RANKS = {"ranks": {kind: [[0.5, 0.3]] * 3 for kind in ("greedy", "sampled")}}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` measures nothing and changes its plan at every step, trees among them."""
    plain_decoder(monkeypatch)
    rng = random.Random(1)

    def best(model: CostModel, batch: int, rows: int | None = None) -> Template:
        return rng.choice([Template("ar"), *rng.sample(model.templates(rows), 4), *[Template("fused", 3, 4)] * 3])

    monkeypatch.setattr(CostModel, "best", best)
    monkeypatch.setattr(policy, "RETHINK", 1)
    monkeypatch.setattr(policy, "largest_tree", lambda *_: 4)
    monkeypatch.setattr(policy, "calibrate", lambda *_: None)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_sampling(monkeypatch)


@lru_cache(maxsize=4)
def engines(name: str, layout: DraftLayout = WIDE, **options: Any) -> tuple[Engine, Engine]:
    return pair(small(name, num_hidden_layers=1), layout, **options)


@lru_cache(maxsize=8)
def truth(name: str, new: int = NEW + 6, **options: Any) -> list[list[int]]:
    """Tokens of the `hf` backend, one by one; longer than what is asked for."""
    return tokens_of(engines(name)[1], PROMPTS, "ar", max_new_tokens=new, **options)


def oracle(
    engine: Engine, way: str, tokens: Sequence[Sequence[int]], mistakes: float = 0.25, hot: bool = False
) -> Engine:
    """The engine with planted drafts; request i has seed i."""
    options = WAYS[way]
    shape = None
    if "tree" in options:
        shape = tree_shape(engine.layout, {}, options.get("prepare", "all"), options["tree"], hot)
    engine.device_policy = AutoPolicy(engine.layout, engine.limits, RANKS)
    return planted(engine, Planted(dict(enumerate(tokens)), mistakes, shape=shape))


def fresh(name: str = "llama", layout: DraftLayout = WIDE, eos: Sequence[int] = (), **changes: Any) -> Engine:
    return pair(small(name, eos, num_hidden_layers=1, **changes), layout)[0]


# Tokens, and where they come from


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
    monkeypatch.setattr(policy, "calibrate", partial(cost.calibrate, repeats=1))
    engine, _ = pair(small("llama", num_hidden_layers=1), WIDE)
    tokens = tokens_of(engine, PROMPTS, "self_spec", max_new_tokens=4, batch_size=2)
    assert tokens == [t[:4] for t in truth("llama")]
    costs = engine.device_policy.costs[False]
    assert {2, 4, 8} <= set(costs.times[False]) and {8, 32} <= set(costs.times[True])
    assert not engine.policy.costs


# Planted faults: the tests above would notice


class Endless(Exception):
    """A request that never ends."""


def _no_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_loop, "compact", lambda *_: None)


def _one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = device_loop.accept

    def wrong(state: Any, lanes: Tensor, shape: Any, targets: Tensor, *rest: Any) -> Any:
        if shape.base_rows > 1:
            rows = targets.view(len(lanes), -1).clone()
            drafts = state.drafts[lanes, : shape.base_rows - 1]
            kept = (rows[:, :-1] == drafts).long().cumprod(1).sum(1).clamp(max=shape.base_rows - 2)
            lane = torch.arange(len(lanes), device=lanes.device)
            rows[lane, kept] = torch.where(state.num_drafts[lanes] > kept, drafts[lane, kept], rows[lane, kept])
            targets = rows.view(-1)
        return accept(state, lanes, shape, targets, *rest)

    monkeypatch.setattr(device_loop, "accept", wrong)


def _noise_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    plan_rows = device_loop.plan_rows

    def wrong(state: Any, lanes: Tensor, *rest: Any) -> None:
        plan_rows(state, lanes, *rest)
        indices = rest[-1].view(len(lanes), -1)
        indices.copy_(indices[:, :1].expand_as(indices).clone())

    monkeypatch.setattr(device_loop, "plan_rows", wrong)


def _read_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = DeviceSteps._launch

    def wrong(self: DeviceSteps, kind: Kind, template: Template, requests: list[Any], lanes: int) -> Any:
        return launch(self, kind, template, requests[::-1], lanes)

    monkeypatch.setattr(DeviceSteps, "_launch", wrong)


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    ("fault", "way", "hot"),
    [
        (_no_compaction, "tree", False),
        (_one_too_many, "all", False),
        (_noise_of_the_seed, "all", True),
        (_read_by_another, "all", False),
    ],
)
def test_a_planted_fault_changes_tokens(
    fault: Callable[[pytest.MonkeyPatch], None], way: str, hot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = HOT if hot else {}
    tokens = truth("llama", **options)
    engine = oracle(fresh(), way, tokens, hot=hot)
    fault(monkeypatch)
    step, steps = DeviceLoop.step, []

    def counted(*args: Any) -> Any:
        steps.append(1)
        if len(steps) > 3 * NEW:
            raise Endless
        return step(*args)

    monkeypatch.setattr(DeviceLoop, "step", counted)
    got: list[list[int]] = []
    with suppress(Endless, RuntimeError):  # who is never told that a request has ended finds out
        got = tokens_of(engine, PROMPTS[:2], "self_spec", max_new_tokens=NEW, batch_size=2, **WAYS[way], **options)
    assert got != [t[:NEW] for t in tokens[:2]]


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("forgetful", [False, True])
def test_drafts_are_forgotten_when_the_plan_changes(forgetful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chain, tree, chain: drafts of one shape are not verified as another's; exact they would be, but of no use."""
    shape = grow(((0.5, 0.4), (0.5, 0.4)), 4)
    plans = [Template("fused", 3, 4), Template("fused", 3, 4), Template("fused", 4, 5, shape), Template("fused", 2, 3)]
    engine = fresh()
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(AutoPolicy, "template", lambda *_: plans[min(len(steps), 3)])
    launch = DeviceSteps._launch

    def recorded(self: DeviceSteps, kind: Kind, *rest: Any) -> Any:
        flight = launch(self, kind, *rest)
        steps.append((kind.rows, int(flight.record[0, 2])))
        return flight

    monkeypatch.setattr(DeviceSteps, "_launch", recorded)
    if forgetful:
        forget = DeviceLoop.forget_drafts
        monkeypatch.setattr(DeviceLoop, "forget_drafts", lambda self, *slot: forget(self, *slot) if slot else None)
    (result,) = engine.generate(PROMPTS[:1], "self_spec", max_new_tokens=NEW)
    assert result.tokens == truth("llama")[0][:NEW]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    changed = [verified for rows, verified in (steps[0], steps[2], steps[3])]
    assert [rows for rows, _ in steps[:4]] == [4, 4, 5, 3]
    assert steps[1][1] == 3
    assert (changed == [0, 0, 0]) is not forgetful


# Plans


def test_kinds_of_a_plan() -> None:
    assert kinds_of(Template("ar")) == [Kind("ar", (-1,))]
    draft, verify = kinds_of(Template("two_forward", 2))
    assert (draft.rows, draft.blocks, draft.draft_parents) == (1, 1, chain(2))
    assert (verify.rows, verify.blocks, verify.parents) == (3, 0, draft.draft_parents)
    for template, hang in (
        (Template("fused", 2, 3), ALL),
        (Template("fused", 2, 2), GIVEN),
        (Template("last", 2, 1), LAST),
    ):
        (kind,) = kinds_of(template)
        assert (kind.parents, kind.blocks, kind.hang, kind.anchors) == (chain(2), template.prepare, hang, None)
        assert kind.draft_parents == kind.parents
    shape = grow(((0.5, 0.4), (0.5, 0.4)), 4)
    (kind,) = kinds_of(Template("fused", 4, 2, shape))
    assert (kind.parents, kind.draft_ranks) == (shape.parents, shape.ranks)
    assert (kind.hang, kind.anchors) == (GIVEN, shape.likeliest_ends(2))


@pytest.mark.parametrize("rows", [None, 1, 2, 3, 4, 5, 8, 16, 40])
@pytest.mark.parametrize("prepare", ["all", "last", 1, 2, 9])
@pytest.mark.parametrize("strategy", ["ar", "two_forward", "fused"])
def test_fixed_plans_fit_their_rows(strategy: str, prepare: str | int, rows: int | None) -> None:
    layout = DraftLayout(block=3)
    template = fixed_template(strategy, prepare, layout, None, rows)
    for kind in kinds_of(template):
        assert rows is None or kind.rows + kind.blocks * layout.block <= max(rows, 1)
        assert kind.hang != ALL or kind.blocks in (0, kind.rows)
    if rows is None and strategy == "fused":
        assert template.verify == layout.drafts
        assert template.prepare == (1 if prepare == "last" else 4 if prepare == "all" else min(int(prepare), 4))
    if rows is not None and rows < 4:
        assert template.strategy == "ar"
