"""The sweep over every decoder: its outcomes mean what they say, and its page is what its results say."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from typing import Any

import pytest
import transformers

from benchmarks import decoders
from benchmarks.common import ROOT, Bar, section
from retrofit.runtime.host import modes

SPEC = importlib.util.spec_from_file_location("sweep", ROOT / "scripts" / "sweep.py")
assert SPEC is not None and SPEC.loader is not None
sweep = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sweep)


@pytest.mark.parametrize("name", ["gpt2", "dbrx", "gemma3n_text", "opt"])
def test_entries_that_are_identical(name: str) -> None:
    found = sweep.measure(name)
    assert found["outcome"] == "identical", found
    assert found["equal"] == found["total"] == len(sweep.RUNS) * len(sweep.PROMPTS)
    assert found["distinct_tokens"] >= sweep.FEW_TOKENS


@pytest.mark.parametrize(("name", "outcome", "reason"), [
    ("hrm_text", "refused", "attends 8 times"),
    ("rwkv", "refused", "recurrent"),
    ("blt", "not built", "more than a tiny model's"),
    ("roc_bert", "not built", "hardly varies"),
])  # fmt: skip
def test_entries_that_are_not_run(name: str, outcome: str, reason: str) -> None:
    found = sweep.measure(name)
    assert found["outcome"] == outcome and reason in found["reason"]


def test_a_fault_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = modes.accepted_length
    monkeypatch.setattr(modes, "accepted_length", lambda d, t, n: (right(d, t, n) + 1).minimum(n))
    found = sweep.measure("llama")
    assert found["outcome"] == "wrong" and found["equal"] < found["total"]
    assert "fused chain, random drafts, batch 3" in found["reason"]
    assert "ar, no drafts" not in found["reason"]


def test_a_crash_and_a_hang_cost_their_entry_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: str) -> Any:
        raise RuntimeError("in\nthe middle")

    monkeypatch.setattr(sweep, "measure", fails)
    assert sweep.run("any") == {"outcome": "crash", "reason": "RuntimeError: in the middle"}
    monkeypatch.setattr(sweep, "measure", lambda _: os._exit(7))
    assert sweep.run("any") == {"outcome": "crash", "reason": "its process ended with 7"}
    monkeypatch.setattr(sweep, "SECONDS", 0.2)
    monkeypatch.setattr(sweep, "measure", lambda _: time.sleep(60))
    assert sweep.run("any") == {"outcome": "crash", "reason": "not done in 0.2 s"}
    monkeypatch.setattr(sweep, "SECONDS", 60)
    monkeypatch.setattr(sweep, "measure", lambda _: {"outcome": "identical"})
    assert sweep.run("any") == {"outcome": "identical"}


def test_bars_and_page_count_alike() -> None:
    entries = {
        "a": {"outcome": "identical", "class": "A", "modules": {"q_proj": 2}},
        "b": {"outcome": "refused", "reason": "this | that"},
        "c": {"outcome": "wrong", "reason": "ar"},
    }
    bars = sweep.bars(entries)
    assert [(b.figure, b.met) for b in bars if b.met is not None] == [("1", False), ("1", False), ("0", True)]
    page = sweep.page(section("x", 1.0, [Bar("a", "b", "c", None)], {"entries": entries}))
    assert "Of the 3 entries" in page and "| `a` | A | q_proj |" in page and r"| `b` | this \| that |" in page
    assert "## Wrong" in page and "## Crash" not in page and "## Not tried" not in page


def test_entries_that_were_not_measured_anew_are_kept_and_said_to_be() -> None:
    old = {"a": {"outcome": "wrong", "reason": "ar"}, "b": {"outcome": "refused", "reason": "this"}}
    before = {"hardware": {"commit": "c0ffee"}, "figures": {"entries": old}}
    found = sweep.figures_of({"a": {"outcome": "refused", "reason": "that"}}, before)
    assert list(found["entries"]) == ["a", "b"] and found["entries"]["b"] is old["b"]
    assert (found["counts"]["wrong"], found["counts"]["refused"]) == (0, 2)
    assert found["kept"] == {"entries": 1, "commit": "c0ffee"}
    page = sweep.page(section("x", 1.0, [Bar("a", "b", "c", None)], found))
    assert "1 entries are as they were at commit c0ffee." in page and "| `a` | that |" in page


# The page in the documentation


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    if not sweep.RESULTS.is_file():
        pytest.skip("no results yet")
    found: dict[str, Any] = json.loads(sweep.RESULTS.read_text())["sections"]["sweep"]
    return found


def test_the_page_is_what_the_results_say(measured: dict[str, Any]) -> None:
    assert sweep.TABLE.read_text(encoding="utf-8") == sweep.page(measured), "run python scripts/sweep.py"


def test_the_results_cover_the_mapping_and_mean_something(measured: dict[str, Any]) -> None:
    entries = measured["figures"]["entries"]
    if measured["hardware"]["versions"]["transformers"] == transformers.__version__:
        assert list(entries) == decoders.names()
    assert measured["figures"]["counts"] == sweep.counted(entries)
    identical = {n: e for n, e in entries.items() if e["outcome"] == "identical"}
    assert all(e["equal"] == e["total"] > 0 and e["modules"] for e in identical.values())
    assert min(e["distinct_tokens"] for e in identical.values()) >= sweep.FEW_TOKENS
    assert all(e["reason"] for e in entries.values() if e["outcome"] != "identical")
