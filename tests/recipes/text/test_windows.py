"""Windows: documents are cut without loss, at one length or at several mixed, always at the same places."""

from collections import Counter

import pytest

from retrofit.recipes.text.documents import Document
from retrofit.recipes.text.windows import cut, windows

MIX = (8, 8, 32, 128)


def plain(name: str, length: int) -> Document:
    return Document(name, tuple(range(length)), (True,) * length)


def test_windows_are_cut_without_loss_and_numbered():
    document = Document("d", tuple(range(10)), (False,) * 4 + (True,) * 6)
    found = list(windows([document], 4))
    assert [(w.id, w.tokens) for w in found] == [("d#1", (4, 5, 6, 7)), ("d#2", (8, 9))]  # #0 has no response
    whole = list(windows([document], 10))
    assert [(w.id, w.tokens, w.response) for w in whole] == [("d#0", document.tokens, document.response)]
    assert sum((w.tokens for w in windows([plain("p", 9)], 4)), ()) == plain("p", 9).tokens


def test_mixed_windows_are_cut_without_loss_at_lengths_of_the_mix():
    document = plain("p", 1000)
    found = list(cut(document, 128, MIX))
    assert sum((w.tokens for w in found), ()) == document.tokens
    assert [w.id for w in found] == [f"p#{number}" for number in range(len(found))]
    assert {len(w.tokens) for w in found[:-1]} == set(MIX) and len(found[-1].tokens) <= 128


def test_each_length_has_its_share_of_the_windows():
    """A length that is named twice comes twice as often: of windows, and so of draft blocks, not of tokens."""
    lengths = Counter(len(w.tokens) for w in list(cut(plain("p", 200_000), 128, MIX))[:-1])
    count = sum(lengths.values())
    assert [lengths[n] / count for n in (8, 32, 128)] == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_a_cut_depends_on_seed_epoch_and_document_alone():
    one, other = plain("one", 3000), plain("other", 3000)

    def lengths(document: Document, seed: int = 0, epoch: int = 0, beside: tuple[Document, ...] = ()) -> list[int]:
        found = windows([*beside, document], 128, MIX, seed, epoch)
        return [len(w.tokens) for w in found if w.id.startswith(f"{document.id}#")]

    assert lengths(one) == lengths(one, beside=(other,))
    assert len({tuple(lengths(d, s, e)) for d, s, e in ((one, 0, 0), (one, 1, 0), (one, 0, 1), (other, 0, 0))}) == 4
