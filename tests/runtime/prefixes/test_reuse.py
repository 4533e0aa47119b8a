"""Prompts that begin like a text before them: what is copied is what would be computed.

Bits are a machine's affair, so they are compared where its self-test lets prefixes be kept; that the right positions
land at the right places is tried in fp32 on any machine, where rounding parts no text.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from decoding import Oracle, random_prompts, randomise
from keeping import LAYOUT, SIZE, keeping, prompt_rows
from tiny_models import build

from retrofit import SamplingParams
from retrofit.adapters.rows import SequenceRows
from retrofit.errors import UsageError
from retrofit.eval.recording import recording
from retrofit.runtime.backends.hf.exact_attention import GROUPED
from retrofit.runtime.engine import Engine
from retrofit.runtime.prefixes import reuse
from retrofit.runtime.prefixes.pieces import Pieces
from retrofit.runtime.results import Result

FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "qwen3_moe", "deepseek_v3")
WAYS: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "ar", "temperature": 0.8},
    {"strategy": "two_forward"},
    {"strategy": "fused", "tree": 0, "temperature": 0.8},
    {"strategy": "fused", "tree": 9},
    {"strategy": "hybrid"},
    {"strategy": "prompt_lookup"},
    {"mode": "diffusion"},
]
NEW = 11
CHAT = random_prompts((21, 1, 14))
"""What the user adds in each turn."""


def conversation(engine: Engine, keeps: bool, **options: Any) -> list[Result]:
    """Turns that each begin with all turns before; keeps: of one turn for the next."""
    text: list[int] = []
    results = []
    for number, said in enumerate(CHAT):
        if not keeps and engine.prefixes is not None:
            engine.prefixes.clear()
        text = [*text, *said]
        results += engine.generate([text], max_new_tokens=NEW, ignore_eos=True, seed=number, **options)
        text += results[-1].tokens
    return results


@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_reads_what_is_new_in_it_and_answers_the_same(name: str) -> None:
    engine = keeping(name)
    for way in WAYS if name == "llama" else WAYS[4:8:3]:
        want = conversation(engine, keeps=False, **way)
        assert not any(result.stats.reused for result in want)
        with prompt_rows(engine) as rows:
            got = conversation(engine, keeps=True, **way)
        assert [r.tokens for r in got] == [r.tokens for r in want], way
        # All but the last token of an answer is committed, in whole pieces; a first turn that came before is kept too.
        for before, result, ran in zip(got, got[1:], rows[1:], strict=False):
            committed = len(before.prompt) + NEW - 1
            least = (committed - (LAYOUT.block if way.get("mode") == "diffusion" else 0)) // SIZE * SIZE
            assert result.stats.reused >= min(least, (len(result.prompt) - 1) // SIZE * SIZE)
            assert ran == len(result.prompt) - result.stats.reused
        engine.prefixes.clear()
    engine.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_where_prefixes_are_kept_not_a_bit_changes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities are compared as they are; drafts are right on purpose: many are committed at once."""
    engine = randomise(Engine.from_model(build(name).to(torch.bfloat16), layout=LAYOUT))
    if engine.prefixes is None:
        pytest.skip(f"on this machine {reuse.why_not(engine.backend)}")
    engine.prefixes.size = SIZE
    for way in WAYS[3:6]:
        told = {**way, "logprobs": 2}
        plain = {"mode": "ar", **{k: v for k, v in told.items() if k == "temperature"}, "logprobs": 2}
        want = conversation(engine, keeps=False, **plain)
        truth = {number: result.tokens for number, result in enumerate(want)}
        Oracle(truth).plant(monkeypatch)
        got = conversation(engine, keeps=True, **told)  # the first turn is kept, of the last turn before
        assert [(r.tokens, r.logprobs) for r in got] == [(r.tokens, r.logprobs) for r in want], way
        assert all(result.stats.reused for result in got)
        monkeypatch.undo()
    engine.close()


def test_requests_of_one_call_share_how_they_begin() -> None:
    """A system prompt of 20 tokens, five requests of which two run at once; and n outputs of one prompt."""
    engine = keeping("llama")
    system, *rest = random_prompts((20, 3, 9, 1, 5, 12))
    prompts = [[*system, *more] for more in rest]
    want = engine.generate(prompts, "ar", max_new_tokens=6, batch_size=1, original_settings=False)
    engine.prefixes.clear()
    with prompt_rows(engine) as rows:
        got = engine.generate(prompts, "ar", max_new_tokens=6, batch_size=2, original_settings=False)
    assert [r.tokens for r in got] == [r.tokens for r in want]
    assert [r.stats.reused for r in got] == [0, 16, 16, 16, 16]
    assert rows == [23, 13, 5, 9, 16]
    several = engine.generate([prompts[1]], SamplingParams(temperature=0.8, n=3, max_new_tokens=6), "ar")
    assert [r.stats.reused for r in several] == [24, 29, 29]
    engine.close()


def test_a_whole_prompt_that_is_kept_runs_its_last_token() -> None:
    engine, (prompt,) = keeping("llama"), random_prompts((2 * SIZE,))
    first, again = (engine.generate([prompt], "ar", max_new_tokens=4)[0] for _ in range(2))
    assert (first.tokens, first.stats.reused, again.stats.reused) == (again.tokens, 0, SIZE)
    (longer,) = engine.generate([[*prompt, 1]], "ar", max_new_tokens=4)
    assert longer.stats.reused == 2 * SIZE
    engine.close()


def test_prompt_logprobs_are_told_of_every_token() -> None:
    engine, (prompt,) = keeping("llama"), random_prompts((3 * SIZE,))
    first, again = (engine.generate([prompt], prompt_logprobs=1, max_new_tokens=4)[0] for _ in range(2))
    assert again.stats.reused == 0 and first.prompt_logprobs == again.prompt_logprobs
    engine.close()


@pytest.mark.parametrize("restarts", [True, False])
def test_neither_side_of_a_longrope_boundary_serves_the_other(restarts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 positions with the short factors.  Texts that cross it, begin below it, and begin beyond it."""
    engine = keeping("phi3_longrope")
    monkeypatch.setattr(engine.backend, "rope_restarts", restarts)
    (text,) = random_prompts((70,))
    crossing, short, long = text[:20], text[:30], text[:60]
    want = {}
    for prompt in (crossing, short, long):
        engine.prefixes.clear()
        (want[len(prompt)],) = engine.generate([prompt], "ar", max_new_tokens=30)
    for order in ((crossing, short, long), (long, short, crossing)):
        engine.prefixes.clear()
        for prompt in (*order, *order):
            (got,) = engine.generate([prompt], "ar", max_new_tokens=30)
            assert got.tokens == want[len(prompt)].tokens
    full = want[20].prompt + want[20].tokens  # its own text beyond the boundary, as a prompt
    engine.prefixes.clear()
    (fresh,) = engine.generate([full[:45]], "ar", max_new_tokens=5)
    engine.prefixes.clear()
    engine.generate([crossing], "ar", max_new_tokens=30)
    (got,) = engine.generate([full[:45]], "ar", max_new_tokens=5)
    assert (got.tokens, got.stats.reused) == (fresh.tokens, 40 if restarts else 0)
    engine.close()


def test_weights_that_change_under_the_engine_are_noticed() -> None:
    model = build("llama")
    engine = randomise(Engine.from_model(model, layout=LAYOUT, exact="off"))
    engine.backend.hold("invariant", GROUPED, 2)
    engine.prefixes = Pieces(None, SIZE)
    (prompt,) = random_prompts((30,))
    assert [engine.generate([prompt], max_new_tokens=3)[0].stats.reused for _ in range(2)] == [0, 24]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.base_layer.weight.mul_(1.5)
    (changed,) = engine.generate([prompt], max_new_tokens=12)
    engine.prefixes.clear()
    (fresh,) = engine.generate([prompt], max_new_tokens=12)
    assert (changed.stats.reused, changed.tokens) == (0, fresh.tokens)
    engine.backend.hold("invariant", GROUPED, 4)
    assert engine.generate([prompt], max_new_tokens=3)[0].stats.reused == 0
    engine.close()


def test_threads_share_what_is_kept_and_a_small_budget() -> None:
    engine = keeping("llama", budget=12 * 2 * 2 * 2 * 8 * SIZE * 4)
    rng = random.Random(3)
    (base,) = random_prompts((60,))
    asked = [[*base[: rng.randrange(1, 60)], *(rng.randrange(64) for _ in range(5))] for _ in range(12)]
    want = [engine.generate([prompt], "ar", max_new_tokens=8)[0].tokens for prompt in asked]
    wrong: list[Sequence[int]] = []

    def work(seed: int) -> None:
        for n in random.Random(seed).sample(range(len(asked)), len(asked)):
            (got,) = engine.generate([asked[n]], "ar", max_new_tokens=8)
            if got.tokens != want[n]:
                wrong.append(asked[n])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and 0 < engine.prefixes.nbytes <= engine.prefixes.budget
    engine.close()
    assert engine.prefixes.nbytes == 0


def test_the_auditor_sees_every_forward() -> None:
    engine, (prompt,), rows = keeping("llama"), random_prompts((30,)), []
    engine.generate([prompt], max_new_tokens=3)
    with recording(engine, lambda forward: rows.append(len(forward.positions))):
        engine.generate([prompt], "ar", max_new_tokens=3)
    assert rows == [30, 1, 1]
    assert engine.generate([prompt], max_new_tokens=3)[0].stats.reused == 24
    engine.close()


# Where prefixes are kept


def test_only_where_it_is_exact() -> None:
    with Engine.from_model(build("llama")) as engine:
        assert (engine.backend.exact == "off") == (engine.prefixes is None)
    with Engine.from_model(build("llama"), exact="bucket") as engine:
        assert engine.prefixes is None and "bucket" in reuse.why_not(engine.backend)
    with pytest.raises(UsageError, match=r"prefix_cache is 1000000, and at exact=off"):
        Engine.from_model(build("llama"), exact="off", prefix_cache="1MB")
    with Engine.from_model(build("llama"), exact="off", prefix_cache=0) as engine:
        assert engine.prefixes is None


@pytest.mark.parametrize("given", [-1, True, 1.5, "much", "auto ", None])
def test_a_budget_is_a_number_of_bytes(given: Any) -> None:
    with pytest.raises(UsageError, match="prefix_cache"):
        Engine.from_model(build("llama"), prefix_cache=given)


def test_bytes_in_words() -> None:
    given = ("auto", "512MB", "1GiB", 7, "0")
    assert [reuse.check_budget(one) for one in given] == [None, 512_000_000, 1 << 30, 7, 0]


@pytest.mark.parametrize("planted", [lambda rows: rows > 100, lambda rows: rows < 20])
def test_a_machine_on_which_bits_depend_on_the_number_of_rows_keeps_none(
    planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A careless kernel, for many rows or for few."""
    engine = Engine.from_model(build("llama").to(torch.bfloat16))
    if (why := reuse.why_not(engine.backend)) is not None:
        pytest.skip(f"on this machine {why}")
    linear = torch.nn.functional.linear

    def careless(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return linear(x, *rest) * (1 + 2**-6 * planted(x.numel() // x.shape[-1]))

    monkeypatch.setattr(torch.nn.functional, "linear", careless)
    assert "how it is cut" in (reuse.why_not(engine.backend) or "")
    engine.close()


def test_the_rest_of_a_prompt_has_the_rows_that_steps_have() -> None:
    """It may be one token, which must not take a path of its own where prefixes are kept."""
    engine = keeping("llama")
    one = [SequenceRows(0, 5, [1], last_logits_only=True)]
    assert engine.backend.row_plan(one).num_rows == 2
    engine.backend.hold("bucket", GROUPED, 8)
    assert engine.backend.row_plan(one).num_rows == 1
    engine.close()
