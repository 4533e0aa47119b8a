"""What steps took, from one process to the next."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from decoding import random_prompts, randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.auto import kept
from retrofit.runtime.auto.kept import Kept
from retrofit.runtime.auto.policy import BEGIN, AutoPolicy
from retrofit.runtime.engine import Engine

LAYOUT = DraftLayout(block=2)
ABOUT = {"model": "this one"}
STEPS = [(False, 1, False, 0.5, 0), (False, 9, True, 2.0, 0), (False, 1, False, 0.75, 2048), (True, 1, False, 0.25, 0)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RETROFIT_CACHE", str(tmp_path))
    return tmp_path / "steps"


def policy_that_knows() -> AutoPolicy:
    policy = AutoPolicy(LAYOUT, {})
    for sampled, rows, drafts, seconds, context in STEPS:
        policy.learn(sampled, rows, drafts, seconds, context=context)
    return policy


def write(policy: AutoPolicy, about: dict[str, Any] = ABOUT) -> Path:
    one = Kept(policy, about)
    one.write()
    assert one.file is not None
    return one.file


def test_what_was_kept_is_known_again() -> None:
    write(policy_that_knows())
    policy = AutoPolicy(LAYOUT, {})
    Kept(policy, ABOUT)
    for sampled, rows, drafts, seconds, context in STEPS:
        times = policy.model(sampled).times
        assert times.typical(rows, drafts, context) == seconds
        assert times.steps(rows, drafts) >= BEGIN
    assert policy.model(True).times.typical(9, True, 0) is None


def test_of_another_model_or_setting_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    write(policy_that_knows())
    for about in ({"model": "another"}, {**ABOUT, "on": "another"}):
        policy = AutoPolicy(LAYOUT, {})
        Kept(policy, about)
        assert policy.costs == {}
    monkeypatch.setattr(kept, "VERSION", kept.VERSION + 1)
    policy = AutoPolicy(LAYOUT, {})
    Kept(policy, ABOUT)
    assert policy.costs == {}


def test_what_is_measured_here_stands() -> None:
    write(policy_that_knows())
    policy = AutoPolicy(LAYOUT, {})
    policy.learn(False, 1, False, 9.0)
    Kept(policy, ABOUT)
    assert policy.model(False).times.typical(1, False, 0) == 9.0
    assert policy.model(False).times.typical(9, True, 0) == 2.0


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "[]",
        "{",
        "null",
        '{"about": 1}',
        "ABOUT, 7",
        "ABOUT, [[1, 2]]",
        'ABOUT, [[0, 1, 0, "x", 0]]',
        "\xff",
        "[" * 100_000,
        "ABOUT, [[0, Infinity, 0, 1, 0]]",
        f"ABOUT, [[0, 1, 0, 1{'0' * 400}, 0]]",
    ],
)
def test_a_broken_file_is_done_without(broken: str) -> None:
    file = write(policy_that_knows())
    about = json.loads(file.read_text())["about"]
    if broken.startswith("ABOUT"):
        broken = f'{{"about": {json.dumps(about)}, "steps": {broken.partition(", ")[2]}}}'
    file.write_bytes(broken.encode("latin-1"))
    policy = AutoPolicy(LAYOUT, {})
    one = Kept(policy, ABOUT)
    assert all(not model.times.seen for model in policy.costs.values())
    policy.learn(False, 1, False, 9.0)
    one.write()
    assert json.loads(file.read_text())["steps"] == [[False, 1, False, 9.0, 0]]


def test_where_nothing_can_be_written_nothing_is(folder: Path) -> None:
    folder.write_text("a file stands here")
    write(policy_that_knows())
    assert folder.read_text() == "a file stands here"


def test_a_folder_in_nobody_s_home_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETROFIT_CACHE", "~nobody-has-this-name/cache")
    one = Kept(policy_that_knows(), ABOUT)
    one.write()
    assert one.file is None


def test_it_is_not_written_at_every_request(folder: Path) -> None:
    policy = policy_that_knows()
    file = write(policy)
    policy.learn(False, 3, False, 9.0)
    before = file.read_text()
    write(policy)
    assert file.read_text() == before and list(folder.iterdir()) == [file], "nothing half-written lies about"


def test_an_engine_begins_with_what_another_has_learnt() -> None:
    def opened() -> Engine:
        return randomise(Engine.from_model(build("llama"), layout=LAYOUT))

    with opened() as engine:
        engine.generate(random_prompts((5,)), strategy="auto", max_new_tokens=12, ignore_eos=True)
        known = sorted(engine.policy.model(False).times.figures())
    assert known
    with opened() as engine:
        engine.generate(random_prompts((5,)), "ar", max_new_tokens=2)
        assert not engine.policy.costs, "nobody asked for `auto`"
        engine.generate(random_prompts((5,)), strategy="auto", max_new_tokens=1)
        assert sorted(engine.policy.model(False).times.figures()) == known
