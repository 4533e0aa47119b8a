"""The certificate in half precision: what a level of exactness puts in the way of base rows is judged from outside.

`ar` and `self_spec` run the same attention at a level, so a fault of it leaves them equal; only the base itself tells.
"""

import shutil
from typing import Any

import found_levels
import pytest
from certifying import command, small
from tiny_models import build

from retrofit.eval.distribution import tiny_engine
from retrofit.runtime.backends.hf import exact_attention
from retrofit.runtime.backends.hf.exact_attention import GROUPED
from retrofit.runtime.backends.hf.parts import base_rows, tree_rows
from retrofit.runtime.engine import Engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory, converted_artifact):
    return shutil.copytree(converted_artifact, tmp_path_factory.mktemp("made") / "artifact")


def scales_scores(patch):
    right = exact_attention._scores
    patch.setattr(exact_attention, "_scores", lambda q, k, scale, *rest: right(q, k, scale * 1.5, *rest))
    part = base_rows.part
    patch.setattr(base_rows, "part", lambda rows, k, v, seen, scale: part(rows, k, v, seen, scale * 1.5))


def forgets_the_first_token(patch):
    right = exact_attention._hide

    def mutant(scores: Any, plan: Any, first: int, stop: int, window: Any, low: int, high: int) -> None:
        right(scores, plan, first, stop, window, low, high)
        if low == 0:
            scores[..., 0].clamp_(max=-1e4)

    patch.setattr(exact_attention, "_hide", mutant)
    pieces = base_rows.pieces

    def blank(cached: Any, low: int, high: int, piece: int) -> Any:
        found = pieces(cached, low, high, piece)
        if low == 0:
            found = found.clone()
            found[0, :, 0] = 0
        return found

    whole = tree_rows._piece

    def blank_whole(cached: Any, begins: list[int], piece: int) -> Any:
        found = whole(cached, begins, piece).clone()
        for s, begin in enumerate(begins):
            if begin == 0:
                found[s, :, 0] = 0
        return found

    # In chains and in trees alike: else the self-test at load sees that they differ.
    patch.setattr(base_rows, "pieces", blank)
    patch.setattr(tree_rows, "pieces", blank)
    patch.setattr(tree_rows, "_piece", blank_whole)


@pytest.mark.parametrize("plant", [None, scales_scores, forgets_the_first_token])
def test_attention_at_a_level_is_held_against_the_base(folder, plant, monkeypatch):
    small(monkeypatch)
    if plant is not None:
        monkeypatch.setattr(found_levels, "FOUND", {})  # what holds with a fault is found with it
        plant(monkeypatch)
    result, checks = command(folder, "--dtype", "bfloat16", "--exact", "bucket")
    assert checks["bitwise"]["status"] == "passed", checks["bitwise"]
    assert (result.exit_code, checks["greedy-fp32"]["status"]) == ((0, "passed") if plant is None else (3, "failed"))


def test_the_distribution_is_drawn_at_the_level_that_is_certified():
    with Engine.from_model(build("llama"), exact="off") as engine:
        engine.backend.hold("bucket", GROUPED, 6)
        tiny = tiny_engine(engine.backend).backend
    assert (tiny.exact, tiny.form, tiny.most_rows, tiny.least_rows) == ("bucket", GROUPED, 6, 6)
