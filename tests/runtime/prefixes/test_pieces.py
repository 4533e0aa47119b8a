"""What is kept of texts: each piece once, found by all tokens before its end, the least recently used gone first."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence

import torch

from retrofit.runtime.prefixes.pieces import AUTO_POSITIONS, PIECE, Kept, Pieces

SIZE = 4
EACH = 2 * SIZE * 8
"""Bytes of a piece of `taking`."""


def taking(tokens: Sequence[int]) -> Callable[[int, int], Kept]:
    """K and V that say which text they are of, up to where: each position's is a hash of all tokens before its end."""

    def take(first: int, stop: int) -> Kept:
        told = torch.tensor([hash(tuple(tokens[: n + 1])) for n in range(first, stop)])
        return {0: (told, told.clone())}

    return take


def positions(found: Sequence[Kept]) -> list[int]:
    return [n for kept in found for n in kept[0][0].tolist()]


def is_of(found: Sequence[Kept], tokens: Sequence[int]) -> bool:
    return positions(found) == [hash(tuple(tokens[: n + 1])) for n in range(len(positions(found)))]


def kept_of(pieces: Pieces, tokens: Sequence[int], condition: object = None) -> int:
    found = pieces.find(tokens, condition)
    assert is_of(found, tokens)
    return len(positions(found))


def keep(pieces: Pieces, tokens: Sequence[int], **options: object) -> None:
    pieces.keep(tokens, taking(tokens), **options)  # type: ignore[arg-type]


def test_a_text_finds_what_it_shares_with_any_text_before() -> None:
    """Against a plain list of the texts; tokens of three kinds, so that texts often begin alike."""
    rng, pieces, texts = random.Random(0), Pieces(1 << 20, SIZE), []
    for _ in range(300):
        base = list(rng.choice(texts))[: rng.randrange(20)] if texts else []
        text = [*base, *(rng.randrange(3) for _ in range(rng.randrange(14)))]
        shared = max((common(text, other) // SIZE * SIZE for other in texts), default=0)
        assert kept_of(pieces, text) == shared
        keep(pieces, text)
        texts.append(tuple(text[: len(text) // SIZE * SIZE]))
        assert kept_of(pieces, text) == len(texts[-1])
    distinct = {text[:end] for text in texts for end in range(SIZE, len(text) + 1, SIZE)}
    assert len(pieces) == len(distinct) and pieces.nbytes == EACH * len(distinct)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_the_budget_holds_and_what_is_kept_begins_at_the_beginning() -> None:
    rng, pieces = random.Random(1), Pieces(10 * EACH + 3, SIZE)
    for _ in range(200):
        text = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
        keep(pieces, text)
        kept_of(pieces, [rng.randrange(2) for _ in range(30)])
        assert pieces.nbytes == EACH * len(pieces) <= 10 * EACH
    assert len(pieces) == 10


def test_the_least_recently_used_goes_from_its_end() -> None:
    pieces = Pieces(6 * EACH, SIZE)
    old, new, third = ([n] * 12 for n in range(3))
    keep(pieces, old)
    keep(pieces, new)
    assert kept_of(pieces, old) == 12  # used again, so the other one goes
    keep(pieces, third[:8])
    assert [kept_of(pieces, text) for text in (old, new, third)] == [12, 4, 8]


def test_a_text_beyond_the_budget_is_not_copied_over_and_over() -> None:
    pieces, text, taken = Pieces(2 * EACH, SIZE), list(range(40)), []

    def take(first: int, stop: int) -> Kept:
        taken.append(first)
        return taking(text)(first, stop)

    for end in range(SIZE, len(text), SIZE):
        pieces.keep(text[:end], take, since=end - SIZE)
    assert taken == [0, 4, 8] and kept_of(pieces, text) == 8
    pieces.keep([9, *text], taking([9, *text]))
    assert kept_of(pieces, [9, *text]) == 8 and kept_of(pieces, text) == 0


def test_what_a_layer_has_let_go_of_ends_the_text() -> None:
    pieces, text = Pieces(1 << 20, SIZE), list(range(20))

    def take(first: int, stop: int) -> Kept:
        whole = taking(text)(first, stop)
        return {**whole, 1: tuple(t[1:] for t in whole[0])} if first >= 8 else whole  # type: ignore[dict-item]

    pieces.keep(text, take)
    assert kept_of(pieces, text) == 8


def test_conditions_and_models_do_not_mix() -> None:
    pieces, text = Pieces(1 << 20, SIZE), [1] * 8
    keep(pieces, text, condition=True)
    assert kept_of(pieces, text, True) == 8 and kept_of(pieces, text, False) == 0
    pieces.made_by("a model")
    assert kept_of(pieces, text, True) == 0 and pieces.nbytes == 0
    keep(pieces, text, condition=True)
    pieces.made_by("a model")
    assert kept_of(pieces, text, True) == 8
    pieces.made_by("another")
    assert kept_of(pieces, text, True) == 0
    keep(pieces, text)
    pieces.clear()
    assert len(pieces) == pieces.nbytes == kept_of(pieces, text) == 0


def test_auto_is_so_many_positions() -> None:
    pieces = Pieces()
    keep(pieces, list(range(PIECE)))
    assert pieces.budget == AUTO_POSITIONS * 16


def test_threads_find_what_is_theirs() -> None:
    pieces, wrong = Pieces(20 * EACH, SIZE), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            text = [rng.randrange(2) for _ in range(rng.randrange(24))]
            if not is_of(pieces.find(text), text):
                wrong.append(text)
            keep(pieces, text)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and pieces.nbytes == EACH * len(pieces) <= 20 * EACH
