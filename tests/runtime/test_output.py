"""What a request gets: where it ends, its statistics, its stream.  The same in every mode and strategy."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from decoding import Oracle, random_prompts, randomise, reference_greedy, tokens_of
from tiny_models import build
from transformers import AutoModelForCausalLM, AutoTokenizer

import retrofit
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import SequenceRows
from retrofit.runtime.engine import Engine, Result
from retrofit.runtime.request import Request
from retrofit.runtime.text import Detokenizer, Text

TINY = Path(retrofit.__file__).parent / "recipes" / "tiny"
WAYS: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "self_spec", "strategy": "two_forward"},
    {"mode": "self_spec", "strategy": "fused", "prepare": "all"},
    {"mode": "self_spec", "strategy": "fused", "prepare": 2},
    {"mode": "self_spec", "strategy": "auto"},
    {"mode": "self_spec", "strategy": "prompt_lookup"},
    {"mode": "self_spec", "strategy": "hybrid"},
    {"mode": "self_spec", "strategy": "hybrid", "prepare": "none"},
]
WAY_IDS = ["ar", "two_forward", "fused_all", "fused_2", "auto", "prompt_lookup", "hybrid", "in_turn"]
LENGTHS = (3, 9, 14, 6)
NEW = 16


@lru_cache(maxsize=1)
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS, seed=2)


@lru_cache(maxsize=1)
def free_run() -> list[list[int]]:
    return reference_greedy(build("llama"), prompts(), NEW)


def perfect(monkeypatch: pytest.MonkeyPatch, truth: Sequence[Sequence[int]], vocab: int = 64) -> None:
    """Drafts of request i (seed i) are the truth, so that several tokens come at once."""
    Oracle(dict(enumerate(truth)), mistakes=0.0, vocab=vocab).plant(monkeypatch)


def random_engine(name: str = "llama", eos: int | list[int] | None = None, **layout: Any) -> Engine:
    model = build(name)
    model.generation_config.eos_token_id = eos
    return randomise(Engine.from_model(model, layout=DraftLayout(**{"block": 4, **layout})))


# Where a request ends


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_eos_is_the_last_token(way: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """EOS falls on the first token of one request, into the middle of accepted drafts of others."""
    free = free_run()
    eos = [free[0][0], free[1][6], free[2][9]]
    want = reference_greedy(build("llama"), prompts(), NEW, eos=eos)
    assert want[0] == free[0][:1]
    perfect(monkeypatch, free)
    results = random_engine(eos=eos).generate(prompts(), max_new_tokens=NEW, batch_size=batch, **way)
    assert [r.tokens for r in results] == want
    assert [r.finish_reason for r in results] == ["stop" if set(w) & set(eos) else "length" for w in want]
    for result in results:
        assert not set(result.tokens[:-1]) & set(eos)
        assert result.stats.tokens == len(result.tokens) - 1
        assert sum(result.stats.accepted) <= result.stats.tokens


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_eos_can_be_ignored(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_run()
    perfect(monkeypatch, free)
    engine = random_engine(eos=free[0][2])
    assert tokens_of(engine, prompts(), max_new_tokens=NEW, ignore_eos=True, **way) == free


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("way", [*WAYS, {"mode": "diffusion"}], ids=[*WAY_IDS, "diffusion"])
def test_max_new_tokens_is_exact(way: dict[str, Any], count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_run()
    perfect(monkeypatch, free)
    results = random_engine().generate(prompts(), max_new_tokens=count, batch_size=3, **way)
    assert [len(r.tokens) for r in results] == [count] * len(results)
    assert {r.finish_reason for r in results} == {"length"}
    if way["mode"] != "diffusion":
        assert [r.tokens for r in results] == [tokens[:count] for tokens in free]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_diffusion_ends_at_eos(threshold: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "threshold": threshold}
    free = tokens_of(random_engine(), prompts(), "diffusion", **options)
    eos = free[0][7]
    for want, result in zip(free, random_engine(eos=eos).generate(prompts(), "diffusion", **options), strict=True):
        end = want.index(eos) + 1 if eos in want else len(want)
        assert result.finish_reason == ("stop" if eos in want else "length")
        assert result.tokens == want[:end]


# Statistics


def test_statistics_of_perfect_two_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 by prefill, then twice: a draft forward emits 1, a verify forward 4 + 1."""
    perfect(monkeypatch, free_run())
    (result,) = random_engine().generate(prompts()[:1], "self_spec", strategy="two_forward", max_new_tokens=13)
    stats = result.stats
    assert stats.forwards == {"prefill": 1, "draft": 2, "verify": 2}
    assert (stats.tokens, stats.accepted, stats.verified) == (12, [4, 4], [4, 4])
    assert stats.rows == 2 * (1 + 4) + 2 * (1 + 4)
    assert (stats.tpf, stats.tau, stats.rows_per_token) == (12 / 4, 12 / 2, 20 / 12)


def test_statistics_of_perfect_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 by prefill, 1 by the draft forward, then 4 + 1 twice; the last forward prepares only what is still of use."""
    perfect(monkeypatch, free_run())
    (result,) = random_engine().generate(prompts()[:1], "self_spec", strategy="fused", max_new_tokens=12)
    stats = result.stats
    assert stats.forwards == {"prefill": 1, "draft": 1, "fused": 2}
    assert (stats.tokens, stats.accepted, stats.verified) == (11, [4, 4], [4, 4])
    # 5 tokens are left at the last: after j accepted, j + 1 are emitted and 2 must remain, so j = 0, 1, 2.
    assert stats.rows == (1 + 4) + (5 + 5 * 4) + (5 + 3 * 4)
    assert (stats.tpf, stats.tau) == (11 / 3, 11 / 2)


def test_statistics_of_ar() -> None:
    (result,) = random_engine().generate(prompts()[:1], "ar", max_new_tokens=9)
    assert result.stats.forwards == {"prefill": 1, "ar": 8}
    assert (result.stats.tokens, result.stats.rows, result.stats.tpf, result.stats.tau) == (8, 8, 1, 1)


def test_prompts_are_prefilled_in_pieces_of_so_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts of 32 tokens in all, at most eight rows a forward; one that does not fit whole waits; then a row of
    each."""
    engine, rows = random_engine(), []
    monkeypatch.setattr(engine.backend, "prefill_rows", 8)
    plan = engine.backend.row_plan

    def recorded(sequences: Sequence[SequenceRows], *rest: Any) -> Any:
        rows.append(sum(len(sequence.tokens) for sequence in sequences))
        return plan(sequences, *rest)

    monkeypatch.setattr(engine.backend, "row_plan", recorded)
    assert tokens_of(engine, prompts(), "ar", max_new_tokens=2, batch_size=4) == [t[:2] for t in free_run()]
    assert max(rows) == 8 and sum(rows[:-1]) == 32 and rows[-1] == 4


def test_a_sequence_run_again_at_a_longrope_boundary_counts_as_decoding() -> None:
    """32 positions with the short factors; the token that crosses them comes of a forward over the whole sequence."""
    (prompt,) = random_prompts((27,))
    (result,) = random_engine("phi3_longrope").generate([prompt], "ar", max_new_tokens=12)
    stats = result.stats
    assert (stats.forwards, stats.tpf, stats.tau) == ({"prefill": 1, "ar": 11}, 1.0, 1.0)
    assert stats.rows == stats.widest + 10 and stats.widest == 33


def test_statistics_of_diffusion_count_denoise_and_commit_forwards() -> None:
    """The first commit is of the seed alone; on each hangs a block of 4 whose 4 tokens the next commits at once."""

    def decoded(engine: Engine, most: int, threshold: float = 0.0) -> Result:
        options: dict[str, Any] = {"max_new_tokens": most, "threshold": threshold, "tolerance": float("inf")}
        return engine.generate(prompts()[:1], "diffusion", **options)[0]

    result = decoded(random_engine(), 12)
    assert result.stats.forwards == {"prefill": 1, "commit": 3}
    assert (result.stats.tokens, result.stats.rows) == (11, (1 + 4) + (5 + 4) + 5)
    # 11 tokens: of the last block 4 exhaust the budget, and owe no commit
    assert decoded(random_engine(), 11).stats.forwards == {"prefill": 1, "commit": 2}
    # Confidence above 1 is never reached: every token is the base's
    result = decoded(random_engine(), 9, 1.0)
    assert result.stats.forwards == {"prefill": 1, "commit": 8} and result.tokens == free_run()[0][:9]
    # Where the seed is a draft row no block hangs on a commit
    result = decoded(random_engine(seed_row="draft"), 12)
    assert result.stats.forwards == {"prefill": 1, "denoise": 2, "commit": 3}
    assert (result.stats.tokens, result.stats.rows) == (11, 2 * 4 + 2 * 5 + 1)


def test_statistics_of_diffusion_whose_tokens_the_base_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block hangs on each end that a commit may have, as long as two tokens remain after it."""
    perfect(monkeypatch, free_run())
    (result,) = random_engine().generate(prompts()[:1], "diffusion", tolerance=0.0, max_new_tokens=12)
    assert result.tokens == free_run()[0][:12]
    assert result.stats.forwards == {"prefill": 1, "commit": 3}
    assert result.stats.rows == (1 + 4) + (5 + 5 * 4) + (5 + 3 * 4)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("way", [*WAYS, {"mode": "diffusion"}], ids=[*WAY_IDS, "diffusion"])
def test_every_forward_is_counted_and_nothing_committed_runs_again(
    way: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = random_engine()
    Oracle(dict(enumerate(free_run())), mistakes=0.3).plant(monkeypatch)
    plans: list[list[SequenceRows]] = []
    begin_run = engine._loop

    def loop(*rest: Any) -> Any:  # the trials of `auto`, which belong to nobody, have run by then
        plan = engine.backend.row_plan

        def recorded(sequences: list[SequenceRows]) -> Any:
            plans.append(sequences)
            return plan(sequences)

        monkeypatch.setattr(engine.backend, "row_plan", recorded)
        return begin_run(*rest)

    monkeypatch.setattr(engine, "_loop", loop)
    results = engine.generate(prompts(), max_new_tokens=NEW, batch_size=batch, **way)
    counted = sum(sum(r.stats.forwards.values()) for r in results)
    assert counted == sum(len(plan) for plan in plans)
    rows = sum(len(s.tokens) + sum(len(b.inputs) for b in s.blocks) for plan in plans for s in plan)
    assert sum(r.stats.rows for r in results) + sum(len(r.prompt) for r in results) == rows
    ways_to_verify = ("verify", "fused")
    for r in results:
        assert r.stats.tokens == len(r.tokens) - 1 == NEW - 1
        cycles = sum(r.stats.forwards.get(kind, 0) for kind in ways_to_verify)
        assert len(r.stats.accepted) == len(r.stats.verified) == cycles
        assert all(0 <= a <= v for a, v in zip(r.stats.accepted, r.stats.verified, strict=True))
        if way["mode"] == "self_spec":
            emitting = r.stats.decode_forwards
            assert sum(r.stats.accepted) + emitting >= r.stats.tokens
    if batch == 1:  # one request after another: each starts its base rows where it stopped emitting
        for r in results:
            committed = 0
            while committed < len(r.prompt) + NEW - 1 and plans:
                (rows_of_step,) = plans.pop(0)
                assert rows_of_step.start == committed
                text = [*r.prompt, *r.tokens]
                # The seed and the drafts that agree with the text become the committed prefix.
                row: int | None = -1
                follows = list(zip(rows_of_step.follows, rows_of_step.tokens, strict=True))
                while row is not None and committed < len(text):
                    row = next((j for j, found in enumerate(follows) if found == (row, text[committed])), None)
                    committed += row is not None
                if committed >= len(text) - 1 or (plans and plans[0][0].start == 0):
                    break


# Streaming and text


@lru_cache(maxsize=1)
def tiny_base() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype="float32"), AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def tiny() -> Any:
    model, tokenizer = tiny_base()
    engine = Engine.from_model(model, tokenizer, layout=DraftLayout(block=4))
    yield engine
    engine.close()


TEXTS = ["import os\n\ndef read(path):\n    ", "# Größe: naïve 漢字 → \U0001f40d\nx = '"]


@pytest.fixture(scope="module")
def tiny_free(tiny: Engine) -> list[Result]:
    return tiny.generate(TEXTS, "ar", max_new_tokens=40, ignore_eos=True)


@pytest.mark.parametrize(
    "way",
    [WAYS[0], WAYS[1], WAYS[2], {"mode": "diffusion", "threshold": 0.3}],
    ids=["ar", "two_forward", "fused", "diffusion"],
)
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_stream_adds_up_to_generate(
    way: dict[str, Any], temperature: float, tiny: Engine, tiny_free: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**way, "max_new_tokens": 24, "temperature": temperature, "batch_size": 2}
    if way["mode"] == "self_spec":
        truth = [r.tokens for r in tiny.generate(TEXTS, "ar", max_new_tokens=24, temperature=temperature)]
        perfect(monkeypatch, truth, len(tiny.tokenizer))
    whole = tiny.generate(TEXTS, **options)
    texts, tokens = ["", ""], [[], []]
    ends = [0, 0]
    for event in tiny.stream(TEXTS, **options):
        assert not ends[event.index], "an event after the last"
        texts[event.index] += event.text
        tokens[event.index] += event.tokens
        if event.result is not None:
            ends[event.index] += 1
            assert event.result.text == whole[event.index].text
    assert ends == [1, 1]
    assert texts == [r.text for r in whole]
    assert tokens == [r.tokens for r in whole]


def border_strings(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Strings that begin inside one token and end inside the next, and stand nowhere before."""
    found = []
    for n in range(2, len(tokens)):
        before, text = (tokenizer.decode(tokens[:m]) for m in (n - 1, n))
        piece = text[len(before) - 1 : len(before) + 1]
        if text.startswith(before) and len(piece) == 2 and piece not in text[: len(before)] and piece not in before:
            found.append(piece)
    return found


@pytest.mark.parametrize("way", WAYS[:4], ids=WAY_IDS[:4])
def test_stop_strings_across_token_borders(
    way: dict[str, Any], tiny: Engine, tiny_free: list[Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tiny_free[0]
    perfect(monkeypatch, [free.tokens], len(tiny.tokenizer))
    stops = border_strings(tiny.tokenizer, free.tokens)
    assert len(stops) >= 3
    for stop in (stops[0], stops[len(stops) // 2], stops[-1]):
        completes = next(n for n in range(41) if stop in tiny.tokenizer.decode(free.tokens[:n]))
        (result,) = tiny.generate(TEXTS[:1], max_new_tokens=40, ignore_eos=True, stop=["\x00never", stop], **way)
        assert result.finish_reason == "stop"
        assert result.tokens == free.tokens[:completes]
        assert result.text == free.text[: free.text.index(stop)]
        assert result.stats.tokens == completes - 1
        events = list(tiny.stream(TEXTS[:1], max_new_tokens=40, ignore_eos=True, stop=stop, **way))
        assert "".join(e.text for e in events) == result.text


def test_a_stop_string_that_does_not_come_changes_nothing(tiny: Engine, tiny_free: list[Result]) -> None:
    half = tiny_free[0].text[-6:] + "\x00"
    (result,) = tiny.generate(TEXTS[:1], "ar", max_new_tokens=40, ignore_eos=True, stop=half)
    assert (result.tokens, result.text, result.finish_reason) == (
        tiny_free[0].tokens,
        tiny_free[0].text,
        "length",
    )
    events = tiny.stream(TEXTS[:1], "ar", max_new_tokens=40, ignore_eos=True, stop=half)
    assert "".join(e.text for e in events) == tiny_free[0].text


class Bytes(Detokenizer):
    """A byte for each token."""

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        return bytes(tokens).decode(errors="replace")


@pytest.mark.parametrize("stop", [(), ("漢!",), ("zz", "é漢?")])
def test_streamed_text_is_never_taken_back(stop: tuple[str, ...]) -> None:
    """One byte a token: no half character goes out, and no beginning of what may become a stop string."""
    text = "aé漢zé漢\U0001f40dz"
    one = Text(Bytes(None), stop)
    request = Request(0, [0], 0, 99, frozenset(), one)
    sent = ""
    for byte in text.encode():
        request.emit([byte])
        stable = sent + one.take()
        assert text.startswith(stable) and stable.startswith(sent)
        whole = request.whole_text(Bytes(None))
        open_ends = [n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n])]
        assert len(stable) <= len(whole) - max(open_ends, default=0)
        sent = stable
    assert request.whole_text(Bytes(None)) == text
