"""Planted faults of the device's steps: the tests of test_device_loop.py would notice."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from decoding import tokens_of
from device_requests import HOT, NEW, PROMPTS, WAYS, fresh, oracle, truth
from torch import Tensor

from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.device import loop as device_loop
from retrofit.runtime.device.loop import DeviceLoop
from retrofit.runtime.device.steps import DeviceSteps
from retrofit.runtime.plan import StepPlan, fused
from retrofit.runtime.rules.tree import grow

pytestmark = pytest.mark.usefixtures("fast")


class Endless(Exception):
    """A request that never ends."""


def _no_compaction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_loop, "compact", lambda *_: None)


def _one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    accept = device_loop.accept

    def wrong(state: Any, lanes: Tensor, step: Any, targets: Tensor, *rest: Any) -> Any:
        if step.base_rows > 1:
            rows = targets.view(len(lanes), -1).clone()
            drafts = state.drafts[lanes, : step.base_rows - 1]
            kept = (rows[:, :-1] == drafts).long().cumprod(1).sum(1).clamp(max=step.base_rows - 2)
            lane = torch.arange(len(lanes), device=lanes.device)
            rows[lane, kept] = torch.where(state.num_drafts[lanes] > kept, drafts[lane, kept], rows[lane, kept])
            targets = rows.view(-1)
        return accept(state, lanes, step, targets, *rest)

    monkeypatch.setattr(device_loop, "accept", wrong)


def _noise_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    lay_rows = device_loop.lay_rows

    def wrong(state: Any, lanes: Tensor, *rest: Any) -> None:
        lay_rows(state, lanes, *rest)
        indices = rest[-1].view(len(lanes), -1)
        indices.copy_(indices[:, :1].expand_as(indices).clone())

    monkeypatch.setattr(device_loop, "lay_rows", wrong)


def _read_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = DeviceSteps._launch

    def wrong(self: DeviceSteps, plan: StepPlan, requests: list[Any], lanes: int) -> Any:
        return launch(self, plan, requests[::-1], lanes)

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
    """Chain, tree, chain: drafts of one tree are not verified as another's; exact they would be, but of no use."""
    tree = grow(((0.5, 0.4), (0.5, 0.4)), 4)
    cycles = [fused(3), fused(3), fused(4, "all", tree), fused(2)]
    engine = fresh()
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(AutoPolicy, "choose", lambda *_: cycles[min(len(steps), 3)])
    launch = DeviceSteps._launch

    def recorded(self: DeviceSteps, plan: StepPlan, *rest: Any) -> Any:
        flight = launch(self, plan, *rest)
        steps.append((1 + plan.verify, int(flight.record[0, 2])))
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
