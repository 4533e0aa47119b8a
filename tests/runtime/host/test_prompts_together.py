"""Which prompts share a forward: those that fit beside the first, but for those that can copy what it computes."""

from __future__ import annotations

import pytest
from decoding import random_prompts
from keeping import SIZE, keeping, prompt_rows

from retrofit.runtime.engine import Engine
from retrofit.runtime.results import Result

GREEDY = {"mode": "ar", "max_new_tokens": 5, "original_settings": False, "ignore_eos": True}


def sharing(rows: int = 256) -> Engine:
    """Forwards of prompts have so many rows at most."""
    engine = keeping("llama")
    engine.backend.prefill_alone, engine.backend.prefill_rows = False, rows
    return engine


def both(engine: Engine, prompts: list[list[int]], batch: int = 8) -> tuple[list[Result], list[int]]:
    """Results of prompts that share forwards, and the rows of each forward; the texts are those without."""
    engine.backend.prefill_alone = True
    want = engine.generate(prompts, batch_size=1, **GREEDY)
    engine.backend.prefill_alone = False
    if engine.prefixes is not None:
        engine.prefixes.clear()
    with prompt_rows(engine) as rows:
        got = engine.generate(prompts, batch_size=batch, **GREEDY)
    assert [r.tokens for r in got] == [r.tokens for r in want]
    return got, rows


def test_prompts_of_different_beginnings_run_at_once() -> None:
    engine = sharing()
    _, rows = both(engine, random_prompts((20, 3, 9, 31)))
    assert rows == [63]


def test_what_several_prompts_begin_with_runs_once_and_then_they_run_together() -> None:
    """A system prompt of 20 tokens, two whole pieces; the second prompt is the piece more that the last one has too."""
    engine = sharing()
    system, *rest = random_prompts((20, 3, 12, 1, 5))
    prompts = [[*system, *more] for more in rest]
    prompts.append([*prompts[1][: 3 * SIZE], 7])
    other = random_prompts((6,), seed=5)
    got, rows = both(engine, [*prompts, *other])
    assert [r.stats.reused for r in got] == [0, 16, 16, 16, 24, 0]
    # The first and the one that begins otherwise; what is behind 16 positions; what the last one waited for.
    assert rows == [23 + 6, (32 - 16) + (21 - 16) + (25 - 16), 25 - 24]


def test_equal_prompts_run_once_but_for_the_last_token() -> None:
    engine = sharing()
    (prompt,) = random_prompts((2 * SIZE + 1,))
    got, rows = both(engine, [prompt] * 4)
    assert [r.stats.reused for r in got] == [0, 16, 16, 16] and rows == [17, 3]


def test_a_prompt_is_cut_where_it_would_be_alone() -> None:
    """10 rows a forward: one that fits nowhere waits, shorter ones behind it go first."""
    engine = sharing(rows=10)
    _, rows = both(engine, random_prompts((7, 24, 2, 5, 1)))
    assert rows == [7 + 2 + 1, 10, 10, 4 + 5]


def test_a_prompt_that_is_told_waits_for_none() -> None:
    engine = sharing()
    system, *rest = random_prompts((20, 3, 9))
    prompts = [[*system, *more] for more in rest]
    with prompt_rows(engine) as rows:
        engine.generate(prompts, prompt_logprobs=1, **GREEDY)
    assert rows == [23 + 29]


@pytest.mark.parametrize("budget", [1, None])
def test_where_nothing_stays_kept_all_run(budget: int | None) -> None:
    engine = sharing()
    assert engine.prefixes is not None
    if budget is None:
        engine.prefixes = None
    else:
        engine.prefixes.budget = budget
    system, *rest = random_prompts((20, 3, 9, 4))
    _, rows = both(engine, [[*system, *more] for more in rest])
    assert rows == ([23 + 29 + 24] if budget is None else [23, 29, 24])
