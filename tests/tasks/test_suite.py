"""The suite over an engine and over the original: the same answers score the same, other answers are seen."""

import json
import re

import pytest
from tiny_conversion import tokenizer
from tiny_models import build
from tokenizers import decoders

from retrofit.errors import UsageError
from retrofit.runtime.engine import Engine
from retrofit.tasks.answering import Asked, EngineAnswers, Likelihood, OriginalAnswers, cut
from retrofit.tasks.items import Item, digest
from retrofit.tasks.suite import NO_CODE, run
from retrofit.tasks.tokens import pair_of, windows

ITEMS = [
    Item("n1", "sums", 1, "number", {"prompt": "two plus two =", "answer": "4", "take": "first", "stop": ["\n"]}),
    Item("n2", "sums", 2, "number", {"prompt": "one plus two =", "answer": "3", "take": "first", "stop": ["\n"]}),
    Item("c1", "cloze", 1, "choice", {"prompt": "the sun is", "options": [" hot", " of"], "answer": 0}),
    Item("c2", "cloze", 1, "choice", {"prompt": "the sea is", "options": [" is", " wet"], "answer": 1}),
    Item("f1", "format", 1, "format", {"prompt": "a,b,c,", "rules": {"lower": True}, "stop": []}),
    Item("p1", "code", 1, "code", {"prompt": "def f(a):\n", "tests": "assert f(2) == 2", "max_new_tokens": 40}),
    Item("t1", "text", 1, "text", {"text": "it was a long day (or so they said), and then came the night."}),
    Item("t2", "text", 1, "text", {"text": "x = x + y\n" * 20}),
]


def letters():
    """One token a letter, and texts without spaces between them."""
    made = tokenizer()
    made.backend_tokenizer.decoder = decoders.Fuse()
    return made


class Scripted:
    """Says what it is told to; likelihoods prefer the option that it is told."""

    def __init__(self, texts, prefers, why_no_likelihood=None):
        self.tokenizer, self.context, self.why_no_likelihood = letters(), 127, why_no_likelihood
        self.said, self.prefers = texts, prefers

    def likelihoods(self, pairs):
        said = [self.tokenizer.decode(pair[1]) for pair in pairs]
        return [Likelihood(-1.0 if text in self.prefers else -2.0, False) for text in said]

    def texts(self, asked):
        return [self.said[self.tokenizer.decode(one.prompt)] for one in asked]


def scripted(number="4", body="    return a\n", prefers=(" hot", " wet"), **options):
    said = {"two plus two =": number, "one plus two =": "3", "a,b,c,": "d", "def f(a):\n": body}
    return Scripted(said, prefers, **options)


@pytest.fixture(scope="module")
def pair():
    model = build("llama").float()
    with Engine.from_model(model, letters(), exact="off") as engine:
        yield engine, OriginalAnswers(model, letters(), engine.limits.context - 1)


def test_by_hand():
    """The original has both sums right and one option of two; the other has one sum, both options, and no code."""
    found = run(
        {"original": scripted(prefers=(" hot", " is")), "other": scripted(number="5", body="    return 3\n")},
        ITEMS[:6], allow_code=True,
    )  # fmt: skip
    sums = found["categories"]["sums"]["accuracy"]["models"]
    assert (sums["original"]["value"], sums["other"]["value"], sums["other"]["delta"]) == (1.0, 0.5, -0.5)
    assert (sums["other"]["only_here"], sums["other"]["only_original"]) == (0, 1)
    assert sums["other"]["same_text"] == 1
    cloze = found["categories"]["cloze"]["accuracy"]["models"]["other"]
    assert (cloze["value"], cloze["delta"], cloze["same_text"]) == (1.0, 0.5, None)
    code = found["categories"]["code"]
    assert (code["parses"]["models"]["other"]["delta"], code["passes"]["models"]["other"]["delta"]) == (0.0, -1.0)
    every = found["categories"]["all"]["accuracy"]["models"]["other"]
    assert every["n"] == 6 and every["original"] == 5 / 6 and every["value"] == 4 / 6
    assert every["mcnemar_p"] == 1.0 and (every["only_here"], every["only_original"]) == (1, 2)
    assert found["skipped"] == []
    rows = {row["id"]: row["results"]["other"] for row in found["items"]}
    assert rows["n1"] == {"scores": {"accuracy": 0.0}, "text": "5"}
    assert rows["c2"]["choice"] == 1 and rows["c2"]["nats"] == [2.0, 1.0]
    assert rows["p1"]["error"] == "AssertionError"


def test_what_was_left_out_is_said():
    long = Item("long", "sums", 1, "number", {"prompt": "a" * 120, "answer": "1", "take": "first", "stop": []})
    models = {"original": scripted(), "fast": scripted(why_no_likelihood="it writes text")}
    found = run(models, [*ITEMS[:6], long])
    assert found["skipped"] == [
        {"what": "item long", "why": "144 tokens, of a context of 127"},
        {"what": "cloze in fast", "why": "it writes text"},
        {"what": "passes of code", "why": NO_CODE},
    ]
    assert set(found["categories"]["cloze"]["accuracy"]["models"]) == {"original"}
    assert set(found["categories"]["code"]) == {"parses"}
    assert (
        found["categories"]["all"]["accuracy"]["models"]["original"]["n"] == 5
    )  # code that was not run solves nothing
    assert found["items_sha256"] == digest([*ITEMS[:6], long]) != digest(ITEMS[:6])


def test_there_must_be_an_original():
    with pytest.raises(UsageError, match="`original`"):
        run({"ar": scripted()}, ITEMS)


def test_every_mode_that_is_lossless_scores_as_the_original_does(pair):
    engine, original = pair
    models = {"original": original, "ar": EngineAnswers(engine, "ar"), "self_spec": EngineAnswers(engine, "self_spec")}
    found = run(models, ITEMS)
    assert "NaN" not in json.dumps(found, allow_nan=False)
    for row in found["items"]:
        own, ar = row["results"]["original"], row["results"]["ar"]
        if row["kind"] in ("choice", "text"):
            assert ar["scores"] == pytest.approx(own["scores"], rel=1e-5)  # fp32: rows are multiplied beside others
            assert ar.get("choice") == own.get("choice")
        else:
            assert ar == own == row["results"]["self_spec"]
    assert found["categories"]["all"]["accuracy"]["models"]["self_spec"]["delta"] == 0.0


def test_an_engine_that_writes_one_token_too_many_is_seen(pair):
    engine, original = pair

    class Lossy(EngineAnswers):
        def texts(self, asked):
            return [text + "a" for text in super().texts(asked)]

    found = run({"original": original, "lossy": Lossy(engine, "ar")}, ITEMS[:2])
    assert found["categories"]["sums"]["accuracy"]["models"]["lossy"]["same_text"] == 0


def test_likelihoods_of_an_engine_are_those_of_one_forward(pair):
    engine, original = pair
    pairs = [pair_of(letters(), "the cat ", "sat on"), ([3], [4]), ([1, 2, 3], list(range(30)))]
    own, theirs = EngineAnswers(engine, "ar").likelihoods(pairs), original.likelihoods(pairs)
    assert [one.total for one in own] == pytest.approx([one.total for one in theirs], rel=1e-5)
    greedy = engine.generate([[1, 2, 3]], mode="ar", max_new_tokens=5)[0].tokens
    for model in (EngineAnswers(engine, "ar"), original):
        assert [one.greedy for one in model.likelihoods([([1, 2, 3], greedy), ([1, 2, 3], [*greedy[:-1], 60])])] == [
            True, False,
        ]  # fmt: skip


def test_windows_hold_each_token_of_a_text_once_and_are_as_long_as_they_may_be():
    tokens = list(range(300))
    cut_up = list(windows(tokens, 7, 100))
    assert [token for _, continuation in cut_up for token in continuation] == tokens
    assert [len(context) + len(continuation) for context, continuation in cut_up] == [100, 100, 100, 100]
    assert [len(context) for context, _ in cut_up] == [1, 1, 1, 97]
    assert all(continuation[0] == context[-1] + 1 for context, continuation in cut_up[1:])


def test_windows_of_short_texts():
    assert list(windows([5, 6], 9, 10)) == [([9], [5, 6])]
    assert list(windows([], 9, 10)) == []
    assert list(windows([1, 2, 3, 4], 0, 3)) == [([0], [1, 2]), ([2], [3, 4])]


def test_a_token_that_spans_context_and_continuation_is_scored():
    def merges(text):
        """A token each letter, but one for `(s`."""
        return {"input_ids": [0 if part == "(s" else ord(part) for part in re.findall(r"\(s|.", text)]}

    assert pair_of(merges, "f(", "self") == ([ord("f")], [0, *map(ord, "elf")])
    assert pair_of(merges, "f", "(x") == ([ord("f")], [ord("("), ord("x")])


def test_text_ends_before_the_first_of_its_stops():
    assert cut("a\nb\n\nc", ["\n\n", "b"]) == "a\n"
    assert cut("abc", []) == cut("abc", ["x"]) == "abc"


def test_an_original_stops_where_an_engine_does(pair):
    engine, original = pair
    asked = [Asked(letters()("the cat")["input_ids"], 40, (stop,)) for stop in "aet"]
    assert original.texts(asked) == EngineAnswers(engine, "ar").texts(asked)
