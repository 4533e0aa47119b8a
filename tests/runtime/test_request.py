"""A request by itself: where its output ends, its text is cut, and what it counted; worked out by hand."""

from collections.abc import Sequence

import pytest
import torch
from decoding import random_prompts, randomise
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime import engine
from retrofit.runtime.asking import requests_for
from retrofit.runtime.request import Request
from retrofit.runtime.results import Stats
from retrofit.runtime.scheduler import Scheduler
from retrofit.runtime.text import Detokenizer, Text

LETTERS = "abcdefgh "


class Letters(Detokenizer):
    """A letter for each token, none of them special."""

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        return spell(tokens)


def spell(tokens: Sequence[int]) -> str:
    return "".join(LETTERS[t] for t in tokens)


def tokens_of(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def request(stop: tuple[str, ...] = (), most: int = 20, eos: str = "") -> Request:
    return Request(0, tokens_of("hh"), 0, most, frozenset(tokens_of(eos)), Text(Letters(None), stop))


@pytest.mark.parametrize(
    ("stop", "emitted", "text"),
    [
        # both strings are complete with the last token; the text ends before the one that begins first
        (("cd", "abcd"), "abcd", ""),
        (("abcd", "cd"), "abcd", ""),
        (("d", "cd", "bcd"), "abcd", "a"),
        (("ef", "bc"), "abc", "a"),
        (("h", "g"), "abcdefg", "abcdef"),
    ],
)
def test_the_first_of_several_stop_strings_cuts_the_text(stop: tuple[str, ...], emitted: str, text: str) -> None:
    one = request(stop)
    assert one.emit(tokens_of("abcdefgh")) == len(emitted)
    assert (one.finish_reason, spell(one.emitted), one.whole_text(Letters(None))) == ("stop", emitted, text)


def test_a_stop_string_cuts_nothing_unless_it_ended_the_request() -> None:
    one = request(("cd",), eos="d")
    one.emit(tokens_of("abcd"))  # the token that completes it is EOS, which counts first
    assert (one.finish_reason, one.whole_text(Letters(None))) == ("stop", "abcd") and one.stop_reason is None
    one = request(("b",), most=3)
    one.emit(tokens_of("aaa"))
    assert (one.finish_reason, one.whole_text(Letters(None))) == ("length", "aaa")


def test_what_is_emitted_ends_at_the_first_end() -> None:
    for most, eos, taken, reason in ((9, "c", 3, "stop"), (2, "c", 2, "length"), (3, "c", 3, "stop"), (9, "", 4, None)):
        one = request(most=most, eos=eos)
        assert one.emit(tokens_of("abcd")) == taken
        assert (one.finish_reason, one.stats.tokens, one.remaining) == (reason, taken, most - taken)
        assert (one.output_index, one.position) == (taken, 2 + taken - 1)


def test_the_token_of_a_prefill_is_not_counted_but_seen() -> None:
    one = request()
    one.watch(len(LETTERS), torch.device("cpu"))
    one.emit(tokens_of("a"), prefill=True)
    one.emit(tokens_of("bc"))
    assert one.stats.tokens == 2 and one.seen is not None
    assert one.seen.nonzero().flatten().tolist() == tokens_of("abch")


def test_statistics_by_hand() -> None:
    stats = Stats(tokens=12)
    for kind, rows in (("prefill", 30), ("draft", 5), ("fused", 21), ("fused", 9), ("verify", 3), ("ar", 1)):
        stats.count(kind, rows)
    assert stats.forwards == {"prefill": 1, "draft": 1, "fused": 2, "verify": 1, "ar": 1}
    assert (stats.rows, stats.widest) == (39, 21)
    assert stats.decode_forwards == 5
    assert stats.tpf == 12 / 5
    assert stats.tau == 12 / 4, "a drafting forward belongs to the cycle of its drafts"
    assert stats.rows_per_token == 39 / 12
    assert stats.to_dict()["tau"] == 3.0 and stats.to_dict()["rows_per_token"] == 3.25
    assert (Stats().tpf, Stats().tau, Stats().rows_per_token) == (0, 0, 0)


def test_places_are_given_in_order_and_given_again() -> None:
    requests = [request(most=1) for _ in range(4)]
    scheduler = Scheduler(requests, 2)
    assert [r.slot for r in scheduler.admit()] == [0, 1]
    assert scheduler.admit() == []
    requests[0].emit([0])
    assert list(scheduler.retire()) == requests[:1]
    assert [(r.slot, r is requests[2]) for r in scheduler.admit()] == [(0, True)]
    assert len(scheduler.running) == 2


def test_what_a_text_proposes_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of occurrences is many times as large as the text, and a call may have many texts."""
    made: list[Request] = []
    monkeypatch.setattr(engine, "requests_for", lambda *given: made.extend(requests_for(*given)) or made)
    opened = randomise(engine.Engine.from_model(build("llama"), layout=DraftLayout(block=4)))
    looked = []
    for event in opened.stream(random_prompts((5, 9, 7)), strategy="auto", max_new_tokens=6, batch_size=2):
        looked.append(sum(request.lookup is not None for request in made))
        assert event.result is None or made[event.index].lookup is None
    assert max(looked) == 2
    opened.close()
