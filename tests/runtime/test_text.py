"""Text that grows with its tokens is the text of all of them, costs what they cost, and ends where it did.

The specification decodes the whole output after every token; what runs looks at a few tokens each time.
"""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import retrofit
from retrofit.runtime import text as module
from retrofit.runtime.request import Request
from retrofit.runtime.text import WINDOW, Detokenizer, Text

TINY = Path(retrofit.__file__).parent / "recipes" / "tiny"


class Slow:
    """A tokenizer that is not of the library `tokenizers`: the same text, decoded in Python alone."""

    def __init__(self, inner: Any):
        self.inner = inner

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return str(self.inner.decode(list(tokens), **options))


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """The embedded base's: BPE over bytes, with special tokens."""
    return AutoTokenizer.from_pretrained(TINY)


@cache
def sentence_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces are part of the pieces, the first one is taken off, unknown characters are bytes."""
    pieces = [
        "<s>",
        "</s>",
        *(f"<0x{n:02X}>" for n in range(256)),
        "\u2581",
        "\u2581a",
        "b",
        "\u2581the",
        "re",
        "\u6f22",
    ]
    inner = Tokenizer(models.BPE(vocab={piece: n for n, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False)


TOKENIZERS = {
    "bytes": byte_level,
    "bytes, slow": lambda: Slow(byte_level()),
    "pieces": sentence_pieces,
    "pieces, slow": lambda: Slow(sentence_pieces()),
}


def whole(tokenizer: Any, tokens: Sequence[int], special: bool = False) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=not special, clean_up_tokenization_spaces=False))


def random_tokens(tokenizer: Any, rng: random.Random, count: int) -> list[int]:
    """Characters of one to four bytes, whole, cut off and in pieces; special tokens, alone and in a row; any tokens."""
    inner = getattr(tokenizer, "inner", tokenizer)
    if inner is sentence_pieces():
        # A broken character follows none that is whole: that one would be taken back.
        bytes_of = [[2 + byte for byte in character.encode()] + [260] for character in "é漢\U0001f40d"]
        choices = [*bytes_of, [260, 2 + 0xE6], [258], [259], [260], [261], [262], [263], [0], [1, 1]]
        return [token for _ in range(count) for token in rng.choice(choices)][:count]
    special = [t for t in inner.all_special_ids if t is not None]
    found: list[int] = []
    while len(found) < count:
        kind = rng.random()
        if kind < 0.4:
            found += inner(rng.choice(("def f(x):\n", "é漢", "\U0001f40d\U0001f40d", "  a", "naïve")))["input_ids"]
        elif kind < 0.55:
            found += [rng.choice(special)] * rng.choice((1, 1, 3))
        elif kind < 0.7:
            found += inner("漢\U0001f40d")["input_ids"][: rng.randint(1, 4)]
        else:
            found.append(rng.randrange(len(inner)))
    return found[:count]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_growing_text_is_the_whole_text(name: str) -> None:
    """After every token; and what was sent stays, and adds up."""
    tokenizer = TOKENIZERS[name]()
    for trial in range(25):
        tokens = random_tokens(tokenizer, random.Random(trial), 60)
        text, sent = Text(Detokenizer(tokenizer)), ""
        for n, token in enumerate(tokens, 1):
            text.add(token)
            want = whole(tokenizer, tokens[:n])
            assert text.plain.lengths[-1] == len(want), (trial, n)
            sent += text.take()
            assert want.startswith(sent)
            assert len(sent) >= len(want.rstrip("\ufffd")) or name.startswith("pieces")
        assert sent + text.take(want) == want


def specified(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> tuple[int, str]:
    """How many tokens there are until a stop string is complete, and the text before it: the whole text each time."""
    for n in range(1, len(tokens) + 1):
        plain, spelled = (whole(tokenizer, tokens[:n], special) for special in (False, True))
        cuts = [plain[: plain.find(s)] for s in stops if s in plain]
        for s in stops:
            if s not in spelled:
                continue
            end = spelled.find(s)
            before = max(m for m in range(n + 1) if len(whole(tokenizer, tokens[:m], True)) <= end)
            text, more = (whole(tokenizer, tokens[:m]) for m in (before, min(before + 1, n)))
            more_spelled = len(whole(tokenizer, tokens[:before], True))
            cuts.append(more[: len(text) + end - more_spelled] if len(more) > len(text) else text)
        if cuts:
            return n, min(cuts, key=len)
    return len(tokens), whole(tokenizer, tokens)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_stop_strings_end_a_text_where_the_whole_text_says(name: str) -> None:
    """Strings cut out of the text anywhere: inside tokens, over their borders, over special tokens."""
    tokenizer = TOKENIZERS[name]()
    ended = 0
    for trial in range(60):
        rng = random.Random(1000 + trial)
        tokens = random_tokens(tokenizer, rng, 30)
        stops = []
        for special in (False, True):
            text = whole(tokenizer, tokens, special)
            begin = rng.randrange(max(1, len(text) - 1))
            stops.append(text[begin : begin + rng.randint(1, 7)])
        stops = [s for s in stops if s.strip("\ufffd")]
        if not stops:
            continue
        count, text = specified(tokenizer, tokens, stops)
        detokenizer = Detokenizer(tokenizer)
        request = Request(0, [0], 0, len(tokens), frozenset(), Text(detokenizer, stops))
        streamed, n = "", 0
        assert request.text is not None
        for token in tokens:
            n += request.emit([token])
            if request.done:
                break
            streamed += request.text.take()
        result = request.whole_text(detokenizer)
        assert (n, result) == (count, text), (trial, stops)
        assert streamed + request.text.take(result) == text
        ended += request.finish_reason == "stop"
        assert (request.stop_reason in stops) == (request.finish_reason == "stop" and request.stop_reason is not None)
    assert ended > 30


class Counting(Detokenizer):
    """Counts the tokens that are given to be decoded."""

    count = 0

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        Counting.count += len(tokens)
        return super().decode(tokens, special)


@pytest.mark.parametrize("kind", ["text", "special", "halves"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_cost_grows_as_the_text_does(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens decoded one way or the other, a token of the output; also where no character ever gets whole."""
    tokenizer = TOKENIZERS[name]()
    steps = 0
    stream = module.DecodeStream

    class Stream:
        """Counts what the stream decodes: its window, up to the last token that gave text."""

        def __init__(self, **options: Any):
            self.inner, self.waiting = stream(**options), 0

        def step(self, backend: Tokenizer, token: int) -> str | None:
            nonlocal steps
            self.waiting += 1
            steps += 2 * self.waiting
            found = self.inner.step(backend, token)
            self.waiting = 1 if found is not None else self.waiting
            return found

    monkeypatch.setattr(module, "DecodeStream", Stream)
    pieces = name.startswith("pieces")
    inner = sentence_pieces() if pieces else byte_level()
    half = 2 + 0xF0 if pieces else inner("\U0001f40d")["input_ids"][0]
    special = 0 if pieces else inner.all_special_ids[0]
    costs = []
    for count in (200, 800):
        tokens = {
            "text": random_tokens(tokenizer, random.Random(3), count),
            "special": [special] * count,
            "halves": [half] * count,
        }[kind]
        Counting.count = steps = 0
        text = Text(Counting(tokenizer), ["\x00no\x00"])
        for token in tokens:
            text.add(token)
            text.take()
        assert len(text.plain.recent) < 50, "old text is not kept"
        costs.append((Counting.count + steps) / count)
    assert costs[1] < 1.2 * costs[0], costs
    assert max(costs) < 12 * WINDOW, "two texts, each decoded with its context and beside it"


def test_a_decoder_that_looks_back_too_far_is_decoded_by_hand() -> None:
    """A run of bytes that was a character and is none any more: the stream gives up, the text goes on."""
    tokens = [2 + byte for byte in "漢".encode()] + [2 + 0xFF, 258]
    text = Text(Detokenizer(sentence_pieces()))
    for token in tokens:
        text.add(token)
    assert text.plain.stream is None
    assert text.plain.lengths[-1] > 0


@pytest.mark.parametrize("name", ["pieces", "pieces, slow"])
def test_a_stop_string_after_a_character_that_was_taken_back(name: str) -> None:
    """A broken character behind a whole one makes the text of all tokens longer than the one that grew."""
    tokenizer = TOKENIZERS[name]()
    detokenizer = Detokenizer(tokenizer)
    broken = [2 + byte for byte in ("é".encode() * 2 + b"\xe6")]
    tokens = [260, *broken, 260, 262, 260]
    request = Request(0, [1], 0, 20, frozenset(), text=Text(detokenizer, ("re",)))
    request.emit(tokens)
    assert request.stop_reason == "re" and request.emitted == tokens[:-1]
    assert request.whole_text(detokenizer) == whole(tokenizer, tokens[:-2])


@pytest.mark.parametrize("name", ["pieces", "pieces, slow"])
def test_a_stream_says_nothing_twice_after_a_character_that_was_taken_back(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    detokenizer = Detokenizer(tokenizer)
    tokens = [260, *(2 + byte for byte in "éé".encode() + b"\xe6"), 260, 262, 262]
    request, sent = Request(0, [1], 0, len(tokens), frozenset(), Text(detokenizer)), ""
    assert request.text is not None
    for token in tokens:
        request.emit([token])
        sent += request.text.take()
    assert sent.endswith("brere")
    assert request.text.take(request.whole_text(detokenizer)) == ""
